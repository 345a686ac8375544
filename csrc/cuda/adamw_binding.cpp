// adamw and adamw_8bit on CUDA: the table of tensors is written in pinned memory and copied without a wait.
#include <optional>
#include <vector>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cpu/adamw_lists.h"
#include "cpu/dispatch.h"
#include "cuda/adamw.h"

namespace fastpt::cuda {
namespace {

using at::Tensor;
using at::TensorList;

bool is_dense(const Tensor& tensor) {
  return tensor.is_contiguous();
}

bool has_type(const Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kBFloat16 ||
         tensor.scalar_type() == at::kHalf;
}

bool is_native(const AdamWLists& all) {
  for (size_t i = 0; i < all.params.size(); ++i) {
    if (!has_type(all.params[i]) || !has_type(all.grads[i]) || !is_dense(all.params[i])) return false;
    for (const TensorList& states : {all.exp_avgs, all.exp_avg_sqs, all.exp_avg_absmaxes, all.exp_avg_sq_absmaxes})
      if (!states.empty() && !is_dense(states[i])) return false;
    if (!all.is_8bit(i) && all.exp_avgs[i].scalar_type() != at::kFloat) return false;
    const Tensor* master = all.master(i);
    if (master != nullptr && !(is_dense(*master) && master->scalar_type() == at::kFloat)) return false;
  }
  return true;
}

void check_device(const AdamWLists& all) {
  const auto device = all.params[0].device();
  for (size_t i = 0; i < all.params.size(); ++i) {
    for (const TensorList& list : {all.params, all.grads, all.exp_avgs, all.exp_avg_sqs, all.exp_avg_absmaxes,
                                   all.exp_avg_sq_absmaxes, all.masters})
      TORCH_CHECK(list.empty() || list[i].device() == device, "adamw: params[", i, "], its gradient or a state is on ",
                  list[i].device(), ", params[0] on ", device, "; one call is for one device");
    TORCH_CHECK(all.steps[i].is_cpu(), "adamw: steps[", i, "] is on ", all.steps[i].device(),
                "; on the CPU its count is known without a wait");
  }
}

Dtype dtype_of(const Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat      ? Dtype::float32
         : tensor.scalar_type() == at::kBFloat16 ? Dtype::bfloat16
                                                 : Dtype::float16;
}

bool is_aligned(const AdamWRow& row) {
  for (const void* address : {static_cast<const void*>(row.param), row.grad, static_cast<const void*>(row.exp_avg),
                              static_cast<const void*>(row.exp_avg_sq), static_cast<const void*>(row.master)})
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0) return false;
  return true;
}

AdamWRow row_of(const AdamWLists& all, size_t i, const Tensor& grad, const AdamW& c, std::optional<int64_t> seed,
                int64_t step, int64_t first_program) {
  AdamWRow row{};
  row.param = all.params[i].mutable_data_ptr();
  row.grad = grad.const_data_ptr();
  row.exp_avg = all.exp_avgs[i].mutable_data_ptr();
  row.exp_avg_sq = all.exp_avg_sqs[i].mutable_data_ptr();
  if (all.is_8bit(i)) {
    row.exp_avg_absmax = all.exp_avg_absmaxes[i].mutable_data_ptr<float>();
    row.exp_avg_sq_absmax = all.exp_avg_sq_absmaxes[i].mutable_data_ptr<float>();
  }
  if (const Tensor* master = all.master(i)) row.master = master->mutable_data_ptr<float>();
  row.size = all.params[i].numel();
  row.first_program = first_program;
  row.stream = random_stream(static_cast<uint64_t>(seed.value_or(0)), static_cast<uint64_t>(step), i);
  row.step_size = c.step_size;
  row.inverse_correction = c.inverse_correction;
  row.param_type = dtype_of(all.params[i]);
  row.grad_type = dtype_of(grad);
  row.is_stochastic = seed && row.param_type == Dtype::bfloat16;
  row.is_aligned = is_aligned(row);
  return row;
}

void run(const AdamWLists& all, const std::optional<Tensor>& grad_scale, double lr, double beta1, double beta2,
         double eps, double weight_decay, std::optional<int64_t> seed) {
  const c10::cuda::CUDAGuard guard(all.params[0].device());
  const int64_t row_bytes = static_cast<int64_t>(sizeof(AdamWRow) * all.params.size());
  const Tensor table = at::empty({row_bytes}, at::TensorOptions().dtype(at::kByte).pinned_memory(true));
  auto* rows = reinterpret_cast<AdamWRow*>(table.mutable_data_ptr<uint8_t>());
  std::vector<Tensor> grads;  // that were copied, until the launch
  int64_t programs = 0, row_count = 0;
  AdamW c = adamw_of(1.0f, lr, beta1, beta2, eps, weight_decay, 1);
  for (size_t i = 0; i < all.params.size(); ++i) {
    const double t = *all.steps[i].mutable_data_ptr<float>() += 1;
    if (all.params[i].numel() == 0) continue;
    c = adamw_of(1.0f, lr, beta1, beta2, eps, weight_decay, t);
    grads.push_back(all.grads[i].contiguous());
    rows[row_count++] = row_of(all, i, grads.back(), c, seed, static_cast<int64_t>(t), programs);
    programs += programs_of(all.params[i].numel());
  }
  if (programs == 0) return;
  const auto device = all.params[0].device();
  const Tensor on_device = table.to(device, /*non_blocking=*/true);
  const Tensor scale = grad_scale ? grad_scale->to(device, at::kFloat, /*non_blocking=*/true) : Tensor();
  const int status =
      launch_adamw(reinterpret_cast<const AdamWRow*>(on_device.const_data_ptr<uint8_t>()), row_count, programs, c,
                   grad_scale ? scale.const_data_ptr<float>() : nullptr, c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_CHECK(static_cast<cudaError_t>(status));
}

void adamw_step(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs, TensorList steps,
                TensorList masters, const std::optional<Tensor>& grad_scale, double lr, double beta1, double beta2,
                double eps, double weight_decay, std::optional<int64_t> seed) {
  static const auto reference =
      reference_of<void(TensorList, TensorList, TensorList, TensorList, TensorList, TensorList,
                        const std::optional<Tensor>&, double, double, double, double, double, std::optional<int64_t>)>(
          "fastpt::adamw_step");
  const AdamWLists all{params, grads, exp_avgs, exp_avg_sqs, {}, {}, steps, masters};
  check_lists("adamw", all);
  if (params.empty()) return;
  if (!is_native(all)) {
    reference(params, grads, exp_avgs, exp_avg_sqs, steps, masters, grad_scale, lr, beta1, beta2, eps, weight_decay,
              seed);
    return;
  }
  check_device(all);
  run(all, grad_scale, lr, beta1, beta2, eps, weight_decay, seed);
}

void adamw_8bit_step(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs,
                     TensorList exp_avg_absmaxes, TensorList exp_avg_sq_absmaxes, TensorList steps, TensorList masters,
                     const std::optional<Tensor>& grad_scale, double lr, double beta1, double beta2, double eps,
                     double weight_decay, std::optional<int64_t> seed) {
  static const auto reference =
      reference_of<void(TensorList, TensorList, TensorList, TensorList, TensorList, TensorList, TensorList, TensorList,
                        const std::optional<Tensor>&, double, double, double, double, double, std::optional<int64_t>)>(
          "fastpt::adamw_8bit_step");
  const AdamWLists all{params, grads, exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes, steps, masters};
  check_lists("adamw_8bit", all);
  if (params.empty()) return;
  if (!is_native(all)) {
    reference(params, grads, exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes, steps, masters, grad_scale,
              lr, beta1, beta2, eps, weight_decay, seed);
    return;
  }
  check_device(all);
  run(all, grad_scale, lr, beta1, beta2, eps, weight_decay, seed);
}

}  // namespace
}  // namespace fastpt::cuda

TORCH_LIBRARY_IMPL(fastpt, CUDA, m) {
  m.impl("adamw_step", &fastpt::cuda::adamw_step);
  m.impl("adamw_8bit_step", &fastpt::cuda::adamw_8bit_step);
}
