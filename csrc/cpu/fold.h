// How a thread's 32-bit counters join the caller's tables.
#pragma once
#include <cstring>

#include "../numeric.h"

// Calls add(i, count) for each counter of `from` that is not zero and clears it; most 64-byte lines are never touched.
template <class Add>
void drain(opd_u32* from, int bins, Add add) {
  for (int i = 0; i < bins; i += 16) {
    opd_u64 any[8];
    std::memcpy(any, from + i, 64);
    if (!(any[0] | any[1] | any[2] | any[3] | any[4] | any[5] | any[6] | any[7])) continue;
    for (int j = i; j < i + 16; j++)
      if (from[j]) add(j, from[j]);
    std::memset(from + i, 0, 64);
  }
}
