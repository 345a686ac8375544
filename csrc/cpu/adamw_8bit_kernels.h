// adamw_8bit on some blocks of one tensor: a block's values are updated, then its new moments rounded by their largest
// magnitudes. The formulas are common/adamw.h, common/dynamic_map.h and common/stochastic_rounding.h.

// table[index[i]] for i < n, of 256 values. With AVX-512 the table stands in 16 registers: eight shuffles and seven
// selections for 16 values, where a gather is 16 loads.
template <typename Index>
FASTPT_INLINE void look_up(int32_t n, const float* table, const Index* index, float* out) {
  int32_t i = 0;
#if FASTPT_ISA_LEVEL >= 2
  __m512 part[16];
  for (int k = 0; k < 16; ++k) part[k] = _mm512_loadu_ps(table + 16 * k);
  for (; i + 16 <= n; i += 16) {
    __m512i at;
    if constexpr (sizeof(Index) == 1) {
      // maskz: GCC 12 warns of its own header without
      at = _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(index + i)));
    } else {
      at = _mm512_loadu_si512(index + i);
    }
    __m512 found[8];
    for (int k = 0; k < 8; ++k) found[k] = _mm512_permutex2var_ps(part[2 * k], at, part[2 * k + 1]);
    for (int bit = 0; bit < 3; ++bit) {
      const __mmask16 is_upper = _mm512_test_epi32_mask(at, _mm512_set1_epi32(32 << bit));
      for (int k = 0; k < 4 >> bit; ++k) found[k] = _mm512_mask_mov_ps(found[2 * k], is_upper, found[2 * k + 1]);
    }
    _mm512_storeu_ps(out + i, found[0]);
  }
#endif
  for (; i < n; ++i) out[i] = table[index[i]];
}

// One block's new values and moments in float32; the moments come as their codes' values. Returns the largest
// magnitudes of the moments, as bits.
template <typename P, typename G>
FASTPT_INLINE void update_block(int32_t n, const AdamW& c, const P* param, const G* grad, float scale, float scale_sq,
                                float* values, float* exp_avg, float* exp_avg_sq, uint32_t& first_bits,
                                uint32_t& second_bits) {
  uint32_t largest = 0, largest_sq = 0;
#pragma omp simd reduction(max : largest, largest_sq)
  for (int32_t i = 0; i < n; ++i) {
    float m = exp_avg[i] * scale, v = exp_avg_sq[i] * scale_sq;
    values[i] = adamw_value(c, to_float(param[i]), to_float(grad[i]), m, v);
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    largest = std::max(largest, magnitude_bits(m));
    largest_sq = std::max(largest_sq, magnitude_bits(v));
  }
  first_bits = largest;
  second_bits = largest_sq;
}

FASTPT_INLINE void round_signed(int32_t n, const DynamicMap& map, float inverse, const float* moment, uint8_t* code) {
  float magnitude[kStateBlock], last[kStateBlock];
  int32_t sign[kStateBlock], slot[kStateBlock];
#pragma omp simd
  for (int32_t i = 0; i < n; ++i) {
    const SignedPlace place = signed_place(moment[i] * inverse);
    magnitude[i] = place.magnitude;
    sign[i] = place.sign;
    slot[i] = place.slot;
  }
  look_up(n, map.last, slot, last);
#pragma omp simd
  for (int32_t i = 0; i < n; ++i) slot[i] = SignedPlace{magnitude[i], sign[i], slot[i]}.index(last[i]);
  for (int32_t i = 0; i < n; ++i) code[i] = static_cast<uint8_t>(slot[i]);
}

FASTPT_INLINE void round_unsigned(int32_t n, const DynamicMap& map, float inverse, const float* moment, uint8_t* code) {
  float magnitude[kStateBlock], last[kStateBlock];
  int32_t slot[kStateBlock];
#pragma omp simd
  for (int32_t i = 0; i < n; ++i) {
    const UnsignedPlace place = unsigned_place(moment[i] * inverse);
    magnitude[i] = place.magnitude;
    slot[i] = place.slot;
  }
  look_up(n, map.last, slot, last);
#pragma omp simd
  for (int32_t i = 0; i < n; ++i) slot[i] = UnsignedPlace{magnitude[i], slot[i]}.index(last[i]);
  for (int32_t i = 0; i < n; ++i) code[i] = static_cast<uint8_t>(slot[i]);
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
    look_up(length, first_map.code, state.exp_avg, exp_avg);
    look_up(length, second_map.code, state.exp_avg_sq, exp_avg_sq);
    const float scale = *state.exp_avg_absmax, scale_sq = *state.exp_avg_sq_absmax;
    if (master != nullptr) {
      update_block(length, c, master + start, grad + start, scale, scale_sq, values, exp_avg, exp_avg_sq, first_bits,
                   second_bits);
      std::copy_n(values, length, master + start);
    } else {
      update_block(length, c, param + start, grad + start, scale, scale_sq, values, exp_avg, exp_avg_sq, first_bits,
                   second_bits);
    }
    std::memcpy(state.exp_avg_absmax, &first_bits, sizeof first_bits);
    std::memcpy(state.exp_avg_sq_absmax, &second_bits, sizeof second_bits);
    round_signed(length, first_map, inverse_scale(*state.exp_avg_absmax), exp_avg, state.exp_avg);
    round_unsigned(length, second_map, inverse_scale(*state.exp_avg_sq_absmax), exp_avg_sq, state.exp_avg_sq);
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
