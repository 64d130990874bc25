// Mapped files that are truncated while open. Touching a page beyond the new end raises SIGBUS, which kills the
// process; inside a guarded range the page is replaced by zeros and the fault counted, so that the reader can report
// it.
#pragma once
#include <cstdint>

// Returns a handle; throws std::runtime_error if all slots are taken.
int64_t guard_mapping(uintptr_t address, int64_t nbytes);
int64_t mapping_faults(int64_t handle);
void unguard_mapping(int64_t handle);
