// GELU and its slope, for kernel headers: like math.h it is included inside a namespace, once per instruction set.
// Both forms are x * s(x) with a sigmoid-like s; each costs one exponential, which the slope shares.

struct Gelu {
  float s;      // gelu(x) / x
  float slope;  // gelu'(x)
};

// s = (1 + tanh(u)) / 2 = sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x³). s and 1 - s both come without cancellation:
// the slope multiplies their product by up to 30.
FASTPT_INLINE Gelu gelu_tanh(float x) {
  constexpr float kRate = 1.5957691216057308f, kCubic = 0.044715f;  // kRate = 2 sqrt(2 / pi)
  const float square = x * x, e = exp_f(-std::abs(kRate * x * (1.0f + kCubic * square)));
  const float larger = 1.0f / (1.0f + e), smaller = e * larger, s = x < 0.0f ? smaller : larger;
  return {s, s + x * larger * smaller * kRate * (1.0f + 3.0f * kCubic * square)};
}

// s = the normal distribution function. Its upper tail at a = |x| is exp(-a² / 2) P(1 / (1 + 0.3 a)); P is a weighted
// least-squares fit of erfcx(a / sqrt(2)) / 2 on [0, 15] with relative error 6e-8, checked by tests/ops/test_geglu.py.
FASTPT_INLINE Gelu gelu_exact(float x) {
  const float a = std::abs(x), bell = exp_f(-0.5f * a * a), t = 1.0f / (1.0f + 0.3f * a);
  float p = 0.03842540085315704f;
  p = p * t - 0.16939479112625122f;
  p = p * t + 0.22913166880607605f;
  p = p * t - 0.07704470306634903f;
  p = p * t + 0.1429063081741333f;
  p = p * t + 0.09452608972787857f;
  p = p * t + 0.12196046113967896f;
  p = p * t + 0.11948209255933762f;
  p = p * t + 7.495441423088778e-06f;
  const float tail = bell * p, s = x < 0.0f ? tail : 1.0f - tail;
  return {s, s + x * bell * 0.3989422804014327f};
}

template <bool IsTanh>
FASTPT_INLINE Gelu gelu_of(float x) {
  if constexpr (IsTanh) return gelu_tanh(x);
  return gelu_exact(x);
}
