// nf4 on part of a weight. The formulas are common/nf4.h.

// The 16 values of a block, and two of them for each byte of codes.
#if FASTPT_ISA_LEVEL >= 2
template <typename T>
struct Nf4Table;

template <>
struct Nf4Table<float> {
  __m512 values;
  FASTPT_INLINE explicit Nf4Table(float scale) {
    float codes[16];
    for (uint32_t code = 0; code < 16; ++code) codes[code] = nf4_value(code);
    values = _mm512_mul_ps(_mm512_loadu_ps(codes), _mm512_set1_ps(scale));
  }
  FASTPT_INLINE void look_up(__m512i codes, float* out) const {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const __m512 first = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), values);
    const __m512 second = _mm512_permutexvar_ps(codes, values);  // reads the lower four bits alone
    _mm512_storeu_ps(out, _mm512_permutex2var_ps(first, low, second));
    _mm512_storeu_ps(out + 16, _mm512_permutex2var_ps(first, high, second));
  }
};

template <>
struct Nf4Table<bf16> {
  __m512i words;  // in the lower halves
  FASTPT_INLINE explicit Nf4Table(float scale) {
    const __m512 values = Nf4Table<float>(scale).values;
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i even = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    words = _mm512_mask_mov_epi32(_mm512_srli_epi32(even, 16), _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q),
                                  _mm512_set1_epi32(0x7fc0));
  }
  FASTPT_INLINE void look_up(__m512i codes, bf16* out) const {
    const __m512i first = _mm512_permutexvar_epi32(_mm512_srli_epi32(codes, 4), words);
    const __m512i second = _mm512_permutexvar_epi32(codes, words);
    _mm512_storeu_si512(out, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
  }
};
#endif

// Values [first, first + n) of a weight, rounded once; first is even.
template <typename T>
void nf4_unpack(int64_t first, int64_t n, const uint8_t* packed, const Nf4Scales& scales, T* out) {
  for (const int64_t end = first + n; first < end;) {
    const int64_t block = first / kNf4Block, stop = std::min(end, (block + 1) * kNf4Block);
    const float scale = nf4_scale(scales, block);
#if FASTPT_ISA_LEVEL >= 2
    const Nf4Table<T> table(scale);
    for (; first + 32 <= stop; first += 32, out += 32)
      table.look_up(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + first / 2))), out);
#endif
    for (; first < stop; ++first)
      *out++ = from_float<T>(nf4_value(packed[first / 2] >> (first % 2 == 0 ? 4 : 0) & 15) * scale);
  }
}

// Block `block` of n values: its codes and its absolute maximum, which is NaN where a value is.
template <typename T>
float nf4_pack(int64_t block, int64_t n, const T* values, uint8_t* packed) {
  values += block * kNf4Block, packed += block * kNf4Block / 2, n = std::min(kNf4Block, n - block * kNf4Block);
  float wide[kNf4Block] = {};
  uint32_t most = 0;  // as bits, above which a NaN's are
  for (int64_t i = 0; i < n; ++i) {
    wide[i] = to_float(values[i]);
    uint32_t bits;
    std::memcpy(&bits, &wide[i], sizeof bits);
    most = std::max(most, bits & 0x7fffffffu);
  }
  float absmax;
  std::memcpy(&absmax, &most, sizeof absmax);
  const Nf4Divisor by = nf4_divisor(absmax, n == kNf4Block);
  uint32_t codes[kNf4Block];
  for (int64_t i = 0; i < kNf4Block; ++i) codes[i] = by.code(wide[i]);
  if (n % 2 != 0) codes[n] = nf4_code(0.0f);
  for (int64_t i = 0; i < n; i += 2) packed[i / 2] = static_cast<uint8_t>(codes[i] << 4 | codes[i + 1]);
  return by.stored();
}

// Codes of at most 256 scales, less the offset, in a map, and their absolute maximum.
inline float nf4_pack_scales(int64_t n, const float* scales, float offset, const float* map, uint8_t* codes) {
  float absmax = 0.0f;
  for (int64_t i = 0; i < n; ++i) absmax = std::max(absmax, __builtin_fabsf(scales[i] - offset));
  for (int64_t i = 0; i < n; ++i) codes[i] = nf4_nested_code(scales[i] - offset, absmax, map);
  return absmax;
}
