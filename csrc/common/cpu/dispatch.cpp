// Which instruction set is used: what the processor reports, or what the user names.
#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

#include "kernels.h"

namespace {
std::vector<std::string> find_available() {
  std::vector<std::string> names{"baseline"};
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();  // includes whether the operating system saves the wide registers
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2"))
    return names;
  names.push_back("avx2");
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") &&
      __builtin_cpu_supports("avx512vbmi2"))
    names.push_back("avx512");
#endif
  return names;
}

const std::vector<std::string>& available() {
  static const std::vector<std::string> names = find_available();
  return names;
}

int index_of(const std::string& name) {
  std::string have;
  for (size_t i = 0; i < available().size(); i++) {
    if (available()[i] == name) return (int)i;
    have += (have.empty() ? "" : ", ") + available()[i];
  }
  throw std::invalid_argument("instruction set " + name + " is not available here; choose one of " + have);
}

int& current() {
  static int index = [] {
    const char* wanted = std::getenv("OPDKERNELS_ISA");
    return wanted && *wanted ? index_of(wanted) : (int)available().size() - 1;
  }();
  return index;
}
}  // namespace

std::vector<std::string> available_isas() { return available(); }
std::string current_isa() { return available()[(size_t)current()]; }
void use_isa(const std::string& name) { current() = index_of(name); }
int current_isa_index() { return current(); }
