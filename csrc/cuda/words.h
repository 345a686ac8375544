// Eight values of a tensor as they lie in memory, moved by 16-byte accesses where that is possible. Kernel bodies use
// them on the device; on the host the same code runs in the tests' emulation of a launch, which checks every address.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/formula.h"
#include "cuda/adamw.h"
#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

namespace fastpt::cuda {

constexpr int kGroup = 8;

// What the accesses below and those of the kernel bodies move, on the host: bytes that each thread asks for, no cache.
#ifndef __CUDACC__
struct Traffic {
  int64_t loaded = 0, stored = 0;
};
inline Traffic traffic;
#endif

FASTPT_FORMULA void count_loaded([[maybe_unused]] int bytes) {
#ifndef __CUDACC__
  traffic.loaded += bytes;
#endif
}

FASTPT_FORMULA void count_stored([[maybe_unused]] int bytes) {
#ifndef __CUDACC__
  traffic.stored += bytes;
#endif
}

struct alignas(16) Words4 {
  uint32_t at[4];
};

// An address out of a table: only so does the compiler know that it is one of global memory.
FASTPT_FORMULA void assume_global([[maybe_unused]] const void* address) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(address));
#endif
}

FASTPT_FORMULA Words4 load_16_bytes(const void* address) {
  count_loaded(16);
#ifdef __CUDA_ARCH__
  assume_global(address);
  const uint4 found = *static_cast<const uint4*>(address);
  return {{found.x, found.y, found.z, found.w}};
#else
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) __builtin_trap();
  Words4 found;
  std::memcpy(&found, address, sizeof found);
  return found;
#endif
}

FASTPT_FORMULA void store_16_bytes(void* address, const Words4& words) {
  count_stored(16);
#ifdef __CUDA_ARCH__
  assume_global(address);
  *static_cast<uint4*>(address) = make_uint4(words.at[0], words.at[1], words.at[2], words.at[3]);
#else
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) __builtin_trap();
  std::memcpy(address, &words, sizeof words);
#endif
}

FASTPT_FORMULA float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

FASTPT_FORMULA uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FASTPT_FORMULA float float_of_half(uint16_t bits) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(bits));
#else
  _Float16 value;
  std::memcpy(&value, &bits, sizeof value);
  return static_cast<float>(value);
#endif
}

FASTPT_FORMULA uint16_t half_of_float(float value) {
#ifdef __CUDA_ARCH__
  return __half_as_ushort(__float2half_rn(value));
#else
  const _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
#endif
}

// To nearest even; a NaN stays one.
FASTPT_FORMULA uint16_t bfloat16_of_float(float value) {
  const uint32_t bits = bits_of_float(value);
  return static_cast<uint16_t>(value != value ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Eight values of 4 or 2 bytes: one word each, or two values a word.
struct Group {
  uint32_t word[kGroup];

  FASTPT_FORMULA float value(int i, Dtype type) const {
    if (type == Dtype::float32) return float_of_bits(word[i]);
    const uint32_t half = (word[i / 2] >> (i % 2 * 16)) & 0xffffu;
    return type == Dtype::bfloat16 ? float_of_bits(half << 16) : float_of_half(static_cast<uint16_t>(half));
  }

  FASTPT_FORMULA void put(int i, uint16_t half) {
    const uint32_t other = i % 2 == 0 ? 0u : word[i / 2] & 0xffffu;
    word[i / 2] = other | static_cast<uint32_t>(half) << (i % 2 * 16);
  }

  FASTPT_FORMULA void put(int i, Dtype type, float value) {
    if (type == Dtype::float32) {
      word[i] = bits_of_float(value);
    } else {
      put(i, type == Dtype::bfloat16 ? bfloat16_of_float(value) : half_of_float(value));
    }
  }
};

// Values [first, first + 8) of a tensor at `base`, of which `count` are there; `is_wide`: all are, at aligned
// addresses.
FASTPT_FORMULA Group load_group(const void* base, Dtype type, int64_t first, int count, bool is_wide) {
  Group group{};
  const char* from = static_cast<const char*>(base) + first * (type == Dtype::float32 ? 4 : 2);
  if (is_wide) {
    const Words4 low = load_16_bytes(from);
    Words4 high{};
    if (type == Dtype::float32) high = load_16_bytes(from + 16);
    FASTPT_UNROLL
    for (int i = 0; i < 4; ++i) {
      group.word[i] = low.at[i];
      group.word[4 + i] = high.at[i];
    }
    return group;
  }
  FASTPT_UNROLL
  for (int i = 0; i < kGroup; ++i) {
    if (i >= count) continue;
    count_loaded(type == Dtype::float32 ? 4 : 2);
    if (type == Dtype::float32) {
      group.word[i] = reinterpret_cast<const uint32_t*>(from)[i];
    } else {
      group.put(i, reinterpret_cast<const uint16_t*>(from)[i]);
    }
  }
  return group;
}

FASTPT_FORMULA void store_group(void* base, Dtype type, int64_t first, int count, bool is_wide, const Group& group) {
  char* to = static_cast<char*>(base) + first * (type == Dtype::float32 ? 4 : 2);
  if (is_wide) {
    store_16_bytes(to, {{group.word[0], group.word[1], group.word[2], group.word[3]}});
    if (type == Dtype::float32) store_16_bytes(to + 16, {{group.word[4], group.word[5], group.word[6], group.word[7]}});
    return;
  }
  FASTPT_UNROLL
  for (int i = 0; i < kGroup; ++i) {
    if (i >= count) continue;
    count_stored(type == Dtype::float32 ? 4 : 2);
    if (type == Dtype::float32) {
      reinterpret_cast<uint32_t*>(to)[i] = group.word[i];
    } else {
      reinterpret_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(group.word[i / 2] >> (i % 2 * 16));
    }
  }
}

}  // namespace fastpt::cuda
