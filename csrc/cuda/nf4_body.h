// What one thread of the kernel that unpacks NF4 does, in two phases around a barrier. The kernel and the tests'
// emulation of it on the host run these same functions. The definition is fastpt/ops/nf4.py.
#pragma once

#include "cuda/nf4.h"
#include "cuda/words.h"

namespace fastpt::cuda {

constexpr int kNf4Codes = 16;
constexpr int kNf4PieceValues = 32;  // in 16 bytes
constexpr int kNf4Pieces = kNf4ProgramValues / kThreads / kNf4PieceValues;
constexpr int kNf4Groups = kNf4ProgramValues / kThreads / kGroup;

// What a program's threads exchange: codes come 32 to a thread and leave 8 to a thread, so that a warp's loads and its
// stores are one piece of memory each, 16 bytes wide.
struct Nf4Shared {
  Words4 pieces[kNf4Pieces * kThreads];
  float scales[kThreads];  // of the program's blocks
  float numbers[kNf4Codes];
};

FASTPT_FORMULA int nf4_count(int64_t size, int64_t first, int most) {
  const int64_t left = size - first;
  return left >= most ? most : left > 0 ? static_cast<int>(left) : 0;
}

// The bytes of `count` values.
FASTPT_FORMULA Words4 nf4_load(const Nf4Task& task, int64_t first, int count) {
  const uint8_t* from = task.packed + first / 2;
  if (count == kNf4PieceValues && task.is_aligned != 0) return load_16_bytes(from);
  Words4 words{};
  FASTPT_UNROLL
  for (int i = 0; i < kNf4PieceValues / 2; ++i) {
    if (2 * i >= count) continue;
    count_loaded(1);
    words.at[i / 4] |= static_cast<uint32_t>(from[i]) << (i % 4 * 8);
  }
  return words;
}

// Phase 1: all that the program needs is loaded and shared.
FASTPT_FORMULA void nf4_load_all(const Nf4Task& task, int64_t program, int thread, Nf4Shared& shared) {
  Words4 words[kNf4Pieces];
  FASTPT_UNROLL
  for (int p = 0; p < kNf4Pieces; ++p) {
    const int64_t first = program * kNf4ProgramValues + (p * kThreads + thread) * kNf4PieceValues;
    words[p] = nf4_load(task, first, nf4_count(task.size, first, kNf4PieceValues));
  }
  const int64_t block = program * kThreads + thread;
  if (block * kNf4Block < task.size) {
    count_loaded(task.scales.codes == nullptr ? 4 : 1 + 3 * 4);
    shared.scales[thread] = nf4_scale(task.scales, block);
  }
  FASTPT_UNROLL
  for (int p = 0; p < kNf4Pieces; ++p) shared.pieces[p * kThreads + thread] = words[p];
  if (thread == 0) {
    FASTPT_UNROLL
    for (uint32_t code = 0; code < kNf4Codes; ++code) shared.numbers[code] = nf4_value(code);
  }
}

// Phase 2. Sixteen numbers lie in sixteen banks: any threads may read any of them at once.
FASTPT_FORMULA void nf4_store_all(const Nf4Task& task, int64_t program, int thread, const Nf4Shared& shared) {
  FASTPT_UNROLL
  for (int g = 0; g < kNf4Groups; ++g) {
    const int place = g * kThreads + thread;  // of the group in the program
    const int64_t first = program * kNf4ProgramValues + place * kGroup;
    const int count = nf4_count(task.size, first, kGroup);
    if (count == 0) return;
    const uint32_t word = shared.pieces[place / 4].at[place % 4];
    const float scale = shared.scales[place * kGroup / kNf4Block];
    Group group{};
    FASTPT_UNROLL
    for (int i = 0; i < kGroup; ++i) {
      const uint32_t code = (word >> (i / 2 * 8 + (i % 2 == 0 ? 4 : 0))) & 15u;
      group.put(i, task.type, shared.numbers[code] * scale);
    }
    store_group(task.out, task.type, first, count, count == kGroup && task.is_aligned != 0, group);
  }
}

}  // namespace fastpt::cuda
