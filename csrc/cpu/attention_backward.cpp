// attention backward for float and bfloat16, in one pass of 5 products a panel (a pass for dq and one for dk and dv
// would take 7 and every exponential twice): a unit of work owns float sums of dk and dv for one key head of one
// sequence and walks query blocks of all query heads that share it, forming each block's dq on the way. Few heads on
// many threads: units split a head's query blocks and their sums are added up afterwards, in order. No atomics, so the
// same each time.
#include <tuple>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/attention.h"
#include "cpu/dispatch.h"

#define FASTPT_KERNELS "cpu/attention_backward_kernels.h"
#include "cpu/for_each_isa.h"

namespace fastpt {
namespace {

template <typename T>
struct BackwardState {
  T *q_pairs, *dout_pairs, *weights, *dscores, *packed_k, *packed_v, *k_pairs;
  float *dq, *lse, *delta, *dk, *dv;
  int64_t bytes;

  BackwardState(Arena arena, int64_t columns, int64_t longest)
      : q_pairs(arena.take<T>(kQueries * columns)),
        dout_pairs(arena.take<T>(kQueries * columns)),
        weights(arena.take<T>(kQueries * kPanel)),
        dscores(arena.take<T>(kQueries * kPanel)),
        packed_k(arena.take<T>(longest * columns)),
        packed_v(arena.take<T>(longest * columns)),
        k_pairs(arena.take<T>(longest * columns)),
        dq(arena.take<float>(kQueries * columns)),
        lse(arena.take<float>(kQueries)),
        delta(arena.take<float>(kQueries)),
        dk(arena.take<float>(longest * columns)),
        dv(arena.take<float>(longest * columns)),
        bytes(arena.used) {}
};

template <typename T>
struct Backward {
  const AttentionPlan& plan;
  Heads<const T> grad, q, k, v, out;
  const float* lse;
  Heads<T> dq, dk, dv;
  T* shared;  // [3, heads_kv, packed_keys, columns]: the packed keys of heads that several units share

  // One head of a sequence packed, each [padded keys, columns]: k and v by panels for the lanes, k for the sum over
  // keys.
  struct Packed {
    T *k, *v, *k_pairs;
  };
  Packed shared_keys(int64_t sequence, int64_t head) const {
    const int64_t stride = plan.heads_kv * plan.packed_keys * plan.columns;
    T* k = shared + (head * plan.packed_keys + plan.sequences[sequence].packed_key0) * plan.columns;
    return {k, k + stride, k + 2 * stride};
  }

  void pack(const Block& block, int64_t head, const Packed& to) const {
    const int64_t token = plan.sequences[block.sequence].key0 + block.first, at = block.first * plan.columns;
    pack_lanes(block.rows, plan.dim, k.token, k.at(token, head), to.k + at);
    pack_lanes(block.rows, plan.dim, v.token, v.at(token, head), to.v + at);
    pack_pairs(block.rows, plan.dim, plan.columns, k.token, k.at(token, head), to.k_pairs + at);
  }

  // What does not depend on the keys: q and dout for sums over queries, lse, and delta = rowsum(dout * out); in float
  // that sum is taken over the keys.
  BackwardPanel<T> load(const Block& block, int64_t token, int64_t head, const BackwardState<T>& state) const {
    BackwardPanel<T> p{};
    p.q = q.at(token, head), p.dout = grad.at(token, head);
    p.q_stride = q.token, p.dout_stride = grad.token;
    p.dim = plan.dim, p.columns = plan.columns;
    p.q_pairs = state.q_pairs, p.dout_pairs = state.dout_pairs;
    p.scale = plan.remaining_scale(), p.softcap = plan.softcap, p.inner = plan.scale / plan.softcap;
    p.lse = state.lse, p.delta = state.delta;
    p.weights = state.weights, p.dscores = state.dscores, p.dq = state.dq;
    pack_pairs(block.rows, plan.dim, plan.columns, q.token, p.q, state.q_pairs);
    pack_pairs(block.rows, plan.dim, plan.columns, grad.token, p.dout, state.dout_pairs);
    if constexpr (std::is_same_v<T, float>)
      std::fill_n(state.delta, block.rows, 0.0f);
    else
      FASTPT_BY_ISA(attention_row_dots<T>)
    (block.rows, plan.dim, grad.token, p.dout, out.token, out.at(token, head), state.delta);
    for (int64_t r = 0; r < block.rows; ++r) state.lse[r] = lse[(token + r) * plan.heads_q + head];
    std::fill_n(state.dq, block.rows * plan.columns, 0.0f);
    return p;
  }

  // Adds to dk_sum and dv_sum [keys, columns] what one block of queries of one head gives, and stores its dq.
  void block(const Block& block, int64_t head, float* dk_sum, float* dv_sum, const Packed& keys,
             const BackwardState<T>& state) const {
    const Sequence& s = plan.sequences[block.sequence];
    const int64_t token = s.query0 + block.first;
    BackwardPanel<T> p = load(block, token, head, state);
    const int64_t end = plan.end_key(s, block.first + block.rows - 1);
    const auto for_each_panel = [&](const auto run) {
      for (int64_t key = plan.first_key(s, block.first); key < end; key += kPanel) {
        const int64_t offset = key * plan.columns;
        p.k = keys.k + offset, p.v = keys.v + offset, p.k_pairs = keys.k_pairs + offset;
        p.dk = dk_sum + offset, p.dv = dv_sum + offset;
        p.seen = plan.visible(block, key);
        p.width = padded(p.seen.lanes);
        run(p, block.rows);
      }
    };
    if constexpr (std::is_same_v<T, float>) for_each_panel(FASTPT_BY_ISA(attention_delta_panel<T>));
    for_each_panel(FASTPT_BY_ISA(attention_backward_panel<T>));
    FASTPT_BY_ISA(attention_store<T>)
    (block.rows, plan.dim, plan.columns, state.dq, plan.scale, dq.token, dq.at(token, head));
  }

  void store_keys(int64_t sequence, int64_t first, int64_t rows, int64_t head, const float* dk_sum,
                  const float* dv_sum) const {
    const auto store = FASTPT_BY_ISA(attention_store<T>);
    const int64_t token = plan.sequences[sequence].key0 + first, offset = first * plan.columns;
    store(rows, plan.dim, plan.columns, dk_sum + offset, plan.scale, dk.token, dk.at(token, head));
    store(rows, plan.dim, plan.columns, dv_sum + offset, 1.0f, dv.token, dv.at(token, head));
  }

  // `sums` holds dk and dv of each part, [parts, 2, longest, columns].
  void unit(const Unit& unit, float* sums, const BackwardState<T>& state) const {
    const Sequence& s = plan.sequences[unit.sequence];
    const int64_t stride = plan.longest * plan.columns;
    float* dk_sum = unit.part < 0 ? state.dk : sums + 2 * unit.part * stride;
    float* dv_sum = unit.part < 0 ? state.dv : dk_sum + stride;
    std::fill_n(dk_sum, s.keys * plan.columns, 0.0f);
    std::fill_n(dv_sum, s.keys * plan.columns, 0.0f);
    const Packed keys =
        unit.part < 0 ? Packed{state.packed_k, state.packed_v, state.k_pairs} : shared_keys(unit.sequence, unit.head);
    if (unit.part < 0) plan.for_each_panel(unit.sequence, [&](const Block& block) { pack(block, unit.head, keys); });
    for (int64_t item = unit.begin; item < unit.end; ++item)
      block(plan.query_block(unit, item), plan.query_head(unit, item), dk_sum, dv_sum, keys, state);
    if (unit.part < 0) store_keys(unit.sequence, 0, s.keys, unit.head, dk_sum, dv_sum);
  }

  // Adds up the parts of one block of keys, in order.
  void join(const Split& split, const Block& block, float* sums) const {
    const int64_t stride = plan.longest * plan.columns, at = block.first * plan.columns, n = block.rows * plan.columns;
    float *dk_sum = sums + 2 * split.first_part * stride, *dv_sum = dk_sum + stride;
    for (int64_t part = 1; part < split.parts; ++part) {
      FASTPT_BY_ISA(attention_add)(n, dk_sum + 2 * part * stride + at, dk_sum + at);
      FASTPT_BY_ISA(attention_add)(n, dv_sum + 2 * part * stride + at, dv_sum + at);
    }
    store_keys(split.sequence, block.first, block.rows, split.head, dk_sum, dv_sum);
  }

  void run(const at::TensorOptions& options, float* sums, const Division& division) const {
    const auto& split_blocks = division.split_blocks;
    for_each_task(split_blocks.size(), [&](int64_t, int64_t task) {
      const auto& [split, block] = split_blocks[task];
      pack(block, split.head, shared_keys(split.sequence, split.head));
    });
    const int64_t bytes = BackwardState<T>(Arena{nullptr}, plan.columns, plan.longest).bytes;
    auto scratch = at::empty({at::get_num_threads(), bytes}, options.dtype(at::kByte));
    char* base = static_cast<char*>(scratch.mutable_data_ptr());
    for_each_task(division.units.size(), [&](int64_t worker, int64_t task) {
      unit(division.units[task], sums, BackwardState<T>(Arena{base + worker * bytes}, plan.columns, plan.longest));
    });
    for_each_task(split_blocks.size(),
                  [&](int64_t, int64_t task) { join(split_blocks[task].first, split_blocks[task].second, sums); });
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
    const at::Tensor& lse, const std::optional<at::Tensor>& cu_seqlens_q, const std::optional<at::Tensor>& cu_seqlens_k,
    bool causal, std::optional<int64_t> window, std::optional<double> softcap, double scale) {
  static const auto reference = reference_of<decltype(attention_backward)>("fastpt::attention_backward");
  if (!is_native(q))
    return reference(grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, causal, window, softcap, scale);
  const auto qi = attention_input(q), ki = attention_input(k), vi = attention_input(v);
  const auto gi = attention_input(grad), oi = attention_input(out), li = lse.contiguous();
  const AttentionPlan plan(qi, ki, vi, cu_seqlens_q, cu_seqlens_k, causal, window, softcap, scale);
  TORCH_CHECK(gi.sizes() == qi.sizes() && oi.sizes() == qi.sizes() && li.scalar_type() == at::kFloat &&
                  gi.scalar_type() == q.scalar_type() && oi.scalar_type() == q.scalar_type() &&
                  li.numel() == q.size(0) * q.size(1),
              "attention_backward: grad ", grad.sizes(), ", out ", out.sizes(), ", lse ", lse.sizes(), " do not fit q ",
              q.sizes());
  auto dq = at::empty(qi.sizes(), q.options()), dk = at::empty(ki.sizes(), k.options());
  auto dv = at::empty(ki.sizes(), v.options());
  const Division division(plan, at::get_num_threads());
  auto sums = at::empty({division.parts, 2, plan.longest, plan.columns}, q.options().dtype(at::kFloat));
  auto shared = at::empty({division.parts > 0 ? 3 : 0, plan.heads_kv, plan.packed_keys, plan.columns}, q.options());
  by_dtype(q, [&]<typename T>() {
    const Backward<T> backward{plan,
                               Heads<const T>(gi),
                               Heads<const T>(qi),
                               Heads<const T>(ki),
                               Heads<const T>(vi),
                               Heads<const T>(oi),
                               li.const_data_ptr<float>(),
                               Heads<T>(dq),
                               Heads<T>(dk),
                               Heads<T>(dv),
                               shared.mutable_data_ptr<T>()};
    backward.run(q.options(), sums.mutable_data_ptr<float>(), division);
  });
  return {attention_output(dq, q.size(2)), attention_output(dk, q.size(2)), attention_output(dv, q.size(2))};
}

// -sum over tokens of exp(sink - lse) * delta: a task per head, its tokens in order.
at::Tensor attention_sinks_backward(const at::Tensor& grad, const at::Tensor& out, const at::Tensor& lse,
                                    const at::Tensor& sinks) {
  static const auto reference = reference_of<decltype(attention_sinks_backward)>("fastpt::attention_sinks_backward");
  if (!is_native(out)) return reference(grad, out, lse, sinks);
  TORCH_CHECK(out.dim() == 3 && grad.sizes() == out.sizes() && grad.scalar_type() == out.scalar_type() &&
                  lse.sizes() == out.sizes().slice(0, 2) && sinks.sizes() == out.sizes().slice(1, 1) &&
                  lse.scalar_type() == at::kFloat && sinks.scalar_type() == at::kFloat,
              "attention_sinks_backward: grad ", grad.sizes(), ", out ", out.sizes(), ", lse ", lse.sizes(), ", sinks ",
              sinks.sizes(), " do not fit");
  const auto gi = attention_input(grad), oi = attention_input(out), li = lse.contiguous(), si = sinks.contiguous();
  const int64_t tokens = oi.size(0), heads = oi.size(1), dim = oi.size(2);
  auto dsinks = at::empty({heads}, sinks.options());
  const float *l = li.const_data_ptr<float>(), *s = si.const_data_ptr<float>();
  float* sums = dsinks.mutable_data_ptr<float>();
  by_dtype(out, [&]<typename T>() {
    const Heads<const T> g(gi), o(oi);
    for_each_task(heads, [&](int64_t, int64_t head) {
      double sum = 0.0;
      for (int64_t first = 0; first < tokens; first += kQueries) {
        const int64_t rows = std::min(kQueries, tokens - first);
        float delta[kQueries];
        FASTPT_BY_ISA(attention_row_dots<T>)
        (rows, dim, g.token, g.at(first, head), o.token, o.at(first, head), delta);
        for (int64_t r = 0; r < rows; ++r) sum -= std::exp(s[head] - l[(first + r) * heads + head]) * delta[r];
      }
      sums[head] = static_cast<float>(sum);
    });
  });
  return dsinks;
}

}  // namespace
}  // namespace fastpt

TORCH_LIBRARY_IMPL(fastpt, CPU, m) {
  m.impl("attention_backward", &fastpt::attention_backward);
  m.impl("attention_sinks_backward", &fastpt::attention_sinks_backward);
}
