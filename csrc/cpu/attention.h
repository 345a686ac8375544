// Flash attention on the CPU: what forward and backward share; the definition is fastpt/ops/attention.py.
// Scores are held transposed, [keys, queries]: a vector lane is a query, so softmax never reduces across lanes, and the
// probabilities come out as the second operand of one GEMM and the first of another without a transpose. Everything a
// GEMM reads is first packed into zero-padded tiles, so no inner loop has a tail.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>
#include <ATen/core/Tensor.h>
#include <ATen/Parallel.h>

#include "cpu/gemm.h"

namespace fastpt {

// A tile of scores [kKeys, kQueries] is 32 KiB, which the GEMM leaves in L1 or L2. Fewer queries compute fewer scores
// that the causal mask throws away, more reread dk and dv less often. Tiles are cut to multiples of kStep, one vector.
constexpr int64_t kQueries = 64;
constexpr int64_t kKeys = 128;
constexpr int64_t kStep = 16;

inline int64_t padded(int64_t n) {
  return (n + kStep - 1) / kStep * kStep;
}

struct Sequence {
  int64_t query0, queries, key0, keys;
  int64_t packed_key0;  // first row in packed tensors, where every sequence has padded(keys) rows
};

// A block of at most kQueries queries or kKeys keys; `first` counts from the start of the sequence.
struct Block {
  int64_t sequence, first, rows;
};

// Everything about a call but the data.
struct AttentionPlan {
  int64_t heads_q, heads_kv, group, dim;  // group: query heads per key head; dim: the head dim, made even for bfloat16
  int64_t before, after;                  // how many keys before and after its own position a query sees
  float scale, softcap;                   // softcap 0: none
  int64_t packed_keys, longest;           // sum and maximum of padded(keys)
  std::vector<Sequence> sequences;

  AttentionPlan(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                const std::optional<at::Tensor>& cu_seqlens_q, const std::optional<at::Tensor>& cu_seqlens_k,
                bool causal, std::optional<int64_t> window, std::optional<double> softcap, double scale);

  // The keys that some query of a block may see, rounded outwards to kStep within the padded sequence.
  int64_t first_key(const Sequence& s, int64_t query) const {
    return std::clamp(query + s.keys - s.queries - before, int64_t{0}, s.keys) / kStep * kStep;
  }
  int64_t end_key(const Sequence& s, int64_t last_query) const {
    return padded(std::clamp(last_query + s.keys - s.queries + after + 1, int64_t{0}, s.keys));
  }
  std::vector<Block> query_blocks() const;
  std::vector<Block> key_blocks() const;
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

// Runs body(worker, task) once for each task; the next free thread takes the next task, so unequal tasks balance.
// Tasks must not share what they write: then the results do not depend on who runs what.
template <typename Body>
void for_each_task(int64_t tasks, const Body& body) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t task = next++; task < tasks; task = next++) body(worker, task);
    gemm_release();
  });
}

// X^T as the second operand of a tile, from rows of X [rows, dim]: kQueries columns apart, the columns from rows on
// zero.
template <typename T>
void pack_columns(int64_t rows, int64_t dim, int64_t stride, const T* x, T* out) {
  if (rows < kQueries) std::fill_n(out, dim * kQueries, T(0.0f));
  if constexpr (std::is_same_v<T, float>)
    transpose(rows, dim, stride, kQueries, x, out);
  else
    pack_vnni_transposed(dim, rows, stride, kQueries, x, out);
}

// Rows of X [rows, dim] zero-padded to padded(rows), as they are (a first operand) or, by pack_rows, as a second one.
template <typename T>
void copy_rows(int64_t rows, int64_t dim, int64_t stride, const T* x, T* out) {
  for (int64_t r = 0; r < rows; ++r) std::copy_n(x + r * stride, dim, out + r * dim);
  std::fill(out + rows * dim, out + padded(rows) * dim, T(0.0f));
}
template <typename T>
void pack_rows(int64_t rows, int64_t dim, int64_t stride, const T* x, T* out) {
  if constexpr (std::is_same_v<T, float>) {
    copy_rows(rows, dim, stride, x, out);
  } else {
    pack_vnni(rows, dim, stride, dim, x, out);
    std::fill(out + (rows + 1) / 2 * 2 * dim, out + padded(rows) * dim, T(0.0f));
  }
}

// X^T as the first operand, [dim, padded(rows)], from rows of X.
template <typename T>
void copy_columns(int64_t rows, int64_t dim, int64_t stride, const T* x, T* out) {
  if (rows < padded(rows)) std::fill_n(out, dim * padded(rows), T(0.0f));
  transpose(rows, dim, stride, padded(rows), x, out);
}

}  // namespace fastpt

#define FASTPT_KERNELS "cpu/attention_kernels.h"
#include "cpu/for_each_isa.h"

namespace fastpt {

// Scores of a block's queries (columns, up to a multiple of kStep) against keys [first_key, + keys): the product,
// capped if the plan says so, and -inf where a query does not see a key. packed_k: rows; packed_q: pack_columns of the
// block.
template <typename T>
void score_tile(const AttentionPlan& plan, const Block& block, int64_t first_key, int64_t keys, const T* packed_k,
                const T* packed_q, float* scores) {
  const int64_t columns = padded(block.rows), dim = plan.dim;
  gemm_tile(keys, columns, dim, dim, kQueries, kQueries, false, packed_k, packed_q, scores);
  if (plan.softcap > 0) FASTPT_BY_ISA(attention_softcap)(keys, columns, plan.scale, plan.softcap, scores);
  // In columns of the tile: the first query that sees key r is begin + r, the last one end + r - 1.
  const Sequence& s = plan.sequences[block.sequence];
  const int64_t own = first_key - (s.keys - s.queries) - block.first;
  const int64_t begin = own - plan.after, end = own + plan.before + 1, rows = s.keys - first_key;
  if (rows < keys || begin + keys > 1 || end < block.rows)
    FASTPT_BY_ISA(attention_mask)(keys, columns, rows, begin, end, scores);
}

// What score_tile's result is still to be multiplied by.
inline float remaining_scale(const AttentionPlan& plan) {
  return plan.softcap > 0 ? 1.0f : plan.scale;
}

}  // namespace fastpt
