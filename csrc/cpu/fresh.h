// Memory for large results. at::empty asks for aligned memory, for which glibc cuts small pieces off the block; other
// small objects settle in them, and a freed block of activations no longer holds the next one of its size. Here the
// alignment is inside of what malloc gives, so blocks of one size take each other's place and the heap stays small.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <limits>
#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

namespace fastpt {

constexpr int64_t kLargeBytes = int64_t{1} << 18;  // small blocks fill holes as they are

inline at::Tensor fresh(at::IntArrayRef sizes, const at::TensorOptions& options) {
  constexpr uintptr_t kAlignment = 64;
  const int64_t bytes = c10::multiply_integers(sizes) * static_cast<int64_t>(options.dtype().itemsize());
  if (bytes < kLargeBytes) return at::empty(sizes, options);
  void* memory = std::malloc(static_cast<size_t>(bytes) + kAlignment);
  TORCH_CHECK(memory != nullptr, "fastpt: can't allocate memory: ", bytes, " bytes for a result of shape ", sizes);
  const auto address = (reinterpret_cast<uintptr_t>(memory) + kAlignment - 1) / kAlignment * kAlignment;
  auto out = at::from_blob(reinterpret_cast<void*>(address), sizes, [memory](void*) { std::free(memory); }, options);
  const auto& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory() && out.is_floating_point())
    out.fill_(std::numeric_limits<double>::quiet_NaN());  // as at::empty does
  return out;
}

inline at::Tensor fresh_like(const at::Tensor& t) {
  return fresh(t.sizes(), t.options());
}

}  // namespace fastpt
