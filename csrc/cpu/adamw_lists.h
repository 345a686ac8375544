// The tensors of one optimizer step, and whether they fit together.
#pragma once

#include <ATen/core/Tensor.h>

#include "common/dynamic_map.h"

namespace fastpt {

struct AdamWLists {
  at::TensorList params, grads, exp_avgs, exp_avg_sqs;
  at::TensorList exp_avg_absmaxes, exp_avg_sq_absmaxes;  // empty: no moments are of 8 bits
  at::TensorList steps, masters;

  bool has_scales() const { return !exp_avg_absmaxes.empty(); }
  bool is_8bit(size_t i) const { return has_scales() && exp_avgs[i].scalar_type() == at::kByte; }
  const at::Tensor* master(size_t i) const { return masters.empty() ? nullptr : &masters[i]; }
};

inline void check_moments(const char* op, const AdamWLists& all, size_t i) {
  const auto type = all.exp_avgs[i].scalar_type(), type_sq = all.exp_avg_sqs[i].scalar_type();
  TORCH_CHECK(type == type_sq && (type == at::kByte || type == at::kFloat), op, ": moments of params[", i, "] are ",
              type, " and ", type_sq, "; they must both be uint8 or both float32");
  const int64_t blocks = type == at::kByte ? (all.params[i].numel() + kStateBlock - 1) / kStateBlock : 0;
  for (const at::Tensor& absmax : {all.exp_avg_absmaxes[i], all.exp_avg_sq_absmaxes[i]})
    TORCH_CHECK(absmax.numel() == blocks && absmax.scalar_type() == at::kFloat, op, ": a scale of params[", i, "] is ",
                absmax.sizes(), " ", absmax.scalar_type(), "; it must be float32 [", blocks, "]");
}

inline void check_lists(const char* op, const AdamWLists& all) {
  const size_t n = all.params.size();
  TORCH_CHECK(
      all.grads.size() == n && all.exp_avgs.size() == n && all.exp_avg_sqs.size() == n && all.steps.size() == n &&
          all.exp_avg_absmaxes.size() == all.exp_avg_sq_absmaxes.size() &&
          (!all.has_scales() || all.exp_avg_absmaxes.size() == n) && (all.masters.empty() || all.masters.size() == n),
      op, ": ", n, " params, ", all.grads.size(), " grads, ", all.exp_avgs.size(), " exp_avgs, ",
      all.exp_avg_sqs.size(), " exp_avg_sqs, ", all.exp_avg_absmaxes.size(), " and ", all.exp_avg_sq_absmaxes.size(),
      " scales, ", all.steps.size(), " steps, ", all.masters.size(), " masters; the lists must be equally long");
  for (size_t i = 0; i < n; ++i) {
    const auto shape = all.params[i].sizes();
    TORCH_CHECK(all.grads[i].sizes() == shape && all.exp_avgs[i].sizes() == shape &&
                    all.exp_avg_sqs[i].sizes() == shape && (all.masters.empty() || all.masters[i].sizes() == shape),
                op, ": params[", i, "] is ", shape, ", its gradient ", all.grads[i].sizes(), ", its exp_avg ",
                all.exp_avgs[i].sizes(), ", its exp_avg_sq ", all.exp_avg_sqs[i].sizes(), "; they must be equal");
    TORCH_CHECK(all.steps[i].numel() == 1 && all.steps[i].scalar_type() == at::kFloat, op, ": steps[", i, "] is ",
                all.steps[i].sizes(), " ", all.steps[i].scalar_type(), "; it must be one float32");
    if (all.has_scales()) check_moments(op, all, i);
  }
}

}  // namespace fastpt
