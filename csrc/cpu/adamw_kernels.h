// adamw and grad_norm on one block of one tensor: every value is read and written once. The formulas are common/adamw.h
// and common/stochastic_rounding.h, inlined here and so compiled for the instruction set in force.

constexpr int64_t kRun = 64;  // values from one run of the loop to its stores

// A parameter that was not read goes past the cache, which would fetch its line first (135M values, bfloat16 with
// float32 masters and gradients, two Zen 5 cores: see benchmarks/ops/bench_adamw.py).
FASTPT_INLINE void store_past_cache(int64_t n, const float* values, float* out) {
  std::copy_n(values, n, out);
}
FASTPT_INLINE void store_past_cache(int64_t n, const float* values, bf16* out) {
#if FASTPT_ISA_LEVEL >= 2
  if (n == kRun && reinterpret_cast<uintptr_t>(out) % 64 == 0) {
    alignas(64) bf16 rounded[kRun];
    for (int64_t i = 0; i < kRun; ++i) rounded[i] = from_float<bf16>(values[i]);
    for (int64_t i = 0; i < kRun; i += 32)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i), _mm512_load_si512(rounded + i));
    return;
  }
#endif
  for (int64_t i = 0; i < n; ++i) out[i] = from_float<bf16>(values[i]);
}

// With HasMaster the float32 master is what is updated and `param` its rounded copy.
template <typename P, typename G, bool HasMaster>
void adamw_block(int64_t n, const AdamW& c, P* param, const G* grad, float* exp_avg, float* exp_avg_sq, float* master) {
  for (int64_t start = 0; start < n; start += kRun) {
    const int64_t length = std::min(kRun, n - start);
    float values[kRun];
#pragma omp simd
    for (int64_t k = 0; k < length; ++k) {
      const int64_t i = start + k;
      float m = exp_avg[i], v = exp_avg_sq[i];
      const float value = adamw_value(c, HasMaster ? master[i] : to_float(param[i]), to_float(grad[i]), m, v);
      exp_avg[i] = m;
      exp_avg_sq[i] = v;
      if constexpr (HasMaster) master[i] = value;
      values[k] = value;
    }
    if constexpr (HasMaster) {
      store_past_cache(length, values, param + start);
    } else {
      for (int64_t k = 0; k < length; ++k) param[start + k] = from_float<P>(values[k]);
    }
  }
#if FASTPT_ISA_LEVEL >= 2
  if constexpr (HasMaster) _mm_sfence();  // before another thread may read
#endif
}

// The same for a bfloat16 parameter without a master, whose value `first + i` of the tensor takes bits of `stream`.
template <typename G>
void adamw_stochastic_block(int64_t n, const AdamW& c, const RandomStream& stream, uint64_t first, bf16* param,
                            const G* grad, float* exp_avg, float* exp_avg_sq) {
  const uint32_t low = static_cast<uint32_t>(first), high = static_cast<uint32_t>(first >> 32);
#pragma omp simd
  for (int32_t i = 0; i < static_cast<int32_t>(n); ++i) {
    float m = exp_avg[i], v = exp_avg_sq[i];
    const float value = adamw_value(c, to_float(param[i]), to_float(grad[i]), m, v);
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    param[i].x = round_stochastically(value, random_bits(stream, low + static_cast<uint32_t>(i), high));
  }
}

// The sum of squares in float64, in lanes: the order does not depend on the instruction set.
template <typename G>
double sum_of_squares(int64_t n, const G* grad) {
  constexpr int64_t kLanes = 32;
  double lanes[kLanes] = {}, sum = 0.0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      const double g = to_float(grad[i + l]);
      lanes[l] += g * g;
    }
  }
  for (; i < n; ++i) sum += static_cast<double>(to_float(grad[i])) * to_float(grad[i]);
  for (int64_t l = 0; l < kLanes; ++l) sum += lanes[l];
  return sum;
}
