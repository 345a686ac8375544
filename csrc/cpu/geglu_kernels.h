// geglu on raw pointers: one pass, float32 inside, one rounding at the store.
#include "cpu/gelu.h"

template <typename T, bool IsTanh>
void geglu_forward(int64_t n, const T* gate, const T* up, T* out) {
  for (int64_t i = 0; i < n; ++i) {
    const float g = to_float(gate[i]);
    out[i] = from_float<T>(g * gelu_of<IsTanh>(g).s * to_float(up[i]));
  }
}

template <typename T, bool IsTanh>
void geglu_backward(int64_t n, const T* grad, const T* gate, const T* up, T* dgate, T* dup) {
  for (int64_t i = 0; i < n; ++i) {
    const float g = to_float(gate[i]), d = to_float(grad[i]);
    const Gelu gelu = gelu_of<IsTanh>(g);
    dgate[i] = from_float<T>(d * to_float(up[i]) * gelu.slope);
    dup[i] = from_float<T>(d * g * gelu.s);
  }
}
