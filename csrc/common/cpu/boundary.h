// C functions that Python calls through ctypes (opdkernels/native.py). Each returns a Status; after an error,
// opd_error_message says what is wrong. Arguments are addresses and 64-bit integers. Python validates the tensors;
// these functions refuse what no kernel can serve, whoever calls.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <new>
#include <stdexcept>

#include "../numeric.h"
#include "parallel.h"

// Python loads a library only if this number is that of opdkernels/native.py: increase both with any change of a
// function.
#define OPD_INTERFACE 4
#define OPD_EXPORT extern "C" __attribute__((visibility("default")))

enum Status { STATUS_DONE, STATUS_INVALID, STATUS_NO_MEMORY, STATUS_FAILED };  // ERRORS in opdkernels/native.py

// Keeps the message for this thread and returns the status.
int set_error(Status status, const char* message);

// Calls body() and returns DONE, or what it threw as a status. Subnormals are kept in it, as in the threads of kernels.
template <class Body>
int guarded(Body body) {
  KeepSubnormals keep;
  try {
    body();
    return STATUS_DONE;
  } catch (const std::invalid_argument& error) {
    return set_error(STATUS_INVALID, error.what());
  } catch (const std::bad_alloc&) {
    return set_error(STATUS_NO_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return set_error(STATUS_FAILED, error.what());
  }
}

inline void require(bool holds, const char* requirement) {
  if (!holds) throw std::invalid_argument(requirement);
}
inline void require_dtypes(int64_t base, int64_t trained) {
  require(base >= BF16 && base <= FP64 && trained >= BF16 && trained <= FP64, "dtypes must be codes of enum Dtype");
}
inline void require_aligned(const void* address, int64_t bytes) {
  require((uintptr_t)address % (uintptr_t)bytes == 0, "addresses must be multiples of the size of an element");
}
inline void require_size(int64_t n, bool has_inputs) {
  require(n >= 0 && (n == 0 || has_inputs), "sizes must not be negative, addresses not null");
}
inline int narrow(int64_t value) {
  require(value >= INT32_MIN && value <= INT32_MAX, "an integer has more than 32 bits");
  return (int)value;
}
