// What one thread of the NF4 kernel does. The kernel and the tests' emulation of it on the host run these same
// functions. The definition is fastpt/ops/nf4.py.
#pragma once

#include "cuda/nf4.h"
#include "cuda/words.h"

namespace fastpt::cuda {

constexpr int kNf4Codes = 16;

// Of the first value of group g: neighbours in a warp unpack neighbouring groups, so that its accesses are one piece.
FASTPT_FORMULA int64_t nf4_place(int64_t program, int thread, int g) {
  return (program * kNf4Groups + g) * kThreads * kGroup + static_cast<int64_t>(thread) * kGroup;
}

FASTPT_FORMULA int nf4_count(const Nf4Task& task, int64_t first) {
  const int64_t left = task.size - first;
  return left >= kGroup ? kGroup : left > 0 ? static_cast<int>(left) : 0;
}

// The bytes of up to eight values, the first in the lowest byte.
FASTPT_FORMULA uint32_t nf4_load(const Nf4Task& task, int64_t first, int count) {
  const uint8_t* from = task.packed + first / 2;
  if (count == kGroup && task.is_aligned != 0) {
    assume_global(from);
    return *reinterpret_cast<const uint32_t*>(from);
  }
  uint32_t word = 0;
  FASTPT_UNROLL
  for (int i = 0; i < kGroup / 2; ++i)
    if (2 * i < count) word |= static_cast<uint32_t>(from[i]) << (8 * i);
  return word;
}

// Those values, by `numbers`, NF4's 16, and the scale of their block.
FASTPT_FORMULA void nf4_store(const Nf4Task& task, const float* numbers, int64_t first, int count, uint32_t word,
                              float scale) {
  Group group{};
  FASTPT_UNROLL
  for (int i = 0; i < kGroup; ++i) {
    const uint32_t code = (word >> (i / 2 * 8 + (i % 2 == 0 ? 4 : 0))) & 15u;
    group.put(i, task.type, numbers[code] * scale);
  }
  store_group(task.out, task.type, first, count, count == kGroup && task.is_aligned != 0, group);
}

struct Nf4Thread {
  uint32_t words[kNf4Groups];
  float scales[kNf4Groups];  // all loaded before the first store, which no load may pass
};

FASTPT_FORMULA void nf4_load_all(const Nf4Task& task, int64_t program, int thread, Nf4Thread& own) {
  FASTPT_UNROLL
  for (int g = 0; g < kNf4Groups; ++g) {
    const int64_t first = nf4_place(program, thread, g);
    const int count = nf4_count(task, first);
    own.words[g] = count > 0 ? nf4_load(task, first, count) : 0;
    own.scales[g] = count > 0 ? nf4_scale(task.scales, first / kNf4Block) : 0.0f;
  }
}

FASTPT_FORMULA void nf4_store_all(const Nf4Task& task, const float* numbers, int64_t program, int thread,
                                  const Nf4Thread& own) {
  FASTPT_UNROLL
  for (int g = 0; g < kNf4Groups; ++g) {
    const int64_t first = nf4_place(program, thread, g);
    const int count = nf4_count(task, first);
    if (count > 0) nf4_store(task, numbers, first, count, own.words[g], own.scales[g]);
  }
}

}  // namespace fastpt::cuda
