// Softmax statistics and gradients on tiles of logits [rows, columns], all in float32. A tile is small enough to be in
// cache when it comes here from the GEMM, so several passes over a row cost little.

constexpr int64_t kLanes = 32;  // independent partial sums: the compiler may not reorder a plain float sum

// z = softcap * tanh(scale * (z + bias) / softcap), in place; bias may be null, softcap 0 means none.
void finish_logits(int64_t rows, int64_t columns, int64_t ld, const float* bias, float scale, float softcap, float* z) {
  for (int64_t r = 0; r < rows; ++r, z += ld) {
    if (bias != nullptr) {
      for (int64_t j = 0; j < columns; ++j) z[j] += bias[j];
    }
    if (softcap > 0.0f) {
      for (int64_t j = 0; j < columns; ++j) z[j] = softcap * tanh_f(z[j] * scale / softcap);
    } else if (scale != 1.0f) {
      for (int64_t j = 0; j < columns; ++j) z[j] *= scale;
    }
  }
}

FASTPT_INLINE float row_max(const float* z, int64_t n) {
  float best[kLanes], result = std::numeric_limits<float>::lowest();
  for (int64_t l = 0; l < kLanes; ++l) best[l] = result;
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) best[l] = z[j + l] > best[l] ? z[j + l] : best[l];
  }
  for (; j < n; ++j) best[0] = std::max(z[j], best[0]);
  for (int64_t l = 0; l < kLanes; ++l) result = std::max(best[l], result);
  return result;
}

// The floor keeps 0 * -inf out of the sums when a logit is -inf; a NaN stays NaN.
FASTPT_INLINE float floored(float log_p) {
  return std::max(log_p, -104.0f);
}

void tile_statistics(int64_t rows, int64_t columns, int64_t ld, const float* z, PanelStats* out) {
  for (int64_t r = 0; r < rows; ++r, z += ld) {
    PanelStats total{row_max(z, columns), 0.0, 0.0, 0.0};
    const float max = total.max;
    float sum[kLanes] = {}, sum_xe[kLanes] = {}, sum_z[kLanes] = {};
    int64_t j = 0;
    for (; j + kLanes <= columns; j += kLanes) {
      for (int64_t l = 0; l < kLanes; ++l) {
        const float x = floored(z[j + l] - max), e = exp_f(x);
        sum[l] += e;
        sum_xe[l] += e * x;
        sum_z[l] += z[j + l];
      }
    }
    for (; j < columns; ++j) {
      const float x = floored(z[j] - max), e = exp_f(x);
      total.sum += e;
      total.sum_xe += e * x;
      total.sum_z += z[j];
    }
    for (int64_t l = 0; l < kLanes; ++l) {
      total.sum += sum[l];
      total.sum_xe += sum_xe[l];
      total.sum_z += sum_z[l];
    }
    out[r] = total;
  }
}

// d logit / d (hidden · weight + bias), from the finished logit.
FASTPT_INLINE float logit_slope(float z, float scale, float softcap) {
  const float t = z / softcap;
  return softcap > 0.0f ? scale * (1.0f - t * t) : scale;
}

FASTPT_INLINE float logit_gradient(float z, const RowGradient& g, float scale, float softcap) {
  const float log_p = floored(z - g.max - g.log_sum);
  const float dz = exp_f(log_p) * (g.of_p + g.of_p_log_p * log_p) + g.of_all;
  return dz * logit_slope(z, scale, softcap);
}

// The tile's logits become their gradients, rounded into out [rows, ldo] with zeros up to an even number of columns.
// The target's entry, by far the largest, goes unrounded to at_target [rows] instead, where `first` is the tile's first
// class.
template <typename T>
void tile_gradient(int64_t rows, int64_t columns, int64_t ld, float* z, const RowGradient* gradient, int64_t first,
                   float scale, float softcap, float* dbias, float* at_target, int64_t ldo, T* out) {
  for (int64_t r = 0; r < rows; ++r, z += ld, out += ldo) {
    const RowGradient g = gradient[r];
    const int64_t target = g.target - first;
    const bool has_target = target >= 0 && target < columns;
    const float slope = has_target ? logit_slope(z[target], scale, softcap) : 0.0f;
    for (int64_t j = 0; j < columns; ++j) z[j] = logit_gradient(z[j], g, scale, softcap);
    if (has_target) at_target[r] = z[target] += g.of_target * slope;
    if (dbias != nullptr) {
      for (int64_t j = 0; j < columns; ++j) dbias[j] += z[j];
    }
    for (int64_t j = 0; j < columns; ++j) out[j] = from_float<T>(z[j]);
    if (has_target) out[target] = from_float<T>(0.0f);
    if (columns % 2 != 0) out[columns] = from_float<T>(0.0f);
  }
}

// y += a x
template <typename T>
void add_scaled(int64_t n, float a, const T* x, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] += a * to_float(x[i]);
}

// out = a x + the sum of `parts` arrays that lie `stride` apart, rounded once.
template <typename T>
void sum_parts(int64_t n, int64_t parts, int64_t stride, const float* in, float a, const T* x, T* out) {
  for (int64_t i = 0; i < n; ++i) {
    float sum = in[i];
    for (int64_t p = 1; p < parts; ++p) sum += in[p * stride + i];
    out[i] = from_float<T>(sum + a * to_float(x[i]));
  }
}
