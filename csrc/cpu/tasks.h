// Unequal tasks on all threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <ATen/Parallel.h>

#include "cpu/gemm.h"

namespace fastpt {

// Runs body(worker, task) once for each task; the next free thread takes the next task, so unequal tasks balance.
// Tasks must not share what they write: then the results do not depend on who runs what.
template <typename Body>
void for_each_task(int64_t tasks, const Body& body) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t task = next++; task < tasks; task = next++) body(worker, task);
    gemm_release();
  });
}

}  // namespace fastpt
