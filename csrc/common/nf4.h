// NF4, the 4-bit numbers of QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, appendix E), in blocks of 64
// with the layout of bitsandbytes: the one arithmetic that CPU and CUDA kernels run. The definition is
// fastpt/ops/nf4.py.
#pragma once

#include <cstdint>

#include "common/formula.h"

namespace fastpt {

constexpr int64_t kNf4Block = 64;        // values that share a scale
constexpr int64_t kNf4ScaleBlock = 256;  // scales that share a scale of their own, where scales are nested
constexpr int64_t kNf4MapSize = 256;     // of the map of 8-bit scales
constexpr float kNf4LeastScale = 1e-38f;

// Quantiles of the normal distribution, as in appendix E.
FASTPT_FORMULA float nf4_value(uint32_t code) {
  constexpr float values[16] = {-1.0f,
                                -0.6961928009986877f,
                                -0.5250730514526367f,
                                -0.39491748809814453f,
                                -0.28444138169288635f,
                                -0.18477343022823334f,
                                -0.09105003625154495f,
                                0.0f,
                                0.07958029955625534f,
                                0.16093020141124725f,
                                0.24611230194568634f,
                                0.33791524171829224f,
                                0.44070982933044434f,
                                0.5626170039176941f,
                                0.7229568362236023f,
                                1.0f};
  return values[code];
}

// The code nearest to a value in [-1, 1]: how many midpoints lie below it. A NaN is below none and gets the last.
FASTPT_FORMULA uint32_t nf4_code(float value) {
  uint32_t code = 0;
#ifdef __CUDACC__
#pragma unroll
#else
#pragma GCC unroll 15
#endif
  for (uint32_t i = 0; i < 15; ++i) code += !(value <= (nf4_value(i) + nf4_value(i + 1)) / 2);
  return code;
}

// a * b, rounded before anything is added to it.
FASTPT_FORMULA float rounded_product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  float product = a * b;
#if defined(__SSE2__)
  __asm__("" : "+x"(product));  // else the compiler may fuse it with the sum
#else
  __asm__("" : "+m"(product));
#endif
  return product;
#endif
}

// The scales of a weight: float32, or 8-bit codes of a map, relative to an absolute maximum per 256 of them, around an
// offset. `nested` holds the map, the offset and those maxima, one after another.
struct Nf4Scales {
  const float* absmax;   // null where they are nested
  const uint8_t* codes;  // null where they are not
  const float* nested;
};

FASTPT_FORMULA float nf4_scale(const Nf4Scales& s, int64_t block) {
  if (s.codes == nullptr) return s.absmax[block];
  const float maximum = s.nested[kNf4MapSize + 1 + block / kNf4ScaleBlock];
  return rounded_product(s.nested[s.codes[block]], maximum) + s.nested[kNf4MapSize];
}

// Which of 65,536 equal steps from -1 to 1 a value belongs to. bitsandbytes' CPU kernel looks scales up at these.
FASTPT_FORMULA float nf4_step_of(float value) {
  const float clamped = value < -1.0f ? -1.0f : value > 1.0f ? 1.0f : value;
  const float step = rounded_product((clamped + 1.0f) * 0.5f, 65535.0f) + 0.5f;
  return step == step ? static_cast<float>(static_cast<int32_t>(step)) : 0.0f;
}

// How the values of a block become codes: those of a whole one by a factor, those of a last part by division.
struct Nf4Divisor {
  float absmax, divisor, factor;
  bool is_whole;

  FASTPT_FORMULA uint32_t code(float value) const { return nf4_code(is_whole ? value * factor : value / divisor); }
  FASTPT_FORMULA float stored() const { return is_whole ? absmax : divisor; }
};

FASTPT_FORMULA Nf4Divisor nf4_divisor(float absmax, bool is_whole) {
  const float divisor = absmax < kNf4LeastScale ? kNf4LeastScale : absmax;
  return {absmax, divisor, 1.0f / divisor, is_whole};
}

// The code of the map's number nearest to a value, by its step; the map is sorted.
FASTPT_FORMULA uint8_t nf4_scale_code(float value, const float* map) {
  const float at = rounded_product(nf4_step_of(value), 2.0f / 65535.0f) - 1.0f;
  int32_t low = 0, high = static_cast<int32_t>(kNf4MapSize) - 1;  // map[low] <= at <= map[high], where they are inside
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    if (map[middle] < at)
      low = middle;
    else
      high = middle;
  }
  return static_cast<uint8_t>(map[high] - at < at - map[low] ? high : low);
}

// That of a scale, less their offset, by the largest magnitude of those that share one; all are 0 where all are equal.
FASTPT_FORMULA uint8_t nf4_nested_code(float centred, float absmax, const float* map) {
  return absmax > 0.0f ? nf4_scale_code(centred * (1.0f / absmax), map) : uint8_t{0};
}

}  // namespace fastpt
