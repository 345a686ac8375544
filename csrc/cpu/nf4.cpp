// nf4 on the CPU: blocks of a weight in parallel, nested scales decoded where they are used. The definition is
// fastpt/ops/nf4.py.
#include "cpu/nf4.h"

#include <functional>
#include <numeric>
#include <tuple>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mean.h>
#include <torch/library.h>

#include "cpu/dispatch.h"
#define FASTPT_KERNELS "cpu/nf4_kernels.h"
#include "cpu/for_each_isa.h"

namespace fastpt {

namespace {

using at::Tensor;

constexpr int64_t kBlocksOfTask = 256;  // 16,384 values, and so a block of nested scales

}  // namespace

Nf4Weight::Nf4Weight(const Tensor& packed, const Tensor& absmax, const std::optional<Tensor>& nested, int64_t values)
    : packed_(packed.contiguous()), absmax_(absmax.contiguous()) {
  check_nf4(packed, absmax, nested, values);
  bytes_ = packed_.const_data_ptr<uint8_t>();
  if (nested) {
    nested_ = nested->contiguous();
    scales_ = {nullptr, absmax_.const_data_ptr<uint8_t>(), nested_.const_data_ptr<float>()};
  } else {
    scales_ = {absmax_.const_data_ptr<float>(), nullptr, nullptr};
  }
}

template <typename T>
void Nf4Weight::unpack(int64_t first, int64_t n, T* out) const {
  FASTPT_BY_ISA(nf4_unpack<T>)(first, n, bytes_, scales_, out);
}
template void Nf4Weight::unpack<float>(int64_t, int64_t, float*) const;
template void Nf4Weight::unpack<c10::BFloat16>(int64_t, int64_t, c10::BFloat16*) const;

namespace {

// (packed [ceil(N / 2)], absmax [B] float32), or with a map absmax in uint8 and what nests them.
std::tuple<Tensor, Tensor, Tensor> nf4_quantize(const Tensor& weight, const std::optional<Tensor>& scales_map) {
  const auto values = (is_native(weight) ? weight : weight.to(at::kFloat)).contiguous();
  const int64_t n = values.numel(), blocks = blocks_of(n, kNf4Block);
  auto packed = at::empty({blocks_of(n, 2)}, values.options().dtype(at::kByte));
  auto absmax = at::empty({blocks}, values.options().dtype(at::kFloat));
  by_dtype(values, [&]<typename T>() {
    const auto pack = FASTPT_BY_ISA(nf4_pack<T>);
    const T* from = values.const_data_ptr<T>();
    uint8_t* to = packed.mutable_data_ptr<uint8_t>();
    float* scales = absmax.mutable_data_ptr<float>();
    at::parallel_for(0, blocks, kBlocksOfTask, [&](int64_t lo, int64_t hi) {
      for (int64_t b = lo; b < hi; ++b) scales[b] = pack(b, n, from, to);
    });
  });
  if (!scales_map) return {packed, absmax, at::empty({0}, absmax.options())};
  TORCH_CHECK(scales_map->numel() == kNf4MapSize && scales_map->scalar_type() == at::kFloat,
              "nf4_quantize: the map is ", scales_map->sizes(), " ", scales_map->scalar_type(),
              "; it must be float32 [256]");
  const int64_t groups = blocks_of(blocks, kNf4ScaleBlock);
  auto nested = at::empty({kNf4MapSize + 1 + groups}, absmax.options());
  auto codes = at::empty({blocks}, packed.options());
  float* parts = nested.mutable_data_ptr<float>();
  std::copy_n(scales_map->contiguous().const_data_ptr<float>(), kNf4MapSize, parts);
  parts[kNf4MapSize] = blocks > 0 ? absmax.mean().item().toFloat() : 0.0f;
  const auto pack_scales = FASTPT_BY_ISA(nf4_pack_scales);
  const float* scales = absmax.const_data_ptr<float>();
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = g * kNf4ScaleBlock;
    parts[kNf4MapSize + 1 + g] = pack_scales(std::min(kNf4ScaleBlock, blocks - first), scales + first,
                                             parts[kNf4MapSize], parts, codes.mutable_data_ptr<uint8_t>() + first);
  }
  return {packed, codes, nested};
}

Tensor nf4_dequantize(const Tensor& packed, const Tensor& absmax, const std::optional<Tensor>& nested,
                      at::IntArrayRef shape, at::ScalarType dtype) {
  const int64_t n = c10::multiply_integers(shape);
  const Nf4Weight weight(packed, absmax, nested, n);
  const bool is_native = dtype == at::kFloat || dtype == at::kBFloat16;
  auto out = at::empty(shape, packed.options().dtype(is_native ? dtype : at::kFloat));
  by_dtype(out, [&]<typename T>() {
    T* to = out.mutable_data_ptr<T>();
    at::parallel_for(0, blocks_of(n, kNf4Block), kBlocksOfTask, [&](int64_t lo, int64_t hi) {
      const int64_t first = lo * kNf4Block;
      weight.unpack<T>(first, std::min(n, hi * kNf4Block) - first, to + first);
    });
  });
  return out.to(dtype);
}

}  // namespace
}  // namespace fastpt

TORCH_LIBRARY_IMPL(fastpt, CPU, m) {
  m.impl("nf4_quantize", &fastpt::nf4_quantize);
  m.impl("nf4_dequantize", &fastpt::nf4_dequantize);
}
