// adamw_8bit on the CPU: adamw with moments of 8 bits; the definition is fastpt/ops/adamw_8bit.py.
#include <optional>
#include <vector>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "common/dynamic_map.h"
#include "cpu/adamw.h"
#include "cpu/dispatch.h"
#define FASTPT_KERNELS "cpu/adamw_8bit_kernels.h"
#include "cpu/for_each_isa.h"

namespace fastpt {
namespace {

using at::Tensor;
using at::TensorList;

const DynamicMap kSignedMap = dynamic_map(true), kUnsignedMap = dynamic_map(false);

static_assert(kBlock % kStateBlock == 0);

struct Lists {
  TensorList params, grads, exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes, steps, masters;
};

void check(const Lists& all) {
  const size_t n = all.params.size();
  TORCH_CHECK(all.grads.size() == n && all.exp_avgs.size() == n && all.exp_avg_sqs.size() == n &&
                  all.exp_avg_absmaxes.size() == n && all.exp_avg_sq_absmaxes.size() == n && all.steps.size() == n &&
                  (all.masters.empty() || all.masters.size() == n),
              "adamw_8bit: ", n, " params, ", all.grads.size(), " grads, ", all.exp_avgs.size(), " exp_avgs, ",
              all.exp_avg_sqs.size(), " exp_avg_sqs, ", all.exp_avg_absmaxes.size(), " and ",
              all.exp_avg_sq_absmaxes.size(), " scales of them, ", all.steps.size(), " steps, ", all.masters.size(),
              " masters; the lists must be equally long");
  for (size_t i = 0; i < n; ++i) {
    const auto shape = all.params[i].sizes();
    TORCH_CHECK(all.grads[i].sizes() == shape && all.exp_avgs[i].sizes() == shape &&
                    all.exp_avg_sqs[i].sizes() == shape && (all.masters.empty() || all.masters[i].sizes() == shape),
                "adamw_8bit: params[", i, "] is ", shape, ", its gradient ", all.grads[i].sizes(), ", its exp_avg ",
                all.exp_avgs[i].sizes(), ", its exp_avg_sq ", all.exp_avg_sqs[i].sizes(), "; they must be equal");
    const bool is_8bit = all.exp_avgs[i].scalar_type() == at::kByte;
    TORCH_CHECK(all.exp_avgs[i].scalar_type() == all.exp_avg_sqs[i].scalar_type() &&
                    (is_8bit || all.exp_avgs[i].scalar_type() == at::kFloat),
                "adamw_8bit: moments of params[", i, "] are ", all.exp_avgs[i].scalar_type(), " and ",
                all.exp_avg_sqs[i].scalar_type(), "; they must both be uint8 or both float32");
    const int64_t blocks = is_8bit ? (all.params[i].numel() + kStateBlock - 1) / kStateBlock : 0;
    for (const Tensor& absmax : {all.exp_avg_absmaxes[i], all.exp_avg_sq_absmaxes[i]})
      TORCH_CHECK(absmax.numel() == blocks && absmax.scalar_type() == at::kFloat, "adamw_8bit: a scale of params[", i,
                  "] is ", absmax.sizes(), " ", absmax.scalar_type(), "; it must be float32 [", blocks, "]");
    TORCH_CHECK(all.steps[i].numel() == 1 && all.steps[i].scalar_type() == at::kFloat, "adamw_8bit: steps[", i,
                "] is ", all.steps[i].sizes(), " ", all.steps[i].scalar_type(), "; it must be one float32");
  }
}

bool all_native(const Lists& all) {
  for (size_t i = 0; i < all.params.size(); ++i) {
    if (!is_native(all.params[i]) || !all.params[i].is_contiguous() || !is_native(all.grads[i])) return false;
    for (const TensorList& states : {all.exp_avgs, all.exp_avg_sqs, all.exp_avg_absmaxes, all.exp_avg_sq_absmaxes})
      if (!states[i].is_contiguous()) return false;
    if (!all.masters.empty() && !(all.masters[i].is_contiguous() && all.masters[i].scalar_type() == at::kFloat))
      return false;
  }
  return true;
}

Update update_8bit(const AdamW& c, const Lists& all, size_t i, const Tensor& grad, const RandomStream* stream) {
  Update update;
  float* master = all.masters.empty() ? nullptr : all.masters[i].mutable_data_ptr<float>();
  const EightBitState state{
      all.exp_avgs[i].mutable_data_ptr<uint8_t>(), all.exp_avg_sqs[i].mutable_data_ptr<uint8_t>(),
      all.exp_avg_absmaxes[i].mutable_data_ptr<float>(), all.exp_avg_sq_absmaxes[i].mutable_data_ptr<float>()};
  by_dtype(all.params[i], [&]<typename P>() {
    by_dtype(grad, [&]<typename G>() {
      update = [=, kernel = FASTPT_BY_ISA(adamw_8bit_blocks<P, G>), p = all.params[i].mutable_data_ptr<P>(),
                g = grad.const_data_ptr<G>(), grad = grad,
                random = stream == nullptr ? std::optional<RandomStream>() : *stream](int64_t first, int64_t end) {
        kernel(first, end - first, c, kSignedMap, kUnsignedMap, random ? &*random : nullptr, p, g, master, state);
      };
    });
  });
  return update;
}

void adamw_8bit_step(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs,
                     TensorList exp_avg_absmaxes, TensorList exp_avg_sq_absmaxes, TensorList steps, TensorList masters,
                     const std::optional<Tensor>& grad_scale, double lr, double beta1, double beta2, double eps,
                     double weight_decay, std::optional<int64_t> seed) {
  static const auto reference = reference_of<void(
      TensorList, TensorList, TensorList, TensorList, TensorList, TensorList, TensorList, TensorList,
      const std::optional<Tensor>&, double, double, double, double, double, std::optional<int64_t>)>(
      "fastpt::adamw_8bit_step");
  const Lists all{params, grads, exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes, steps, masters};
  check(all);
  if (!all_native(all)) {
    reference(params, grads, exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes, steps, masters, grad_scale,
              lr, beta1, beta2, eps, weight_decay, seed);
    return;
  }
  const float scale = grad_scale ? grad_scale->item().toFloat() : 1.0f;
  std::vector<Update> updates;
  for (size_t i = 0; i < params.size(); ++i) {
    const double t = *steps[i].mutable_data_ptr<float>() += 1;
    const AdamW c = adamw_of(scale, lr, beta1, beta2, eps, weight_decay, t);
    const RandomStream stream = random_stream(static_cast<uint64_t>(seed.value_or(0)), static_cast<uint64_t>(t), i);
    const bool is_stochastic = seed && params[i].scalar_type() == at::kBFloat16;
    if (exp_avgs[i].scalar_type() == at::kByte) {
      updates.push_back(update_8bit(c, all, i, grads[i].contiguous(), is_stochastic ? &stream : nullptr));
    } else {
      updates.push_back(adamw_update(c, params[i], grads[i].contiguous(), exp_avgs[i], exp_avg_sqs[i],
                                     masters.empty() ? nullptr : &masters[i], is_stochastic ? &stream : nullptr));
    }
  }
  run_updates(updates, params);
}

}  // namespace
}  // namespace fastpt

TORCH_LIBRARY_IMPL(fastpt, CPU, m) {
  m.impl("adamw_8bit_step", &fastpt::adamw_8bit_step);
}
