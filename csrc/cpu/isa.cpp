#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>

namespace fastpt {
namespace {

Isa detect() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512_bf16;
  if (has_avx512) return Isa::avx512;
  if (has_avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

Isa limited(Isa best) {
  const char* wanted = std::getenv("FASTPT_CPU_ISA");
  if (wanted == nullptr) return best;
  for (int level = 0; level <= static_cast<int>(best); ++level)
    if (std::strcmp(wanted, isa_name(static_cast<Isa>(level))) == 0) return static_cast<Isa>(level);
  return best;
}

}  // namespace

const char* isa_name(Isa level) {
  constexpr const char* names[] = {"portable", "avx2", "avx512", "avx512_bf16"};
  return names[static_cast<int>(level)];
}

Isa isa() {
  static const Isa level = limited(detect());
  return level;
}

}  // namespace fastpt
