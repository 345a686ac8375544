// grouped_linear on the CPU: every expert's tokens are rows of a projection of lora_linear, experts beside each other
// on the threads. The definition is fastpt/ops/grouped_linear.py.
#include <numeric>
#include <tuple>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "cpu/dispatch.h"
#include "cpu/lora_linear.h"

namespace fastpt {
namespace {

using Adapter = std::optional<at::Tensor>;

void check(const at::Tensor& x, const at::Tensor& offsets, const at::Tensor& weight, const Adapter& a,
           const Adapter& b) {
  const auto experts = weight.size(0);
  bool is_right = x.dim() == 2 && weight.dim() == 3 && x.size(1) == weight.size(2) &&
                  offsets.scalar_type() == at::kInt && offsets.sizes() == at::IntArrayRef{experts + 1} &&
                  weight.scalar_type() == x.scalar_type() && a.has_value() == b.has_value();
  if (is_right && a) {
    is_right = a->dim() == 3 && a->sizes() == at::IntArrayRef{experts, a->size(1), x.size(1)} &&
               b->sizes() == at::IntArrayRef{experts, weight.size(1), a->size(1)} &&
               a->scalar_type() == x.scalar_type() && b->scalar_type() == x.scalar_type();
  }
  TORCH_CHECK(is_right, "grouped_linear: x ", x.sizes(), ", offsets ", offsets.sizes(), " ", offsets.scalar_type(),
              ", weight ", weight.sizes(), ", lora_a ", a ? a->sizes() : at::IntArrayRef{}, ", lora_b ",
              b ? b->sizes() : at::IntArrayRef{},
              "; they must be [T, D], [E + 1] int32, [E, O, D], [E, R, D], [E, O, R] (the last two or neither) of one "
              "dtype");
}

struct Group {
  int64_t expert, begin, rows;
};

// Of all experts, those with the most rows first.
std::vector<Group> read_groups(const at::Tensor& offsets, int64_t tokens) {
  const auto ends = offsets.contiguous();
  const int* at = ends.const_data_ptr<int>();
  std::vector<Group> groups;
  for (int64_t e = 0; e + 1 < ends.numel(); ++e) groups.push_back({e, at[e], at[e + 1] - at[e]});
  const bool ascends = std::is_sorted(at, at + ends.numel()) && at[0] == 0 && at[ends.numel() - 1] <= tokens;
  TORCH_CHECK(ascends, "grouped_linear: offsets must ascend from 0 to at most the ", tokens, " rows of x");
  std::stable_sort(groups.begin(), groups.end(), [](const Group& l, const Group& r) { return l.rows > r.rows; });
  return groups;
}

// Calls body(group) for each: on all threads where it has more rows than a thread's share, else on one thread beside
// others. body's results must not depend on which.
template <typename Body>
void for_each_group(const std::vector<Group>& groups, const Body& body) {
  const auto add = [](int64_t sum, const Group& g) { return sum + g.rows; };
  const int64_t rows = std::accumulate(groups.begin(), groups.end(), int64_t{0}, add);
  size_t large = 0;
  while (large < groups.size() && groups[large].rows * at::get_num_threads() > rows) body(groups[large++]);
  for_each_task(groups.size() - large, [&](int64_t, int64_t task) {
    const at::AutoDispatchBelowADInplaceOrView guard;  // a thread starts with autograd on
    body(groups[large + task]);
  });
}

std::vector<Projection> projection_of(int64_t expert, const at::Tensor& weight, const Adapter& a, const Adapter& b,
                                      double scale) {
  Projection p{dense(weight.select(0, expert)), {}, {}, {}, {}, static_cast<float>(scale), 0};
  if (a) p.a = a->select(0, expert).contiguous(), p.b = b->select(0, expert).contiguous();
  return {p};
}

at::Tensor rows_of(const Group& group, const at::Tensor& t) {
  return t.narrow(0, group.begin, group.rows);
}

void clear_rest(const std::vector<Group>& groups, const at::Tensor& t) {
  int64_t last = 0;
  for (const Group& group : groups) last = std::max(last, group.begin + group.rows);
  t.narrow(0, last, t.size(0) - last).zero_();
}

std::tuple<at::Tensor, at::Tensor> grouped_linear(const at::Tensor& x, const at::Tensor& offsets,
                                                  const at::Tensor& weight, const Adapter& lora_a,
                                                  const Adapter& lora_b, double scale) {
  static const auto reference = reference_of<decltype(grouped_linear)>("fastpt::grouped_linear");
  if (!is_native(x)) return reference(x, offsets, weight, lora_a, lora_b, scale);
  check(x, offsets, weight, lora_a, lora_b);
  const auto groups = read_groups(offsets, x.size(0));
  const auto rows = gemm_rows(x);
  auto y = at::empty({x.size(0), weight.size(1)}, x.options());
  auto xa = at::empty({x.size(0), lora_a ? lora_a->size(1) : 0}, x.options());
  clear_rest(groups, y), clear_rest(groups, xa);
  for_each_group(groups, [&](const Group& group) {
    if (group.rows == 0) return;
    std::vector<at::Tensor> ys{rows_of(group, y)}, xas{rows_of(group, xa)};
    project(rows_of(group, rows), projection_of(group.expert, weight, lora_a, lora_b, scale), Dropout{0}, ys, xas);
  });
  return {y, xa};
}

// A gradient of a stack, and an expert's part of it while it is summed: in place, or in float32 of its own.
struct StackGradient {
  StackGradient(const Adapter& stack, bool wanted, bool in_float32, const at::Tensor& x)
      : is_wanted(wanted && stack.has_value()),
        all(at::empty(is_wanted ? stack->sizes() : at::IntArrayRef{0},
                      in_float32 ? x.options().dtype(at::kFloat) : x.options())) {}

  at::Tensor part(const Group& group) const {
    if (!is_wanted) return {};
    auto part = all.select(0, group.expert);
    if (group.rows == 0) part.zero_();
    return part;
  }
  at::Tensor sum_of(const Group& group) const {
    const auto found = part(group);
    return !is_wanted || found.scalar_type() == at::kFloat
               ? found
               : at::empty(found.sizes(), found.options().dtype(at::kFloat));
  }
  void store(const Group& group, const at::Tensor& sum) const {
    if (is_wanted && group.rows > 0 && all.scalar_type() != at::kFloat) all.select(0, group.expert).copy_(sum);
  }

  bool is_wanted;
  at::Tensor all;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> grouped_linear_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& offsets, const at::Tensor& weight,
    const Adapter& lora_a, const Adapter& lora_b, const at::Tensor& xa, double scale, const c10::List<bool>& wants,
    bool in_float32) {
  static const auto reference = reference_of<decltype(grouped_linear_backward)>("fastpt::grouped_linear_backward");
  if (!is_native(x)) return reference(grad, x, offsets, weight, lora_a, lora_b, xa, scale, wants, in_float32);
  check(x, offsets, weight, lora_a, lora_b);
  const int64_t rank = lora_a ? lora_a->size(1) : 0;
  TORCH_CHECK(grad.sizes() == at::IntArrayRef({x.size(0), weight.size(1)}) && grad.scalar_type() == x.scalar_type() &&
                  xa.sizes() == at::IntArrayRef({x.size(0), rank}) && xa.scalar_type() == x.scalar_type(),
              "grouped_linear: grad is ", grad.sizes(), " ", grad.scalar_type(), ", xa ", xa.sizes(), " ",
              xa.scalar_type(), " for x ", x.sizes(), " ", x.scalar_type());
  const auto groups = read_groups(offsets, x.size(0));
  const auto rows = gemm_rows(x), grads = gemm_rows(grad), hidden = xa.contiguous();
  const bool wants_x = wants[0];
  const StackGradient dweight(weight, wants[1], in_float32, x), da(lora_a, wants[2], in_float32, x),
      db(lora_b, wants[3], in_float32, x);
  const auto dx = at::empty(wants_x ? x.sizes() : at::IntArrayRef{0}, x.options());
  if (wants_x) clear_rest(groups, dx);
  const std::vector<Wants> wanted{{dweight.is_wanted, false, da.is_wanted, db.is_wanted}};
  for_each_group(groups, [&](const Group& group) {
    Gradients out{wants_x ? rows_of(group, dx) : dx,
                  {dweight.part(group)},
                  {at::Tensor()},
                  {da.sum_of(group)},
                  {db.sum_of(group)}};
    if (group.rows == 0) return;
    project_backward(rows_of(group, rows), projection_of(group.expert, weight, lora_a, lora_b, scale),
                     {rows_of(group, grads)}, {rows_of(group, hidden)}, Dropout{0}, wants_x, wanted, out);
    da.store(group, out.a[0]), db.store(group, out.b[0]);
  });
  return {dx, dweight.all, da.all, db.all};
}

}  // namespace
}  // namespace fastpt

TORCH_LIBRARY_IMPL(fastpt, CPU, m) {
  m.impl("grouped_linear", &fastpt::grouped_linear);
  m.impl("grouped_linear_backward", &fastpt::grouped_linear_backward);
}
