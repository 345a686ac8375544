// The rate that no product here can beat: one GEMM tile of a good shape over and over, its operands in cache.
#pragma once

namespace fastpt {

// GFLOP/s of all threads together, measured for `seconds` on each.
double gemm_ceiling(bool is_bf16, double seconds);

}  // namespace fastpt
