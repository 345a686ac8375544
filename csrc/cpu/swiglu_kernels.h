// swiglu on raw pointers: one pass, float32 inside, one rounding at the store.

template <typename T>
void swiglu_forward(int64_t n, const T* gate, const T* up, T* out) {
  for (int64_t i = 0; i < n; ++i) {
    const float g = to_float(gate[i]);
    out[i] = from_float<T>(g * sigmoid_f(g) * to_float(up[i]));
  }
}

template <typename T>
void swiglu_backward(int64_t n, const T* grad, const T* gate, const T* up, T* dgate, T* dup) {
  for (int64_t i = 0; i < n; ++i) {
    const float g = to_float(gate[i]), d = to_float(grad[i]), s = sigmoid_f(g);
    dgate[i] = from_float<T>(d * to_float(up[i]) * s * (1.0f + g * (1.0f - s)));
    dup[i] = from_float<T>(d * g * s);
  }
}
