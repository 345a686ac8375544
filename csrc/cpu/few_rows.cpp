#include "cpu/few_rows.h"

#define FASTPT_KERNELS "cpu/few_rows_kernels.h"
#include "cpu/for_each_isa.h"

namespace fastpt {

void few_rows(int64_t M, int64_t N, int64_t K, const c10::BFloat16* x, int64_t ldx, const c10::BFloat16* W, int64_t ldw,
              float* out, int64_t ldo) {
  FASTPT_BY_ISA(few_rows_product<c10::BFloat16>)(M, N, K, x, ldx, W, ldw, out, ldo);
}

void few_rows(int64_t M, int64_t N, int64_t K, const float* x, int64_t ldx, const float* W, int64_t ldw, float* out,
              int64_t ldo) {
  FASTPT_BY_ISA(few_rows_product<float>)(M, N, K, x, ldx, W, ldw, out, ldo);
}

}  // namespace fastpt
