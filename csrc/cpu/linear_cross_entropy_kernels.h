// Softmax statistics and gradients on tiles of logits [n classes, columns tokens], row stride kBlock, all in float32.
// Tokens lie along the vector: statistics need no sums across lanes. A tile is in cache when it comes from the GEMM, so
// several passes over it cost little.

// z = softcap * tanh(scale * (z + bias) / softcap), in place; bias [n] may be null, softcap 0 means none.
void finish_logits(int64_t n, int64_t columns, const float* bias, float scale, float softcap, float* z) {
  if (bias == nullptr && scale == 1.0f && softcap <= 0.0f) return;
  for (int64_t j = 0; j < n; ++j, z += kBlock) {
    const float b = bias == nullptr ? 0.0f : bias[j];
    if (softcap > 0.0f) {
      for (int64_t c = 0; c < columns; ++c) z[c] = softcap * tanh_f((z[c] + b) * scale / softcap);
    } else {
      for (int64_t c = 0; c < columns; ++c) z[c] = (z[c] + b) * scale;
    }
  }
}

// The floor keeps 0 * -inf out of the sums when a logit is -inf; a NaN stays NaN.
FASTPT_INLINE float floored(float log_p) {
  return std::max(log_p, -104.0f);
}

// d logit / d (scale * (hidden · weight + bias)), from the finished logit.
FASTPT_INLINE float cap_slope(float z, float softcap) {
  const float t = z / softcap;
  return softcap > 0.0f ? 1.0f - t * t : 1.0f;
}

FASTPT_INLINE float lane_sum(int64_t columns, const float* x) {
  float sums[kSumLanes] = {};
  in_lanes(columns, [&](int64_t c, int lane) __attribute__((always_inline)) { sums[lane] += x[c]; });
  return added(sums);
}

// Two rows of values rounded to T: as rows of a matrix (first, second; may be null) and as a row pair of the B operand
// of gemm_tile (may be null).
FASTPT_INLINE void store_rows(int64_t columns, const float* a, const float* b, float* first, float* second,
                              float* as_b) {
  if (first != nullptr) std::copy_n(a, columns, first);
  if (second != nullptr) std::copy_n(b, columns, second);
  if (as_b == nullptr) return;
  std::copy_n(a, columns, as_b);
  std::copy_n(b, columns, as_b + kBlock);
}
FASTPT_INLINE void store_rows(int64_t columns, const float* a, const float* b, bf16* first, bf16* second, bf16* as_b) {
#if FASTPT_ISA_LEVEL >= 3
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  for (int64_t c = 0; c < columns; c += 16) {
    const __m512i pair = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(b + c), _mm512_loadu_ps(a + c));
    if (first != nullptr) _mm256_storeu_si256((__m256i*)(first + c), _mm512_castsi512_si256(pair));
    if (second != nullptr) _mm256_storeu_si256((__m256i*)(second + c), _mm512_extracti64x4_epi64(pair, 1));
    if (as_b != nullptr) _mm512_storeu_si512(as_b + 2 * c, _mm512_permutexvar_epi16(order, pair));
  }
#else
  bf16 low[kBlock], high[kBlock];
  for (int64_t c = 0; c < columns; ++c) low[c] = from_float<bf16>(a[c]);
  for (int64_t c = 0; c < columns; ++c) high[c] = from_float<bf16>(b[c]);
  if (first != nullptr) std::copy_n(low, columns, first);
  if (second != nullptr) std::copy_n(high, columns, second);
  if (as_b == nullptr) return;
  for (int64_t c = 0; c < columns; ++c) {
    const uint32_t pair = low[c].x | static_cast<uint32_t>(high[c].x) << 16;
    std::memcpy(as_b + 2 * c, &pair, sizeof pair);
  }
#endif
}

// Takes the tile's maximum into the running softmax. The shift follows it only when a column outgrows it by kSlack, so
// that what was summed under the old shift seldom needs alpha = e^(old - new); true when it does.
FASTPT_INLINE bool follow_maximum(int64_t n, int64_t columns, const float* z, const Softmax& s, float* alpha) {
  float max[kBlock];
  std::copy_n(s.max, columns, max);
  for (int64_t j = 0; j < n; ++j)
    for (int64_t c = 0; c < columns; ++c) max[c] = z[j * kBlock + c] > max[c] ? z[j * kBlock + c] : max[c];
  bool has_moved = false;
  for (int64_t c = 0; c < columns; ++c) {
    s.max[c] = max[c];
    const bool moves = max[c] > s.shift[c] + kSlack;
    const double step = moves ? static_cast<double>(s.shift[c]) - max[c] : 0.0;
    alpha[c] = moves ? static_cast<float>(std::exp(step)) : 1.0f;
    if (!moves) continue;
    has_moved = true;
    s.sum_xe[c] = s.sum[c] == 0.0 ? 0.0 : std::exp(step) * (s.sum_xe[c] + s.sum[c] * step);
    s.sum[c] *= std::exp(step);
    s.shift[c] = max[c];
  }
  return has_moved;
}

// e^(row - shift) and what it adds to the moments.
FASTPT_INLINE void exponentials(int64_t columns, const float* row, const float* shift, bool has_moments, float* e,
                                float* sum_xe, float* sum_z) {
  if (!has_moments) {
    for (int64_t c = 0; c < columns; ++c) e[c] = exp_f(row[c] - shift[c]);
    return;
  }
  for (int64_t c = 0; c < columns; ++c) {
    const float x = floored(row[c] - shift[c]);
    e[c] = exp_f(x);
    sum_xe[c] += e[c] * x;
    sum_z[c] += row[c];
  }
}

// Adds the tile to the running softmax and writes e^(z - shift) * cap_slope, the gradient of the loss but for a factor
// per token, as rows [n, columns] (stride ldr) and as the B operand [n, columns] of a GEMM; either may be null. The sum
// is in float64 from pairs on: a certain token's 1 - p is what is left of it beside 1.
template <typename T>
bool tile_softmax(int64_t n, int64_t columns, const float* z, float softcap, bool has_moments, const Softmax& s,
                  float* alpha, int64_t ldr, T* rows, T* as_b) {
  constexpr int64_t kDepth = 64;  // of the moments' float32 sums
  const bool has_moved = follow_maximum(n, columns, z, s, alpha);
  float shift[kBlock], e[2][kBlock];
  double sum[kBlock];
  std::copy_n(s.shift, columns, shift);
  std::copy_n(s.sum, columns, sum);
  for (int64_t j0 = 0; j0 < n; j0 += kDepth) {
    float sum_xe[kBlock] = {}, sum_z[kBlock] = {};
    for (int64_t j = j0; j < std::min(n, j0 + kDepth); j += 2) {
      const float* row = z + j * kBlock;
      const bool is_pair = j + 1 < n;
      exponentials(columns, row, shift, has_moments, e[0], sum_xe, sum_z);
      if (is_pair) {
        exponentials(columns, row + kBlock, shift, has_moments, e[1], sum_xe, sum_z);
      } else {
        std::fill_n(e[1], columns, 0.0f);
      }
      for (int64_t c = 0; c < columns; ++c) sum[c] += e[0][c] + e[1][c];
      for (int64_t k = 0; softcap > 0.0f && k < (is_pair ? 2 : 1); ++k)
        for (int64_t c = 0; c < columns; ++c) e[k][c] *= cap_slope(row[k * kBlock + c], softcap);
      store_rows(columns, e[0], e[1], rows == nullptr ? nullptr : rows + j * ldr,
                 rows == nullptr || !is_pair ? nullptr : rows + (j + 1) * ldr,
                 as_b == nullptr ? nullptr : as_b + j * kBlock);
    }
    for (int64_t c = 0; has_moments && c < columns; ++c) s.sum_xe[c] += sum_xe[c], s.sum_z[c] += sum_z[c];
  }
  std::copy_n(sum, columns, s.sum);
  return has_moved;
}

// The gradient of the tile's logits where the statistics are known, as rows and as a B operand, rounded to T; summed
// over tokens in float32 into dbias [n].
template <typename T>
void tile_gradient(int64_t n, int64_t columns, const float* z, const TokenGradients& g, float scale, float softcap,
                   float* dbias, int64_t ldr, T* rows, T* as_b) {
  float dz[2][kBlock];
  for (int64_t j = 0; j < n; j += 2) {
    const bool is_pair = j + 1 < n;
    std::fill_n(dz[1], columns, 0.0f);
    for (int64_t k = 0; k < (is_pair ? 2 : 1); ++k) {
      const float* row = z + (j + k) * kBlock;
      for (int64_t c = 0; c < columns; ++c) {
        const float log_p = floored(row[c] - g.max[c] - g.log_sum[c]);
        const float by_logit = exp_f(log_p) * (g.of_p[c] + g.of_p_log_p[c] * log_p) + g.of_all[c];
        dz[k][c] = by_logit * scale * cap_slope(row[c], softcap);
      }
      if (dbias != nullptr) dbias[j + k] += lane_sum(columns, dz[k]);
    }
    store_rows(columns, dz[0], dz[1], rows == nullptr ? nullptr : rows + j * ldr,
               rows == nullptr || !is_pair ? nullptr : rows + (j + 1) * ldr,
               as_b == nullptr ? nullptr : as_b + j * kBlock);
  }
}

// y += a x
template <typename T>
void add_scaled(int64_t n, float a, const T* x, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] += a * to_float(x[i]);
}

// y = a x
template <typename T>
void scale_to(int64_t n, float a, const T* x, T* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = from_float<T>(a * to_float(x[i]));
}

template <typename T>
float dot(int64_t n, const T* x, const float* y) {
  float sums[kSumLanes] = {};
  in_lanes(n, [&](int64_t i, int lane) __attribute__((always_inline)) { sums[lane] += to_float(x[i]) * y[i]; });
  return added(sums);
}

// x[j, c] *= factor[c] for rows kBlock apart.
void scale_columns(int64_t n, int64_t columns, const float* factor, float* x) {
  for (int64_t j = 0; j < n; ++j, x += kBlock)
    for (int64_t c = 0; c < columns; ++c) x[c] *= factor[c];
}

// out = the rounded sum.
template <typename T>
void round_to(int64_t n, const float* in, T* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = from_float<T>(in[i]);
}
