// NF4 weights as other CPU kernels read them: some values at a time, never a whole weight.
#pragma once

#include <optional>
#include <ATen/core/Tensor.h>

#include "common/nf4.h"

namespace fastpt {

// A weight [O, D] whose values lie row after row in 4 bits each, the first of a pair in the upper half of its byte.
class Nf4Weight {
 public:
  Nf4Weight() = default;
  // packed uint8; absmax float32 or uint8 with `nested`. Raises where they do not hold the scales of `values` values.
  Nf4Weight(const at::Tensor& packed, const at::Tensor& absmax, const std::optional<at::Tensor>& nested,
            int64_t values);

  // Values [first, first + n) to out, float or bfloat16; first is even.
  template <typename T>
  void unpack(int64_t first, int64_t n, T* out) const;

 private:
  at::Tensor packed_, absmax_, nested_;
  const uint8_t* bytes_ = nullptr;
  Nf4Scales scales_{};
};

}  // namespace fastpt
