// What the kernels of attention with dropout know of one sequence.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/dropout.h"

namespace fastpt {

constexpr int64_t kLanes = 16, kQueries = 4;  // keys in a register, and queries at once

// One sequence and key head. Pointers stand at the first token and the head (for q, out, grad, lse: its first query
// head).
struct DroppedSequence {
  int64_t queries, keys, K, heads_q, heads_kv, group;  // group: query heads of this key head
  int64_t first_row;                                   // number of (first query, first query head) in the draw
  bool causal;
  int64_t window;  // 0: none
  float scale;
  DropoutRule dropout;
  uint64_t seed;

  int64_t n() const { return (keys + kLanes - 1) / kLanes * kLanes; }
  int64_t width() const { return (K + kLanes - 1) / kLanes * kLanes; }
  int64_t scratch() const { return 6 * n() * width() + kQueries * (4 * width() + 3 * n()); }
  int64_t first_key(int64_t i) const { return window == 0 ? 0 : std::max<int64_t>(0, i + keys - queries - window + 1); }
  int64_t end_key(int64_t i) const {
    const int64_t at = i + keys - queries, end = causal ? at + 1 : (window == 0 ? keys : at + window);
    return std::max(first_key(i), std::min(keys, end));
  }
};

}  // namespace fastpt
