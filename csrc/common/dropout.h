// Which values dropout keeps: a hash of (seed, row, column), so that forward, backward and any tiling agree and no mask
// is stored. The definition is fastpt/ops/_dropout.py.
#pragma once

#include <cstdint>

#include "common/formula.h"

namespace fastpt {

struct DropoutRule {
  uint32_t threshold;  // a value is dropped when its 32 random bits lie below
  float scale;         // 1 / (1 - p), 0 when all is dropped
};

inline DropoutRule dropout_of(double p) {
  const double threshold = p * 4294967296.0;
  return {threshold < 4294967295.0 ? static_cast<uint32_t>(threshold) : 4294967295u,
          p < 1.0 ? static_cast<float>(1.0 / (1.0 - p)) : 0.0f};
}

// MurmurHash3's 32-bit finaliser: every input bit flips every output bit with probability 1/2.
FASTPT_FORMULA uint32_t mix_bits(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

FASTPT_FORMULA uint32_t dropout_key(uint64_t seed, uint64_t row) {
  const uint32_t low = mix_bits(static_cast<uint32_t>(seed) + static_cast<uint32_t>(row));
  return mix_bits(low ^ static_cast<uint32_t>(seed >> 32)) + static_cast<uint32_t>(row >> 32);
}

FASTPT_FORMULA float dropped_out(float value, uint32_t key, uint32_t column, DropoutRule dropout) {
  return mix_bits(key ^ (column * 0x9e3779b9u)) < dropout.threshold ? 0.0f : value * dropout.scale;
}

}  // namespace fastpt
