// bfloat16 rounding that is right on average, from random bits that are a function of (seed, step, tensor, index)
// alone: no state, so any order and any number of threads gives the same result. The definition is fastpt/ops/adamw.py.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/formula.h"

namespace fastpt {

// One stream per tensor and step.
struct RandomStream {
  uint32_t key0, key1;
};

// Steele et al. 2014, https://doi.org/10.1145/2714064.2660195: the finaliser of SplitMix64.
FASTPT_FORMULA uint64_t mix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

FASTPT_FORMULA RandomStream random_stream(uint64_t seed, uint64_t step, uint64_t tensor) {
  const uint64_t key = mix64(mix64(mix64(seed) ^ step) ^ tensor);
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
}

// 32 bits for value `index`: two rounds of multiplication and xor-shift, keyed before and between them.
FASTPT_FORMULA uint32_t random_bits(const RandomStream& stream, uint32_t index_low, uint32_t index_high) {
  uint32_t x = (index_low ^ stream.key0) + index_high * 0x9e3779b9u;
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  x = (x ^ (x >> 15) ^ stream.key1) * 0x735a2d97u;
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  return x ^ (x >> 15);
}

// The upper half of a float32 plus 16 random bits: of the two neighbours, each with the probability of its nearness.
// Infinities and NaN stay what they are.
FASTPT_FORMULA uint16_t round_stochastically(float value, uint32_t random) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const bool is_finite = (bits & 0x7f800000u) != 0x7f800000u;
  const uint32_t quiet = (bits & 0x7fffffu) != 0 ? 0x400000u : 0u;
  return static_cast<uint16_t>((is_finite ? bits + (random & 0xffffu) : bits | quiet) >> 16);
}

}  // namespace fastpt
