// rms_norm on rows: float32 inside, `scale` is offset + weight in float32. Sums run in lanes (math.h), in an order that
// depends on D alone, so a row's result does not depend on the rows around it.

// With Adds, s = x + residual is rounded, stored, and what is normed.
template <typename T, bool Adds, bool CastsFirst>
void rms_norm_rows(int64_t rows, int64_t D, const T* x, const T* residual, const float* scale, float eps, T* s, T* y,
                   float* rstd) {
  for (int64_t t = 0; t < rows; ++t) {
    const T* row = x + t * D;
    if constexpr (Adds) {
      const T* other = residual + t * D;
      T* sum = s + t * D;
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) sum[d] = from_float<T>(to_float(row[d]) + to_float(other[d]));
      row = sum;
    }
    float squares[kSumLanes] = {};
    in_lanes(D, [&](int64_t d, int lane)
                    __attribute__((always_inline)) { squares[lane] += to_float(row[d]) * to_float(row[d]); });
    const float r = 1.0f / std::sqrt(added(squares) / D + eps);
    T* out = y + t * D;
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) {
      const float n = to_float(row[d]) * r;
      out[d] = from_float<T>((CastsFirst ? to_float(from_float<T>(n)) : n) * scale[d]);
    }
    rstd[t] = r;
  }
}

// dx = r (g - x r² mean(g x)) + grad_sum with g = grad * scale, and dweight += grad * x * r: one read of grad and x
// from memory, the second comes from the L1 cache. grad_sum and dweight may be null.
template <typename T>
void rms_norm_backward_rows(int64_t rows, int64_t D, const T* grad, const T* grad_sum, const T* x, const float* rstd,
                            const float* scale, T* dx, float* dweight) {
  for (int64_t t = 0; t < rows; ++t, grad += D, x += D, dx += D) {
    float dots[kSumLanes] = {};
    in_lanes(D, [&](int64_t d, int lane)
                    __attribute__((always_inline)) { dots[lane] += to_float(grad[d]) * scale[d] * to_float(x[d]); });
    const float r = rstd[t], along = r * r * r * (added(dots) / D);
    if (grad_sum != nullptr) {
#pragma omp simd
      for (int64_t d = 0; d < D; ++d)
        dx[d] = from_float<T>(to_float(grad[d]) * scale[d] * r - to_float(x[d]) * along + to_float(grad_sum[d]));
      grad_sum += D;
    } else {
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) dx[d] = from_float<T>(to_float(grad[d]) * scale[d] * r - to_float(x[d]) * along);
    }
    if (dweight != nullptr) {
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) dweight[d] += to_float(grad[d]) * (to_float(x[d]) * r);
    }
  }
}
