// Scalar building blocks that the compiler vectorises inside a kernel loop. Included by for_each_isa.h, once per
// instruction set and inside its namespace: no #include, no #pragma once here.
#define FASTPT_INLINE inline __attribute__((always_inline))

using bf16 = c10::BFloat16;

FASTPT_INLINE float to_float(float x) {
  return x;
}
FASTPT_INLINE float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.x) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

template <typename T>
FASTPT_INLINE T from_float(float x);
template <>
FASTPT_INLINE float from_float<float>(float x) {
  return x;
}
// Round to nearest even; a NaN stays a (quiet) NaN.
template <>
FASTPT_INLINE bf16 from_float<bf16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  bf16 out;
  out.x = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
  return out;
}

// A long sum goes into kSumLanes sums, term i into lane i % kSumLanes, that are added in pairs at the end: written out,
// so that its chains are short and its order is the same at every instruction set and where nothing is vectorised.
constexpr int kSumLanes = 16;

// Calls add(i, lane of i) for i < n.
template <typename Add>
FASTPT_INLINE void in_lanes(int64_t n, const Add& add) {
  int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes) {
#pragma omp simd
    for (int lane = 0; lane < kSumLanes; ++lane) add(i + lane, lane);
  }
  for (int lane = 0; i + lane < n; ++lane) add(i + lane, lane);
}

FASTPT_INLINE float added(const float (&lanes)[kSumLanes]) {
  typedef float floats4 __attribute__((vector_size(16)));
  floats4 fours[4];
  std::memcpy(fours, lanes, sizeof fours);
  const floats4 sums = (fours[0] + fours[2]) + (fours[1] + fours[3]);
  return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

// e^x within 1.5 ulp of float32: x = n ln2 + r, a degree-6 polynomial on |r| <= ln2 / 2 (Cephes expf coefficients),
// scaled by 2^n in two steps so that subnormal results are right and those beyond the range become infinite. The clamps
// are written so that each is one instruction (std::max and std::min make three) and a NaN passes through.
FASTPT_INLINE float exp_f(float x) {
  const float floored = -104.0f > x ? -104.0f : x, clamped = 89.0f < floored ? 89.0f : floored;
  const float n = __builtin_rintf(clamped * 1.44269504088896341f);
  float r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t whole = static_cast<int32_t>(n);
  const int32_t half = whole >> 1;
  const int32_t low_bits = (half + 127) << 23, high_bits = (whole - half + 127) << 23;
  float low, high;
  std::memcpy(&low, &low_bits, sizeof low);
  std::memcpy(&high, &high_bits, sizeof high);
  return p * low * high;
}

FASTPT_INLINE float sigmoid_f(float x) {
  return 1.0f / (1.0f + exp_f(-x));
}
// Within 1.5 ulp: (1 - t) / (1 + t) of t = e^-2|x|, and near 0, where 1 - t cancels, the odd series.
FASTPT_INLINE float tanh_f(float x) {
  const float a = __builtin_fabsf(x), s = x * x, t = exp_f(-2.0f * a);
  const float series = a + a * s * (-1.0f / 3 + s * (2.0f / 15 + s * (-17.0f / 315 + s * (62.0f / 2835))));
  return __builtin_copysignf(a < 0.25f ? series : (1.0f - t) / (1.0f + t), x);
}
