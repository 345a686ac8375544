// layer_norm on rows: float32 inside; sums run in vector lanes (omp simd), in an order that depends on D alone.

// The variance is taken about the mean in a second pass over the cached row: no cancellation.
template <typename T>
void layer_norm_rows(int64_t rows, int64_t D, const T* x, const float* weight, const float* bias, float eps, T* y,
                     float* mean, float* rstd) {
  for (int64_t t = 0; t < rows; ++t, x += D, y += D) {
    float sum = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < D; ++d) sum += to_float(x[d]);
    const float m = sum / D;
#pragma omp simd reduction(+ : squares)
    for (int64_t d = 0; d < D; ++d) squares += (to_float(x[d]) - m) * (to_float(x[d]) - m);
    const float r = 1.0f / std::sqrt(squares / D + eps);
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) y[d] = from_float<T>((to_float(x[d]) - m) * r * weight[d] + bias[d]);
    mean[t] = m;
    rstd[t] = r;
  }
}

// dx = r (g - mean(g) - x̂ mean(g x̂)) with g = grad * weight; dweight += grad x̂ and dbias += grad unless they are null.
template <typename T>
void layer_norm_backward_rows(int64_t rows, int64_t D, const T* grad, const T* x, const float* mean, const float* rstd,
                              const float* weight, T* dx, float* dweight, float* dbias) {
  for (int64_t t = 0; t < rows; ++t, grad += D, x += D, dx += D) {
    const float m = mean[t], r = rstd[t];
    float sum = 0.0f, dot = 0.0f;
#pragma omp simd reduction(+ : sum, dot)
    for (int64_t d = 0; d < D; ++d) {
      const float g = to_float(grad[d]) * weight[d];
      sum += g;
      dot += g * ((to_float(x[d]) - m) * r);
    }
    const float shift = sum / D, along = dot / D;
#pragma omp simd
    for (int64_t d = 0; d < D; ++d)
      dx[d] = from_float<T>(r * (to_float(grad[d]) * weight[d] - shift - (to_float(x[d]) - m) * r * along));
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
