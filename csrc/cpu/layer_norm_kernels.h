// layer_norm on rows: float32 inside; sums run in lanes (math.h), in an order that depends on D alone.

// The variance is taken about the mean in a second pass over the cached row: no cancellation.
template <typename T>
void layer_norm_rows(int64_t rows, int64_t D, const T* x, const float* weight, const float* bias, float eps, T* y,
                     float* mean, float* rstd) {
  for (int64_t t = 0; t < rows; ++t, x += D, y += D) {
    float sums[kSumLanes] = {}, squares[kSumLanes] = {};
    in_lanes(D, [&](int64_t d, int lane) __attribute__((always_inline)) { sums[lane] += to_float(x[d]); });
    const float m = added(sums) / D;
    in_lanes(D, [&](int64_t d, int lane) __attribute__((always_inline)) {
      const float away = to_float(x[d]) - m;
      squares[lane] += away * away;
    });
    const float r = 1.0f / std::sqrt(added(squares) / D + eps);
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) y[d] = from_float<T>((to_float(x[d]) - m) * r * weight[d] + bias[d]);
    mean[t] = m;
    rstd[t] = r;
  }
}

// dx = r (g - mean(g) - x̂ mean(g x̂)) + grad_sum with g = grad * weight; dweight += grad x̂ and dbias += grad. The last
// three may be null.
template <typename T>
void layer_norm_backward_rows(int64_t rows, int64_t D, const T* grad, const T* x, const float* mean, const float* rstd,
                              const float* weight, const T* grad_sum, T* dx, float* dweight, float* dbias) {
  for (int64_t t = 0; t < rows; ++t, grad += D, x += D, dx += D) {
    const float m = mean[t], r = rstd[t];
    float sums[kSumLanes] = {}, dots[kSumLanes] = {};
    in_lanes(D, [&](int64_t d, int lane) __attribute__((always_inline)) {
      const float g = to_float(grad[d]) * weight[d];
      sums[lane] += g;
      dots[lane] += g * ((to_float(x[d]) - m) * r);
    });
    const float shift = added(sums) / D, along = added(dots) / D;
    if (grad_sum != nullptr) {
#pragma omp simd
      for (int64_t d = 0; d < D; ++d)
        dx[d] = from_float<T>(r * (to_float(grad[d]) * weight[d] - shift - (to_float(x[d]) - m) * r * along) +
                              to_float(grad_sum[d]));
      grad_sum += D;
    } else {
#pragma omp simd
      for (int64_t d = 0; d < D; ++d)
        dx[d] = from_float<T>(r * (to_float(grad[d]) * weight[d] - shift - (to_float(x[d]) - m) * r * along));
    }
    if (dweight != nullptr) {
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) dweight[d] += to_float(grad[d]) * ((to_float(x[d]) - m) * r);
    }
    if (dbias != nullptr) {
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) dbias[d] += to_float(grad[d]);
    }
  }
}

// s = dropout(x) + residual, rounded, stored and normed. Rows are numbered from `first` for the draw.
template <typename X, typename R, bool Drops>
void add_layer_norm_rows(int64_t first, int64_t rows, int64_t D, const X* x, const R* residual, DropoutRule dropout,
                         uint64_t seed, const float* weight, const float* bias, float eps, R* s, R* y, float* mean,
                         float* rstd) {
  for (int64_t t = 0; t < rows; ++t) {
    const uint32_t key = Drops ? dropout_key(seed, first + t) : 0;
    const X* row = x + t * D;
    const R* other = residual + t * D;
    R* sum = s + t * D;
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) {
      const float value = to_float(row[d]);
      const float kept = Drops ? dropped_out(value, key, static_cast<uint32_t>(d), dropout) : value;
      sum[d] = from_float<R>(kept + to_float(other[d]));
    }
    layer_norm_rows<R>(1, D, sum, weight, bias, eps, y + t * D, mean + t, rstd + t);
  }
}

// The gradient of s = that of its norm + grad_sum (may be null) goes to ds, and dropped out to dx unless it is null.
template <typename X, typename R, bool Drops>
void add_layer_norm_backward_rows(int64_t first, int64_t rows, int64_t D, const R* grad, const R* grad_sum, const R* s,
                                  DropoutRule dropout, uint64_t seed, const float* mean, const float* rstd,
                                  const float* weight, R* ds, X* dx, float* dweight, float* dbias) {
  for (int64_t t = 0; t < rows; ++t) {
    R* out = ds + t * D;
    layer_norm_backward_rows<R>(1, D, grad + t * D, s + t * D, mean + t, rstd + t, weight,
                                grad_sum == nullptr ? nullptr : grad_sum + t * D, out, dweight, dbias);
    if (dx == nullptr) continue;
    const uint32_t key = Drops ? dropout_key(seed, first + t) : 0;
    X* dropped = dx + t * D;
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) {
      const float value = to_float(out[d]);
      dropped[d] = from_float<X>(Drops ? dropped_out(value, key, static_cast<uint32_t>(d), dropout) : value);
    }
  }
}
