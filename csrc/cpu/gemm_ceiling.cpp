#include "cpu/gemm_ceiling.h"

#include <chrono>
#include <vector>
#include <ATen/Parallel.h>

#include "cpu/gemm.h"

namespace fastpt {
namespace {

// SmolLM2's width as the depth; A (72 KiB in bf16) and a panel of B (72 KiB) stay in a level 2 cache of 1 MiB.
constexpr int64_t kRows = 64, kColumns = 64, kDepth = 576;

template <typename T>
double rate_of_one_thread(double seconds) {
  using Clock = std::chrono::steady_clock;
  const std::vector<T> A(kRows * kDepth, T(0.5f)), B(kDepth * kColumns, T(0.25f));
  std::vector<float> C(kRows * kColumns);
  int64_t tiles = 0;
  double elapsed = 0;
  for (const auto start = Clock::now(); elapsed < seconds; tiles += 16) {
    for (int i = 0; i < 16; ++i)
      gemm_tile(kRows, kColumns, kDepth, kDepth, kColumns, kColumns, false, A.data(), B.data(), C.data());
    elapsed = std::chrono::duration<double>(Clock::now() - start).count();
  }
  gemm_release();
  return 2e-9 * kRows * kColumns * kDepth * tiles / elapsed;
}

}  // namespace

double gemm_ceiling(bool is_bf16, double seconds) {
  std::vector<double> rates(at::get_num_threads(), 0.0);
  at::parallel_for(0, rates.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      rates[i] = is_bf16 ? rate_of_one_thread<c10::BFloat16>(seconds) : rate_of_one_thread<float>(seconds);
  });
  double total = 0;
  for (const double rate : rates) total += rate;
  return total;
}

}  // namespace fastpt
