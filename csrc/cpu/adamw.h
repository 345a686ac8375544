// What adamw and adamw_8bit share on the CPU: the blocks of all tensors as one parallel loop.
#pragma once

#include <algorithm>
#include <functional>
#include <optional>
#include <vector>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "common/adamw.h"
#include "common/stochastic_rounding.h"
#include "cpu/adamw_lists.h"
#include "cpu/dispatch.h"

namespace fastpt {

constexpr int64_t kBlock = 16384;  // values per task: half a megabyte of traffic, small against any thread's share

struct Block {
  size_t tensor;
  int64_t first;
};

inline std::vector<Block> blocks_of(at::TensorList tensors) {
  std::vector<Block> blocks;
  for (size_t i = 0; i < tensors.size(); ++i)
    for (int64_t first = 0; first < tensors[i].numel(); first += kBlock) blocks.push_back({i, first});
  return blocks;
}

// One tensor's update of its values [first, end), whatever the dtypes.
using Update = std::function<void(int64_t first, int64_t end)>;

// Moments of 8 bits, and the scale of each kStateBlock of them.
struct EightBitState {
  uint8_t* exp_avg;
  uint8_t* exp_avg_sq;
  float* exp_avg_absmax;
  float* exp_avg_sq_absmax;
};

// The maps of both moments.
struct EightBitMaps {
  DynamicMap first = dynamic_map(true), second = dynamic_map(false);
  MapPieces first_pieces = map_pieces(true), second_pieces = map_pieces(false);
};

// That of a tensor with float32 moments; of `master` and `stream` one or none.
Update adamw_update(const AdamW& c, const at::Tensor& param, const at::Tensor& grad, const at::Tensor& exp_avg,
                    const at::Tensor& exp_avg_sq, const at::Tensor* master, const RandomStream* stream);

// Whether the kernels take all of it; what they do not, the definition does.
inline bool all_native(const AdamWLists& all) {
  const auto is_plain = [](const at::Tensor& state, at::ScalarType dtype) {
    return state.is_contiguous() && state.scalar_type() == dtype;
  };
  for (size_t i = 0; i < all.params.size(); ++i) {
    const auto moments = all.is_8bit(i) ? at::kByte : at::kFloat;
    if (!is_native(all.params[i]) || !all.params[i].is_contiguous() || !is_native(all.grads[i])) return false;
    if (!is_plain(all.exp_avgs[i], moments) || !is_plain(all.exp_avg_sqs[i], moments)) return false;
    if (all.is_8bit(i) && !(all.exp_avg_absmaxes[i].is_contiguous() && all.exp_avg_sq_absmaxes[i].is_contiguous()))
      return false;
    if (all.master(i) != nullptr && !is_plain(*all.master(i), at::kFloat)) return false;
  }
  return true;
}

// A step of all tensors: `update_of(constants, i, gradient, stream)` makes that of one; no stream: rounded to nearest.
template <typename UpdateOf>
void step_all(const AdamWLists& all, const std::optional<at::Tensor>& grad_scale, double lr, double beta1, double beta2,
              double eps, double weight_decay, std::optional<int64_t> seed, const UpdateOf& update_of) {
  const float scale = grad_scale ? grad_scale->item().toFloat() : 1.0f;
  std::vector<Update> updates;
  for (size_t i = 0; i < all.params.size(); ++i) {
    const double t = *all.steps[i].mutable_data_ptr<float>() += 1;
    const AdamW c = adamw_of(scale, lr, beta1, beta2, eps, weight_decay, t);
    const RandomStream stream = random_stream(static_cast<uint64_t>(seed.value_or(0)), static_cast<uint64_t>(t), i);
    const bool is_stochastic = seed && all.params[i].scalar_type() == at::kBFloat16;
    updates.push_back(update_of(c, i, all.grads[i].contiguous(), is_stochastic ? &stream : nullptr));
  }
  const auto blocks = blocks_of(all.params);
  at::parallel_for(0, static_cast<int64_t>(blocks.size()), 1, [&](int64_t lo, int64_t hi) {
    for (int64_t b = lo; b < hi; ++b) {
      const auto [tensor, first] = blocks[b];
      updates[tensor](first, std::min(first + kBlock, all.params[tensor].numel()));
    }
  });
}

}  // namespace fastpt
