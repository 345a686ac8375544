// out [M, N] float32 = x [M, K] · W [N, K]ᵀ for a few rows x, straight from row-major weights: no packing, every weight
// read once, which at few rows is all the time there is. On one thread: callers share out columns (rows of W).
#pragma once

#include <cstdint>
#include <c10/util/BFloat16.h>

namespace fastpt {

// Sums are float32, in an order that depends on K alone: a row's result is bit for bit the same for any M, N and any
// cut of the columns. Strides are in elements.
void few_rows(int64_t M, int64_t N, int64_t K, const c10::BFloat16* x, int64_t ldx, const c10::BFloat16* W, int64_t ldw,
              float* out, int64_t ldo);
void few_rows(int64_t M, int64_t N, int64_t K, const float* x, int64_t ldx, const float* W, int64_t ldw, float* out,
              int64_t ldo);

}  // namespace fastpt
