// A launch of a CUDA kernel on the CPU: the grid's and the block's loops around what one thread does between two
// exchanges with others (a barrier, a shuffle), called a phase. Built with AddressSanitizer, on tensors of exactly
// their size, it finds every access out of range; compared with a plain loop, every element that no thread came to.
#pragma once

#include <cstdint>
#include <vector>

namespace fastpt::cuda {

// `phases` are called as phase(program, thread, registers of all the block's threads), one after the other for the
// whole block. Programs run in descending order: one that leans on another's result goes wrong.
template <typename Registers, typename... Phases>
void emulate(int64_t programs, int threads, const Phases&... phases) {
  for (int64_t program = programs - 1; program >= 0; --program) {
    std::vector<Registers> block(threads);
    const auto run = [&](const auto& phase) {
      for (int thread = 0; thread < threads; ++thread) phase(program, thread, block);
    };
    (run(phases), ...);
  }
}

}  // namespace fastpt::cuda
