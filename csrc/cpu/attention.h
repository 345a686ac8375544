// Flash attention on the CPU: what forward and backward share; the definition is fastpt/ops/attention.py.
// Queries are rows and keys are lanes: q and its gradient are read where they lie, and what the kernels want packed
// (k and v, for the lanes or for the sum over keys) is packed once for all query heads that share it. The products are
// the register tiles of attention_tiles.h, not calls of gemm_tile: softmax and its gradient work on the sums before
// they leave the registers, and what the mask hides is skipped by rows and vectors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>
#include <ATen/core/Tensor.h>
#include <ATen/Parallel.h>

#include "cpu/gemm.h"
#include "cpu/tasks.h"

namespace fastpt {

// A block of queries against a panel of keys, which is what one call of a kernel does: all it reads stays in L1 and L2.
constexpr int64_t kQueries = 64;
constexpr int64_t kPanel = 64;
constexpr int64_t kStep = 16;  // keys and columns are padded to whole vectors

inline int64_t padded(int64_t n) {
  return (n + kStep - 1) / kStep * kStep;
}

struct Sequence {
  int64_t query0, queries, key0, keys;
  int64_t packed_key0;  // first row in packed tensors, where every sequence has padded(keys) rows
};

// A block of at most kQueries queries or kPanel keys; `first` counts from the start of the sequence.
struct Block {
  int64_t sequence, first, rows;
};

// Row r of a block of queries sees the lanes [begin + r, end + r) of a panel of keys, as far as the panel goes.
struct Visible {
  int64_t begin, end, lanes;

  int64_t first(int64_t r) const { return std::clamp(begin + r, int64_t{0}, lanes); }
  int64_t last(int64_t r) const { return std::clamp(end + r, int64_t{0}, lanes); }
};

// A unit of work: items [begin, end) of a (sequence, key head), item i being query head i % group of query block i /
// group. It packs the keys for itself, which then stay in its caches, unless the head is split among several.
struct Unit {
  int64_t sequence, head, begin, end;
  int64_t cost;  // in keys
  int64_t part;  // counts the parts of all split heads; -1: a unit that has the key head to itself
};

// Where a split (sequence, key head) finds its parts.
struct Split {
  int64_t sequence, head, first_part, parts;
};

// Everything about a call but the data.
struct AttentionPlan {
  int64_t heads_q, heads_kv, group;  // group: query heads per key head
  int64_t dim, columns;              // the head dim, made even for bfloat16, and padded
  int64_t before, after;             // how many keys before and after its own position a query sees
  float scale, softcap;              // softcap 0: none
  int64_t packed_keys, longest;      // sum and maximum of padded(keys)
  std::vector<Sequence> sequences;

  AttentionPlan(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                const std::optional<at::Tensor>& cu_seqlens_q, const std::optional<at::Tensor>& cu_seqlens_k,
                bool causal, std::optional<int64_t> window, std::optional<double> softcap, double scale);

  // The keys that some of the queries [first, last] of a sequence may see, rounded outwards to panels.
  int64_t first_key(const Sequence& s, int64_t first) const {
    return std::clamp(first + s.keys - s.queries - before, int64_t{0}, s.keys) / kPanel * kPanel;
  }
  int64_t end_key(const Sequence& s, int64_t last) const {
    return std::clamp(last + s.keys - s.queries + after + 1, int64_t{0}, s.keys);
  }
  // What a block of queries sees of the panel of keys that starts at `key`.
  Visible visible(const Block& block, int64_t key) const {
    const Sequence& s = sequences[block.sequence];
    const int64_t own = block.first + s.keys - s.queries - key;
    return {own - before, own + after + 1, std::min(kPanel, s.keys - key)};
  }

  // What scores are multiplied by in the exponent: all that softcap has left to do.
  float remaining_scale() const { return softcap > 0 ? 1.0f : scale; }

  // Calls body(block) for each panel of keys of a sequence.
  template <typename Body>
  void for_each_panel(int64_t sequence, const Body& body) const {
    const int64_t keys = sequences[sequence].keys;
    for (int64_t first = 0; first < keys; first += kPanel) body(Block{sequence, first, std::min(kPanel, keys - first)});
  }
  Block query_block(const Unit& unit, int64_t item) const {
    const int64_t first = item / group * kQueries;
    return {unit.sequence, first, std::min(kQueries, sequences[unit.sequence].queries - first)};
  }
  int64_t query_head(const Unit& unit, int64_t item) const { return unit.head * group + item % group; }
};

// What the kernels are given: pointers to the first row of a block and the first key of a panel.
template <typename T>
struct ForwardPanel {
  const T* q;  // rows of the user's tensor
  int64_t q_stride, dim;
  const T *k, *v;          // k: words [dim, width]; v: words [keys, columns]
  int64_t width, columns;  // columns: dim, padded
  Visible seen;
  float scale, softcap;    // scale is that of the exponent; softcap 0: none
  float inner;             // softcap: scale / softcap
  float *max, *sum, *out;  // state of the block: [rows], [rows, 16 lanes], [rows, columns]; max is unscaled
};

template <typename T>
struct BackwardPanel {
  const T *q, *dout;  // rows of the user's tensors
  int64_t q_stride, dout_stride, dim;
  const T *q_pairs, *dout_pairs;  // words [rows, columns]
  const T *k, *v, *k_pairs;       // words [dim, width] of k and v, words [keys, columns] of k
  int64_t width, columns;         // columns: dim, padded
  Visible seen;
  float scale, softcap, inner;  // scale is that of the exponent; softcap 0: none; inner: scale / softcap
  const float* lse;             // [rows]
  float* delta;                 // [rows]
  T *weights, *dscores;         // scratch: words [rows, kPanel]
  float *dq, *dk, *dv;          // [rows, columns], [keys, columns] twice
};

struct Division {
  std::vector<Unit> units;  // the longest first
  std::vector<Split> splits;
  std::vector<std::pair<Split, Block>> split_blocks;  // and their blocks of keys
  int64_t parts = 0;

  Division(const AttentionPlan& plan, int64_t threads);
};

// A tensor [tokens, heads, dim] with contiguous last dim, as attention_input() makes it.
template <typename T>
struct Heads {
  T* data;
  int64_t token, head;  // strides

  explicit Heads(const at::Tensor& t) : token(t.stride(0)), head(t.stride(1)) {
    if constexpr (std::is_const_v<T>)
      data = t.const_data_ptr<std::remove_const_t<T>>();
    else
      data = t.mutable_data_ptr<T>();
  }
  T* at(int64_t t, int64_t h) const { return data + t * token + h * head; }
};

// t itself where its last dim is contiguous; bfloat16 with an odd head dim gets a zero column (pairs are the GEMM's
// unit).
at::Tensor attention_input(const at::Tensor& t);

// Undoes that column for a result.
inline at::Tensor attention_output(const at::Tensor& t, int64_t dim) {
  return t.size(2) == dim ? t : t.narrow(2, 0, dim).contiguous();
}

// Hands out 64-byte aligned pieces of one allocation; from nullptr it only counts.
struct Arena {
  char* base;
  int64_t used = 0;

  template <typename T>
  T* take(int64_t n) {
    char* piece = base == nullptr ? nullptr : base + used;
    used += (n * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(piece);
  }
};

// X^T of one panel, from rows of X [rows, dim]: words [dim, padded(rows)], zero from `rows` on. The last rows are
// padded first: a whole block of kStep is transposed in registers, a part of one element by element.
template <typename T>
void pack_lanes(int64_t rows, int64_t dim, int64_t stride, const T* x, T* out) {
  const auto transposed = [dim, width = padded(rows)](int64_t rows, int64_t stride, const T* x, T* out) {
    if constexpr (std::is_same_v<T, float>)
      transpose(rows, dim, stride, width, x, out);
    else
      pack_vnni_transposed(dim, rows, stride, width, x, out);
  };
  const int64_t whole = rows / kStep * kStep;
  if (whole > 0) transposed(whole, stride, x, out);
  if (whole == rows) return;
  thread_local std::vector<T> copy;
  copy.assign(kStep * dim, T(0.0f));
  for (int64_t r = whole; r < rows; ++r) std::copy_n(x + r * stride, dim, copy.data() + (r - whole) * dim);
  transposed(kStep, dim, copy.data(), out + whole * (4 / sizeof(T)));
}

// X for a sum over its rows: words [rows, columns], zero in the columns from dim on and in the odd half of a last pair.
template <typename T>
void pack_pairs(int64_t rows, int64_t dim, int64_t columns, int64_t stride, const T* x, T* out) {
  if (dim < columns) std::fill_n(out, (rows + 1) / 2 * 2 * columns, T(0.0f));
  if constexpr (std::is_same_v<T, float>)
    for (int64_t r = 0; r < rows; ++r) std::copy_n(x + r * stride, dim, out + r * columns);
  else
    pack_vnni(rows, dim, stride, columns, x, out);
}

}  // namespace fastpt
