// What adamw and adamw_8bit share on the CPU: the blocks of all tensors as one parallel loop.
#pragma once

#include <algorithm>
#include <functional>
#include <vector>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "common/adamw.h"
#include "common/stochastic_rounding.h"

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

// That of a tensor with float32 moments; of `master` and `stream` one or none.
Update adamw_update(const AdamW& c, const at::Tensor& param, const at::Tensor& grad, const at::Tensor& exp_avg,
                    const at::Tensor& exp_avg_sq, const at::Tensor* master, const RandomStream* stream);

inline void run_updates(const std::vector<Update>& updates, at::TensorList tensors) {
  const auto blocks = blocks_of(tensors);
  at::parallel_for(0, static_cast<int64_t>(blocks.size()), 1, [&](int64_t lo, int64_t hi) {
    for (int64_t b = lo; b < hi; ++b) {
      const auto [tensor, first] = blocks[b];
      updates[tensor](first, std::min(first + kBlock, tensors[tensor].numel()));
    }
  });
}

}  // namespace fastpt
