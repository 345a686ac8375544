// Small row-major GEMM tiles on one thread, C [M, N] float32 (+)= A [M, K] · B [K, N]; the only door to libtorch's
// brgemm (oneDNN's JIT kernels: AVX-512, AVX-512-BF16, AMX), which for bfloat16 wants B VNNI-packed. Elsewhere a
// vectorised loop with the same result up to the order of summation.
#pragma once

#include <cstdint>
#include <c10/util/BFloat16.h>

namespace fastpt {

// B of the bfloat16 tile is VNNI-packed: [ceil(K / 2), N, 2], K padded with zeros by pack_vnni; A must then be readable
// (and finite) up to an even K. ldb counts columns (N of the packed panel). Leading dimensions are in elements.
void gemm_tile(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool accumulate,
               const c10::BFloat16* A, const c10::BFloat16* B, float* C);
void gemm_tile(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool accumulate, const float* A,
               const float* B, float* C);

// Call once per thread after a batch of gemm_tile calls (releases AMX tiles; a no-op elsewhere).
void gemm_release();

// packed[k / 2, n, k % 2] = B[k, n] for row-major B [K, N] with row stride ldb; rows of packed are ldp columns apart.
void pack_vnni(int64_t K, int64_t N, int64_t ldb, int64_t ldp, const c10::BFloat16* B, c10::BFloat16* packed);

// The same from the transpose: packed[k / 2, n, k % 2] = Bt[n, k] for row-major Bt [N, K].
void pack_vnni_transposed(int64_t K, int64_t N, int64_t ldbt, int64_t ldp, const c10::BFloat16* Bt,
                          c10::BFloat16* packed);

// out[c, r] = in[r, c] for row-major in [rows, columns]; strides in elements.
void transpose(int64_t rows, int64_t columns, int64_t in_stride, int64_t out_stride, const float* in, float* out);
void transpose(int64_t rows, int64_t columns, int64_t in_stride, int64_t out_stride, const c10::BFloat16* in,
               c10::BFloat16* out);

// "brgemm" or "loops": what gemm_tile runs on for this dtype in this process.
const char* gemm_backend(bool is_bf16);

}  // namespace fastpt
