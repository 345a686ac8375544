// What every CPU op shares: which dtypes are native, and the way back to the Python reference for the others.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/BFloat16.h>

namespace fastpt {

inline bool is_native(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kBFloat16;
}

// Calls body.operator()<T>() with T = float or c10::BFloat16.
template <typename Body>
void by_dtype(const at::Tensor& tensor, Body&& body) {
  if (tensor.scalar_type() == at::kFloat) {
    body.template operator()<float>();
  } else {
    body.template operator()<c10::BFloat16>();
  }
}

// The reference of an op (registered as CompositeExplicitAutograd by fastpt/ops/_library.py), called past the CPU
// kernel: double and half have no native kernel, and gradcheck runs in double.
template <typename Signature>
auto reference_of(const char* name) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
  return [op](auto&&... arguments) {
    return op.redispatch(c10::DispatchKeySet(c10::DispatchKey::CompositeExplicitAutograd),
                         std::forward<decltype(arguments)>(arguments)...);
  };
}

}  // namespace fastpt
