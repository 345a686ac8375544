// attention backward for float and bfloat16, in one pass of 5 GEMMs a tile (a pass for dq and one for dk and dv would
// take 7 and every exponential twice): a unit of work owns float sums of dk and dv for one key head of one sequence and
// walks query blocks of all query heads that share it, forming each block's dq on the way. Few heads on many threads:
// units split a head's query blocks and their sums are added up afterwards, in order. No atomics, so the same each
// time.
#include <numeric>
#include <tuple>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/attention.h"
#include "cpu/dispatch.h"

namespace fastpt {
namespace {

// Items [begin, end) of a (sequence, key head); item i is query head i % group of query block i / group.
struct Unit {
  int64_t sequence, head, begin, end;
  int64_t cost;  // in rows of key tiles
  int64_t part;  // which of the split sums it fills, from -1: a unit that has the key head to itself
};

// Where a split (sequence, key head) finds its parts.
struct Split {
  int64_t sequence, head, first_part, parts;
};

struct Division {
  std::vector<Unit> units;
  std::vector<Split> splits;
  int64_t parts = 0;
};

int64_t block_cost(const AttentionPlan& plan, const Sequence& s, int64_t first) {
  const int64_t last = std::min(s.queries, first + kQueries) - 1;
  return kStep + std::max<int64_t>(plan.end_key(s, last) - plan.first_key(s, first), 0);
}

Division divide(const AttentionPlan& plan, int64_t threads) {
  std::vector<int64_t> costs;  // of one query head of each sequence
  for (const Sequence& s : plan.sequences) {
    int64_t cost = 0;
    for (int64_t first = 0; first < s.queries; first += kQueries) cost += block_cost(plan, s, first);
    costs.push_back(cost);
  }
  const int64_t total = std::accumulate(costs.begin(), costs.end(), int64_t{0}) * plan.heads_q;
  const int64_t limit = threads == 1 ? total : total / (4 * threads);  // 4 units a thread balance to a few per cent
  Division division;
  for (int64_t i = 0; i < static_cast<int64_t>(costs.size()); ++i) {
    const Sequence& s = plan.sequences[i];
    const int64_t items = (s.queries + kQueries - 1) / kQueries * plan.group, cost = costs[i] * plan.group;
    const int64_t parts = std::clamp((cost + limit) / (limit + 1), int64_t{1}, std::max(items, int64_t{1}));
    for (int64_t head = 0; head < plan.heads_kv; ++head) {
      if (parts > 1) division.splits.push_back({i, head, division.parts, parts});
      int64_t done = 0, item = 0;
      for (int64_t part = 0; part < parts; ++part) {
        Unit unit{i, head, item, item, done, parts > 1 ? division.parts++ : -1};
        for (; item < items && (part + 1 == parts || done * parts < cost * (part + 1)); ++item)
          done += block_cost(plan, s, item / plan.group * kQueries);
        unit.end = item, unit.cost = done - unit.cost;
        division.units.push_back(unit);
      }
    }
  }
  std::stable_sort(division.units.begin(), division.units.end(), [](auto& a, auto& b) { return a.cost > b.cost; });
  return division;
}

template <typename T>
struct BackwardTiles {
  T *query_columns, *query_rows, *dout_columns, *dout_rows, *weights, *dscores, *dscores_pairs;
  float *scores, *dweights, *dq, *dq_rows, *lse, *delta, *dk, *dv;
  int64_t bytes;

  BackwardTiles(Arena arena, int64_t dim, int64_t longest)
      : query_columns(arena.take<T>(dim * kQueries)),
        query_rows(arena.take<T>(dim * kQueries)),
        dout_columns(arena.take<T>(dim * kQueries)),
        dout_rows(arena.take<T>(dim * kQueries)),
        weights(arena.take<T>(kKeys * kQueries)),
        dscores(arena.take<T>(kKeys * kQueries)),
        dscores_pairs(std::is_same_v<T, float> ? dscores : arena.take<T>(kKeys * kQueries)),
        scores(arena.take<float>(kKeys * kQueries)),
        dweights(arena.take<float>(kKeys * kQueries)),
        dq(arena.take<float>(dim * kQueries)),
        dq_rows(arena.take<float>(dim * kQueries)),
        lse(arena.take<float>(kQueries)),
        delta(arena.take<float>(kQueries)),
        dk(arena.take<float>(longest * dim)),
        dv(arena.take<float>(longest * dim)),
        bytes(arena.used) {}
};

template <typename T>
struct Backward {
  const AttentionPlan& plan;
  Heads<const T> grad, q, k, v, out;
  const float* lse;
  Heads<T> dq, dk, dv;
  T *packed_k, *packed_v, *packed_kt;  // each [heads_kv, packed_keys, dim], the last in blocks of [dim, kKeys]

  void pack(const Block& block, int64_t head) const {
    const Sequence& s = plan.sequences[block.sequence];
    const int64_t token = s.key0 + block.first;
    const int64_t at = (head * plan.packed_keys + s.packed_key0 + block.first) * plan.dim;
    copy_rows(block.rows, plan.dim, k.token, k.at(token, head), packed_k + at);
    copy_rows(block.rows, plan.dim, v.token, v.at(token, head), packed_v + at);
    copy_columns(block.rows, plan.dim, k.token, k.at(token, head), packed_kt + at);
  }

  // The block's q and dout in all the layouts that GEMMs want, its lse, and delta = rowsum(dout * out).
  void load_queries(const Block& block, int64_t token, int64_t head, const BackwardTiles<T>& tiles) const {
    const int64_t rows = block.rows, dim = plan.dim;
    const T *query = q.at(token, head), *dout = grad.at(token, head);
    pack_columns(rows, dim, q.token, query, tiles.query_columns);
    pack_rows(rows, dim, q.token, query, tiles.query_rows);
    pack_columns(rows, dim, grad.token, dout, tiles.dout_columns);
    pack_rows(rows, dim, grad.token, dout, tiles.dout_rows);
    FASTPT_BY_ISA(attention_row_dots<T>)
    (rows, dim, grad.token, dout, out.token, out.at(token, head), tiles.delta);
    std::fill(tiles.delta + rows, tiles.delta + kQueries, 0.0f);
    std::fill_n(tiles.lse, kQueries, std::numeric_limits<float>::infinity());  // columns without a query weigh 0
    for (int64_t r = 0; r < rows; ++r) tiles.lse[r] = lse[(token + r) * plan.heads_q + head];
  }

  // Adds to dk_sum and dv_sum [padded keys, dim] what one block of queries of one head gives, and stores its dq.
  void block(const Block& block, int64_t head, float* dk_sum, float* dv_sum, const BackwardTiles<T>& tiles) const {
    const Sequence& s = plan.sequences[block.sequence];
    const int64_t columns = padded(block.rows), dim = plan.dim, token = s.query0 + block.first;
    const int64_t at = (head / plan.group * plan.packed_keys + s.packed_key0) * dim;
    const auto score_gradient = plan.softcap > 0 ? FASTPT_BY_ISA(attention_score_gradient<T, true>)
                                                 : FASTPT_BY_ISA(attention_score_gradient<T, false>);
    load_queries(block, token, head, tiles);
    const int64_t end = plan.end_key(s, block.first + block.rows - 1);
    bool is_first = true;
    for (int64_t key = plan.first_key(s, block.first), next; key < end; key = next) {
      const int64_t tile = key / kKeys * kKeys, width = std::min(kKeys, padded(s.keys) - tile);
      next = std::min(end, tile + kKeys);
      const int64_t rows = next - key;
      score_tile(plan, block, key, rows, packed_k + at + key * dim, tiles.query_columns, tiles.scores);
      gemm_tile(rows, columns, dim, dim, kQueries, kQueries, false, packed_v + at + key * dim, tiles.dout_columns,
                tiles.dweights);
      score_gradient(rows, columns, remaining_scale(plan), plan.softcap, tiles.scores, tiles.dweights, tiles.lse,
                     tiles.delta, tiles.weights, tiles.dscores, tiles.dscores_pairs);
      gemm_tile(rows, dim, columns, kQueries, dim, dim, true, tiles.weights, tiles.dout_rows, dv_sum + key * dim);
      gemm_tile(rows, dim, columns, kQueries, dim, dim, true, tiles.dscores, tiles.query_rows, dk_sum + key * dim);
      gemm_tile(dim, columns, rows, width, kQueries, kQueries, !is_first, packed_kt + at + tile * dim + (key - tile),
                tiles.dscores_pairs, tiles.dq);
      is_first = false;
    }
    if (is_first) std::fill_n(tiles.dq, dim * kQueries, 0.0f);
    transpose(dim, columns, kQueries, dim, tiles.dq, tiles.dq_rows);
    FASTPT_BY_ISA(attention_store_rows<T>)
    (block.rows, dim, tiles.dq_rows, plan.scale, dq.token, dq.at(token, head));
  }

  void store_keys(int64_t sequence, int64_t first, int64_t rows, int64_t head, const float* dk_sum,
                  const float* dv_sum) const {
    const auto store = FASTPT_BY_ISA(attention_store_rows<T>);
    const int64_t token = plan.sequences[sequence].key0 + first, offset = first * plan.dim;
    store(rows, plan.dim, dk_sum + offset, plan.scale, dk.token, dk.at(token, head));
    store(rows, plan.dim, dv_sum + offset, 1.0f, dv.token, dv.at(token, head));
  }

  // `sums` holds dk and dv of each part, [parts, 2, longest, dim].
  void unit(const Unit& unit, float* sums, const BackwardTiles<T>& tiles) const {
    const Sequence& s = plan.sequences[unit.sequence];
    const int64_t stride = plan.longest * plan.dim;
    float* dk_sum = unit.part < 0 ? tiles.dk : sums + 2 * unit.part * stride;
    float* dv_sum = unit.part < 0 ? tiles.dv : dk_sum + stride;
    std::fill_n(dk_sum, padded(s.keys) * plan.dim, 0.0f);
    std::fill_n(dv_sum, padded(s.keys) * plan.dim, 0.0f);
    for (int64_t item = unit.begin; item < unit.end; ++item) {
      const int64_t first = item / plan.group * kQueries, head = unit.head * plan.group + item % plan.group;
      block({unit.sequence, first, std::min(kQueries, s.queries - first)}, head, dk_sum, dv_sum, tiles);
    }
    if (unit.part < 0) store_keys(unit.sequence, 0, s.keys, unit.head, dk_sum, dv_sum);
  }

  // Adds up the parts of one block of keys, in order.
  void join(const Split& split, const Block& block, float* sums) const {
    const int64_t stride = plan.longest * plan.dim, at = block.first * plan.dim, n = block.rows * plan.dim;
    float *dk_sum = sums + 2 * split.first_part * stride, *dv_sum = dk_sum + stride;
    for (int64_t part = 1; part < split.parts; ++part) {
      FASTPT_BY_ISA(attention_add)(n, dk_sum + 2 * part * stride + at, dk_sum + at);
      FASTPT_BY_ISA(attention_add)(n, dv_sum + 2 * part * stride + at, dv_sum + at);
    }
    store_keys(split.sequence, block.first, block.rows, split.head, dk_sum, dv_sum);
  }

  void run(const at::TensorOptions& options, float* sums, const Division& division) const {
    const auto key_blocks = plan.key_blocks();
    const int64_t n_keys = key_blocks.size();
    for_each_task(plan.heads_kv * n_keys,
                  [&](int64_t, int64_t task) { pack(key_blocks[task % n_keys], task / n_keys); });
    const int64_t bytes = BackwardTiles<T>(Arena{nullptr}, plan.dim, plan.longest).bytes;
    auto scratch = at::empty({at::get_num_threads(), bytes}, options.dtype(at::kByte));
    char* base = static_cast<char*>(scratch.mutable_data_ptr());
    for_each_task(division.units.size(), [&](int64_t worker, int64_t task) {
      unit(division.units[task], sums, BackwardTiles<T>(Arena{base + worker * bytes}, plan.dim, plan.longest));
    });
    std::vector<std::pair<Split, Block>> joins;
    for (const Split& split : division.splits)
      for (const Block& block : key_blocks)
        if (block.sequence == split.sequence) joins.emplace_back(split, block);
    for_each_task(joins.size(), [&](int64_t, int64_t task) { join(joins[task].first, joins[task].second, sums); });
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
  const Division division = divide(plan, at::get_num_threads());
  auto sums = at::empty({division.parts, 2, plan.longest, plan.dim}, q.options().dtype(at::kFloat));
  auto packed = at::empty({3, plan.heads_kv, plan.packed_keys, plan.dim}, q.options());
  by_dtype(q, [&]<typename T>() {
    T* p = packed.mutable_data_ptr<T>();
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
                               p,
                               p + packed.stride(0),
                               p + 2 * packed.stride(0)};
    backward.run(q.options(), sums.mutable_data_ptr<float>(), division);
  });
  return {attention_output(dq, q.size(2)), attention_output(dk, q.size(2)), attention_output(dv, q.size(2))};
}

}  // namespace
}  // namespace fastpt

TORCH_LIBRARY_IMPL(fastpt, CPU, m) {
  m.impl("attention_backward", &fastpt::attention_backward);
}
