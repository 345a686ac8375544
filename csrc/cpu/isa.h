// Which instruction set the kernels of this process run on: detected once, lowered (never raised) by FASTPT_CPU_ISA.
#pragma once

namespace fastpt {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

// The best level that both this build and this CPU offer.
Isa isa();

const char* isa_name(Isa level);

}  // namespace fastpt
