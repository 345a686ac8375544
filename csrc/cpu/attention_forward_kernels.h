// attention forward, one block of queries against one panel of keys: scores and their softmax in registers, then the
// product with the values. Lanes are keys; a query's maximum is raised only where a score exceeds it by so much that
// the weights would grow large, which is rare after the first panel, so lanes are seldom reduced.
#include "cpu/attention_tiles.h"

// Weights e^(score - max) of up to 2^kSlack overflow nothing, and their relative precision is the same.
constexpr float kSlack = 8.0f;

template <typename T, int kRows>
FASTPT_INLINE void raise_maximum(const ForwardPanel<T>& p, int64_t row, const Floats (&top)[kRows]) {
  for (int r = 0; r < kRows; ++r) {
    float *max = p.max + row + r, *sum = p.sum + kLanes * (row + r), *out = p.out + (row + r) * p.columns;
    const float raised = std::max(*max, lane_max(top[r]));
    const Floats factor = power_of_2<float>(splat(*max - raised), p.scale * kLog2E);
    *max = raised;
    store_vector(sum, load_vector<Floats>(sum) * factor);
    for (int64_t c = 0; c < p.columns; c += kLanes) store_vector(out + c, load_vector<Floats>(out + c) * factor);
  }
}

// Scores of kRows queries against kLanes * kVectors keys from `lane` on, added to the state, and their weights.
template <typename T, int kRows, int kVectors>
void weights_tile(const ForwardPanel<T>& p, int64_t row, int64_t lane, T* weights) {
  Floats s[kRows][kVectors] = {};
  accumulate<T, false>(p.dim / kWord<T>, p.q + row * p.q_stride, p.q_stride, p.k + lane * kWord<T>, p.width, s);
  if (p.softcap > 0) cap(p.inner, p.softcap, s);
  hide(p.seen, row, lane, s);
  const float scale = p.scale * kLog2E, slack = kSlack / scale;
  Floats top[kRows];
  bool is_above = false;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    top[r] = s[r][0];
#pragma GCC unroll 8
    for (int v = 1; v < kVectors; ++v) top[r] = larger(top[r], s[r][v]);
    is_above |= any_above(top[r], splat(p.max[row + r] + slack));
  }
  if (__builtin_expect(is_above, 0)) raise_maximum<T, kRows>(p, row, top);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const Floats max = splat(p.max[row + r]);
    Floats total = load_vector<Floats>(p.sum + kLanes * (row + r));
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const Floats weight = power_of_2<T>(s[r][v] - max, scale);
      total += weight;
      store_row(weights + r * kPanel + kLanes * v, weight);
    }
    store_vector(p.sum + kLanes * (row + r), total);
  }
}

template <typename T, int kVectors, int kRows = kTileRows>
FASTPT_INLINE void weights_rows(int64_t rows, const ForwardPanel<T>& p, int64_t row, int64_t lane, T* weights) {
  if constexpr (kRows > 1)
    if (rows < kRows) return weights_rows<T, kVectors, kRows - 1>(rows, p, row, lane, weights);
  weights_tile<T, kRows, kVectors>(p, row, lane, weights);
}

template <typename T>
void attention_forward_panel(const ForwardPanel<T>& p, int64_t rows) {
  alignas(64) T weights[kTileRows * kPanel];
  const RowGroups groups(rows);
  for (int64_t i = 0; i < groups.groups; ++i) {
    const int64_t row = groups.begin(i), height = groups.begin(i + 1) - row;
    const int64_t last = p.seen.last(row + height - 1);
    for (int64_t lane = p.seen.first(row) / kLanes * kLanes; lane < last; lane += kLanes * kTileVectors) {
      const int64_t lanes = std::min<int64_t>(last - lane, kLanes * kTileVectors),
                    vectors = (lanes + kLanes - 1) / kLanes;
      if (vectors == 4) {
        weights_rows<T, 4>(height, p, row, lane, weights);
      } else if (vectors == 3) {
        weights_rows<T, 3>(height, p, row, lane, weights);
      } else if (vectors == 2) {
        weights_rows<T, 2>(height, p, row, lane, weights);
      } else {
        weights_rows<T, 1>(height, p, row, lane, weights);
      }
      product<T, false>(height, p.columns, (lanes + kWord<T> - 1) / kWord<T>, weights, kPanel, p.v + lane * p.columns,
                        p.columns, p.out + row * p.columns, p.columns);
    }
  }
}

// What the last panel leaves to do; a sink counts as one key more, of value 0. lse in double: backward has but this one
// float for a row's scores, whose rounding error is then no more than that of a score.
template <typename T>
void attention_forward_finish(const ForwardPanel<T>& p, int64_t rows, const float* sink, T* out, int64_t out_stride,
                              float* lse, int64_t lse_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const float sum = lane_sum(load_vector<Floats>(p.sum + kLanes * r));
    const bool sees_any = sum != 0.0f;  // NaN counts as seen
    const double exact = static_cast<double>(p.max[r]) * p.scale + std::log(static_cast<double>(sum));
    lse[r * lse_stride] = sees_any ? static_cast<float>(exact) : std::numeric_limits<float>::infinity();
    float factor = sees_any ? 1.0f / sum : 0.0f;
    if (sink != nullptr) {
      const double total =
          sees_any ? std::max(exact, double{*sink}) + std::log1p(std::exp(-std::abs(exact - *sink))) : double{*sink};
      lse[r * lse_stride] = static_cast<float>(total);
      factor *= sees_any ? static_cast<float>(std::exp(exact - total)) : 0.0f;
    }
    attention_store(1, p.dim, p.columns, p.out + r * p.columns, factor, out_stride, out + r * out_stride);
  }
}
