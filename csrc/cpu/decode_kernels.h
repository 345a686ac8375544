// One new query of a few heads that share a key head, over the cached keys and values; float32 inside. Cached keys lie
// in blocks [K, kBlockKeys], so scores are vectorised over the keys; values lie in rows, so sums are over the head dim.
#include "cpu/few_rows_kernels.h"
#include "cpu/geglu_kernels.h"
#include "cpu/rms_norm_kernels.h"
#include "cpu/rope_kernels.h"
#include "cpu/swiglu_kernels.h"

constexpr int kGroup = 4;  // heads at a time: their sums stay in registers

// scores[h, j] = scale * q[h] . key j for the kBlockKeys keys of one block [K, kBlockKeys]; rows of q are K apart.
template <typename T, int Heads>
FASTPT_INLINE void block_scores(int64_t K, const float* q, const T* keys, float scale, int64_t stride, float* scores) {
  constexpr int kVectors = kBlockKeys / 16;
  floats16 sums[Heads][kVectors] = {};
  for (int64_t d = 0; d < K; ++d) {
    floats16 key[kVectors];
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; ++i) key[i] = wide_load(keys + d * kBlockKeys + 16 * i);
#pragma GCC unroll 4
    for (int h = 0; h < Heads; ++h) {
#pragma GCC unroll 2
      for (int i = 0; i < kVectors; ++i) sums[h][i] += q[h * K + d] * key[i];
    }
  }
  for (int h = 0; h < Heads; ++h) {
    for (int i = 0; i < kVectors; ++i) {
      const floats16 scaled = sums[h][i] * scale;
      std::memcpy(scores + h * stride + 16 * i, &scaled, sizeof scaled);
    }
  }
}

// out[h, d] = sum over keys j of weights[h, j] values[j, d] for Width * 16 columns d.
template <typename T, int Heads, int Width>
FASTPT_INLINE void weighted_values(int64_t keys, int64_t K, const float* weights, int64_t stride, const T* values,
                                   float* out) {
  floats16 sums[Heads][Width] = {};
  for (int64_t j = 0; j < keys; ++j) {
    floats16 value[Width];
#pragma GCC unroll 2
    for (int i = 0; i < Width; ++i) value[i] = wide_load(values + j * K + 16 * i);
#pragma GCC unroll 4
    for (int h = 0; h < Heads; ++h) {
#pragma GCC unroll 2
      for (int i = 0; i < Width; ++i) sums[h][i] += weights[h * stride + j] * value[i];
    }
  }
  for (int h = 0; h < Heads; ++h)
    for (int i = 0; i < Width; ++i) std::memcpy(out + h * K + 16 * i, &sums[h][i], sizeof(floats16));
}

// Softmax of scores[first..keys), in place; softcap 0: none. Returns 1 / sum, by which the sums are to be multiplied.
inline float softmax_weights(int64_t first, int64_t keys, float softcap, float* scores) {
  if (softcap > 0)
    for (int64_t j = first; j < keys; ++j) scores[j] = softcap * tanh_f(scores[j] / softcap);
  float top = -std::numeric_limits<float>::infinity(), sums[kSumLanes] = {};
#pragma omp simd reduction(max : top)
  for (int64_t j = first; j < keys; ++j) top = scores[j] > top ? scores[j] : top;
  in_lanes(keys - first, [&](int64_t j, int lane) __attribute__((always_inline)) {
    scores[first + j] = exp_f(scores[first + j] - top);
    sums[lane] += scores[first + j];
  });
  return 1.0f / added(sums);
}

template <typename T, int Heads>
void attend_heads(int64_t first, int64_t keys, int64_t K, const float* q, const T* key_blocks, const T* values,
                  float scale, float softcap, int64_t stride, float* scores, float* sums, T* out) {
  const int64_t from = first / kBlockKeys * kBlockKeys;
  for (int64_t j = from; j < keys; j += kBlockKeys)
    block_scores<T, Heads>(K, q, key_blocks + j * K, scale, stride, scores + j);
  float factors[Heads];
  for (int h = 0; h < Heads; ++h) factors[h] = softmax_weights(first, keys, softcap, scores + h * stride);
  const T* seen = values + first * K;
  int64_t d = 0;
  for (; d + 32 <= K; d += 32)
    weighted_values<T, Heads, 2>(keys - first, K, scores + first, stride, seen + d, sums + d);
  for (; d + 16 <= K; d += 16)
    weighted_values<T, Heads, 1>(keys - first, K, scores + first, stride, seen + d, sums + d);
  for (; d < K; ++d) {
    for (int h = 0; h < Heads; ++h) {
      float sum = 0.0f;
      for (int64_t j = first; j < keys; ++j) sum += scores[h * stride + j] * to_float(values[j * K + d]);
      sums[h * K + d] = sum;
    }
  }
  for (int h = 0; h < Heads; ++h)
    for (d = 0; d < K; ++d) out[h * K + d] = from_float<T>(sums[h * K + d] * factors[h]);
}

// Attention of `heads` queries q [heads, K] (float32, rounded to T already) that share a key head, over its cached keys
// first <= j < keys -> out [heads, K]. scores [kGroup, stride] and sums [kGroup, K] are scratch; stride: keys rounded
// up to whole blocks.
template <typename T>
void decode_attention(int64_t heads, int64_t first, int64_t keys, int64_t K, const float* q, const T* key_blocks,
                      const T* values, float scale, float softcap, int64_t stride, float* scores, float* sums, T* out) {
  const auto run = [&](auto attend, int64_t h) {
    attend(first, keys, K, q + h * K, key_blocks, values, scale, softcap, stride, scores, sums, out + h * K);
  };
  int64_t h = 0;
  for (; h + 4 <= heads; h += 4) run(attend_heads<T, 4>, h);
  if (heads - h == 3) run(attend_heads<T, 3>, h);
  if (heads - h == 2) run(attend_heads<T, 2>, h);
  if (heads - h == 1) run(attend_heads<T, 1>, h);
}

// Normed (unless scale is null) and rotated heads of one token, through T at each store as the ops rms_norm and rope
// do. x [heads, K]; normed [heads, K] and rstd [heads] are scratch.
template <typename T>
void decode_heads(int64_t heads, int64_t K, int64_t R, const T* x, const float* scale, float eps, bool casts_first,
                  const float* cos, const float* sin, T* normed, float* rstd, T* out) {
  if (scale != nullptr) {
    const auto norm = casts_first ? rms_norm_rows<T, false, true> : rms_norm_rows<T, false, false>;
    norm(heads, K, x, nullptr, scale, eps, nullptr, normed, rstd);
    x = normed;
  }
  rope_heads<T, false>(heads, K, R, K, x, cos, sin, out);
}

// Puts one key into its place in the blocks, one value into its row.
template <typename T>
void decode_store(int64_t K, int64_t position, const T* key, const T* value, T* key_blocks, T* values) {
  T* block = key_blocks + position / kBlockKeys * kBlockKeys * K + position % kBlockKeys;
  for (int64_t d = 0; d < K; ++d) block[d * kBlockKeys] = key[d];
  std::copy_n(value, K, values + position * K);
}

template <typename T>
void decode_widen(int64_t n, const T* x, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(x[i]);
}

// sum[m, n] += other[m, n] + bias[n]; other or bias may be null.
template <typename T>
void decode_add(int64_t M, int64_t N, const float* other, const T* bias, float* sum) {
  for (int64_t m = 0; m < M; ++m) {
    if (other != nullptr)
      for (int64_t n = 0; n < N; ++n) sum[m * N + n] += other[m * N + n];
    if (bias != nullptr)
      for (int64_t n = 0; n < N; ++n) sum[m * N + n] += to_float(bias[n]);
  }
}

template <typename T>
void decode_round(int64_t M, int64_t N, const float* x, T* out, int64_t stride) {
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < N; ++n) out[m * stride + n] = from_float<T>(x[m * N + n]);
}

// activation 0: silu, 1: gelu with tanh, 2: gelu.
template <typename T>
void decode_activate(int activation, int64_t n, const T* gate, const T* up, T* out) {
  if (activation == 0) {
    swiglu_forward(n, gate, up, out);
  } else if (activation == 1) {
    geglu_forward<T, true>(n, gate, up, out);
  } else {
    geglu_forward<T, false>(n, gate, up, out);
  }
}
