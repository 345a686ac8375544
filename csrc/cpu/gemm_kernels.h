// The fallback tile where brgemm is not offered, vectorised over N; VNNI packing and transposes.

template <bool IsVnni, typename T>
void tile_loops(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool accumulate, const T* A,
                const T* B, float* C) {
  constexpr int64_t kColumns = 64;
  for (int64_t n0 = 0; n0 < N; n0 += kColumns) {
    const int64_t columns = std::min(kColumns, N - n0);
    for (int64_t m = 0; m < M; ++m) {
      float sums[kColumns] = {};  // C joins at the end: sums of sums err less than one long sum
      if constexpr (IsVnni) {
        for (int64_t k = 0; k < K; k += 2) {
          const float a0 = to_float(A[m * lda + k]), a1 = k + 1 < K ? to_float(A[m * lda + k + 1]) : 0.0f;
          const T* row = B + (k / 2) * ldb * 2 + n0 * 2;
          for (int64_t n = 0; n < columns; ++n) sums[n] += a0 * to_float(row[2 * n]) + a1 * to_float(row[2 * n + 1]);
        }
      } else {
        for (int64_t k = 0; k < K; ++k) {
          const float a = to_float(A[m * lda + k]);
          const T* row = B + k * ldb + n0;
          for (int64_t n = 0; n < columns; ++n) sums[n] += a * to_float(row[n]);
        }
      }
      for (int64_t n = 0; n < columns; ++n) C[m * ldc + n0 + n] = sums[n] + (accumulate ? C[m * ldc + n0 + n] : 0.0f);
    }
  }
}

void vnni_rows(int64_t K, int64_t N, int64_t ldb, int64_t ldp, const bf16* B, bf16* packed) {
  for (int64_t k = 0; k < K; k += 2) {
    bf16* out = packed + k / 2 * ldp * 2;
    const bf16* even = B + k * ldb;
    const bf16* odd = even + ldb;
    if (k + 1 < K) {
      for (int64_t n = 0; n < N; ++n) {  // one word a pair: this vectorises better than two stores
        const uint32_t pair = even[n].x | static_cast<uint32_t>(odd[n].x) << 16;
        std::memcpy(out + 2 * n, &pair, sizeof pair);
      }
    } else {
      for (int64_t n = 0; n < N; ++n) {
        out[2 * n] = even[n];
        out[2 * n + 1].x = 0;
      }
    }
  }
}

// Transposes go by blocks of 16 x 16 words in registers where there are 32 vectors of that width, elsewhere by plain
// loops, which the smaller register files do better.
constexpr int64_t kTransposeBlock = FASTPT_ISA_LEVEL >= 2 ? 16 : std::numeric_limits<int32_t>::max();

// Sixteen vectors of sixteen 32-bit words: four rounds of interleaving row i with row i + 8 transpose them.
typedef uint32_t words16 __attribute__((vector_size(64)));

FASTPT_INLINE void transpose_16x16(words16 (&rows)[16]) {
#pragma GCC unroll 4
  for (int round = 0; round < 4; ++round) {
    words16 mixed[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      mixed[2 * i] =
          __builtin_shufflevector(rows[i], rows[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      mixed[2 * i + 1] =
          __builtin_shufflevector(rows[i], rows[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) rows[i] = mixed[i];
  }
}

// out[c, r] = in[r, c] for 32-bit words at any byte address; in [rows, columns], strides in bytes.
FASTPT_INLINE void transpose_words(int64_t rows, int64_t columns, int64_t in_stride, int64_t out_stride, const char* in,
                                   char* out) {
  const int64_t whole_rows = rows / kTransposeBlock * 16, whole_columns = columns / kTransposeBlock * 16;
  for (int64_t r = 0; r < whole_rows; r += 16) {
    for (int64_t c = 0; c < whole_columns; c += 16) {
      words16 block[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) std::memcpy(&block[i], in + (r + i) * in_stride + c * 4, sizeof block[i]);
      transpose_16x16(block);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) std::memcpy(out + (c + i) * out_stride + r * 4, &block[i], sizeof block[i]);
    }
  }
  for (int64_t r0 = 0; r0 < rows; r0 += 16)  // 16 rows stay in L1
    for (int64_t c = r0 < whole_rows ? whole_columns : 0; c < columns; ++c)
      for (int64_t r = r0; r < std::min(rows, r0 + 16); ++r)
        std::memcpy(out + c * out_stride + r * 4, in + r * in_stride + c * 4, 4);
}

// A pair (k, k + 1) of Bt's row n is one 32-bit word of packed: a transpose of words.
void vnni_transposed(int64_t K, int64_t N, int64_t ldbt, int64_t ldp, const bf16* Bt, bf16* packed) {
  transpose_words(N, K / 2, ldbt * 2, ldp * 4, reinterpret_cast<const char*>(Bt), reinterpret_cast<char*>(packed));
  if (K % 2 != 0) {
    for (int64_t n = 0; n < N; ++n) {
      bf16* out = packed + (K / 2 * ldp + n) * 2;
      out[0] = Bt[n * ldbt + K - 1];
      out[1].x = 0;
    }
  }
}

void transpose_float(int64_t rows, int64_t columns, int64_t in_stride, int64_t out_stride, const float* in,
                     float* out) {
  transpose_words(rows, columns, in_stride * 4, out_stride * 4, reinterpret_cast<const char*>(in),
                  reinterpret_cast<char*>(out));
}

// Rows r and r + 1 interleaved are 32-bit words, whose transpose is two elements of each row of out at a time.
void transpose_bf16(int64_t rows, int64_t columns, int64_t in_stride, int64_t out_stride, const bf16* in, bf16* out) {
  typedef uint16_t halves16 __attribute__((vector_size(32)));
  const int64_t whole_rows = rows / (2 * kTransposeBlock) * 32, whole_columns = columns / kTransposeBlock * 16;
  for (int64_t r = 0; r < whole_rows; r += 32) {
    for (int64_t c = 0; c < whole_columns; c += 16) {
      words16 block[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        halves16 even, odd;
        std::memcpy(&even, in + (r + 2 * i) * in_stride + c, sizeof even);
        std::memcpy(&odd, in + (r + 2 * i + 1) * in_stride + c, sizeof odd);
        block[i] = __builtin_convertvector(even, words16) | (__builtin_convertvector(odd, words16) << 16);
      }
      transpose_16x16(block);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) std::memcpy(out + (c + i) * out_stride + r, &block[i], sizeof block[i]);
    }
  }
  for (int64_t r0 = 0; r0 < rows; r0 += 16)
    for (int64_t c = r0 < whole_rows ? whole_columns : 0; c < columns; ++c)
      for (int64_t r = r0; r < std::min(rows, r0 + 16); ++r) out[c * out_stride + r] = in[r * in_stride + c];
}
