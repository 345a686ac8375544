// adamw on the CPU: the blocks of all tensors are one parallel loop; the definition is fastpt/ops/adamw.py.
#include <cmath>
#include <functional>
#include <optional>
#include <vector>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "common/adamw.h"
#include "cpu/dispatch.h"
#define FASTPT_KERNELS "cpu/adamw_kernels.h"
#include "cpu/for_each_isa.h"

namespace fastpt {
namespace {

using at::Tensor;
using at::TensorList;

constexpr int64_t kBlock = 16384;  // values per task: half a megabyte of traffic, small against any thread's share

void check(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs, TensorList steps,
           TensorList masters) {
  const size_t n = params.size();
  TORCH_CHECK(grads.size() == n && exp_avgs.size() == n && exp_avg_sqs.size() == n && steps.size() == n &&
                  (masters.empty() || masters.size() == n),
              "adamw: ", n, " params, ", grads.size(), " grads, ", exp_avgs.size(), " exp_avgs, ", exp_avg_sqs.size(),
              " exp_avg_sqs, ", steps.size(), " steps, ", masters.size(), " masters; the lists must be equally long");
  for (size_t i = 0; i < n; ++i) {
    const auto shape = params[i].sizes();
    TORCH_CHECK(grads[i].sizes() == shape && exp_avgs[i].sizes() == shape && exp_avg_sqs[i].sizes() == shape &&
                    (masters.empty() || masters[i].sizes() == shape),
                "adamw: params[", i, "] is ", shape, ", its gradient ", grads[i].sizes(), ", its exp_avg ",
                exp_avgs[i].sizes(), ", its exp_avg_sq ", exp_avg_sqs[i].sizes(), "; they must be equal");
    TORCH_CHECK(steps[i].numel() == 1 && steps[i].scalar_type() == at::kFloat, "adamw: steps[", i, "] is ",
                steps[i].sizes(), " ", steps[i].scalar_type(), "; it must be one float32");
  }
}

bool is_plain_float(const Tensor& state) {
  return state.is_contiguous() && state.scalar_type() == at::kFloat;
}

bool all_native(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs, TensorList masters) {
  for (size_t i = 0; i < params.size(); ++i) {
    if (!is_native(params[i]) || !params[i].is_contiguous() || !is_native(grads[i])) return false;
    if (!is_plain_float(exp_avgs[i]) || !is_plain_float(exp_avg_sqs[i])) return false;
    if (!masters.empty() && !is_plain_float(masters[i])) return false;
  }
  return true;
}

// One tensor's update of its values [first, end), whatever the dtypes.
using Update = std::function<void(int64_t first, int64_t end)>;

Update update_of(const AdamW& c, const Tensor& param, const Tensor& grad, const Tensor& exp_avg,
                 const Tensor& exp_avg_sq, const Tensor* master) {
  Update update;
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

void adamw_step(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs, TensorList steps,
                TensorList masters, const std::optional<Tensor>& grad_scale, double lr, double beta1, double beta2,
                double eps, double weight_decay) {
  static const auto reference =
      reference_of<void(TensorList, TensorList, TensorList, TensorList, TensorList, TensorList,
                        const std::optional<Tensor>&, double, double, double, double, double)>("fastpt::adamw_step");
  check(params, grads, exp_avgs, exp_avg_sqs, steps, masters);
  if (!all_native(params, grads, exp_avgs, exp_avg_sqs, masters)) {
    reference(params, grads, exp_avgs, exp_avg_sqs, steps, masters, grad_scale, lr, beta1, beta2, eps, weight_decay);
    return;
  }
  const float scale = grad_scale ? grad_scale->item().toFloat() : 1.0f;
  struct Block {
    size_t tensor;
    int64_t first;
  };
  std::vector<Update> updates;
  std::vector<Block> blocks;
  for (size_t i = 0; i < params.size(); ++i) {
    const double t = *steps[i].mutable_data_ptr<float>() += 1;
    const AdamW c{scale,
                  static_cast<float>(1 - beta1),
                  static_cast<float>(beta2),
                  static_cast<float>(1 - beta2),
                  static_cast<float>(lr * weight_decay),
                  static_cast<float>(lr / (1 - std::pow(beta1, t))),
                  static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, t))),
                  static_cast<float>(eps)};
    updates.push_back(update_of(c, params[i], grads[i].contiguous(), exp_avgs[i], exp_avg_sqs[i],
                                masters.empty() ? nullptr : &masters[i]));
    for (int64_t first = 0; first < params[i].numel(); first += kBlock) blocks.push_back({i, first});
  }
  at::parallel_for(0, static_cast<int64_t>(blocks.size()), 1, [&](int64_t lo, int64_t hi) {
    for (int64_t b = lo; b < hi; ++b) {
      const auto [tensor, first] = blocks[b];
      updates[tensor](first, std::min(first + kBlock, params[tensor].numel()));
    }
  });
}

}  // namespace
}  // namespace fastpt

TORCH_LIBRARY_IMPL(fastpt, CPU, m) {
  m.impl("adamw_step", &fastpt::adamw_step);
}
