// The fallback tile where brgemm is not offered, and VNNI packing; vectorised over N.

template <bool IsVnni, typename T>
void tile_loops(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool accumulate, const T* A,
                const T* B, float* C) {
  constexpr int64_t kColumns = 64;
  for (int64_t n0 = 0; n0 < N; n0 += kColumns) {
    const int64_t columns = std::min(kColumns, N - n0);
    for (int64_t m = 0; m < M; ++m) {
      float sums[kColumns];
      for (int64_t n = 0; n < columns; ++n) sums[n] = accumulate ? C[m * ldc + n0 + n] : 0.0f;
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
      for (int64_t n = 0; n < columns; ++n) C[m * ldc + n0 + n] = sums[n];
    }
  }
}

void vnni_rows(int64_t K, int64_t N, int64_t ldb, int64_t ldp, const bf16* B, bf16* packed) {
  for (int64_t k = 0; k < K; k += 2) {
    bf16* out = packed + k / 2 * ldp * 2;
    const bf16* even = B + k * ldb;
    const bf16* odd = even + ldb;
    if (k + 1 < K) {
      for (int64_t n = 0; n < N; ++n) {
        out[2 * n] = even[n];
        out[2 * n + 1] = odd[n];
      }
    } else {
      for (int64_t n = 0; n < N; ++n) {
        out[2 * n] = even[n];
        out[2 * n + 1].x = 0;
      }
    }
  }
}

// A pair (k, k + 1) of Bt's row n is one 32-bit word of packed: a transpose of words, in blocks that stay in L1.
void vnni_transposed(int64_t K, int64_t N, int64_t ldbt, int64_t ldp, const bf16* Bt, bf16* packed) {
  constexpr int64_t kBlock = 16;
  for (int64_t n0 = 0; n0 < N; n0 += kBlock) {
    const int64_t n1 = std::min(N, n0 + kBlock);
    for (int64_t k = 0; k + 1 < K; k += 2) {
      for (int64_t n = n0; n < n1; ++n)
        std::memcpy(packed + (k / 2 * ldp + n) * 2, Bt + n * ldbt + k, 2 * sizeof(bf16));
    }
    if (K % 2 != 0) {
      for (int64_t n = n0; n < n1; ++n) {
        bf16* out = packed + (K / 2 * ldp + n) * 2;
        out[0] = Bt[n * ldbt + K - 1];
        out[1].x = 0;
      }
    }
  }
}
