// adamw_8bit on some blocks of one tensor: a block's values are updated, then its new moments rounded by their largest
// magnitudes. The formulas are common/adamw.h, common/dynamic_map.h and common/stochastic_rounding.h.

// The values of n codes, n <= kStateBlock.
FASTPT_INLINE void decode(int32_t n, const float* table, const uint8_t* code, float* out) {
  int32_t i = 0;
#if FASTPT_ISA_LEVEL >= 2
  // The table stands in 16 registers: eight shuffles and seven selections for 16 values, where a gather is 16 loads.
  __m512 part[16];
  for (int k = 0; k < 16; ++k) part[k] = _mm512_loadu_ps(table + 16 * k);
  for (; i + 16 <= n; i += 16) {
    // maskz: GCC 12 warns of its own header without
    const __m512i at = _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(code + i)));
    __m512 found[8];
    for (int k = 0; k < 8; ++k) found[k] = _mm512_permutex2var_ps(part[2 * k], at, part[2 * k + 1]);
    for (int bit = 0; bit < 3; ++bit) {
      const __mmask16 is_upper = _mm512_test_epi32_mask(at, _mm512_set1_epi32(32 << bit));
      for (int k = 0; k < 4 >> bit; ++k) found[k] = _mm512_mask_mov_ps(found[2 * k], is_upper, found[2 * k + 1]);
    }
    _mm512_storeu_ps(out + i, found[0]);
  }
#endif
  for (; i < n; ++i) out[i] = table[code[i]];
}

#if FASTPT_ISA_LEVEL >= 2
// The same with AVX-512 VBMI, for which a table of bytes is four registers: a byte of 64 values takes two shuffles.
// `out` has room for kStateBlock values.
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi"), noinline)) inline void decode_bytewise(
    int32_t n, const uint8_t (*planes)[256], const uint8_t* code, float* out) {
  __m512i part[4][4];
  for (int b = 0; b < 4; ++b)
    for (int k = 0; k < 4; ++k) part[b][k] = _mm512_loadu_si512(planes[b] + 64 * k);
  const __m512i transposed = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int32_t i = 0; i < n; i += 64) {
    const __mmask64 there = n - i >= 64 ? ~0ull : (1ull << (n - i)) - 1;
    const __m512i at = _mm512_permutexvar_epi32(transposed, _mm512_maskz_loadu_epi8(there, code + i));
    const __mmask64 is_upper = _mm512_movepi8_mask(at);
    __m512i bytes[4];
    for (int b = 0; b < 4; ++b) {
      const __m512i low = _mm512_permutex2var_epi8(part[b][0], at, part[b][1]);
      const __m512i high = _mm512_permutex2var_epi8(part[b][2], at, part[b][3]);
      bytes[b] = _mm512_mask_mov_epi8(low, is_upper, high);
    }
    const __m512i even = _mm512_unpacklo_epi8(bytes[0], bytes[1]), odd = _mm512_unpackhi_epi8(bytes[0], bytes[1]);
    const __m512i even2 = _mm512_unpacklo_epi8(bytes[2], bytes[3]), odd2 = _mm512_unpackhi_epi8(bytes[2], bytes[3]);
    _mm512_storeu_si512(out + i, _mm512_unpacklo_epi16(even, even2));
    _mm512_storeu_si512(out + i + 16, _mm512_unpackhi_epi16(even, even2));
    _mm512_storeu_si512(out + i + 32, _mm512_unpacklo_epi16(odd, odd2));
    _mm512_storeu_si512(out + i + 48, _mm512_unpackhi_epi16(odd, odd2));
  }
}
#endif

// A map as decoding wants it.
struct Decoder {
  const float* table;
#if FASTPT_ISA_LEVEL >= 2
  uint8_t planes[4][256];  // the bytes of its values
  bool is_bytewise = __builtin_cpu_supports("avx512vbmi") != 0;
#endif

  explicit Decoder(const DynamicMap& map) : table(map.code) {
#if FASTPT_ISA_LEVEL >= 2
    for (int i = 0; i < 256; ++i) {
      uint32_t bits;
      std::memcpy(&bits, &map.code[i], sizeof bits);
      for (int b = 0; b < 4; ++b) planes[b][i] = static_cast<uint8_t>(bits >> (8 * b));
    }
#endif
  }

  FASTPT_INLINE void operator()(int32_t n, const uint8_t* code, float* out) const {
#if FASTPT_ISA_LEVEL >= 2
    if (is_bytewise) {
      decode_bytewise(n, planes, code, out);
      return;
    }
#endif
    decode(n, table, code, out);
  }
};

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

#if FASTPT_ISA_LEVEL >= 2
// Codes of n moments, in 16s: by the pieces, and where those cannot say, one after the other by `last`.
template <bool kSigned>
FASTPT_INLINE void round_moments(int32_t n, const DynamicMap& map, const MapPieces& pieces, float inverse,
                                 const float* moment, uint8_t* code) {
  const __m512 slope = _mm512_loadu_ps(pieces.slope), offset = _mm512_loadu_ps(pieces.offset),
               most = _mm512_loadu_ps(pieces.most);
  const __m512i end = _mm512_loadu_si512(pieces.end), end2 = _mm512_loadu_si512(pieces.end + 16);
  const __m512i begins = _mm512_loadu_si512(pieces.piece), begins2 = _mm512_loadu_si512(pieces.piece + 16);
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff), one = _mm512_set1_epi32(0x3f800000);
  const __m512i least = _mm512_set1_epi32(96 << 23), near = _mm512_set1_epi32(MapPieces::kNear);
  for (int32_t i = 0; i < n; i += 16) {
    const __mmask16 there = static_cast<__mmask16>(n - i >= 16 ? 0xffff : (1 << (n - i)) - 1);
    const __m512 x = _mm512_mul_ps(_mm512_maskz_loadu_ps(there, moment + i), _mm512_set1_ps(inverse));
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i a = _mm512_max_epu32(_mm512_min_epu32(_mm512_and_si512(bits, magnitude), one), least);
    const __m512i exponent = _mm512_srli_epi32(a, 23);  // of which the shuffles read the lower five bits
    const __m512i beyond = _mm512_sub_epi32(a, _mm512_permutex2var_epi32(end, exponent, end2));
    const __mmask16 is_next = _mm512_cmpgt_epi32_mask(beyond, near);
    __mmask16 unclear = _mm512_cmplt_epu32_mask(beyond, _mm512_set1_epi32(2 * MapPieces::kNear));
    __m512i piece = _mm512_permutex2var_epi32(begins, exponent, begins2);
    piece = _mm512_mask_add_epi32(piece, is_next, piece, _mm512_set1_epi32(1));
    __m512 place = _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_permutexvar_ps(piece, slope),
                                   _mm512_permutexvar_ps(piece, offset));
    place = _mm512_min_ps(place, _mm512_permutexvar_ps(piece, most));
    const __m512 past = _mm512_abs_ps(_mm512_reduce_ps(place, 0));  // the nearest whole number
    unclear |= _mm512_cmp_ps_mask(past, _mm512_set1_ps(MapPieces::kTooClose), _CMP_LT_OQ);
    __m512i index = _mm512_cvttps_epi32(place);
    if constexpr (kSigned) {
      const __m512i zero = _mm512_set1_epi32(127);
      const __mmask16 is_negative = _mm512_movepi32_mask(bits);
      const __m512i up = _mm512_add_epi32(zero, index);
      index = _mm512_mask_sub_epi32(up, is_negative, zero, _mm512_min_epi32(index, zero));
    }
    _mm_mask_storeu_epi8(code + i, there, _mm512_cvtepi32_epi8(index));
    for (unclear &= there; __builtin_expect(unclear != 0, 0); unclear &= unclear - 1) {
      const int32_t k = i + __builtin_ctz(unclear);
      const float scaled = moment[k] * inverse;
      code[k] = static_cast<uint8_t>(kSigned ? signed_index(map.last, scaled) : unsigned_index(map.last, scaled));
    }
  }
}
#else
template <bool kSigned>
FASTPT_INLINE void round_moments(int32_t n, const DynamicMap& map, const MapPieces&, float inverse, const float* moment,
                                 uint8_t* code) {
  float magnitude[kStateBlock], last[kStateBlock];
  int32_t sign[kStateBlock], slot[kStateBlock];
#pragma omp simd
  for (int32_t i = 0; i < n; ++i) {
    if constexpr (kSigned) {
      const SignedPlace place = signed_place(moment[i] * inverse);
      magnitude[i] = place.magnitude;
      sign[i] = place.sign;
      slot[i] = place.slot;
    } else {
      const UnsignedPlace place = unsigned_place(moment[i] * inverse);
      magnitude[i] = place.magnitude;
      slot[i] = place.slot;
    }
  }
  for (int32_t i = 0; i < n; ++i) last[i] = map.last[slot[i]];
#pragma omp simd
  for (int32_t i = 0; i < n; ++i) {
    if constexpr (kSigned)
      slot[i] = SignedPlace{magnitude[i], sign[i], slot[i]}.index(last[i]);
    else
      slot[i] = UnsignedPlace{magnitude[i], slot[i]}.index(last[i]);
  }
  for (int32_t i = 0; i < n; ++i) code[i] = static_cast<uint8_t>(slot[i]);
}
#endif

template <typename T>
FASTPT_INLINE void fetch_block(const T* at) {
  constexpr int kLine = 64 / sizeof(T);
  for (int i = 0; i < kStateBlock; i += kLine) __builtin_prefetch(at + i);
}

// Values [first, first + n) of a tensor, first a multiple of kStateBlock; the pointers are those of the tensor. With a
// master `param` becomes its rounded copy; with a stream it is rounded stochastically.
template <typename P, typename G>
void adamw_8bit_blocks(int64_t first, int64_t n, const AdamW& c, const EightBitMaps& maps, const RandomStream* stream,
                       P* param, const G* grad, float* master, const EightBitState& whole) {
  const Decoder first_values(maps.first), second_values(maps.second);
  for (int64_t start = first; start < first + n; start += kStateBlock) {
    const int32_t length = static_cast<int32_t>(std::min<int64_t>(kStateBlock, first + n - start));
    const int64_t block = start / kStateBlock;
    const EightBitState state{whole.exp_avg + start, whole.exp_avg_sq + start, whole.exp_avg_absmax + block,
                              whole.exp_avg_sq_absmax + block};
    if (start + kStateBlock < first + n) {  // the hardware alone fetches it too late
      fetch_block(state.exp_avg + kStateBlock);
      fetch_block(state.exp_avg_sq + kStateBlock);
      fetch_block(grad + start + kStateBlock);
      fetch_block(param + start + kStateBlock);
    }
    float values[kStateBlock], exp_avg[kStateBlock], exp_avg_sq[kStateBlock];
    uint32_t first_bits, second_bits;
    first_values(length, state.exp_avg, exp_avg);
    second_values(length, state.exp_avg_sq, exp_avg_sq);
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
    round_moments<true>(length, maps.first, maps.first_pieces, inverse_scale(*state.exp_avg_absmax), exp_avg,
                        state.exp_avg);
    round_moments<false>(length, maps.second, maps.second_pieces, inverse_scale(*state.exp_avg_sq_absmax), exp_avg_sq,
                         state.exp_avg_sq);
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
