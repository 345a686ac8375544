// Softmax of one tile of transposed scores [keys, kQueries] and its gradient, vectorised over the queries.

// 2^x within 1.5 ulp for x <= 128, exactly 0 below -126.5 (and so for -inf); NaN stays. Cheaper than exp_f by its
// clamps: a minimax polynomial of 2^f on |f| <= 1/2, times 2^n.
FASTPT_INLINE float attention_exp2(float x) {
  x = std::max(x, -127.0f);
  const float n = __builtin_rintf(x), f = x - n;
  float p = 1.326472731e-3f;
  p = p * f + 9.671512991e-3f;
  p = p * f + 5.550733581e-2f;
  p = p * f + 2.402224243e-1f;
  p = p * f + 6.931470037e-1f;
  p = p * f + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// The bits of x rounded to bfloat16, nearest even. A NaN here came out of arithmetic, so no payload can overflow.
FASTPT_INLINE uint32_t bf16_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

// Rows r and r + 1, column c of a second operand of kQueries columns: a VNNI pair for bfloat16, two floats for float.
FASTPT_INLINE void store_pair(bf16* rows, int64_t c, float even, float odd) {
  const uint32_t word = bf16_bits(even) | (bf16_bits(odd) << 16);
  std::memcpy(rows + 2 * c, &word, sizeof word);
}
FASTPT_INLINE void store_pair(float* rows, int64_t c, float even, float odd) {
  rows[c] = even;
  rows[kQueries + c] = odd;
}
FASTPT_INLINE void store_one(bf16* out, float x) {
  out->x = static_cast<uint16_t>(bf16_bits(x));
}
FASTPT_INLINE void store_one(float* out, float x) {
  *out = x;
}

inline void attention_softcap(int64_t keys, int64_t columns, float scale, float softcap, float* scores) {
  const float inner = scale / softcap;
  for (int64_t r = 0; r < keys; ++r) {
    float* row = scores + r * kQueries;
    for (int64_t c = 0; c < columns; ++c) row[c] = softcap * tanh_f(row[c] * inner);
  }
}

// Row r keeps its columns from begin + r up to end + r; the rows from `rows` on keep none.
inline void attention_mask(int64_t keys, int64_t columns, int64_t rows, int64_t begin, int64_t end, float* scores) {
  constexpr float kUnseen = -std::numeric_limits<float>::infinity();
  for (int64_t r = 0; r < keys; ++r) {
    const int64_t from = r < rows ? std::clamp(begin + r, int64_t{0}, columns) : columns;
    const int64_t to = std::clamp(end + r, from, columns);
    std::fill(scores + r * kQueries, scores + r * kQueries + from, kUnseen);
    std::fill(scores + r * kQueries + to, scores + r * kQueries + columns, kUnseen);
  }
}

constexpr float kLog2E = 1.44269504088896341f;

// Online softmax: weights = e^((score - new max) * scale). Raises max (of unscaled scores), adds to sum, and leaves in
// rescale what earlier sums and outputs are to be multiplied by. The difference comes first: it is exact near the
// maximum, where the weight is.
template <typename T>
void attention_softmax(int64_t keys, int64_t columns, float scale, const float* __restrict scores,
                       float* __restrict max, float* __restrict sum, float* __restrict rescale, T* __restrict weights) {
  float top[kQueries], base[kQueries], total[kQueries];
  std::copy_n(max, columns, top);
  for (int64_t r = 0; r < keys; ++r) {
    const float* row = scores + r * kQueries;
    for (int64_t c = 0; c < columns; ++c) top[c] = row[c] > top[c] ? row[c] : top[c];  // GCC leaves std::max scalar
  }
  scale *= kLog2E;
  for (int64_t c = 0; c < columns; ++c) {
    const bool sees_any = top[c] > -std::numeric_limits<float>::infinity();
    base[c] = sees_any ? top[c] : 0.0f;  // -inf - (-inf) would be NaN
    rescale[c] = attention_exp2((max[c] - base[c]) * scale);
    max[c] = top[c];
    total[c] = 0.0f;
  }
  for (int64_t r = 0; r < keys; r += 2) {
    const float* even = scores + r * kQueries;
    const float* odd = even + kQueries;
    for (int64_t c = 0; c < columns; ++c) {
      const float p0 = attention_exp2((even[c] - base[c]) * scale), p1 = attention_exp2((odd[c] - base[c]) * scale);
      total[c] += p0 + p1;
      store_pair(weights + r * kQueries, c, p0, p1);
    }
  }
  for (int64_t c = 0; c < columns; ++c) sum[c] = sum[c] * rescale[c] + total[c];
}

// What the last tile leaves to do: lse of each query, and in factor what its output is to be multiplied by. In double:
// backward has but this one float for a row's scores, whose rounding error is then no more than that of a score.
inline void attention_finish(int64_t columns, float scale, const float* max, const float* sum, float* lse,
                             float* factor) {
  for (int64_t c = 0; c < columns; ++c) {
    const bool sees_any = sum[c] != 0.0f;  // NaN counts as seen
    const double exact = static_cast<double>(max[c]) * scale + std::log(static_cast<double>(sum[c]));
    lse[c] = sees_any ? static_cast<float>(exact) : std::numeric_limits<float>::infinity();
    factor[c] = sees_any ? 1.0f / sum[c] : 0.0f;
  }
}

// out[d, c] *= factor[c] for transposed rows [dim, kQueries].
inline void attention_rescale(int64_t dim, int64_t columns, const float* __restrict factor, float* __restrict out) {
  for (int64_t d = 0; d < dim; ++d)
    for (int64_t c = 0; c < columns; ++c) out[d * kQueries + c] *= factor[c];
}

// Recomputes weights from lse and forms the gradient of the scores, ds = p (dp - delta), times
// the slope of softcap. Each as a first operand [keys, kQueries], ds also as a second one (the same thing for float).
template <typename T, bool HasSoftcap>
void attention_score_gradient(int64_t keys, int64_t columns, float scale, float softcap, const float* __restrict scores,
                              const float* __restrict dweights, const float* __restrict lse,
                              const float* __restrict delta, T* __restrict weights, T* __restrict dscores,
                              T* __restrict dscores_pairs) {
  const auto slope = [softcap](float s) {
    const float t = std::max(s, -softcap) / softcap;  // the maximum: an unseen score is -inf
    return HasSoftcap ? 1.0f - t * t : 1.0f;
  };
  for (int64_t r = 0; r < keys * kQueries; r += 2 * kQueries) {
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t even = r + c, odd = even + kQueries;
      const float p0 = attention_exp2((scores[even] * scale - lse[c]) * kLog2E);
      const float p1 = attention_exp2((scores[odd] * scale - lse[c]) * kLog2E);
      const float d0 = p0 * (dweights[even] - delta[c]) * slope(scores[even]);
      const float d1 = p1 * (dweights[odd] - delta[c]) * slope(scores[odd]);
      store_one(weights + even, p0);
      store_one(weights + odd, p1);
      store_one(dscores + even, d0);
      store_one(dscores + odd, d1);
      if constexpr (!std::is_same_v<T, float>) store_pair(dscores_pairs + r, c, d0, d1);
    }
  }
}

// sum[c] = a[c, :] . b[c, :]
template <typename T>
void attention_row_dots(int64_t rows, int64_t dim, int64_t a_stride, const T* a, int64_t b_stride, const T* b,
                        float* sums) {
  constexpr int64_t kLanes = 16;
  for (int64_t r = 0; r < rows; ++r) {
    float lanes[kLanes] = {}, sum = 0.0f;
    const T *x = a + r * a_stride, *y = b + r * b_stride;
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes)
      for (int64_t i = 0; i < kLanes; ++i) lanes[i] += to_float(x[d + i]) * to_float(y[d + i]);
    for (; d < dim; ++d) sum += to_float(x[d]) * to_float(y[d]);
    for (int64_t i = 0; i < kLanes; ++i) sum += lanes[i];
    sums[r] = sum;
  }
}

// out = factor * in, rounded once.
template <typename T>
void attention_store_rows(int64_t rows, int64_t dim, const float* __restrict in, float factor, int64_t out_stride,
                          T* __restrict out) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < dim; ++d) out[r * out_stride + d] = from_float<T>(in[r * dim + d] * factor);
}

inline void attention_add(int64_t n, const float* __restrict in, float* __restrict sum) {
  for (int64_t i = 0; i < n; ++i) sum[i] += in[i];
}
