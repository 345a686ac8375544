// Register tiles of the attention kernels: products of small matrices whose results are used while they are still in
// registers. An element of A and B is a 32-bit word, a float or a pair of bfloat16 along the summed dimension; a vector
// holds kLanes columns. Included by the kernel headers, inside their namespace: no #include, no #pragma once here.

// Vectors of the machine's own width: GCC keeps wider ones in memory.
constexpr int kLanes = FASTPT_ISA_LEVEL >= 2 ? 16 : FASTPT_ISA_LEVEL == 1 ? 8 : 4;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

// 6 x 4 sums, 4 columns and 1 element of A fill 29 of 32 registers and load less than the multipliers take; 2 x 4
// fit 16.
constexpr int kTileRows = FASTPT_ISA_LEVEL >= 2 ? 6 : 2;
constexpr int kTileVectors = 4;

constexpr float kLog2E = 1.44269504088896341f;

template <typename T>
constexpr int kWord = 4 / static_cast<int>(sizeof(T));  // elements

template <typename V>
FASTPT_INLINE V load_vector(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <typename V>
FASTPT_INLINE void store_vector(void* to, V v) {
  std::memcpy(to, &v, sizeof v);
}
FASTPT_INLINE Floats splat(float x) {
#if FASTPT_ISA_LEVEL >= 2
  return (Floats)_mm512_set1_ps(x);
#else
  return x - Floats{};
#endif
}
FASTPT_INLINE Words splat_word(const void* from) {
  int32_t w;
  std::memcpy(&w, from, sizeof w);
#if FASTPT_ISA_LEVEL >= 2
  return (Words)_mm512_set1_epi32(w);
#else
  return (Words)(w - Ints{});
#endif
}

FASTPT_INLINE Floats larger(Floats bound, Floats x) {  // NaN in x stays
#if FASTPT_ISA_LEVEL >= 2
  return (Floats)_mm512_maskz_max_ps(0xffff, (__m512)bound, (__m512)x);  // maskz: GCC warns about the plain one
#else
  return x < bound ? bound : x;
#endif
}
FASTPT_INLINE bool any_above(Floats x, Floats bound) {
#if FASTPT_ISA_LEVEL >= 2
  return _mm512_cmp_ps_mask((__m512)x, (__m512)bound, _CMP_GT_OQ) != 0;
#else
  int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= (x > bound)[i];
  return found != 0;
#endif
}
// x with neighbouring groups of kGroup lanes swapped.
template <int kGroup>
FASTPT_INLINE Floats swapped(Floats x) {
#if FASTPT_ISA_LEVEL >= 2
  if constexpr (kGroup == 8) return __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  if constexpr (kGroup == 4) return __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  if constexpr (kGroup == 2) return __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  return __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#else
  Floats y = {};
  for (int i = 0; i < kLanes; ++i) y[i] = x[i ^ kGroup];
  return y;
#endif
}
template <int kGroup = kLanes / 2>
FASTPT_INLINE float lane_max(Floats x) {
  x = larger(x, swapped<kGroup>(x));
  if constexpr (kGroup > 1) return lane_max<kGroup / 2>(x);
  return x[0];
}
template <int kGroup = kLanes / 2>
FASTPT_INLINE float lane_sum(Floats x) {
  x += swapped<kGroup>(x);
  if constexpr (kGroup > 1) return lane_sum<kGroup / 2>(x);
  return x[0];
}

// a b + c, rounded once where the target can: GCC contracts the expression only from -O2 on.
FASTPT_INLINE Floats fused(Floats a, Floats b, Floats c) {
#if FASTPT_ISA_LEVEL >= 2
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif FASTPT_ISA_LEVEL == 1
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// c + a b, word by word.
template <typename T>
FASTPT_INLINE Floats multiply_add(Words a, Words b, Floats c) {
  if constexpr (std::is_same_v<T, float>) return fused((Floats)a, (Floats)b, c);
#if FASTPT_ISA_LEVEL >= 3
  return (Floats)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#else
  c = fused((Floats)(a << 16), (Floats)(b << 16), c);
  return fused((Floats)(a & 0xffff0000u), (Floats)(b & 0xffff0000u), c);
#endif
}

// sums += A · B over `words` words. A's word (r, k) is at row r of stride lda elements, or for kTransposed at row k of
// stride lda words; B has rows of ldb words.
template <typename T, bool kTransposed, int kRows, int kVectors>
FASTPT_INLINE void accumulate(int64_t words, const T* a, int64_t lda, const T* b, int64_t ldb,
                              Floats (&sums)[kRows][kVectors]) {
  for (int64_t k = 0; k < words; ++k) {
    Words columns[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) columns[v] = load_vector<Words>(b + (k * ldb + kLanes * v) * kWord<T>);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Words element = splat_word(a + (kTransposed ? (k * lda + r) * kWord<T> : r * lda + k * kWord<T>));
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[r][v] = multiply_add<T>(element, columns[v], sums[r][v]);
    }
  }
}

template <typename T, bool kTransposed, int kRows, int kVectors>
void product_tile(int64_t words, const T* a, int64_t lda, const T* b, int64_t ldb, float* c, int64_t ldc) {
  Floats sums[kRows][kVectors] = {};  // C joins at the end: sums of sums err less than one long sum
  accumulate<T, kTransposed, kRows, kVectors>(words, a, lda, b, ldb, sums);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      float* at = c + r * ldc + kLanes * v;
      store_vector(at, load_vector<Floats>(at) + sums[r][v]);
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
  for (int64_t n = 0; n < columns; n += kLanes * kTileVectors) {
    const int64_t vectors = std::min<int64_t>(kTileVectors, (columns - n) / kLanes);
    for (int64_t i = 0; i < groups.groups; ++i) {
      const int64_t r = groups.begin(i), height = groups.begin(i + 1) - r;
      const T *ar = a + r * a_row, *bn = b + n * kWord<T>;
      float* cn = c + r * ldc + n;
      if (vectors == 4) {
        product_rows<T, kTransposed, 4>(height, words, ar, lda, bn, ldb, cn, ldc);
      } else if (vectors == 3) {
        product_rows<T, kTransposed, 3>(height, words, ar, lda, bn, ldb, cn, ldc);
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
FASTPT_INLINE Floats power_of_2(Floats y, float factor) {
  constexpr float kMagic = 12582912.0f + 127.0f;  // adding it leaves n + 127 in the low bits
  y = larger(splat(-127.0f / factor), y);
  const Floats shifted = fused(y, splat(factor), splat(kMagic)), n = shifted - splat(kMagic);
  const Floats f = fused(y, splat(factor), -n);
  Floats p;
  if constexpr (std::is_same_v<T, float>) {
    p = fused(splat(1.535336196e-4f), f, splat(1.339887502e-3f));
    p = fused(p, f, splat(9.618436918e-3f));
    p = fused(p, f, splat(5.550332367e-2f));
    p = fused(p, f, splat(2.402264774e-1f));
    p = fused(p, f, splat(6.931471825e-1f));
  } else {
    p = fused(splat(9.582852945e-3f), f, splat(5.590642616e-2f));
    p = fused(p, f, splat(2.402409911e-1f));
    p = fused(p, f, splat(6.931241751e-1f));
  }
  p = fused(p, f, splat(1.0f));
  return p * (Floats)((Words)shifted << 23);
}

// The bits of x rounded to bfloat16, nearest even. A NaN here came out of arithmetic, so no payload can overflow.
FASTPT_INLINE Words bf16_bits(Floats x) {
  const Words bits = (Words)x;
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

// kLanes elements of a row.
FASTPT_INLINE void store_row(float* to, Floats x) {
  store_vector(to, x);
}
FASTPT_INLINE void store_row(bf16* to, Floats x) {
  typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
#if FASTPT_ISA_LEVEL >= 3
  const Halves rounded = (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
  const Halves rounded = __builtin_convertvector(bf16_bits(x), Halves);
#endif
  std::memcpy(to, &rounded, sizeof rounded);
}

// Rows r and r + 1 of a matrix that is to be summed over its rows: words for bfloat16, else two rows ld apart.
FASTPT_INLINE void store_pair(float* to, int64_t ld, Floats even, Floats odd) {
  store_vector(to, even);
  store_vector(to + ld, odd);
}
FASTPT_INLINE void store_pair(bf16* to, int64_t, Floats even, Floats odd) {
#if FASTPT_ISA_LEVEL >= 3
  const auto halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  const Words order = {0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007,
                       0x180008, 0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f};
  store_vector(to, (Words)_mm512_permutexvar_epi16((__m512i)order, halves));
#else
  store_vector(to, bf16_bits(even) | (bf16_bits(odd) << 16));
#endif
}

// -inf where rows from `row` on do not see the lanes from `lane` on.
template <int kRows, int kVectors>
FASTPT_INLINE void hide(const Visible& seen, int64_t row, int64_t lane, Floats (&scores)[kRows][kVectors]) {
  if (seen.first(row + kRows - 1) <= lane && seen.last(row) >= lane + kLanes * kVectors) return;
  Ints index = {};
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) index[i] = i;
  const Floats unseen = splat(-std::numeric_limits<float>::infinity());
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const int32_t first = static_cast<int32_t>(seen.first(row + r) - lane);
    const int32_t last = static_cast<int32_t>(seen.last(row + r) - lane);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const Ints at = index + kLanes * v;
      scores[r][v] = ((at >= first) & (at < last)) ? scores[r][v] : unseen;
    }
  }
}

// Within an ulp or so: (1 - t) / (1 + t) of t = e^-2|x|, and near 0, where 1 - t cancels, the odd series.
FASTPT_INLINE Floats tanh_v(Floats x) {
  const Words sign = (Words)x & 0x80000000u;
  const Floats a = (Floats)((Words)x ^ sign), s = a * a, t = power_of_2<float>(-a, 2.0f * kLog2E);
  const Floats series = a + a * s * (-1.0f / 3 + s * (2.0f / 15 + s * (-17.0f / 315 + s * (62.0f / 2835))));
  const Floats magnitude = a < 0.25f ? series : (1.0f - t) / (1.0f + t);
  return (Floats)((Words)magnitude | sign);
}

// score -> softcap * tanh(score * inner). On a copy in memory: scores whose address is taken would not stay in
// registers, and not inlined, as it is rare and would double the code of every tile.
__attribute__((noinline)) inline void cap_scores(int n, float inner, float softcap, float* scores) {
  for (int i = 0; i < n; i += kLanes)
    store_vector(scores + i, splat(softcap) * tanh_v(load_vector<Floats>(scores + i) * splat(inner)));
}
template <int kRows, int kVectors>
FASTPT_INLINE void cap(float inner, float softcap, Floats (&scores)[kRows][kVectors]) {
  float copy[kRows * kVectors * kLanes];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store_vector(copy + kLanes * (r * kVectors + v), scores[r][v]);
  cap_scores(kRows * kVectors * kLanes, inner, softcap, copy);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) scores[r][v] = load_vector<Floats>(copy + kLanes * (r * kVectors + v));
}

// out [rows, dim] = factor * in, rounded once; in has rows of `columns`, a multiple of 16.
template <typename T>
void attention_store(int64_t rows, int64_t dim, int64_t columns, const float* in, float factor, int64_t out_stride,
                     T* out) {
  for (int64_t r = 0; r < rows; ++r, in += columns, out += out_stride) {
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) store_row(out + d, load_vector<Floats>(in + d) * splat(factor));
    for (; d < dim; ++d) out[d] = from_float<T>(in[d] * factor);
  }
}
