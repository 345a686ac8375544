// adamw_8bit on the CPU: adamw with moments of 8 bits; the definition is fastpt/ops/adamw_8bit.py.
#include <optional>
#include <vector>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "cpu/adamw.h"
#include "cpu/adamw_lists.h"
#include "cpu/dispatch.h"
#define FASTPT_KERNELS "cpu/adamw_8bit_kernels.h"
#include "cpu/for_each_isa.h"

namespace fastpt {
namespace {

using at::Tensor;
using at::TensorList;

const EightBitMaps kMaps;

static_assert(kBlock % kStateBlock == 0);

Update update_8bit(const AdamW& c, const AdamWLists& all, size_t i, const Tensor& grad, const RandomStream* stream) {
  Update update;
  float* master = all.masters.empty() ? nullptr : all.masters[i].mutable_data_ptr<float>();
  const EightBitState state{all.exp_avgs[i].mutable_data_ptr<uint8_t>(), all.exp_avg_sqs[i].mutable_data_ptr<uint8_t>(),
                            all.exp_avg_absmaxes[i].mutable_data_ptr<float>(),
                            all.exp_avg_sq_absmaxes[i].mutable_data_ptr<float>()};
  by_dtype(all.params[i], [&]<typename P>() {
    by_dtype(grad, [&]<typename G>() {
      update = [=, kernel = FASTPT_BY_ISA(adamw_8bit_blocks<P, G>), p = all.params[i].mutable_data_ptr<P>(),
                g = grad.const_data_ptr<G>(), grad = grad,
                random = stream == nullptr ? std::optional<RandomStream>() : *stream](int64_t first, int64_t end) {
        kernel(first, end - first, c, kMaps, random ? &*random : nullptr, p, g, master, state);
      };
    });
  });
  return update;
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
  if (!all_native(all)) {
    reference(params, grads, exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes, steps, masters, grad_scale,
              lr, beta1, beta2, eps, weight_decay, seed);
    return;
  }
  step_all(all, grad_scale, lr, beta1, beta2, eps, weight_decay, seed,
           [&](const AdamW& c, size_t i, const Tensor& grad, const RandomStream* stream) {
             if (all.is_8bit(i)) return update_8bit(c, all, i, grad, stream);
             return adamw_update(c, params[i], grad, exp_avgs[i], exp_avg_sqs[i], all.master(i), stream);
           });
}

}  // namespace
}  // namespace fastpt

TORCH_LIBRARY_IMPL(fastpt, CPU, m) {
  m.impl("adamw_8bit_step", &fastpt::adamw_8bit_step);
}
