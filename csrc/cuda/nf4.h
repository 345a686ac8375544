// NF4 dequantisation in one launch, scales nested or not: what the launcher takes. No torch headers here.
#pragma once

#include <cstdint>

#include "common/nf4.h"
#include "cuda/adamw.h"

namespace fastpt::cuda {

// A weight's values one after the other; all addresses on the device.
struct Nf4Task {
  const uint8_t* packed;
  Nf4Scales scales;
  void* out;
  int64_t size;
  Dtype type;
  int32_t is_aligned;  // packed to 4 bytes, out to 16
};

constexpr int kNf4Groups =
    8;  // of 8 values each that a thread unpacks; their bytes are loaded before the first is stored
constexpr int kNf4ProgramValues = kThreads * kNf4Groups * 8;

inline int64_t nf4_programs_of(int64_t size) {
  return (size + kNf4ProgramValues - 1) / kNf4ProgramValues;
}

// `stream` is a cudaStream_t; returns a cudaError_t.
int launch_nf4_dequantize(const Nf4Task& task, void* stream);

}  // namespace fastpt::cuda
