// AdamW's update of one value in float32: the one formula that CPU and CUDA kernels run.
#pragma once

#include <cmath>

#include "common/formula.h"

namespace fastpt {

// What is equal for all values of a tensor in one step: formed in float64, rounded once.
struct AdamW {
  float grad_scale;
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float decay;               // lr * weight_decay
  float step_size;           // lr / (1 - beta1^t)
  float inverse_correction;  // 1 / sqrt(1 - beta2^t)
  float eps;
};

// The constants of step t of a tensor.
inline AdamW adamw_of(float grad_scale, double lr, double beta1, double beta2, double eps, double weight_decay,
                      double t) {
  return {grad_scale,
          static_cast<float>(1 - beta1),
          static_cast<float>(beta2),
          static_cast<float>(1 - beta2),
          static_cast<float>(lr * weight_decay),
          static_cast<float>(lr / (1 - std::pow(beta1, t))),
          static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, t))),
          static_cast<float>(eps)};
}

// Updates the moments and returns the new value. Decay is part of what is subtracted: as a factor, 1 - lr *
// weight_decay would keep one digit at lr 1e-5.
FASTPT_FORMULA float adamw_value(const AdamW& c, float value, float grad, float& exp_avg, float& exp_avg_sq) {
  const float g = grad * c.grad_scale;
  exp_avg += c.one_minus_beta1 * (g - exp_avg);
  exp_avg_sq = c.beta2 * exp_avg_sq + c.one_minus_beta2 * g * g;
  const float step = c.step_size * exp_avg / (__builtin_sqrtf(exp_avg_sq) * c.inverse_correction + c.eps);
  return value - (c.decay * value + step);
}

}  // namespace fastpt
