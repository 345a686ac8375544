// Sixteen dot products at a time, rows x columns of the result = 1x16, 2x8, 4x4 or 8x2: each has one vector of partial
// sums, and four rounds of pairwise additions turn the sixteen vectors into one of sixteen results.

typedef float floats16 __attribute__((vector_size(64)));

// Lane i of the result is the sum of vectors[i]: lanes 8, then 4, 2 and 1 apart, alike for all sixteen.
FASTPT_INLINE floats16 sums_of_lanes(const floats16 (&vectors)[16]) {
  floats16 quarters[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    floats16 halves[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const floats16 a = vectors[j + 8 * i], b = vectors[j + 8 * i + 4];
      halves[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                  __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    const floats16 a = halves[0], b = halves[1];
    quarters[j] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                  __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
  floats16 pairs[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const floats16 a = quarters[2 * i], b = quarters[2 * i + 1];
    pairs[i] = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
  return __builtin_shufflevector(pairs[0], pairs[1], 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
         __builtin_shufflevector(pairs[0], pairs[1], 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
}

FASTPT_INLINE floats16 wide_load(const float* p) {
  floats16 out;
  std::memcpy(&out, p, sizeof out);
  return out;
}
FASTPT_INLINE floats16 wide_load(const bf16* p) {
  typedef uint16_t halves16 __attribute__((vector_size(32)));
  typedef uint32_t words16 __attribute__((vector_size(64)));
  halves16 bits;
  std::memcpy(&bits, p, sizeof bits);
  return (floats16)(__builtin_convertvector(bits, words16) << 16);
}

// a * b + c, always fused where the target can: GCC contracts it in one tile shape and not in another, and a row's
// result would depend on the rows beside it.
FASTPT_INLINE floats16 multiply_add(floats16 a, floats16 b, floats16 c) {
#if FASTPT_ISA_LEVEL >= 2
  return (floats16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif FASTPT_ISA_LEVEL == 1
  __m256 halves[3][2];
  std::memcpy(halves[0], &a, sizeof a);
  std::memcpy(halves[1], &b, sizeof b);
  std::memcpy(halves[2], &c, sizeof c);
  for (int i = 0; i < 2; ++i) halves[2][i] = _mm256_fmadd_ps(halves[0][i], halves[1][i], halves[2][i]);
  std::memcpy(&c, halves[2], sizeof c);
  return c;
#else
  return a * b + c;
#endif
}

// What one step of a dot product takes from a row: kLength elements, zeros after the first `n`.
template <typename T>
struct Chunk {
  static constexpr int64_t kLength = 16;
  floats16 values;

  static FASTPT_INLINE Chunk load(const T* p) { return {wide_load(p)}; }
  static FASTPT_INLINE Chunk load_some(const T* p, int64_t n) {
    T some[kLength] = {};
    std::copy_n(p, n, some);
    return {wide_load(some)};
  }
  static FASTPT_INLINE floats16 dot(floats16 sum, Chunk a, Chunk b) { return multiply_add(a.values, b.values, sum); }
};

#if FASTPT_ISA_LEVEL >= 3
template <>
struct Chunk<bf16> {
  static constexpr int64_t kLength = 32;
  __m512i values;

  static FASTPT_INLINE Chunk load(const bf16* p) { return {_mm512_loadu_si512(p)}; }
  static FASTPT_INLINE Chunk load_some(const bf16* p, int64_t n) {
    return {_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << n) - 1), p)};
  }
  static FASTPT_INLINE floats16 dot(floats16 sum, Chunk a, Chunk b) {
    return (floats16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a.values, (__m512bh)b.values);
  }
};
#endif

// How far before their use weights are asked for, which the hardware does not do for tiles of two rows of W.
constexpr int64_t kAheadBytes = 12 * 1024;

// rows <= Rows and columns <= 16 / Rows of them are wanted; the others repeat the last one.
template <typename T, int Rows, bool Prefetches>
void few_rows_tile(int64_t rows, int64_t columns, int64_t K, const T* x, int64_t ldx, const T* W, int64_t ldw,
                   float* out, int64_t ldo) {
  constexpr int kColumns = 16 / Rows;
  using C = Chunk<T>;
  const T *x_rows[Rows], *w_rows[kColumns];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) x_rows[r] = x + std::min<int64_t>(r, rows - 1) * ldx;
#pragma GCC unroll 16
  for (int c = 0; c < kColumns; ++c) w_rows[c] = W + std::min<int64_t>(c, columns - 1) * ldw;
  floats16 sums[16] = {};
  int64_t k = 0;
  const int64_t tile_bytes = kColumns * ldw * static_cast<int64_t>(sizeof(T));
  const int64_t ahead = std::max<int64_t>(1, kAheadBytes / tile_bytes) * kColumns * ldw;
  const auto step = [&](auto load) __attribute__((always_inline)) {
    C w[kColumns];
#pragma GCC unroll 16
    for (int c = 0; c < kColumns; ++c) {
      w[c] = load(w_rows[c]);
      if (Prefetches) __builtin_prefetch(w_rows[c] + k + ahead);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const C a = load(x_rows[r]);
#pragma GCC unroll 16
      for (int c = 0; c < kColumns; ++c) sums[r * kColumns + c] = C::dot(sums[r * kColumns + c], a, w[c]);
    }
  };
  for (; k + C::kLength <= K; k += C::kLength) step([k](const T* row) { return C::load(row + k); });
  if (k < K) step([k, K](const T* row) { return C::load_some(row + k, K - k); });
  float results[16];
  const floats16 totals = sums_of_lanes(sums);
  std::memcpy(results, &totals, sizeof results);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) out[r * ldo + c] = results[r * kColumns + c];
}

template <typename T, int Rows>
void few_rows_by(int64_t M, int64_t N, int64_t K, const T* x, int64_t ldx, const T* W, int64_t ldw, float* out,
                 int64_t ldo) {
  constexpr int64_t kColumns = 16 / Rows;
  for (int64_t n = 0; n < N; n += kColumns)
    for (int64_t m = 0; m < M; m += Rows) {
      const auto tile = m == 0 ? few_rows_tile<T, Rows, true> : few_rows_tile<T, Rows, false>;  // then W is in L1
      tile(std::min<int64_t>(Rows, M - m), std::min(kColumns, N - n), K, x + m * ldx, ldx, W + n * ldw, ldw,
           out + m * ldo + n, ldo);
    }
}

template <typename T>
void few_rows_product(int64_t M, int64_t N, int64_t K, const T* x, int64_t ldx, const T* W, int64_t ldw, float* out,
                      int64_t ldo) {
  const auto product = M == 1   ? few_rows_by<T, 1>
                       : M == 2 ? few_rows_by<T, 2>
                       : M <= 4 ? few_rows_by<T, 4>
                                : few_rows_by<T, 8>;
  product(M, N, K, x, ldx, W, ldw, out, ldo);
}
