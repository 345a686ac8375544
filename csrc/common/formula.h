// How a function that host and device share is declared, and its loops over arrays that must stay in registers.
#pragma once

#ifdef __CUDACC__
#define FASTPT_FORMULA __host__ __device__ __forceinline__
#define FASTPT_UNROLL _Pragma("unroll")
#else
#define FASTPT_FORMULA inline __attribute__((always_inline))
#define FASTPT_UNROLL
#endif
