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

// Dropout by a counter: number i of the tensor is kept when a hash of (seed, i) falls below the threshold, so that
// backward finds the mask again without storing it. Two rounds of a 32-bit mixer (multiply, xor-shift) per element.
FASTPT_INLINE bool is_kept(uint32_t key0, uint32_t key1, uint32_t threshold, uint32_t i) {
  uint32_t h = i * 0x9E3779B1u + key0;
  h = (h ^ (h >> 16)) * 0x21F0AAADu;
  h = (h ^ (h >> 15)) * 0x735A2D97u;
  h = (h ^ (h >> 15)) + key1;
  h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
  h ^= h >> 13;
  return h < threshold;
}

// out = in where kept, else 0, for rows whose first number has index `first`; they follow one another without gaps.
template <typename T>
void drop_rows(int64_t n, uint32_t key0, uint32_t key1, uint32_t threshold, int64_t first, const T* in, T* out) {
  for (int64_t i = 0; i < n; ++i) {
    const bool kept = is_kept(key0, key1, threshold, static_cast<uint32_t>(first + i));
    out[i] = kept ? in[i] : from_float<T>(0.0f);
  }
}

// tile += in where kept.
inline void add_kept(int64_t rows, int64_t columns, uint32_t key0, uint32_t key1, uint32_t threshold, int64_t first,
                     int64_t row_stride, int64_t ld, const float* in, float* tile) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const bool kept = is_kept(key0, key1, threshold, static_cast<uint32_t>(first + r * row_stride + c));
      tile[r * ld + c] += kept ? in[r * ld + c] : 0.0f;
    }
  }
}
