// One row of divergence_rows: two or three passes over a row's logits, which stay in the core's cache as float32.

// ln x within 1.5 ulp of float32 for normal positive x: x = m 2^e with m in [sqrt(1/2), sqrt(2)) (Cephes logf).
FASTPT_INLINE float log_f(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const int32_t offset = bits - 0x3f3504f3;  // of sqrt(1/2)
  const float e = static_cast<float>(offset >> 23);
  const int32_t mantissa = (offset & 0x007fffff) + 0x3f3504f3;
  float m;
  std::memcpy(&m, &mantissa, sizeof m);
  const float r = m - 1.0f, s = r * r;
  float p = 7.0376836292e-2f;
  p = p * r - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  return (r + (p * r * s - 2.12194440e-4f * e - 0.5f * s)) + 0.693359375f * e;
}

// The sum of term(i) for i < n: float32 within blocks, double over them.
template <typename Term>
FASTPT_INLINE double block_sums(int64_t n, const Term& term) {
  constexpr int64_t kBlock = 1024;
  double total = 0;
  for (int64_t start = 0; start < n; start += kBlock) {
    float lanes[kSumLanes] = {};
    in_lanes(std::min(kBlock, n - start), [&](int64_t i, int lane) { lanes[lane] += term(start + i); });
    total += added(lanes);
  }
  return total;
}

struct Softmax {
  float log_sum, inverse;  // of the sum of exponentials
};

// out = x / temperature minus the largest of these; what their softmax is divided by.
template <typename T>
FASTPT_INLINE Softmax widened(int64_t n, const T* x, float temperature, float* out) {
  float lanes[kSumLanes];
  for (float& lane : lanes) lane = -std::numeric_limits<float>::infinity();
  in_lanes(n, [&](int64_t i, int lane) {
    out[i] = to_float(x[i]) / temperature;
    lanes[lane] = out[i] > lanes[lane] ? out[i] : lanes[lane];
  });
  float most = lanes[0];
  for (float lane : lanes) most = lane > most ? lane : most;
  const double sum = block_sums(n, [&](int64_t i) { return exp_f(out[i] -= most); });
  return {static_cast<float>(std::log(sum)), static_cast<float>(1 / sum)};
}

// Returns the divergence of a student's logits z from the teacher's, times weight, and stores the gradient by z, which
// may be z's own place; s and t are scratch of n floats. Definition: fastpt/ops/linear_divergence.py: rows_reference.
template <typename T, typename U>
double divergence_row(int64_t n, const T* z, const U* teacher, T* gradient, float weight, float beta, float temperature,
                      float* s, float* t) {
  const float share = weight / temperature;
  const Softmax mine = widened(n, z, temperature, s), theirs = widened(n, teacher, temperature, t);
  if (beta == 0.0f) {
    return weight * block_sums(n, [&](int64_t i) {
             const float q = exp_f(t[i]) * theirs.inverse;
             gradient[i] = from_float<T>(share * (exp_f(s[i]) * mine.inverse - q));
             return q * ((t[i] - theirs.log_sum) - (s[i] - mine.log_sum));
           });
  }
  double from_teacher = 0, from_student;
  if (beta == 1.0f) {
    from_student = block_sums(n, [&](int64_t i) {
      t[i] = (s[i] - mine.log_sum) - (t[i] - theirs.log_sum);
      s[i] = exp_f(s[i]) * mine.inverse;
      return s[i] * t[i];
    });
  } else {
    const float rest = 1.0f - beta, tiny = std::numeric_limits<float>::min();
    from_teacher = block_sums(n, [&](int64_t i) {
      const float p = exp_f(s[i]) * mine.inverse, q = exp_f(t[i]) * theirs.inverse, m = beta * q + rest * p;
      // The log of a ratio near 1 is exact where the difference of two logs is not; 0 log 0 is 0.
      const float of_m = 1.0f / (m > tiny ? m : tiny), a = p * of_m, b = q * of_m;
      s[i] = p;
      t[i] = log_f(a > tiny ? a : tiny);
      return q * log_f(b > tiny ? b : tiny);
    });
    from_student = block_sums(n, [&](int64_t i) { return s[i] * t[i]; });
  }
  const float mean = static_cast<float>(from_student), of_p = beta == 1.0f ? share : share * (1.0f - beta);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) gradient[i] = from_float<T>(of_p * s[i] * (t[i] - mean));
  return weight * (beta == 1.0f ? from_student : beta * from_teacher + (1.0 - beta) * from_student);
}
