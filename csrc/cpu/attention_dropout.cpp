// Attention with dropout of its weights for float and bfloat16 on the CPU, a task per sequence and key head; the
// definition is fastpt/ops/attention.py.
#include <optional>
#include <tuple>
#include <vector>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "cpu/attention_dropout.h"
#include "cpu/dispatch.h"
#define FASTPT_KERNELS "cpu/attention_dropout_kernels.h"
#include "cpu/for_each_isa.h"

namespace fastpt {
namespace {

using at::Tensor;
using Lengths = std::optional<Tensor>;

std::vector<int64_t> bounds(const Lengths& cu_seqlens, int64_t tokens) {
  if (!cu_seqlens) return {0, tokens};
  const auto given = cu_seqlens->to(at::kLong).contiguous();
  const int64_t* at = given.const_data_ptr<int64_t>();
  return {at, at + given.numel()};
}

// Calls body(sequence, first query row, first key row, key head, worker's scratch) for every sequence and key head.
template <typename Body>
void for_each_head(const Tensor& q, const Tensor& k, const Lengths& cu_seqlens_q, const Lengths& cu_seqlens_k,
                   const DroppedSequence& common, Body&& body) {
  const auto queries = bounds(cu_seqlens_q, q.size(0)),
             keys = bounds(cu_seqlens_k ? cu_seqlens_k : cu_seqlens_q, k.size(0));
  TORCH_CHECK(queries.size() == keys.size() && std::is_sorted(queries.begin(), queries.end()) &&
                  std::is_sorted(keys.begin(), keys.end()) && queries.front() == 0 && queries.back() == q.size(0) &&
                  keys.front() == 0 && keys.back() == k.size(0),
              "attention: cumulative lengths are ", queries, " and ", keys, "; they must rise from 0 to the ",
              q.size(0), " queries and ", k.size(0), " keys, as many of each");
  const int64_t sequences = static_cast<int64_t>(queries.size()) - 1, heads = k.size(1);
  at::parallel_for(0, sequences * heads, 1, [&](int64_t lo, int64_t hi) {
    std::vector<float> scratch;
    for (int64_t task = lo; task < hi; ++task) {
      const int64_t i = task / heads, head = task % heads;
      DroppedSequence c = common;
      c.queries = queries[i + 1] - queries[i], c.keys = keys[i + 1] - keys[i];
      c.first_row = queries[i] * q.size(1) + head * c.group;
      if (static_cast<int64_t>(scratch.size()) < c.scratch()) scratch.resize(c.scratch());
      body(c, queries[i], keys[i], head, scratch.data());
    }
  });
}

DroppedSequence described(const Tensor& q, const Tensor& k, bool causal, std::optional<int64_t> window, double scale,
                          double dropout_p, int64_t seed) {
  DroppedSequence c{};
  c.K = q.size(2), c.heads_q = q.size(1), c.heads_kv = k.size(1), c.group = q.size(1) / k.size(1);
  c.causal = causal, c.window = window.value_or(0), c.scale = static_cast<float>(scale);
  c.dropout = dropout_of(dropout_p), c.seed = static_cast<uint64_t>(seed);
  return c;
}

std::tuple<Tensor, Tensor> attention_dropout(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const Lengths& cu_seqlens_q, const Lengths& cu_seqlens_k, bool causal,
                                             std::optional<int64_t> window, std::optional<double> softcap, double scale,
                                             double dropout_p, int64_t seed) {
  static const auto reference = reference_of<decltype(attention_dropout)>("fastpt::attention_dropout");
  if (!is_native(q) || softcap)
    return reference(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window, softcap, scale, dropout_p, seed);
  const auto qc = q.contiguous(), kc = k.contiguous(), vc = v.contiguous();
  auto out = at::empty_like(qc), lse = at::empty({q.size(0), q.size(1)}, q.options().dtype(at::kFloat));
  const auto common = described(q, k, causal, window, scale, dropout_p, seed);
  by_dtype(q, [&]<typename T>() {
    const auto kernel = FASTPT_BY_ISA(dropped_attention_head<T>);
    const T *qp = qc.const_data_ptr<T>(), *kp = kc.const_data_ptr<T>(), *vp = vc.const_data_ptr<T>();
    T* op = out.mutable_data_ptr<T>();
    float* lp = lse.mutable_data_ptr<float>();
    for_each_head(q, k, cu_seqlens_q, cu_seqlens_k, common,
                  [&](const DroppedSequence& c, int64_t i, int64_t j, int64_t head, float* scratch) {
                    const int64_t row = i * c.heads_q + head * c.group, key = (j * c.heads_kv + head) * c.K;
                    kernel(c, qp + row * c.K, kp + key, vp + key, op + row * c.K, lp + row, scratch);
                  });
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_dropout_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                              const Tensor& v, const Tensor& out, const Tensor& lse,
                                                              const Lengths& cu_seqlens_q, const Lengths& cu_seqlens_k,
                                                              bool causal, std::optional<int64_t> window,
                                                              std::optional<double> softcap, double scale,
                                                              double dropout_p, int64_t seed) {
  static const auto reference =
      reference_of<decltype(attention_dropout_backward)>("fastpt::attention_dropout_backward");
  if (!is_native(q) || softcap)
    return reference(grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, causal, window, softcap, scale, dropout_p,
                     seed);
  const auto g = grad.contiguous(), qc = q.contiguous(), kc = k.contiguous(), vc = v.contiguous(), l = lse.contiguous();
  auto dq = at::empty_like(qc), dk = at::empty_like(kc), dv = at::empty_like(vc);
  const auto common = described(q, k, causal, window, scale, dropout_p, seed);
  by_dtype(q, [&]<typename T>() {
    const auto kernel = FASTPT_BY_ISA(dropped_attention_backward_head<T>);
    const T *gp = g.const_data_ptr<T>(), *qp = qc.const_data_ptr<T>(), *kp = kc.const_data_ptr<T>(),
            *vp = vc.const_data_ptr<T>();
    const float* lp = l.const_data_ptr<float>();
    T *dqp = dq.mutable_data_ptr<T>(), *dkp = dk.mutable_data_ptr<T>(), *dvp = dv.mutable_data_ptr<T>();
    for_each_head(q, k, cu_seqlens_q, cu_seqlens_k, common,
                  [&](const DroppedSequence& c, int64_t i, int64_t j, int64_t head, float* scratch) {
                    const int64_t row = i * c.heads_q + head * c.group, key = (j * c.heads_kv + head) * c.K;
                    kernel(c, gp + row * c.K, qp + row * c.K, kp + key, vp + key, lp + row, dqp + row * c.K, dkp + key,
                           dvp + key, scratch);
                  });
  });
  return {dq, dk, dv};
}

}  // namespace
}  // namespace fastpt

TORCH_LIBRARY_IMPL(fastpt, CPU, m) {
  m.impl("attention_dropout", &fastpt::attention_dropout);
  m.impl("attention_dropout_backward", &fastpt::attention_dropout_backward);
}
