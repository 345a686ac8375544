// Attention with dropout of its weights, one sequence and key head at a time: float32 copies in scratch, four queries
// at once. For encoders in training, whose sequences are short; the scores of four queries are all that exists of [T,
// T].

constexpr int64_t kDepth =
    16;  // products in one sum before it joins the others: sums of sums err less than one long sum

// Rows of out, ld apart, = sum or += sum.
FASTPT_INLINE void add_sums(bool is_first, int64_t ld, const float (&sum)[kQueries][kLanes], float* out) {
  for (int64_t r = 0; r < kQueries; ++r) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) out[r * ld + l] = sum[r][l] + (is_first ? 0.0f : out[r * ld + l]);
  }
}

// s [kQueries, n] = a [kQueries, K] · bᵀ, with bᵀ given as [K, n]; n a multiple of kLanes.
FASTPT_INLINE void four_scores(int64_t n, int64_t K, const float* a, const float* b_t, float* s) {
  for (int64_t j = 0; j < n; j += kLanes) {
    for (int64_t d0 = 0; d0 < K; d0 += kDepth) {
      float sum[kQueries][kLanes] = {};
      for (int64_t d = d0; d < std::min(K, d0 + kDepth); ++d) {
        for (int64_t r = 0; r < kQueries; ++r) {
#pragma omp simd
          for (int64_t l = 0; l < kLanes; ++l) sum[r][l] += a[r * K + d] * b_t[d * n + j + l];
        }
      }
      add_sums(d0 == 0, n, sum, s + j);
    }
  }
}

// out [kQueries, K] = s [kQueries, n] · b [keys, K]; K a multiple of kLanes.
FASTPT_INLINE void four_sums(int64_t n, int64_t keys, int64_t K, const float* s, const float* b, float* out) {
  for (int64_t c = 0; c < K; c += kLanes) {
    for (int64_t j0 = 0; j0 < keys; j0 += kDepth) {
      float sum[kQueries][kLanes] = {};
      for (int64_t j = j0; j < std::min(keys, j0 + kDepth); ++j) {
        for (int64_t r = 0; r < kQueries; ++r) {
#pragma omp simd
          for (int64_t l = 0; l < kLanes; ++l) sum[r][l] += s[r * n + j] * b[j * K + c + l];
        }
      }
      add_sums(j0 == 0, K, sum, out + c);
    }
  }
}

// out [keys, K] += sᵀ [keys, kQueries] · a [kQueries, K]; K a multiple of kLanes.
FASTPT_INLINE void add_outer(int64_t n, int64_t keys, int64_t K, const float* s, const float* a, float* out) {
  for (int64_t c = 0; c < K; c += kLanes) {
    float rows[kQueries][kLanes];  // stay in registers
    for (int64_t r = 0; r < kQueries; ++r) std::memcpy(rows[r], a + r * K + c, sizeof rows[r]);
    for (int64_t j = 0; j < keys; ++j) {
      float* to = out + j * K + c;
#pragma omp simd
      for (int64_t l = 0; l < kLanes; ++l) {
        float sum = 0.0f;
        for (int64_t r = 0; r < kQueries; ++r) sum += s[r * n + j] * rows[r][l];
        to[l] += sum;
      }
    }
  }
}

// `rows` rows of one head in float32, `ld` apart in x, padded with zeros to [padded, width].
template <typename T>
FASTPT_INLINE void widen(int64_t rows, int64_t padded, int64_t K, int64_t width, int64_t ld, const T* x, float* to) {
  for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
    for (int64_t d = 0; d < K; ++d) to[r * width + d] = to_float(x[r * ld + d]);
    for (int64_t d = K; d < width; ++d) to[r * width + d] = 0.0f;
  }
  std::fill(to + rows * width, to + padded * width, 0.0f);
}

FASTPT_INLINE void transposed(int64_t n, int64_t K, const float* x, float* to) {  // [n, K] -> [K, n]
  for (int64_t d = 0; d < K; ++d) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) to[d * n + j] = x[j * K + d];
  }
}

// Unseen keys of a row of scores become -inf, the others are multiplied by scale: whole registers from here on.
FASTPT_INLINE void mask_scores(int64_t n, int64_t lo, int64_t hi, float scale, float* s) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) s[j] = j >= lo && j < hi ? s[j] * scale : -std::numeric_limits<float>::infinity();
}

FASTPT_INLINE float exp_or_0(float x) {
  return x == -std::numeric_limits<float>::infinity() ? 0.0f : exp_f(x);
}

// A row of scores becomes e^(score - its maximum); `top` and `sum` of a row that sees nothing are 0.
struct RowSum {
  float top, sum;
};
FASTPT_INLINE RowSum exponentials(int64_t n, float* w) {
  float top = -std::numeric_limits<float>::infinity(), sums[kSumLanes] = {};
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < n; ++j) top = std::max(top, w[j]);
  if (top == -std::numeric_limits<float>::infinity()) top = 0.0f;
  in_lanes(n, [&](int64_t j, int lane) __attribute__((always_inline)) {
    w[j] = exp_or_0(w[j] - top);
    sums[lane] += w[j];
  });
  return {top, added(sums)};
}

template <typename T>
void dropped_attention_head(const DroppedSequence& c, const T* q, const T* k, const T* v, T* out, float* lse,
                            float* scratch) {
  const int64_t n = c.n(), K = c.width(), ld_q = c.heads_q * c.K, ld_k = c.heads_kv * c.K;
  float *values = scratch, *keys_t = values + n * K, *wide = keys_t + n * K, *query = wide + n * K,
        *result = query + kQueries * K, *s = result + kQueries * K;
  widen(c.keys, n, c.K, K, ld_k, k, wide);
  transposed(n, K, wide, keys_t);
  widen(c.keys, n, c.K, K, ld_k, v, values);
  for (int64_t g = 0; g < c.group; ++g) {
    for (int64_t i = 0; i < c.queries; i += kQueries) {
      const int64_t rows = std::min(kQueries, c.queries - i);
      widen(rows, kQueries, c.K, K, ld_q, q + i * ld_q + g * c.K, query);
      four_scores(n, K, query, keys_t, s);
      for (int64_t r = 0; r < rows; ++r) {
        float* w = s + r * n;
        const int64_t lo = c.first_key(i + r), hi = c.end_key(i + r);
        const uint32_t key = dropout_key(c.seed, c.first_row + (i + r) * c.heads_q + g);
        mask_scores(n, lo, hi, c.scale, w);
        const auto [top, sum] = exponentials(n, w);
        const float inverse = hi > lo ? 1.0f / sum : 0.0f;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) w[j] = dropped_out(w[j] * inverse, key, static_cast<uint32_t>(j), c.dropout);
        lse[(i + r) * c.heads_q + g] = hi > lo ? top + std::log(sum) : std::numeric_limits<float>::infinity();
      }
      four_sums(n, c.keys, K, s, values, result);
      for (int64_t r = 0; r < rows; ++r) {
        T* to = out + (i + r) * ld_q + g * c.K;
        for (int64_t d = 0; d < c.K; ++d) to[d] = from_float<T>(result[r * K + d]);
      }
    }
  }
}

template <typename T>
void dropped_attention_backward_head(const DroppedSequence& c, const T* grad, const T* q, const T* k, const T* v,
                                     const float* lse, T* dq, T* dk, T* dv, float* scratch) {
  const int64_t n = c.n(), K = c.width(), ld_q = c.heads_q * c.K, ld_k = c.heads_kv * c.K;
  float *keys = scratch, *keys_t = keys + n * K, *values = keys_t + n * K, *values_t = values + n * K,
        *dkeys = values_t + n * K, *dvalues = dkeys + n * K, *query = dvalues + n * K, *dout = query + kQueries * K,
        *result = dout + kQueries * K, *s = result + kQueries * K, *dp = s + kQueries * n, *w = dp + kQueries * n;
  widen(c.keys, n, c.K, K, ld_k, k, keys);
  transposed(n, K, keys, keys_t);
  widen(c.keys, n, c.K, K, ld_k, v, values);
  transposed(n, K, values, values_t);
  std::fill(dkeys, dkeys + 2 * n * K, 0.0f);
  for (int64_t g = 0; g < c.group; ++g) {
    for (int64_t i = 0; i < c.queries; i += kQueries) {
      const int64_t rows = std::min(kQueries, c.queries - i), at = i * ld_q + g * c.K;
      widen(rows, kQueries, c.K, K, ld_q, q + at, query);
      widen(rows, kQueries, c.K, K, ld_q, grad + at, dout);
      four_scores(n, K, query, keys_t, s);
      four_scores(n, K, dout, values_t, dp);
      for (int64_t r = 0; r < kQueries; ++r) {
        float *score = s + r * n, *weight = w + r * n;
        const int64_t lo = r < rows ? c.first_key(i + r) : 0, hi = r < rows ? c.end_key(i + r) : 0;
        mask_scores(n, lo, hi, c.scale, score);
        const int64_t row = std::min(i + r, c.queries - 1);
        const uint32_t key = dropout_key(c.seed, c.first_row + row * c.heads_q + g);
        const float total = hi > lo ? lse[row * c.heads_q + g] : 0.0f;
        float* dweight = dp + r * n;
        float sums[kSumLanes] = {}, deltas[kSumLanes] = {};
        in_lanes(n, [&](int64_t j, int lane) __attribute__((always_inline)) {
          const float p = exp_or_0(score[j] - total);
          const float kept = dropped_out(1.0f, key, static_cast<uint32_t>(j), c.dropout);
          weight[j] = p * kept;
          score[j] = p;
          dweight[j] *= kept;
          sums[lane] += p;
          deltas[lane] += p * dweight[j];
        });
        // The weights would add up to 1 but for the rounding of lse, which would show in all of them: divided by their
        // sum. delta = weights times their gradients is closer than out times dout, both of which are rounded.
        const float inverse = hi > lo ? 1.0f / added(sums) : 0.0f, delta = added(deltas) * inverse;
        const float factor = c.scale * inverse;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          weight[j] *= inverse;
          score[j] *= (dweight[j] - delta) * factor;
        }
      }
      four_sums(n, c.keys, K, s, keys, result);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t d = 0; d < c.K; ++d) dq[at + r * ld_q + d] = from_float<T>(result[r * K + d]);
      add_outer(n, c.keys, K, s, query, dkeys);
      add_outer(n, c.keys, K, w, dout, dvalues);
    }
  }
  for (int64_t j = 0; j < c.keys; ++j) {
    for (int64_t d = 0; d < c.K; ++d) {
      dk[j * ld_k + d] = from_float<T>(dkeys[j * K + d]);
      dv[j * ld_k + d] = from_float<T>(dvalues[j * K + d]);
    }
  }
}
