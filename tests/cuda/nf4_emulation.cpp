// The NF4 launch, emulated, against a plain loop over every value: tests/test_cuda_emulation.py builds and runs it.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cuda/nf4_body.h"
#include "emulate.h"

using namespace fastpt;
using namespace fastpt::cuda;

namespace {

// Memory of exactly the size, `offset` bytes after an address of 16.
struct Memory {
  char* raw;
  char* at;

  Memory(size_t bytes, size_t offset) : raw(static_cast<char*>(std::malloc(bytes + offset))), at(raw + offset) {
    std::memset(raw, 0x55, bytes + offset);
  }
  Memory(const Memory&) = delete;
  ~Memory() { std::free(raw); }
};

int bytes_of(Dtype type) {
  return type == Dtype::float32 ? 4 : 2;
}

bool is_right(int64_t size, Dtype type, bool is_nested, size_t offset, std::mt19937& random) {
  const int64_t blocks = (size + kNf4Block - 1) / kNf4Block, groups = (blocks + kNf4ScaleBlock - 1) / kNf4ScaleBlock;
  Memory packed((size + 1) / 2, offset), codes(blocks, 0), absmax(blocks * 4, 0), nested((257 + groups) * 4, 0);
  Memory out(size * bytes_of(type), offset);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < (size + 1) / 2; ++i) packed.at[i] = static_cast<char>(random());
  for (int64_t b = 0; b < blocks; ++b) {
    codes.at[b] = static_cast<char>(random());
    reinterpret_cast<float*>(absmax.at)[b] = normal(random);
  }
  for (int64_t i = 0; i < 257 + groups; ++i) reinterpret_cast<float*>(nested.at)[i] = normal(random);
  Nf4Task task{};
  task.packed = reinterpret_cast<const uint8_t*>(packed.at);
  task.scales = is_nested ? Nf4Scales{nullptr, reinterpret_cast<const uint8_t*>(codes.at),
                                      reinterpret_cast<const float*>(nested.at)}
                          : Nf4Scales{reinterpret_cast<const float*>(absmax.at), nullptr, nullptr};
  task.out = out.at;
  task.size = size;
  task.type = type;
  task.is_aligned = offset % 16 == 0;

  float numbers[kNf4Codes];
  for (uint32_t code = 0; code < kNf4Codes; ++code) numbers[code] = nf4_value(code);
  emulate<Nf4Thread>(
      nf4_programs_of(size), kThreads,
      [&](int64_t program, int thread, std::vector<Nf4Thread>& block) {
        nf4_load_all(task, program, thread, block[thread]);
      },
      [&](int64_t program, int thread, std::vector<Nf4Thread>& block) {
        nf4_store_all(task, numbers, program, thread, block[thread]);
      });

  for (int64_t i = 0; i < size; ++i) {
    const uint8_t byte = static_cast<uint8_t>(packed.at[i / 2]);
    const float value = nf4_value(i % 2 == 0 ? byte >> 4 : byte & 15) * nf4_scale(task.scales, i / kNf4Block);
    Group expected{};
    expected.put(0, type, value);
    if (std::memcmp(&expected.word[0], out.at + i * bytes_of(type), bytes_of(type)) != 0) {
      std::printf("wrong: value %ld of %ld, type %d, nested %d, offset %zu\n", long(i), long(size), int(type),
                  is_nested, offset);
      return false;
    }
  }
  return true;
}

}  // namespace

int main() {
  std::mt19937 random(1);
  int tensors = 0, wrong = 0;
  for (const int64_t size : {1, 2, 7, 8, 9, 63, 64, 65, 2047, 2049, 16383, 16384, 16385, 40001})
    for (const Dtype type : {Dtype::float32, Dtype::bfloat16, Dtype::float16})
      for (const bool is_nested : {false, true})
        for (const size_t offset : {0, 4}) {
          ++tensors;
          wrong += !is_right(size, type, is_nested, offset, random);
        }
  std::printf("%d tensors, %d wrong\n", tensors, wrong);
  return wrong == 0 ? 0 : 1;
}
