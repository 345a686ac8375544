// attention forward for float and bfloat16: packs k and v once, then each (query block, head) walks its keys with an
// online softmax. The definition is fastpt/ops/attention.py; what is shared with backward, and the layout, attention.h.
#include <tuple>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/attention.h"
#include "cpu/dispatch.h"

namespace fastpt {
namespace {

std::vector<int64_t> bounds(const std::optional<at::Tensor>& cu_seqlens, int64_t tokens, const char* name) {
  if (!cu_seqlens) return {0, tokens};
  const auto cu = cu_seqlens->to(at::kCPU, at::kLong).contiguous();
  TORCH_CHECK(cu.dim() == 1 && cu.numel() > 0, "attention: ", name, " has shape ", cu.sizes(), "; it must be [N + 1]");
  std::vector<int64_t> b(cu.const_data_ptr<int64_t>(), cu.const_data_ptr<int64_t>() + cu.numel());
  TORCH_CHECK(b.front() == 0 && b.back() == tokens && std::is_sorted(b.begin(), b.end()), "attention: ", name, " is ",
              at::IntArrayRef(b), "; it must rise from 0 to the ", tokens, " tokens of its tensor");
  return b;
}

std::vector<Block> blocks(const std::vector<Sequence>& sequences, int64_t Sequence::* length, int64_t size) {
  std::vector<Block> found;
  for (size_t i = 0; i < sequences.size(); ++i)
    for (int64_t first = 0; first < sequences[i].*length; first += size)
      found.push_back({static_cast<int64_t>(i), first, std::min(size, sequences[i].*length - first)});
  return found;
}

}  // namespace

AttentionPlan::AttentionPlan(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const std::optional<at::Tensor>& cu_seqlens_q,
                             const std::optional<at::Tensor>& cu_seqlens_k, bool causal, std::optional<int64_t> window,
                             std::optional<double> softcap, double scale)
    : scale(static_cast<float>(scale)), softcap(static_cast<float>(softcap.value_or(0.0))) {
  TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && k.sizes() == v.sizes() && q.size(2) == k.size(2) && k.size(1) > 0 &&
                  q.size(1) % k.size(1) == 0 && q.scalar_type() == k.scalar_type() &&
                  q.scalar_type() == v.scalar_type() && scale > 0,
              "attention: q ", q.sizes(), ", k ", k.sizes(), ", v ", v.sizes(), ", scale ", scale, " do not fit");
  heads_q = q.size(1), heads_kv = k.size(1), group = heads_q / heads_kv, dim = q.size(2);
  constexpr int64_t kAll = int64_t{1} << 40;
  before = window ? *window - 1 : kAll;
  after = causal ? 0 : before;
  const auto starts_q = bounds(cu_seqlens_q, q.size(0), "cu_seqlens_q");
  const auto starts_k = bounds(cu_seqlens_k ? cu_seqlens_k : cu_seqlens_q, k.size(0), "cu_seqlens_k");
  TORCH_CHECK(starts_q.size() == starts_k.size(), "attention: cu_seqlens_q has ", starts_q.size() - 1,
              " sequences, cu_seqlens_k ", starts_k.size() - 1, "; give one each");
  packed_keys = longest = 0;
  for (size_t i = 0; i + 1 < starts_q.size(); ++i) {
    const int64_t keys = starts_k[i + 1] - starts_k[i];
    sequences.push_back({starts_q[i], starts_q[i + 1] - starts_q[i], starts_k[i], keys, packed_keys});
    packed_keys += padded(keys);
    longest = std::max(longest, padded(keys));
  }
}

std::vector<Block> AttentionPlan::query_blocks() const {
  return blocks(sequences, &Sequence::queries, kQueries);
}

std::vector<Block> AttentionPlan::key_blocks() const {
  return blocks(sequences, &Sequence::keys, kKeys);
}

at::Tensor attention_input(const at::Tensor& t) {
  if (t.scalar_type() == at::kBFloat16 && t.size(2) % 2 != 0) return at::constant_pad_nd(t, {0, 1});
  return t.size(2) == 1 || t.stride(2) == 1 ? t : t.contiguous();
}

namespace {

template <typename T>
struct ForwardTiles {
  T *query, *weights;
  float *scores, *out, *rows, *max, *sum, *factor, *lse;

  ForwardTiles(Arena arena, int64_t dim)
      : query(arena.take<T>(dim * kQueries)),
        weights(arena.take<T>(kKeys * kQueries)),
        scores(arena.take<float>(kKeys * kQueries)),
        out(arena.take<float>(dim * kQueries)),
        rows(arena.take<float>(dim * kQueries)),
        max(arena.take<float>(kQueries)),
        sum(arena.take<float>(kQueries)),
        factor(arena.take<float>(kQueries)),
        lse(arena.take<float>(kQueries)),
        bytes(arena.used) {}
  int64_t bytes;
};

// One block of queries of one head, against packed_k [keys, dim] and packed_vt (blocks of [dim, kKeys]) of its sequence
// and key head.
template <typename T>
void forward_block(const AttentionPlan& plan, const Block& block, int64_t q_stride, const T* q, const T* packed_k,
                   const T* packed_vt, const ForwardTiles<T>& tiles, int64_t out_stride, T* out, float* lse) {
  const Sequence& s = plan.sequences[block.sequence];
  const int64_t columns = padded(block.rows), dim = plan.dim;
  const float scale = remaining_scale(plan);
  pack_columns(block.rows, dim, q_stride, q, tiles.query);
  std::fill_n(tiles.max, kQueries, -std::numeric_limits<float>::infinity());
  std::fill_n(tiles.sum, kQueries, 0.0f);
  const int64_t end = plan.end_key(s, block.first + block.rows - 1);
  bool is_first = true;
  for (int64_t key = plan.first_key(s, block.first), next; key < end; key = next) {
    const int64_t tile = key / kKeys * kKeys, width = std::min(kKeys, padded(s.keys) - tile);
    next = std::min(end, tile + kKeys);
    score_tile(plan, block, key, next - key, packed_k + key * dim, tiles.query, tiles.scores);
    FASTPT_BY_ISA(attention_softmax<T>)
    (next - key, columns, scale, tiles.scores, tiles.max, tiles.sum, tiles.factor, tiles.weights);
    if (!is_first) FASTPT_BY_ISA(attention_rescale)(dim, columns, tiles.factor, tiles.out);
    gemm_tile(dim, columns, next - key, width, kQueries, kQueries, !is_first, packed_vt + tile * dim + (key - tile),
              tiles.weights, tiles.out);
    is_first = false;
  }
  if (is_first) std::fill_n(tiles.out, dim * kQueries, 0.0f);
  FASTPT_BY_ISA(attention_finish)(columns, scale, tiles.max, tiles.sum, tiles.lse, tiles.factor);
  for (int64_t r = 0; r < block.rows; ++r) lse[r * plan.heads_q] = tiles.lse[r];
  FASTPT_BY_ISA(attention_rescale)(dim, columns, tiles.factor, tiles.out);
  transpose(dim, columns, kQueries, dim, tiles.out, tiles.rows);
  FASTPT_BY_ISA(attention_store_rows<T>)(block.rows, dim, tiles.rows, 1.0f, out_stride, out);
}

template <typename T>
void forward(const AttentionPlan& plan, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::Tensor& out,
             at::Tensor& lse) {
  const Heads<const T> queries(q), keys(k), values(v);
  const Heads<T> outputs(out);
  float* lses = lse.mutable_data_ptr<float>();
  auto packed = at::empty({2, plan.heads_kv, plan.packed_keys, plan.dim}, q.options());
  T* packed_k = packed.mutable_data_ptr<T>();
  T* packed_vt = packed_k + packed.stride(0);
  const auto key_blocks = plan.key_blocks(), query_blocks = plan.query_blocks();
  const int64_t n_keys = key_blocks.size(), n_queries = query_blocks.size();

  for_each_task(plan.heads_kv * n_keys, [&](int64_t, int64_t task) {
    const Block& block = key_blocks[task % n_keys];
    const Sequence& s = plan.sequences[block.sequence];
    const int64_t head = task / n_keys, token = s.key0 + block.first;
    const int64_t at = (head * plan.packed_keys + s.packed_key0 + block.first) * plan.dim;
    copy_rows(block.rows, plan.dim, keys.token, keys.at(token, head), packed_k + at);
    copy_columns(block.rows, plan.dim, values.token, values.at(token, head), packed_vt + at);
  });

  const int64_t bytes = ForwardTiles<T>(Arena{nullptr}, plan.dim).bytes;
  auto scratch = at::empty({at::get_num_threads(), bytes}, q.options().dtype(at::kByte));
  char* base = static_cast<char*>(scratch.mutable_data_ptr());
  for_each_task(plan.heads_q * n_queries, [&](int64_t worker, int64_t task) {
    const Block& block = query_blocks[n_queries - 1 - task % n_queries];  // the longest first
    const Sequence& s = plan.sequences[block.sequence];
    const int64_t head = task / n_queries, token = s.query0 + block.first;
    const int64_t at = (head / plan.group * plan.packed_keys + s.packed_key0) * plan.dim;
    forward_block<T>(plan, block, queries.token, queries.at(token, head), packed_k + at, packed_vt + at,
                     ForwardTiles<T>(Arena{base + worker * bytes}, plan.dim), outputs.token, outputs.at(token, head),
                     lses + token * plan.heads_q + head);
  });
}

std::tuple<at::Tensor, at::Tensor> attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                             const std::optional<at::Tensor>& cu_seqlens_q,
                                             const std::optional<at::Tensor>& cu_seqlens_k, bool causal,
                                             std::optional<int64_t> window, std::optional<double> softcap,
                                             double scale) {
  static const auto reference = reference_of<decltype(attention)>("fastpt::attention");
  if (!is_native(q)) return reference(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window, softcap, scale);
  const auto qi = attention_input(q), ki = attention_input(k), vi = attention_input(v);
  const AttentionPlan plan(qi, ki, vi, cu_seqlens_q, cu_seqlens_k, causal, window, softcap, scale);
  auto out = at::empty(qi.sizes(), q.options());
  auto lse = at::empty({q.size(0), q.size(1)}, q.options().dtype(at::kFloat));
  by_dtype(q, [&]<typename T>() { forward<T>(plan, qi, ki, vi, out, lse); });
  return {attention_output(out, q.size(2)), lse};
}

}  // namespace
}  // namespace fastpt

TORCH_LIBRARY_IMPL(fastpt, CPU, m) {
  m.impl("attention", &fastpt::attention);
}
