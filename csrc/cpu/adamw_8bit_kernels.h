// adamw_8bit on some blocks of one tensor: a block's values are updated, then its new moments rounded by their largest
// magnitudes. The formulas are common/adamw.h, common/dynamic_map.h and common/stochastic_rounding.h.

// One block's new values and moments in float32. Returns the largest magnitudes of the moments, as bits.
template <typename P, typename G>
FASTPT_INLINE void update_block(int32_t n, const AdamW& c, const DynamicMap& first, const DynamicMap& second,
                                const P* param, const G* grad, const EightBitState& state, float* values,
                                float* exp_avg, float* exp_avg_sq, uint32_t& first_bits, uint32_t& second_bits) {
  const float first_scale = *state.exp_avg_absmax, second_scale = *state.exp_avg_sq_absmax;
  uint32_t largest = 0, largest_sq = 0;
#pragma omp simd reduction(max : largest, largest_sq)
  for (int32_t i = 0; i < n; ++i) {
    float m = first.code[state.exp_avg[i]] * first_scale, v = second.code[state.exp_avg_sq[i]] * second_scale;
    values[i] = adamw_value(c, to_float(param[i]), to_float(grad[i]), m, v);
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    largest = std::max(largest, magnitude_bits(m));
    largest_sq = std::max(largest_sq, magnitude_bits(v));
  }
  first_bits = largest;
  second_bits = largest_sq;
}

FASTPT_INLINE void round_block(int32_t n, const DynamicMap& first, const DynamicMap& second, const float* exp_avg,
                               const float* exp_avg_sq, uint32_t first_bits, uint32_t second_bits,
                               const EightBitState& state) {
  std::memcpy(state.exp_avg_absmax, &first_bits, sizeof first_bits);
  std::memcpy(state.exp_avg_sq_absmax, &second_bits, sizeof second_bits);
  const float first_inverse = inverse_scale(*state.exp_avg_absmax);
  const float second_inverse = inverse_scale(*state.exp_avg_sq_absmax);
  // In int32 first: the compiler must not think that a stored byte changes what it reads.
  int32_t index[kStateBlock], index_sq[kStateBlock];
#pragma omp simd
  for (int32_t i = 0; i < n; ++i) index[i] = signed_index(first.last, exp_avg[i] * first_inverse);
#pragma omp simd
  for (int32_t i = 0; i < n; ++i) index_sq[i] = unsigned_index(second.last, exp_avg_sq[i] * second_inverse);
  for (int32_t i = 0; i < n; ++i) state.exp_avg[i] = static_cast<uint8_t>(index[i]);
  for (int32_t i = 0; i < n; ++i) state.exp_avg_sq[i] = static_cast<uint8_t>(index_sq[i]);
}

// Values [first, first + n) of a tensor, first a multiple of kStateBlock; the pointers are those of the tensor. With a
// master `param` becomes its rounded copy; with a stream it is rounded stochastically.
template <typename P, typename G>
void adamw_8bit_blocks(int64_t first, int64_t n, const AdamW& c, const DynamicMap& first_map,
                       const DynamicMap& second_map, const RandomStream* stream, P* param, const G* grad, float* master,
                       const EightBitState& whole) {
  for (int64_t start = first; start < first + n; start += kStateBlock) {
    const int32_t length = static_cast<int32_t>(std::min<int64_t>(kStateBlock, first + n - start));
    const int64_t block = start / kStateBlock;
    const EightBitState state{whole.exp_avg + start, whole.exp_avg_sq + start, whole.exp_avg_absmax + block,
                              whole.exp_avg_sq_absmax + block};
    float values[kStateBlock], exp_avg[kStateBlock], exp_avg_sq[kStateBlock];
    uint32_t first_bits, second_bits;
    if (master != nullptr) {
      update_block(length, c, first_map, second_map, master + start, grad + start, state, values, exp_avg, exp_avg_sq,
                   first_bits, second_bits);
      std::copy_n(values, length, master + start);
    } else {
      update_block(length, c, first_map, second_map, param + start, grad + start, state, values, exp_avg, exp_avg_sq,
                   first_bits, second_bits);
    }
    round_block(length, first_map, second_map, exp_avg, exp_avg_sq, first_bits, second_bits, state);
    if constexpr (sizeof(P) == 2) {
      if (stream != nullptr) {
        const uint32_t low = static_cast<uint32_t>(start), high = static_cast<uint32_t>(start >> 32);
#pragma omp simd
        for (int32_t i = 0; i < length; ++i)
          param[start + i].x =
              round_stochastically(values[i], random_bits(*stream, low + static_cast<uint32_t>(i), high));
        continue;
      }
    }
    for (int32_t i = 0; i < length; ++i) param[start + i] = from_float<P>(values[i]);
  }
}
