// How the 32-bit counters of a thread are added to the caller's tables.
#pragma once
#include <cstring>

#include "../numeric.h"

// Calls add(i, count) for each counter of `from` that is not zero and clears it; most of a table is never touched.
// `bins` is a multiple of 64.
template <class Add>
void drain(opd_u32* from, int bins, Add add) {
  for (int i = 0; i < bins; i += 64) {
    opd_u32 any = 0;
    for (int j = i; j < i + 64; j++) any |= from[j];
    if (!any) continue;
    for (int j = i; j < i + 64; j++)
      if (from[j]) add(j, from[j]);
    std::memset(from + i, 0, 256);
  }
}
