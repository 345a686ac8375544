// rope of q and k for float and bfloat16 on the CPU, forward and transposed; the definition is fastpt/ops/rope.py.
#include <optional>
#include <tuple>
#include <vector>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/dispatch.h"
#include "cpu/row_blocks.h"
#define FASTPT_KERNELS "cpu/rope_kernels.h"
#include "cpu/for_each_isa.h"

namespace fastpt {
namespace {

using at::Tensor;

Tensor with_contiguous_rows(const Tensor& x) {
  return x.size(-1) == 1 || x.stride(-1) == 1 ? x : x.contiguous();
}

void check(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
           const std::optional<Tensor>& position_ids) {
  TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && q.size(0) == k.size(0) && q.size(2) == k.size(2) &&
                  q.scalar_type() == k.scalar_type(),
              "rope: q is ", q.sizes(), " ", q.scalar_type(), ", k is ", k.sizes(), " ", k.scalar_type(),
              "; they must be [T, Hq, K] and [T, Hkv, K] of one dtype");
  TORCH_CHECK(cos.dim() == 2 && cos.sizes() == sin.sizes() && cos.size(1) % 2 == 0 && cos.size(1) <= q.size(2),
              "rope: cos is ", cos.sizes(), ", sin is ", sin.sizes(),
              "; both must be [P, R] with an even R <= ", q.size(2));
  if (position_ids) {
    TORCH_CHECK(position_ids->dim() == 1 && position_ids->size(0) == q.size(0), "rope: position_ids are ",
                position_ids->sizes(), " for ", q.size(0), " tokens; flatten them to [T]");
  } else {
    TORCH_CHECK(q.size(0) <= cos.size(0), "rope: ", q.size(0), " tokens, but cos has ", cos.size(0),
                " rows; pass position_ids or longer tables");
  }
}

// Row of the tables of every token, checked: a kernel would read out of bounds.
std::vector<int64_t> checked_rows(const std::optional<Tensor>& position_ids, int64_t tokens, int64_t positions) {
  std::vector<int64_t> rows(tokens);
  if (!position_ids) {
    for (int64_t t = 0; t < tokens; ++t) rows[t] = t;
    return rows;
  }
  const auto ids = position_ids->to(at::kLong).contiguous();
  std::copy_n(ids.const_data_ptr<int64_t>(), tokens, rows.begin());
  for (int64_t t = 0; t < tokens; ++t)
    TORCH_CHECK_INDEX(rows[t] >= 0 && rows[t] < positions, "rope: position_ids[", t, "] is ", rows[t],
                      ", cos and sin have ", positions, " rows");
  return rows;
}

template <typename T, typename C>
void rotate(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, const std::vector<int64_t>& rows,
            bool interleaved, bool transposed, Tensor& q_out, Tensor& k_out) {
  const int64_t K = q.size(2), R = cos.size(1), q_width = q.size(1) * K, k_width = k.size(1) * K;
  const auto angles = FASTPT_BY_ISA(rope_angles<C>);
  const auto heads = interleaved ? FASTPT_BY_ISA(rope_heads<T, true>) : FASTPT_BY_ISA(rope_heads<T, false>);
  const T *qp = q.const_data_ptr<T>(), *kp = k.const_data_ptr<T>();
  const C *cp = cos.const_data_ptr<C>(), *sp = sin.const_data_ptr<C>();
  T *qo = q_out.mutable_data_ptr<T>(), *ko = k_out.mutable_data_ptr<T>();
  const int64_t q_stride = q.stride(0), k_stride = k.stride(0), q_head = q.stride(1), k_head = k.stride(1),
                cos_stride = cos.stride(0), sin_stride = sin.stride(0), q_heads = q.size(1), k_heads = k.size(1);
  at::parallel_for(0, q.size(0), row_grain(q_width + k_width), [&](int64_t lo, int64_t hi) {
    std::vector<float> wide(2 * R);
    float *c = wide.data(), *s = wide.data() + R;
    for (int64_t t = lo; t < hi; ++t) {
      angles(R, cp + rows[t] * cos_stride, sp + rows[t] * sin_stride, interleaved, transposed, c, s);
      heads(q_heads, K, R, q_head, qp + t * q_stride, c, s, qo + t * q_width);
      heads(k_heads, K, R, k_head, kp + t * k_stride, c, s, ko + t * k_width);
    }
  });
}

std::tuple<Tensor, Tensor> rope(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                                const std::optional<Tensor>& position_ids, bool interleaved, bool transposed) {
  static const auto reference =
      reference_of<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                              const std::optional<Tensor>&, bool, bool)>("fastpt::rope");
  check(q, k, cos, sin, position_ids);
  if (!is_native(q)) return reference(q, k, cos, sin, position_ids, interleaved, transposed);
  const auto rows = checked_rows(position_ids, q.size(0), cos.size(0));
  const auto qs = with_contiguous_rows(q), ks = with_contiguous_rows(k);
  const bool is_table_native = is_native(cos) && cos.scalar_type() == sin.scalar_type();
  const auto c = with_contiguous_rows(is_table_native ? cos : cos.to(at::kFloat));
  const auto s = with_contiguous_rows(is_table_native ? sin : sin.to(at::kFloat));
  auto q_out = at::empty(q.sizes(), q.options()), k_out = at::empty(k.sizes(), k.options());
  by_dtype(q, [&]<typename T>() {
    by_dtype(c, [&]<typename C>() { rotate<T, C>(qs, ks, c, s, rows, interleaved, transposed, q_out, k_out); });
  });
  return {q_out, k_out};
}

}  // namespace
}  // namespace fastpt

TORCH_LIBRARY_IMPL(fastpt, CPU, m) {
  m.impl("rope", &fastpt::rope);
}
