// bias_gelu on rows: one pass, float32 inside, one rounding at the store; the sum x + bias is not rounded.
#include "cpu/gelu.h"

template <typename T, bool IsTanh>
void bias_gelu_rows(int64_t rows, int64_t D, const T* x, const float* bias, T* out) {
  for (int64_t t = 0; t < rows; ++t, x += D, out += D) {
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) {
      const float u = to_float(x[d]) + bias[d];
      out[d] = from_float<T>(u * gelu_of<IsTanh>(u).s);
    }
  }
}

// dbias += dx before its rounding, unless null.
template <typename T, bool IsTanh>
void bias_gelu_backward_rows(int64_t rows, int64_t D, const T* grad, const T* x, const float* bias, T* dx,
                             float* dbias) {
  for (int64_t t = 0; t < rows; ++t, grad += D, x += D, dx += D) {
    if (dbias != nullptr) {
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) {
        const float du = to_float(grad[d]) * gelu_of<IsTanh>(to_float(x[d]) + bias[d]).slope;
        dx[d] = from_float<T>(du);
        dbias[d] += du;
      }
    } else {
#pragma omp simd
      for (int64_t d = 0; d < D; ++d)
        dx[d] = from_float<T>(to_float(grad[d]) * gelu_of<IsTanh>(to_float(x[d]) + bias[d]).slope);
    }
  }
}
