// How a function that host and device share is declared.
#pragma once

#ifdef __CUDACC__
#define FASTPT_FORMULA __host__ __device__ __forceinline__
#else
#define FASTPT_FORMULA inline __attribute__((always_inline))
#endif
