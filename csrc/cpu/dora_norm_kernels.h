// dora_norm on a tile [rows, columns] of W + s B A, whose row stride is ld.

// tile = W, in float32; weight's rows are `stride` apart.
template <typename T>
void widen_tile(int64_t rows, int64_t columns, const T* weight, int64_t stride, float* tile, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r, weight += stride, tile += ld) {
#pragma omp simd
    for (int64_t d = 0; d < columns; ++d) tile[d] = to_float(weight[d]);
  }
}

// sums[r] += the squares of row r.
inline void add_squares(int64_t rows, int64_t columns, const float* tile, int64_t ld, float* sums) {
  for (int64_t r = 0; r < rows; ++r, tile += ld) {
    float squares[kSumLanes] = {};
    in_lanes(columns, [&](int64_t d, int lane) __attribute__((always_inline)) { squares[lane] += tile[d] * tile[d]; });
    sums[r] += added(squares);
  }
}
