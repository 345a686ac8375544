// adamw and grad_norm on the CPU: the blocks of all tensors are one parallel loop; the definition is
// fastpt/ops/adamw.py.
#include <cmath>
#include <optional>
#include <vector>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include "cpu/adamw.h"
#include "cpu/adamw_lists.h"
#include "cpu/dispatch.h"
#define FASTPT_KERNELS "cpu/adamw_kernels.h"
#include "cpu/for_each_isa.h"

namespace fastpt {

Update adamw_update(const AdamW& c, const at::Tensor& param, const at::Tensor& grad, const at::Tensor& exp_avg,
                    const at::Tensor& exp_avg_sq, const at::Tensor* master, const RandomStream* stream) {
  Update update;
  if (stream != nullptr) {
    by_dtype(grad, [&]<typename G>() {
      update = [c, kernel = FASTPT_BY_ISA(adamw_stochastic_block<G>), stream = *stream, grad,
                p = param.mutable_data_ptr<c10::BFloat16>(), g = grad.const_data_ptr<G>(),
                m = exp_avg.mutable_data_ptr<float>(),
                v = exp_avg_sq.mutable_data_ptr<float>()](int64_t first, int64_t end) {
        kernel(end - first, c, stream, static_cast<uint64_t>(first), p + first, g + first, m + first, v + first);
      };
    });
    return update;
  }
  by_dtype(param, [&]<typename P>() {
    by_dtype(grad, [&]<typename G>() {
      const auto kernel =
          master != nullptr ? FASTPT_BY_ISA(adamw_block<P, G, true>) : FASTPT_BY_ISA(adamw_block<P, G, false>);
      update = [c, kernel, grad, p = param.mutable_data_ptr<P>(), g = grad.const_data_ptr<G>(),
                m = exp_avg.mutable_data_ptr<float>(), v = exp_avg_sq.mutable_data_ptr<float>(),
                w = master != nullptr ? master->mutable_data_ptr<float>() : nullptr](int64_t first, int64_t end) {
        kernel(end - first, c, p + first, g + first, m + first, v + first, w == nullptr ? w : w + first);
      };
    });
  });
  return update;
}

namespace {

using at::Tensor;
using at::TensorList;

void adamw_step(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs, TensorList steps,
                TensorList masters, const std::optional<Tensor>& grad_scale, double lr, double beta1, double beta2,
                double eps, double weight_decay, std::optional<int64_t> seed) {
  static const auto reference =
      reference_of<void(TensorList, TensorList, TensorList, TensorList, TensorList, TensorList,
                        const std::optional<Tensor>&, double, double, double, double, double, std::optional<int64_t>)>(
          "fastpt::adamw_step");
  const AdamWLists all{params, grads, exp_avgs, exp_avg_sqs, {}, {}, steps, masters};
  check_lists("adamw", all);
  if (!all_native(all)) {
    reference(params, grads, exp_avgs, exp_avg_sqs, steps, masters, grad_scale, lr, beta1, beta2, eps, weight_decay,
              seed);
    return;
  }
  step_all(all, grad_scale, lr, beta1, beta2, eps, weight_decay, seed,
           [&](const AdamW& c, size_t i, const Tensor& grad, const RandomStream* stream) {
             return adamw_update(c, params[i], grad, exp_avgs[i], exp_avg_sqs[i], all.master(i), stream);
           });
}

// Every block has its own partial sum and they are added in order: the same bits for any number of threads.
Tensor grad_norm(TensorList grads) {
  static const auto reference = reference_of<Tensor(TensorList)>("fastpt::grad_norm");
  std::vector<Tensor> dense;
  for (const Tensor& grad : grads) {
    if (!is_native(grad)) return reference(grads);
    dense.push_back(grad.contiguous());
  }
  const auto blocks = blocks_of(dense);
  std::vector<double> parts(blocks.size());
  at::parallel_for(0, static_cast<int64_t>(blocks.size()), 1, [&](int64_t lo, int64_t hi) {
    for (int64_t b = lo; b < hi; ++b) {
      const auto [tensor, first] = blocks[b];
      const int64_t n = std::min(kBlock, dense[tensor].numel() - first);
      by_dtype(dense[tensor], [&]<typename G>() {
        parts[b] = FASTPT_BY_ISA(sum_of_squares<G>)(n, dense[tensor].const_data_ptr<G>() + first);
      });
    }
  });
  double sum = 0;
  for (const double part : parts) sum += part;
  return at::full({}, std::sqrt(sum), at::TensorOptions().dtype(at::kFloat));
}

}  // namespace
}  // namespace fastpt

TORCH_LIBRARY_IMPL(fastpt, CPU, m) {
  m.impl("adamw_step", &fastpt::adamw_step);
  m.impl("grad_norm", &fastpt::grad_norm);
}
