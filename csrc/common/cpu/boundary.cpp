#include "boundary.h"

#include <string>

#include "dispatch.h"
#include "mapped.h"

namespace {
thread_local std::string last_error, names;
}

int set_error(Status status, const char* message) {
  last_error = message;
  return status;
}

OPD_EXPORT const char* opd_error_message() { return last_error.c_str(); }
OPD_EXPORT int opd_interface() { return OPD_INTERFACE; }

OPD_EXPORT const char* opd_compiler() {
#ifdef __VERSION__
  return __VERSION__;
#else
  return "unknown";
#endif
}
OPD_EXPORT int opd_openmp() {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}

// Names are valid until the next call of this thread. `available`: with commas between them.
OPD_EXPORT int opd_available_isas(const char** available) {
  return guarded([&] {
    names.clear();
    for (const std::string& name : available_isas()) names += (names.empty() ? "" : ",") + name;
    *available = names.c_str();
  });
}
OPD_EXPORT int opd_current_isa(const char** name) {
  return guarded([&] {
    names = current_isa();
    *name = names.c_str();
  });
}
OPD_EXPORT int opd_use_isa(const char* name) {
  return guarded([&] { use_isa(name); });
}

OPD_EXPORT int opd_guard_mapping(uintptr_t address, int64_t nbytes, int64_t* handle) {
  return guarded([&] { *handle = guard_mapping(address, nbytes); });
}
OPD_EXPORT int64_t opd_mapping_faults(int64_t handle) { return mapping_faults(handle); }
OPD_EXPORT void opd_unguard_mapping(int64_t handle) { unguard_mapping(handle); }
