// What surrounds the tiles of lora_linear: splitting float32 factors into bfloat16 ones, joining their products,
// stores.

// x = hi + mid + lo, each rounded to bfloat16: three times 8 bits are all 24 of a float, so products of the parts with
// bfloat16 numbers, summed in float32, are those of x itself. Out of range parts (x infinite or NaN) stay in hi alone.
FASTPT_INLINE void split_parts(float x, bf16* hi, bf16* mid, bf16* lo) {
  *hi = from_float<bf16>(x);
  const float rest = x - to_float(*hi);
  *mid = from_float<bf16>(rest == rest ? rest : 0.0f);
  const float last = rest - to_float(*mid);
  *lo = from_float<bf16>(last == last ? last : 0.0f);
}

// Parts of n numbers, `stride` apart: hi, mid, lo for bfloat16, the number itself for float.
inline void split_numbers(int64_t n, const float* in, int64_t stride, bf16* out) {
  for (int64_t i = 0; i < n; ++i) split_parts(in[i], out + i, out + stride + i, out + 2 * stride + i);
}

// sums[r] = factor * (the parts of column r added from the smallest), for rows of C [rows, parts * R].
inline void join_parts(int64_t rows, int64_t R, int64_t parts, int64_t ldc, const float* C, float factor,
                       int64_t ld_sums, float* sums) {
  for (int64_t i = 0; i < rows; ++i, C += ldc, sums += ld_sums) {
    for (int64_t r = 0; r < R; ++r) sums[r] = C[(parts - 1) * R + r];
    for (int64_t part = parts - 2; part >= 0; --part)
      for (int64_t r = 0; r < R; ++r) sums[r] += C[part * R + r];
    for (int64_t r = 0; r < R; ++r) sums[r] *= factor;
  }
}

// The same where the parts are blocks of R rows: sums [R, columns] from C [parts * R, columns].
inline void join_row_parts(int64_t R, int64_t columns, int64_t parts, int64_t ldc, const float* C, float factor,
                           int64_t ld_sums, float* sums) {
  for (int64_t r = 0; r < R; ++r) {
    float* out = sums + r * ld_sums;
    for (int64_t c = 0; c < columns; ++c) out[c] = C[((parts - 1) * R + r) * ldc + c];
    for (int64_t part = parts - 2; part >= 0; --part)
      for (int64_t c = 0; c < columns; ++c) out[c] += C[(part * R + r) * ldc + c];
    for (int64_t c = 0; c < columns; ++c) out[c] *= factor;
  }
}

// out = round(factor * in), rows of `columns` numbers.
template <typename In, typename Out>
void convert_rows(int64_t rows, int64_t columns, int64_t ld_in, const In* in, float factor, int64_t ld_out, Out* out) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) out[r * ld_out + c] = from_float<Out>(to_float(in[r * ld_in + c]) * factor);
}

// out = round(tile + bias); bias may be null.
template <typename T>
void store_tile(int64_t rows, int64_t columns, int64_t ld, const float* tile, const float* bias, int64_t ld_out,
                T* out) {
  for (int64_t r = 0; r < rows; ++r, tile += ld, out += ld_out) {
    if (bias == nullptr) {
      for (int64_t c = 0; c < columns; ++c) out[c] = from_float<T>(tile[c]);
    } else {
      for (int64_t c = 0; c < columns; ++c) out[c] = from_float<T>(tile[c] + bias[c]);
    }
  }
}

// sums[c] += the column's numbers, in order of rows.
template <typename T>
void add_columns(int64_t rows, int64_t columns, int64_t ld, const T* in, float* sums) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) sums[c] += to_float(in[r * ld + c]);
}

// out = in where the rule keeps it, else 0; rows are numbered from `first`. The rule's scale is 1: the caller scales
// sums.
template <typename T>
void drop_rows(int64_t first, int64_t rows, int64_t columns, uint64_t seed, DropoutRule rule, const T* in, T* out) {
  for (int64_t r = 0; r < rows; ++r, in += columns, out += columns) {
    const uint32_t key = dropout_key(seed, first + r);
    for (int64_t c = 0; c < columns; ++c)
      out[c] = from_float<T>(dropped_out(to_float(in[c]), key, static_cast<uint32_t>(c), rule));
  }
}

// tile += in where kept; the tile's first number is at (first_row, first_column).
inline void add_kept(int64_t first_row, int64_t rows, int64_t first_column, int64_t columns, uint64_t seed,
                     DropoutRule rule, int64_t ld, const float* in, float* tile) {
  for (int64_t r = 0; r < rows; ++r, in += ld, tile += ld) {
    const uint32_t key = dropout_key(seed, first_row + r);
    for (int64_t c = 0; c < columns; ++c)
      tile[c] += dropped_out(in[c], key, static_cast<uint32_t>(first_column + c), rule);
  }
}
