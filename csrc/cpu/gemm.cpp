#include "cpu/gemm.h"

#include <ATen/native/CPUBlas.h>

#define FASTPT_KERNELS "cpu/gemm_kernels.h"
#include "cpu/for_each_isa.h"

namespace fastpt {
namespace {

// oneDNN has brgemm kernels from AVX-512 (core) on for float32 and bfloat16; below, calling it would throw.
bool has_brgemm() {
  return isa() >= Isa::avx512;
}

}  // namespace

void gemm_tile(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool accumulate,
               const c10::BFloat16* A, const c10::BFloat16* B, float* C) {
  if (has_brgemm()) {
    at::native::cpublas::brgemm(M, N, K + K % 2, lda, ldb, ldc, accumulate, A, B, C);
  } else {
    FASTPT_BY_ISA(tile_loops<true, c10::BFloat16>)(M, N, K, lda, ldb, ldc, accumulate, A, B, C);
  }
}

void gemm_tile(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool accumulate, const float* A,
               const float* B, float* C) {
  if (has_brgemm()) {
    at::native::cpublas::brgemm(M, N, K, lda, ldb, ldc, accumulate, A, B, C);
  } else {
    FASTPT_BY_ISA(tile_loops<false, float>)(M, N, K, lda, ldb, ldc, accumulate, A, B, C);
  }
}

void gemm_release() {
  if (has_brgemm()) at::native::cpublas::brgemm_release();
}

void pack_vnni(int64_t K, int64_t N, int64_t ldb, int64_t ldp, const c10::BFloat16* B, c10::BFloat16* packed) {
  FASTPT_BY_ISA(vnni_rows)(K, N, ldb, ldp, B, packed);
}

void pack_vnni_transposed(int64_t K, int64_t N, int64_t ldbt, int64_t ldp, const c10::BFloat16* Bt,
                          c10::BFloat16* packed) {
  FASTPT_BY_ISA(vnni_transposed)(K, N, ldbt, ldp, Bt, packed);
}

void transpose(int64_t rows, int64_t columns, int64_t in_stride, int64_t out_stride, const float* in, float* out) {
  FASTPT_BY_ISA(transpose_float)(rows, columns, in_stride, out_stride, in, out);
}

void transpose(int64_t rows, int64_t columns, int64_t in_stride, int64_t out_stride, const c10::BFloat16* in,
               c10::BFloat16* out) {
  FASTPT_BY_ISA(transpose_bf16)(rows, columns, in_stride, out_stride, in, out);
}

const char* gemm_backend(bool) {
  return has_brgemm() ? "brgemm" : "loops";
}

}  // namespace fastpt
