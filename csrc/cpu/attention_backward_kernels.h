// attention backward, one block of queries against one panel of keys: weights and the gradient of the scores are formed
// in registers, kept as bfloat16 (or float) in L1, and multiplied into dq, dk and dv.
#include "cpu/attention_tiles.h"

// Weights e^(score - lse) and the gradient of the scores ds = p (dp - delta), times the slope of softcap, of kRows
// queries against kLanes * kVectors keys: both for sums over queries, ds also by rows. With kDelta only p dp is added
// up.
template <typename T, int kRows, int kVectors, bool kDelta>
void gradient_tile(const BackwardPanel<T>& p, int64_t row, int64_t lane, T* dscore_rows) {
  Floats s[kRows][kVectors] = {}, slope[kRows][kVectors];
  accumulate<T, false>(p.dim / kWord<T>, p.q + row * p.q_stride, p.q_stride, p.k + lane * kWord<T>, p.width, s);
  const bool is_capped = p.softcap > 0;
  if (is_capped) {
    cap(p.inner, p.softcap, s);
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) slope[r][v] = 1.0f - (s[r][v] / p.softcap) * (s[r][v] / p.softcap);
  }
  hide(p.seen, row, lane, s);
  const int64_t at = (row * kPanel + lane * kWord<T>);
  const int64_t pair_row = kWord<T> * kPanel;  // elements from one pair of rows to the next, for float from row to row
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      s[r][v] = power_of_2<T>(fused(s[r][v], splat(p.scale), splat(-p.lse[row + r])), kLog2E);
  Floats d[kRows][kVectors] = {};
  accumulate<T, false>(p.dim / kWord<T>, p.dout + row * p.dout_stride, p.dout_stride, p.v + lane * kWord<T>, p.width,
                       d);
  if constexpr (kDelta) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      Floats sum = {};
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum = fused(s[r][v], d[r][v], sum);
      p.delta[row + r] += lane_sum(sum);
    }
    return;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r += 2)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      store_pair(p.weights + at + r * kPanel + kLanes * kWord<T> * v, pair_row, s[r][v],
                 r + 1 < kRows ? s[r + 1 < kRows ? r + 1 : r][v] : Floats{});
  if (is_capped)
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) s[r][v] *= slope[r][v];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      d[r][v] = (d[r][v] - splat(p.delta[row + r])) * s[r][v];
      if constexpr (!std::is_same_v<T, float>) store_row(dscore_rows + r * kPanel + kLanes * v, d[r][v]);
    }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r += 2)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      store_pair(p.dscores + at + r * kPanel + kLanes * kWord<T> * v, pair_row, d[r][v],
                 r + 1 < kRows ? d[r + 1 < kRows ? r + 1 : r][v] : Floats{});
}

template <typename T, int kVectors, bool kDelta, int kRows = kTileRows>
FASTPT_INLINE void gradient_rows(int64_t rows, const BackwardPanel<T>& p, int64_t row, int64_t lane, T* dscore_rows) {
  if constexpr (kRows > 1)
    if (rows < kRows) return gradient_rows<T, kVectors, kDelta, kRows - 1>(rows, p, row, lane, dscore_rows);
  gradient_tile<T, kRows, kVectors, kDelta>(p, row, lane, dscore_rows);
}

// Zeros in weights and dscores of rows from `row` on, lanes [from, to).
template <typename T>
void clear(const BackwardPanel<T>& p, int64_t row, int64_t height, int64_t from, int64_t to) {
  constexpr int64_t kPair = kWord<T>;
  for (int64_t r = row; r < row + height; r += kPair) {
    std::fill_n(p.weights + r * kPanel + from * kPair, (to - from) * kPair, T(0.0f));
    std::fill_n(p.dscores + r * kPanel + from * kPair, (to - from) * kPair, T(0.0f));
  }
}

// Weights and dscores of the whole block, zero where nothing is seen, and what they give to dq; or only what is
// delta's.
template <typename T, bool kDelta>
void gradient_panel(const BackwardPanel<T>& p, int64_t rows) {
  alignas(64) T buffer[kTileRows * kPanel];
  const RowGroups groups(rows, 2);  // pairs of rows stay together
  for (int64_t i = 0; i < groups.groups; ++i) {
    const int64_t row = groups.begin(i), height = groups.begin(i + 1) - row;
    const int64_t end = p.seen.last(row + height - 1), begin = std::min(p.seen.first(row) / kLanes * kLanes, end);
    int64_t lane = begin;
    for (int64_t vectors; lane < end; lane += kLanes * vectors) {
      vectors = std::min<int64_t>((end - lane + kLanes - 1) / kLanes, kTileVectors);
      if (vectors == 4) {
        gradient_rows<T, 4, kDelta>(height, p, row, lane, buffer + lane);
      } else if (vectors == 3) {
        gradient_rows<T, 3, kDelta>(height, p, row, lane, buffer + lane);
      } else if (vectors == 2) {
        gradient_rows<T, 2, kDelta>(height, p, row, lane, buffer + lane);
      } else {
        gradient_rows<T, 1, kDelta>(height, p, row, lane, buffer + lane);
      }
    }
    if constexpr (kDelta) continue;
    clear(p, row, height, 0, begin);
    clear(p, row, height, lane, p.width);
    const T* dscore_rows = std::is_same_v<T, float> ? p.dscores + row * kPanel : buffer;
    if (begin < end)
      product<T, false>(height, p.columns, (end - begin + kWord<T> - 1) / kWord<T>, dscore_rows + begin, kPanel,
                        p.k_pairs + begin * p.columns, p.columns, p.dq + row * p.columns, p.columns);
  }
}

// Adds to delta what a panel gives to the sum of p dp: in float, delta then errs as the dp do that it is taken from,
// where dout . out has roundings of its own.
template <typename T>
void attention_delta_panel(const BackwardPanel<T>& p, int64_t rows) {
  gradient_panel<T, true>(p, rows);
}

template <typename T>
void attention_backward_panel(const BackwardPanel<T>& p, int64_t rows) {
  gradient_panel<T, false>(p, rows);
  // Keys in strips, each with the queries that see some of it; one strip where all see all.
  const bool is_full = p.seen.first(rows - 1) == 0 && p.seen.last(0) == p.seen.lanes;
  const int64_t strip = is_full ? p.width : kLanes;
  for (int64_t lane = 0; lane < p.seen.lanes; lane += strip) {
    const int64_t keys = std::min(strip, p.seen.lanes - lane);
    const int64_t first = std::clamp(lane - p.seen.end + 1, int64_t{0}, rows) / kWord<T>;
    const int64_t last = (std::clamp(lane + keys - p.seen.begin, int64_t{0}, rows) + kWord<T> - 1) / kWord<T>;
    if (first >= last) continue;
    const int64_t at = (first * kPanel + lane) * kWord<T>, from = first * p.columns * kWord<T>;
    product<T, true>(keys, p.columns, last - first, p.weights + at, kPanel, p.dout_pairs + from, p.columns,
                     p.dv + lane * p.columns, p.columns);
    product<T, true>(keys, p.columns, last - first, p.dscores + at, kPanel, p.q_pairs + from, p.columns,
                     p.dk + lane * p.columns, p.columns);
  }
}

// sums[r] = a[r, :] . b[r, :]. For float in double: delta is taken from every dp of a row, which it may nearly cancel.
inline void row_dots(int64_t rows, int64_t dim, int64_t a_stride, const float* a, int64_t b_stride, const float* b,
                     float* sums) {
  constexpr int64_t kChains = 8;
  for (int64_t r0 = 0; r0 < rows; r0 += kChains) {
    double chains[kChains] = {};
    const int64_t n = std::min(kChains, rows - r0);
    for (int64_t d = 0; d < dim; ++d)
#pragma GCC unroll 8
      for (int64_t r = 0; r < kChains; ++r) {
        const int64_t row = r0 + std::min(r, n - 1);
        chains[r] += static_cast<double>(a[row * a_stride + d]) * b[row * b_stride + d];
      }
    std::copy_n(chains, n, sums + r0);
  }
}
inline void row_dots(int64_t rows, int64_t dim, int64_t a_stride, const bf16* a, int64_t b_stride, const bf16* b,
                     float* sums) {
  for (int64_t r = 0; r < rows; ++r) {
    const bf16 *x = a + r * a_stride, *y = b + r * b_stride;
    Floats lanes = {};
    int64_t d = 0;
    for (; d + 2 * kLanes <= dim; d += 2 * kLanes)
      lanes = multiply_add<bf16>(load_vector<Words>(x + d), load_vector<Words>(y + d), lanes);
    float sum = lane_sum(lanes);
    for (; d < dim; ++d) sum += to_float(x[d]) * to_float(y[d]);
    sums[r] = sum;
  }
}

template <typename T>
void attention_row_dots(int64_t rows, int64_t dim, int64_t a_stride, const T* a, int64_t b_stride, const T* b,
                        float* sums) {
  row_dots(rows, dim, a_stride, a, b_stride, b, sums);
}

inline void attention_add(int64_t n, const float* __restrict in, float* __restrict sum) {
  for (int64_t i = 0; i < n; ++i) sum[i] += in[i];
}
