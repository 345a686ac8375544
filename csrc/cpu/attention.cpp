// attention forward for float and bfloat16: packs k and v once, then each (query block, head) walks its panels of keys
// with an online softmax. The definition is fastpt/ops/attention.py; what is shared with backward, and the layout,
// attention.h.
#include <tuple>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/attention.h"
#include "cpu/dispatch.h"

#define FASTPT_KERNELS "cpu/attention_forward_kernels.h"
#include "cpu/for_each_isa.h"

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
  columns = padded(dim);
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
  return blocks(sequences, &Sequence::keys, kPanel);
}

at::Tensor attention_input(const at::Tensor& t) {
  if (t.scalar_type() == at::kBFloat16 && t.size(2) % 2 != 0) return at::constant_pad_nd(t, {0, 1});
  return t.size(2) == 1 || t.stride(2) == 1 ? t : t.contiguous();
}

namespace {

struct ForwardState {
  float *max, *sum, *out;
  int64_t bytes;

  ForwardState(Arena arena, int64_t columns)
      : max(arena.take<float>(kQueries)),
        sum(arena.take<float>(kQueries * kStep)),
        out(arena.take<float>(kQueries * columns)),
        bytes(arena.used) {}
};

template <typename T>
struct Forward {
  const AttentionPlan& plan;
  Heads<const T> q, k, v;
  Heads<T> out;
  float* lse;
  T *packed_k, *packed_v;  // each [heads_kv, packed_keys, columns]: k by panels for the lanes, v for the sum over keys

  int64_t packed_at(const Sequence& s, int64_t head) const {
    return (head * plan.packed_keys + s.packed_key0) * plan.columns;
  }

  void pack(const Block& block, int64_t head) const {
    const Sequence& s = plan.sequences[block.sequence];
    const int64_t token = s.key0 + block.first, at = packed_at(s, head) + block.first * plan.columns;
    pack_lanes(block.rows, plan.dim, k.token, k.at(token, head), packed_k + at);
    pack_pairs(block.rows, plan.dim, plan.columns, v.token, v.at(token, head), packed_v + at);
  }

  void block(const Block& block, int64_t head, const ForwardState& state) const {
    const Sequence& s = plan.sequences[block.sequence];
    const int64_t token = s.query0 + block.first;
    std::fill_n(state.max, kQueries, std::numeric_limits<float>::lowest());
    std::fill_n(state.sum, kQueries * kStep, 0.0f);
    std::fill_n(state.out, block.rows * plan.columns, 0.0f);
    ForwardPanel<T> panel{};
    panel.q = q.at(token, head), panel.q_stride = q.token;
    panel.dim = plan.dim, panel.columns = plan.columns;
    panel.scale = plan.remaining_scale(), panel.softcap = plan.softcap, panel.inner = plan.scale / plan.softcap;
    panel.max = state.max, panel.sum = state.sum, panel.out = state.out;
    const auto run = FASTPT_BY_ISA(attention_forward_panel<T>);
    const int64_t end = plan.end_key(s, block.first + block.rows - 1), at = packed_at(s, head / plan.group);
    for (int64_t key = plan.first_key(s, block.first); key < end; key += kPanel) {
      panel.k = packed_k + at + key * plan.columns, panel.v = packed_v + at + key * plan.columns;
      panel.seen = plan.visible(block, key);
      panel.width = padded(panel.seen.lanes);
      run(panel, block.rows);
    }
    FASTPT_BY_ISA(attention_forward_finish<T>)
    (panel, block.rows, out.at(token, head), out.token, lse + token * plan.heads_q + head, plan.heads_q);
  }

  void run(const at::TensorOptions& options) const {
    const auto key_blocks = plan.key_blocks(), query_blocks = plan.query_blocks();
    const int64_t n_keys = key_blocks.size(), n_queries = query_blocks.size();
    for_each_task(plan.heads_kv * n_keys,
                  [&](int64_t, int64_t task) { pack(key_blocks[task % n_keys], task / n_keys); });
    const int64_t bytes = ForwardState(Arena{nullptr}, plan.columns).bytes;
    auto scratch = at::empty({at::get_num_threads(), bytes}, options.dtype(at::kByte));
    char* base = static_cast<char*>(scratch.mutable_data_ptr());
    for_each_task(plan.heads_q * n_queries, [&](int64_t worker, int64_t task) {
      const Block& longest_first = query_blocks[n_queries - 1 - task % n_queries];
      block(longest_first, task / n_queries, ForwardState(Arena{base + worker * bytes}, plan.columns));
    });
  }
};

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
  auto packed = at::empty({2, plan.heads_kv, plan.packed_keys, plan.columns}, q.options());
  by_dtype(q, [&]<typename T>() {
    T* p = packed.mutable_data_ptr<T>();
    const Forward<T> forward{
        plan, Heads<const T>(qi),  Heads<const T>(ki), Heads<const T>(vi), Heads<T>(out), lse.mutable_data_ptr<float>(),
        p,    p + packed.stride(0)};
    forward.run(q.options());
  });
  return {attention_output(out, q.size(2)), lse};
}

}  // namespace
}  // namespace fastpt

TORCH_LIBRARY_IMPL(fastpt, CPU, m) {
  m.impl("attention", &fastpt::attention);
}
