// attention forward for float and bfloat16: a unit of work packs k and v of one key head, then each query block of
// each query head that shares it walks its panels of keys with an online softmax. The definition is
// fastpt/ops/attention.py; what is shared with backward, and the layout, attention.h.
#include <numeric>
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

namespace {

int64_t block_cost(const AttentionPlan& plan, const Sequence& s, int64_t first) {
  const int64_t last = std::min(s.queries, first + kQueries) - 1;
  return kStep + std::max<int64_t>(plan.end_key(s, last) - plan.first_key(s, first), 0);
}

}  // namespace

Division::Division(const AttentionPlan& plan, int64_t threads) {
  std::vector<int64_t> costs;  // of one query head of each sequence
  for (const Sequence& s : plan.sequences) {
    int64_t cost = 0;
    for (int64_t first = 0; first < s.queries; first += kQueries) cost += block_cost(plan, s, first);
    costs.push_back(cost);
  }
  const int64_t total = std::accumulate(costs.begin(), costs.end(), int64_t{0}) * plan.heads_q;
  const int64_t limit = threads == 1 ? total : total / (4 * threads);  // 4 units a thread balance to a few per cent
  for (int64_t i = 0; i < static_cast<int64_t>(costs.size()); ++i) {
    const Sequence& s = plan.sequences[i];
    const int64_t items = (s.queries + kQueries - 1) / kQueries * plan.group, cost = costs[i] * plan.group;
    const int64_t n = std::clamp((cost + limit) / (limit + 1), int64_t{1}, std::max(items, int64_t{1}));
    for (int64_t head = 0; head < plan.heads_kv; ++head) {
      if (n > 1) splits.push_back({i, head, parts, n});
      int64_t done = 0, item = 0;
      for (int64_t part = 0; part < n; ++part) {
        Unit unit{i, head, item, item, done, n > 1 ? parts++ : -1};
        for (; item < items && (part + 1 == n || done * n < cost * (part + 1)); ++item)
          done += block_cost(plan, s, item / plan.group * kQueries);
        unit.end = item, unit.cost = done - unit.cost;
        units.push_back(unit);
      }
    }
  }
  std::stable_sort(units.begin(), units.end(), [](auto& a, auto& b) { return a.cost > b.cost; });
  for (const Split& split : splits)
    plan.for_each_panel(split.sequence, [&](const Block& block) { split_blocks.emplace_back(split, block); });
}

at::Tensor attention_input(const at::Tensor& t) {
  if (t.scalar_type() == at::kBFloat16 && t.size(2) % 2 != 0) return at::constant_pad_nd(t, {0, 1});
  return t.size(2) == 1 || t.stride(2) == 1 ? t : t.contiguous();
}

namespace {

template <typename T>
struct ForwardState {
  T *packed_k, *packed_v;
  float *max, *sum, *out;
  int64_t bytes;

  ForwardState(Arena arena, int64_t columns, int64_t longest)
      : packed_k(arena.take<T>(longest * columns)),
        packed_v(arena.take<T>(longest * columns)),
        max(arena.take<float>(kQueries)),
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
  const float* sinks;  // null: none
  T* shared;           // [2, heads_kv, packed_keys, columns]: the packed keys of heads that several units share

  // Packed k and v of one head of a sequence, each [padded keys, columns]: k by panels for the lanes, v for the sum
  // over keys.
  struct Packed {
    T *k, *v;
  };
  Packed shared_keys(int64_t sequence, int64_t head) const {
    T* k = shared + (head * plan.packed_keys + plan.sequences[sequence].packed_key0) * plan.columns;
    return {k, k + plan.heads_kv * plan.packed_keys * plan.columns};
  }

  void pack(const Block& block, int64_t head, const Packed& to) const {
    const int64_t token = plan.sequences[block.sequence].key0 + block.first, at = block.first * plan.columns;
    pack_lanes(block.rows, plan.dim, k.token, k.at(token, head), to.k + at);
    pack_pairs(block.rows, plan.dim, plan.columns, v.token, v.at(token, head), to.v + at);
  }

  void block(const Block& block, int64_t head, const Packed& keys, const ForwardState<T>& state) const {
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
    const int64_t end = plan.end_key(s, block.first + block.rows - 1);
    for (int64_t key = plan.first_key(s, block.first); key < end; key += kPanel) {
      panel.k = keys.k + key * plan.columns, panel.v = keys.v + key * plan.columns;
      panel.seen = plan.visible(block, key);
      panel.width = padded(panel.seen.lanes);
      run(panel, block.rows);
    }
    FASTPT_BY_ISA(attention_forward_finish<T>)
    (panel, block.rows, sinks == nullptr ? sinks : sinks + head, out.at(token, head), out.token,
     lse + token * plan.heads_q + head, plan.heads_q);
  }

  void unit(const Unit& unit, const ForwardState<T>& state) const {
    const bool is_alone = unit.part < 0;
    const Packed keys = is_alone ? Packed{state.packed_k, state.packed_v} : shared_keys(unit.sequence, unit.head);
    if (is_alone) plan.for_each_panel(unit.sequence, [&](const Block& block) { pack(block, unit.head, keys); });
    for (int64_t item = unit.begin; item < unit.end; ++item)
      block(plan.query_block(unit, item), plan.query_head(unit, item), keys, state);
  }

  void run(const at::TensorOptions& options, const Division& division) const {
    for_each_task(division.split_blocks.size(), [&](int64_t, int64_t task) {
      const auto& [split, block] = division.split_blocks[task];
      pack(block, split.head, shared_keys(split.sequence, split.head));
    });
    const int64_t bytes = ForwardState<T>(Arena{nullptr}, plan.columns, plan.longest).bytes;
    auto scratch = at::empty({at::get_num_threads(), bytes}, options.dtype(at::kByte));
    char* base = static_cast<char*>(scratch.mutable_data_ptr());
    for_each_task(division.units.size(), [&](int64_t worker, int64_t task) {
      unit(division.units[task], ForwardState<T>(Arena{base + worker * bytes}, plan.columns, plan.longest));
    });
  }
};

std::tuple<at::Tensor, at::Tensor> attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                             const std::optional<at::Tensor>& cu_seqlens_q,
                                             const std::optional<at::Tensor>& cu_seqlens_k, bool causal,
                                             std::optional<int64_t> window, std::optional<double> softcap, double scale,
                                             const std::optional<at::Tensor>& sinks) {
  static const auto reference = reference_of<decltype(attention)>("fastpt::attention");
  if (!is_native(q)) return reference(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window, softcap, scale, sinks);
  const auto qi = attention_input(q), ki = attention_input(k), vi = attention_input(v);
  const AttentionPlan plan(qi, ki, vi, cu_seqlens_q, cu_seqlens_k, causal, window, softcap, scale);
  TORCH_CHECK(!sinks || (sinks->dim() == 1 && sinks->size(0) == q.size(1) && sinks->scalar_type() == at::kFloat),
              "attention: sinks must be float32 [", q.size(1), "]");
  const auto si = sinks ? sinks->contiguous() : at::Tensor();
  auto out = at::empty(qi.sizes(), q.options());
  auto lse = at::empty({q.size(0), q.size(1)}, q.options().dtype(at::kFloat));
  const Division division(plan, at::get_num_threads());
  auto shared = at::empty({division.parts > 0 ? 2 : 0, plan.heads_kv, plan.packed_keys, plan.columns}, q.options());
  by_dtype(q, [&]<typename T>() {
    const Forward<T> forward{plan,
                             Heads<const T>(qi),
                             Heads<const T>(ki),
                             Heads<const T>(vi),
                             Heads<T>(out),
                             lse.mutable_data_ptr<float>(),
                             sinks ? si.const_data_ptr<float>() : nullptr,
                             shared.mutable_data_ptr<T>()};
    forward.run(q.options(), division);
  });
  return {attention_output(out, q.size(2)), lse};
}

}  // namespace
}  // namespace fastpt

TORCH_LIBRARY_IMPL(fastpt, CPU, m) {
  m.impl("attention", &fastpt::attention);
}
