// AdamW over all tensors in one launch: what the launcher takes. No torch headers here.
#pragma once

#include <cstdint>

#include "common/adamw.h"
#include "common/stochastic_rounding.h"

namespace fastpt::cuda {

enum class Dtype : int32_t { float32, bfloat16, float16 };

// One tensor of the table that a launch works through, in the order of first_program.
struct AdamWRow {
  void* param;
  const void* grad;
  void* exp_avg;  // float32, or with scales uint8
  void* exp_avg_sq;
  float* exp_avg_absmax;  // null where the moments are float32
  float* exp_avg_sq_absmax;
  float* master;  // null where the parameter is what is updated
  int64_t size;
  int64_t first_program;
  RandomStream stream;
  float step_size;
  float inverse_correction;
  Dtype param_type;
  Dtype grad_type;
  int32_t is_stochastic;
  int32_t is_aligned;  // all addresses to 16 bytes
};

constexpr int kThreads = 256;
constexpr int kThreadValues = 16;                      // one 16-byte access of 8-bit moments
constexpr int kTileValues = kThreads * kThreadValues;  // of one program at a time
constexpr int kTiles = 4;                              // of a program, one after the other
constexpr int64_t kProgramValues = kTileValues * kTiles;

inline int64_t programs_of(int64_t size) {
  return (size + kProgramValues - 1) / kProgramValues;
}

// `rows`, `grad_scale` (or null: 1) on the device; `constants` are those that all rows share; `stream` a cudaStream_t.
// Returns a cudaError_t.
int launch_adamw(const AdamWRow* rows, int64_t row_count, int64_t programs, const AdamW& constants,
                 const float* grad_scale, void* stream);

}  // namespace fastpt::cuda
