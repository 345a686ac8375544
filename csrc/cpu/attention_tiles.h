// Register tiles of the attention kernels: products of small matrices whose results are used while they are still in
// registers. An element of A and B is a 32-bit word, a float or a pair of bfloat16 along the summed dimension; a vector
// holds 16 columns. Included by the kernel headers, inside their namespace: no #include, no #pragma once here.

typedef float floats16 __attribute__((vector_size(64)));
typedef uint32_t words16 __attribute__((vector_size(64)));
typedef int32_t ints16 __attribute__((vector_size(64)));

// 6 x 4 sums, 4 columns and 1 element of A fill 29 of 32 registers and load less than the multipliers take; where a
// vector is two registers of 16 or more, fewer.
constexpr int kTileRows = FASTPT_ISA_LEVEL >= 2 ? 6 : 2;
constexpr int kTileVectors = FASTPT_ISA_LEVEL >= 2 ? 4 : 2;

constexpr float kLog2E = 1.44269504088896341f;

template <typename T>
constexpr int kWord = 4 / static_cast<int>(sizeof(T));  // elements

template <typename V>
FASTPT_INLINE V load16(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <typename V>
FASTPT_INLINE void store16(void* to, V v) {
  std::memcpy(to, &v, sizeof v);
}
FASTPT_INLINE floats16 splat(float x) {
#if FASTPT_ISA_LEVEL >= 2
  return (floats16)_mm512_set1_ps(x);
#else
  return floats16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
#endif
}
FASTPT_INLINE words16 splat_word(const void* from) {
  int32_t w;
  std::memcpy(&w, from, sizeof w);
#if FASTPT_ISA_LEVEL >= 2
  return (words16)_mm512_set1_epi32(w);
#else
  return (words16)ints16{w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w};
#endif
}

FASTPT_INLINE floats16 larger(floats16 bound, floats16 x) {  // NaN in x stays
#if FASTPT_ISA_LEVEL >= 2
  return (floats16)_mm512_maskz_max_ps(0xffff, (__m512)bound, (__m512)x);  // maskz: GCC warns about the plain one
#else
  return x < bound ? bound : x;
#endif
}
FASTPT_INLINE bool any_above(floats16 x, floats16 bound) {
#if FASTPT_ISA_LEVEL >= 2
  return _mm512_cmp_ps_mask((__m512)x, (__m512)bound, _CMP_GT_OQ) != 0;
#else
  int32_t found = 0;
  for (int i = 0; i < 16; ++i) found |= (x > bound)[i];
  return found != 0;
#endif
}
// x with halves of 2 * kHalf lanes swapped.
template <int kHalf>
FASTPT_INLINE floats16 swapped(floats16 x) {
  if constexpr (kHalf == 8) return __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  if constexpr (kHalf == 4) return __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  if constexpr (kHalf == 2) return __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  return __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
}
FASTPT_INLINE float lane_max(floats16 x) {
  x = larger(x, swapped<8>(x));
  x = larger(x, swapped<4>(x));
  x = larger(x, swapped<2>(x));
  return larger(x, swapped<1>(x))[0];
}
FASTPT_INLINE float lane_sum(floats16 x) {
  x += swapped<8>(x);
  x += swapped<4>(x);
  x += swapped<2>(x);
  return (x + swapped<1>(x))[0];
}

// c + a b, word by word.
template <typename T>
FASTPT_INLINE floats16 multiply_add(words16 a, words16 b, floats16 c) {
  if constexpr (std::is_same_v<T, float>) return (floats16)a * (floats16)b + c;
#if FASTPT_ISA_LEVEL >= 3
  return (floats16)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#else
  c = (floats16)(a << 16) * (floats16)(b << 16) + c;
  return (floats16)(a & 0xffff0000u) * (floats16)(b & 0xffff0000u) + c;
#endif
}

// sums += A · B over `words` words. A's word (r, k) is at row r of stride lda elements, or for kTransposed at row k of
// stride lda words; B has rows of ldb words.
template <typename T, bool kTransposed, int kRows, int kVectors>
FASTPT_INLINE void accumulate(int64_t words, const T* a, int64_t lda, const T* b, int64_t ldb,
                              floats16 (&sums)[kRows][kVectors]) {
  for (int64_t k = 0; k < words; ++k) {
    words16 columns[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) columns[v] = load16<words16>(b + (k * ldb + 16 * v) * kWord<T>);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const words16 element = splat_word(a + (kTransposed ? (k * lda + r) * kWord<T> : r * lda + k * kWord<T>));
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[r][v] = multiply_add<T>(element, columns[v], sums[r][v]);
    }
  }
}

template <typename T, bool kTransposed, int kRows, int kVectors>
void product_tile(int64_t words, const T* a, int64_t lda, const T* b, int64_t ldb, float* c, int64_t ldc) {
  floats16 sums[kRows][kVectors] = {};  // C joins at the end: sums of sums err less than one long sum
  accumulate<T, kTransposed, kRows, kVectors>(words, a, lda, b, ldb, sums);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      float* at = c + r * ldc + 16 * v;
      store16(at, load16<floats16>(at) + sums[r][v]);
    }
}

// The tile of `rows` <= kRows rows.
template <typename T, bool kTransposed, int kVectors, int kRows = kTileRows>
FASTPT_INLINE void product_rows(int64_t rows, int64_t words, const T* a, int64_t lda, const T* b, int64_t ldb, float* c,
                                int64_t ldc) {
  if constexpr (kRows > 1)
    if (rows < kRows) return product_rows<T, kTransposed, kVectors, kRows - 1>(rows, words, a, lda, b, ldb, c, ldc);
  product_tile<T, kTransposed, kRows, kVectors>(words, a, lda, b, ldb, c, ldc);
}

// Rows [begin, end) of group i where n rows are cut into the fewest equal groups of at most kTileRows (a multiple of
// kStep unless it is the last).
struct RowGroups {
  int64_t rows, step, units, groups;

  FASTPT_INLINE RowGroups(int64_t rows, int64_t step = 1)
      : rows(rows),
        step(step),
        units((rows + step - 1) / step),
        groups((units + kTileRows / step - 1) / (kTileRows / step)) {}
  FASTPT_INLINE int64_t begin(int64_t i) const {
    return std::min(rows, step * (units / groups * i + std::min(i, units % groups)));
  }
};

// C [rows, columns] += A · B for `columns` a multiple of 16.
template <typename T, bool kTransposed>
void product(int64_t rows, int64_t columns, int64_t words, const T* a, int64_t lda, const T* b, int64_t ldb, float* c,
             int64_t ldc) {
  const RowGroups groups(rows);
  const int64_t a_row = kTransposed ? kWord<T> : lda;
  for (int64_t n = 0; n < columns; n += 16 * kTileVectors) {
    const int64_t vectors = std::min<int64_t>(kTileVectors, (columns - n) / 16);
    for (int64_t i = 0; i < groups.groups; ++i) {
      const int64_t r = groups.begin(i), height = groups.begin(i + 1) - r;
      const T *ar = a + r * a_row, *bn = b + n * kWord<T>;
      float* cn = c + r * ldc + n;
      if (vectors == 4) {
        if constexpr (kTileVectors == 4) product_rows<T, kTransposed, 4>(height, words, ar, lda, bn, ldb, cn, ldc);
      } else if (vectors == 3) {
        if constexpr (kTileVectors == 4) product_rows<T, kTransposed, 3>(height, words, ar, lda, bn, ldb, cn, ldc);
      } else if (vectors == 2) {
        product_rows<T, kTransposed, 2>(height, words, ar, lda, bn, ldb, cn, ldc);
      } else {
        product_rows<T, kTransposed, 1>(height, words, ar, lda, bn, ldb, cn, ldc);
      }
    }
  }
}

// 2^(y * factor) for results up to 2^127, exactly 0 below 2^-126.5 (and so for y = -inf); NaN stays. A minimax
// polynomial of 2^f on |f| <= 1/2 times 2^n: within 0.6 ulp for float; within 2^-18 for bfloat16, to which it is
// rounded.
template <typename T>
FASTPT_INLINE floats16 power_of_2(floats16 y, float factor) {
  constexpr float kMagic = 12582912.0f + 127.0f;  // adding it leaves n + 127 in the low bits
  y = larger(splat(-127.0f / factor), y);
  const floats16 shifted = y * splat(factor) + splat(kMagic), n = shifted - splat(kMagic), f = y * splat(factor) - n;
  floats16 p;
  if constexpr (std::is_same_v<T, float>) {
    p = splat(1.535336196e-4f) * f + splat(1.339887502e-3f);
    p = p * f + splat(9.618436918e-3f);
    p = p * f + splat(5.550332367e-2f);
    p = p * f + splat(2.402264774e-1f);
    p = p * f + splat(6.931471825e-1f);
  } else {
    p = splat(9.582852945e-3f) * f + splat(5.590642616e-2f);
    p = p * f + splat(2.402409911e-1f);
    p = p * f + splat(6.931241751e-1f);
  }
  p = p * f + splat(1.0f);
  return p * (floats16)((words16)shifted << 23);
}

// The bits of x rounded to bfloat16, nearest even. A NaN here came out of arithmetic, so no payload can overflow.
FASTPT_INLINE words16 bf16_bits(floats16 x) {
  const words16 bits = (words16)x;
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

// 16 elements of a row.
FASTPT_INLINE void store_row(float* to, floats16 x) {
  store16(to, x);
}
FASTPT_INLINE void store_row(bf16* to, floats16 x) {
  typedef uint16_t halves16 __attribute__((vector_size(32)));
#if FASTPT_ISA_LEVEL >= 3
  const halves16 rounded = (halves16)_mm512_cvtneps_pbh((__m512)x);
#else
  const halves16 rounded = __builtin_convertvector(bf16_bits(x), halves16);
#endif
  std::memcpy(to, &rounded, sizeof rounded);
}

// Rows r and r + 1 of a matrix that is to be summed over its rows: words for bfloat16, else two rows ld apart.
FASTPT_INLINE void store_pair(float* to, int64_t ld, floats16 even, floats16 odd) {
  store16(to, even);
  store16(to + ld, odd);
}
FASTPT_INLINE void store_pair(bf16* to, int64_t, floats16 even, floats16 odd) {
#if FASTPT_ISA_LEVEL >= 3
  const auto halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  const words16 order = {0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007,
                         0x180008, 0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f};
  store16(to, (words16)_mm512_permutexvar_epi16((__m512i)order, halves));
#else
  store16(to, bf16_bits(even) | (bf16_bits(odd) << 16));
#endif
}

// -inf where rows from `row` on do not see the lanes from `lane` on.
template <int kRows, int kVectors>
FASTPT_INLINE void hide(const Visible& seen, int64_t row, int64_t lane, floats16 (&scores)[kRows][kVectors]) {
  if (seen.first(row + kRows - 1) <= lane && seen.last(row) >= lane + 16 * kVectors) return;
  const ints16 index = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const floats16 unseen = splat(-std::numeric_limits<float>::infinity());
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const int32_t first = static_cast<int32_t>(seen.first(row + r) - lane);
    const int32_t last = static_cast<int32_t>(seen.last(row + r) - lane);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const ints16 at = index + 16 * v;
      scores[r][v] = ((at >= first) & (at < last)) ? scores[r][v] : unseen;
    }
  }
}

// Within an ulp or so: (1 - t) / (1 + t) of t = e^-2|x|, and near 0, where 1 - t cancels, the odd series.
FASTPT_INLINE floats16 tanh16(floats16 x) {
  const words16 sign = (words16)x & 0x80000000u;
  const floats16 a = (floats16)((words16)x ^ sign), s = a * a, t = power_of_2<float>(-a, 2.0f * kLog2E);
  const floats16 series = a + a * s * (-1.0f / 3 + s * (2.0f / 15 + s * (-17.0f / 315 + s * (62.0f / 2835))));
  const floats16 magnitude = a < 0.25f ? series : (1.0f - t) / (1.0f + t);
  return (floats16)((words16)magnitude | sign);
}

// score -> softcap * tanh(score * inner). On a copy in memory: scores whose address is taken would not stay in
// registers, and not inlined, as it is rare and would double the code of every tile.
__attribute__((noinline)) inline void cap_scores(int n, float inner, float softcap, float* scores) {
  for (int i = 0; i < n; i += 16)
    store16(scores + i, splat(softcap) * tanh16(load16<floats16>(scores + i) * splat(inner)));
}
template <int kRows, int kVectors>
FASTPT_INLINE void cap(float inner, float softcap, floats16 (&scores)[kRows][kVectors]) {
  float copy[kRows * kVectors * 16];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store16(copy + 16 * (r * kVectors + v), scores[r][v]);
  cap_scores(kRows * kVectors * 16, inner, softcap, copy);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) scores[r][v] = load16<floats16>(copy + 16 * (r * kVectors + v));
}

// out [rows, dim] = factor * in, rounded once; in has rows of `columns`, a multiple of 16.
template <typename T>
void attention_store(int64_t rows, int64_t dim, int64_t columns, const float* in, float factor, int64_t out_stride,
                     T* out) {
  for (int64_t r = 0; r < rows; ++r, in += columns, out += out_stride) {
    int64_t d = 0;
    for (; d + 16 <= dim; d += 16) store_row(out + d, load16<floats16>(in + d) * splat(factor));
    for (; d < dim; ++d) out[d] = from_float<T>(in[d] * factor);
  }
}
