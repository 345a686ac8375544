// NF4 weights as other CPU kernels read them: some values at a time, never a whole weight.
#pragma once

#include <optional>
#include <ATen/core/Tensor.h>

#include "common/nf4.h"

namespace fastpt {

inline int64_t blocks_of(int64_t values, int64_t size) {
  return (values + size - 1) / size;
}

// Raises where these are not the codes and scales of so many values.
inline void check_nf4(const at::Tensor& packed, const at::Tensor& absmax, const std::optional<at::Tensor>& nested,
                      int64_t values) {
  const int64_t blocks = blocks_of(values, kNf4Block), size = kNf4MapSize + 1 + blocks_of(blocks, kNf4ScaleBlock);
  const bool is_nested = absmax.scalar_type() == at::kByte;
  TORCH_CHECK(packed.scalar_type() == at::kByte && packed.numel() == blocks_of(values, 2) && absmax.numel() == blocks &&
                  (is_nested || absmax.scalar_type() == at::kFloat) && is_nested == nested.has_value() &&
                  (!is_nested || (nested->numel() == size && nested->scalar_type() == at::kFloat)),
              "nf4: packed is ", packed.sizes(), " ", packed.scalar_type(), ", absmax ", absmax.sizes(), " ",
              absmax.scalar_type(), nested ? ", nested" : "", nested ? c10::str(" ", nested->sizes()) : "", " for ",
              values, " values; they must be ", blocks_of(values, 2), " bytes and ", blocks,
              " scales, float32, or uint8 with a float32 `nested` of ", size);
}

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
