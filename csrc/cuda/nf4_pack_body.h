// What one thread of the kernels that pack NF4 and nest its scales does, in phases between which threads exchange
// values. The kernels and the tests' emulation of them on the host run these same functions. The definition is
// fastpt/ops/nf4.py.
#pragma once

#include "common/dynamic_map.h"
#include "cuda/nf4.h"
#include "cuda/words.h"

namespace fastpt::cuda {

constexpr int kNf4Sharers = kNf4Block / kGroup;  // neighbours whose values are one block

struct Nf4PackThread {
  Group groups[kNf4PackGroups];
  uint32_t largest[kNf4PackGroups];  // of its magnitudes, as bits; then of all the sharers'
};

// Of the first value of group g: a warp's groups are neighbours, so that its accesses are one piece.
FASTPT_FORMULA int64_t nf4_pack_place(int64_t program, int thread, int g) {
  return program * kNf4PackValues + (g * kThreads + thread) * kGroup;
}

FASTPT_FORMULA int nf4_pack_count(const Nf4PackTask& task, int64_t first) {
  const int64_t left = task.size - first;
  return left >= kGroup ? kGroup : left > 0 ? static_cast<int>(left) : 0;
}

// Phase 1: all values are loaded.
FASTPT_FORMULA void nf4_pack_load(const Nf4PackTask& task, int64_t program, int thread, Nf4PackThread& own) {
  FASTPT_UNROLL
  for (int g = 0; g < kNf4PackGroups; ++g) {
    const int64_t first = nf4_pack_place(program, thread, g);
    const int count = nf4_pack_count(task, first);
    own.groups[g] = load_group(task.values, task.type, first, count, count == kGroup && task.is_aligned != 0);
  }
  FASTPT_UNROLL
  for (int g = 0; g < kNf4PackGroups; ++g) {
    own.largest[g] = 0;
    FASTPT_UNROLL
    for (int i = 0; i < kGroup; ++i) {
      const uint32_t bits = magnitude_bits(own.groups[g].value(i, task.type));
      own.largest[g] = bits > own.largest[g] ? bits : own.largest[g];
    }
  }
}

// Phase 2, with the largest magnitudes of the sharers. A value that is not there is packed as 0.
FASTPT_FORMULA void nf4_pack_store(const Nf4PackTask& task, int64_t program, int thread, const Nf4PackThread& own) {
  FASTPT_UNROLL
  for (int g = 0; g < kNf4PackGroups; ++g) {
    const int64_t first = nf4_pack_place(program, thread, g), block = first / kNf4Block;
    const int count = nf4_pack_count(task, first);
    if (count == 0) return;
    const Nf4Divisor by = nf4_divisor(float_of_bits(own.largest[g]), (block + 1) * kNf4Block <= task.size);
    uint32_t word = 0;
    FASTPT_UNROLL
    for (int i = 0; i < kGroup; ++i) {
      const uint32_t code = i < count ? by.code(own.groups[g].value(i, task.type)) : nf4_code(0.0f);
      word |= code << (i / 2 * 8 + (i % 2 == 0 ? 4 : 0));
    }
    uint8_t* to = task.packed + first / 2;
    count_stored((count + 1) / 2);
    if (count == kGroup && task.is_aligned != 0) {
      assume_global(to);
      *reinterpret_cast<uint32_t*>(to) = word;
    } else {
      FASTPT_UNROLL
      for (int i = 0; i < kGroup / 2; ++i)
        if (2 * i < count) to[i] = static_cast<uint8_t>(word >> (8 * i));
    }
    if (thread % kNf4Sharers == 0) {
      count_stored(4);
      task.absmax[block] = by.stored();
    }
  }
}

// The scales that share one, and the map.
struct Nf4NestShared {
  float magnitudes[kThreads];
  float map[kThreads];
};

FASTPT_FORMULA float nf4_centred(const Nf4NestTask& task, int64_t scale) {
  return task.absmax[scale] - task.nested[kNf4MapSize];
}

FASTPT_FORMULA void nf4_nest_load(const Nf4NestTask& task, int64_t program, int thread, Nf4NestShared& shared) {
  const int64_t scale = program * kThreads + thread;
  shared.magnitudes[thread] = scale < task.size ? __builtin_fabsf(nf4_centred(task, scale)) : 0.0f;
  shared.map[thread] = task.nested[thread];
}

FASTPT_FORMULA void nf4_nest_store(const Nf4NestTask& task, int64_t program, int thread, const Nf4NestShared& shared) {
  float most = 0.0f;  // no NaN counts
  for (int i = 0; i < kThreads; ++i) most = shared.magnitudes[i] > most ? shared.magnitudes[i] : most;
  const int64_t scale = program * kThreads + thread;
  if (scale < task.size) task.codes[scale] = nf4_nested_code(nf4_centred(task, scale), most, shared.map);
  if (thread == 0) task.nested[kNf4MapSize + 1 + program] = most;
}

}  // namespace fastpt::cuda
