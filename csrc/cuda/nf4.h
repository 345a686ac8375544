// NF4 on CUDA: what the launchers take. No torch headers here.
#pragma once

#include <cstdint>

#include "common/nf4.h"
#include "cuda/adamw.h"

namespace fastpt::cuda {

// To unpack a weight's values, which lie one after the other; all addresses on the device.
struct Nf4Task {
  const uint8_t* packed;
  Nf4Scales scales;
  void* out;
  int64_t size;
  Dtype type;
  int32_t is_aligned;  // packed and out, to 16 bytes
};

constexpr int64_t kNf4ProgramValues = kThreads * kNf4Block;  // a thread loads one scale

inline int64_t nf4_programs_of(int64_t size) {
  return (size + kNf4ProgramValues - 1) / kNf4ProgramValues;
}

// In one launch, scales nested or not. `stream` is a cudaStream_t; returns a cudaError_t.
int launch_nf4_dequantize(const Nf4Task& task, void* stream);

// To pack a weight's values.
struct Nf4PackTask {
  const void* values;
  uint8_t* packed;
  float* absmax;
  int64_t size;
  Dtype type;
  int32_t is_aligned;  // values to 16 bytes, packed to 4
};

constexpr int kNf4PackGroups = 4;  // of 8 values each that a thread packs; all are loaded before the first is stored
constexpr int64_t kNf4PackValues = kThreads * kNf4PackGroups * 8;

inline int64_t nf4_pack_programs_of(int64_t size) {
  return (size + kNf4PackValues - 1) / kNf4PackValues;
}

int launch_nf4_pack(const Nf4PackTask& task, void* stream);

// To nest a weight's scales.
struct Nf4NestTask {
  const float* absmax;
  uint8_t* codes;
  float* nested;  // the map and the offset are there; the maxima behind them are written
  int64_t size;   // scales
};

static_assert(kThreads == kNf4ScaleBlock && kThreads == kNf4MapSize);  // a thread for each

inline int64_t nf4_nest_programs_of(int64_t size) {
  return (size + kNf4ScaleBlock - 1) / kNf4ScaleBlock;
}

int launch_nf4_nest(const Nf4NestTask& task, void* stream);

}  // namespace fastpt::cuda
