// rope for one token: its row of the tables in float32, then the heads, each a contiguous run of K values.

// The transpose of a rotation is the rotation with the sines swapped within each pair and negated.
template <typename C>
void rope_angles(int64_t R, const C* cos, const C* sin, bool is_interleaved, bool is_transposed, float* wide_cos,
                 float* wide_sin) {
  const int64_t half = R / 2;
  for (int64_t j = 0; j < R; ++j) {
    const int64_t partner = is_interleaved ? j ^ 1 : (j < half ? j + half : j - half);
    wide_cos[j] = to_float(cos[j]);
    wide_sin[j] = is_transposed ? -to_float(sin[partner]) : to_float(sin[j]);
  }
}

template <typename T, bool IsInterleaved>
void rope_heads(int64_t heads, int64_t K, int64_t R, int64_t head_stride, const T* x, const float* cos,
                const float* sin, T* out) {
  const int64_t half = R / 2, pair = IsInterleaved ? 2 : 1, partner = IsInterleaved ? 1 : half;
  for (int64_t h = 0; h < heads; ++h, x += head_stride, out += K) {
#pragma omp simd
    for (int64_t j = 0; j < half; ++j) {
      const int64_t i = j * pair, i2 = i + partner;
      const float a = to_float(x[i]), b = to_float(x[i2]);
      out[i] = from_float<T>(a * cos[i] - b * sin[i]);
      out[i2] = from_float<T>(b * cos[i2] + a * sin[i2]);
    }
    for (int64_t j = R; j < K; ++j) out[j] = x[j];
  }
}
