// sum += x, one row of a gradient into its float32 sum.
template <typename T>
void add_row(int64_t n, const T* x, float* sum) {
  for (int64_t i = 0; i < n; ++i) sum[i] += to_float(x[i]);
}
