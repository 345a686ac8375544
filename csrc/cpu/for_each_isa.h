// Compiles one kernel header once per instruction set, in one translation unit, so that a wheel built anywhere runs
// everywhere at full width. Use, in x.cpp, after every other include:
//
//   #define FASTPT_KERNELS "cpu/x_kernels.h"
//   #include "cpu/for_each_isa.h"
//   ... FASTPT_BY_ISA(row_kernel<T>)(arguments);
//
// The kernel header holds plain C++ on raw pointers (no ATen, no #include, no #pragma once); the compiler vectorises it
// for the target in force. cpu/math.h comes with it, inside the same namespace. FASTPT_ISA_LEVEL (0 to 3, as in isa.h)
// tells a kernel which level it is compiled for; intrinsics belong under `#if FASTPT_ISA_LEVEL >= 2`.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <algorithm>
#include <c10/util/BFloat16.h>
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif
#include "cpu/isa.h"

#define FASTPT_ISA_LEVEL 0
namespace fastpt::portable {
#include "cpu/math.h"
#include FASTPT_KERNELS
}  // namespace fastpt::portable
#undef FASTPT_ISA_LEVEL

// Only GCC takes target pragmas around templates; clang builds get the portable level (tuned by its own -march flags).
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define FASTPT_ISA_LEVEL 1
namespace fastpt::avx2 {
#include "cpu/math.h"
#include FASTPT_KERNELS
}  // namespace fastpt::avx2
#undef FASTPT_ISA_LEVEL
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#define FASTPT_ISA_LEVEL 2
namespace fastpt::avx512 {
#include "cpu/math.h"
#include FASTPT_KERNELS
}  // namespace fastpt::avx512
#undef FASTPT_ISA_LEVEL
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,prefer-vector-width=512")
#define FASTPT_ISA_LEVEL 3
namespace fastpt::avx512_bf16 {
#include "cpu/math.h"
#include FASTPT_KERNELS
}  // namespace fastpt::avx512_bf16
#undef FASTPT_ISA_LEVEL
#pragma GCC pop_options

#define FASTPT_BY_ISA(...)                                                             \
  (::fastpt::isa() == ::fastpt::Isa::avx512_bf16 ? &::fastpt::avx512_bf16::__VA_ARGS__ \
   : ::fastpt::isa() == ::fastpt::Isa::avx512    ? &::fastpt::avx512::__VA_ARGS__      \
   : ::fastpt::isa() == ::fastpt::Isa::avx2      ? &::fastpt::avx2::__VA_ARGS__        \
                                                 : &::fastpt::portable::__VA_ARGS__)
#else
#define FASTPT_BY_ISA(...) (&::fastpt::portable::__VA_ARGS__)
#endif
