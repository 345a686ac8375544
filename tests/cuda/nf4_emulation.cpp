// The NF4 launches, emulated, against plain loops over every value: tests/test_cuda_emulation.py builds and runs it.
// With the argument "traffic" it prints instead what a launch moves and its floor, for tests/cuda_check.py.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cuda/nf4_body.h"
#include "cuda/nf4_pack_body.h"
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

  float* floats() const { return reinterpret_cast<float*>(at); }
  uint8_t* bytes() const { return reinterpret_cast<uint8_t*>(at); }
};

int bytes_of(Dtype type) {
  return type == Dtype::float32 ? 4 : 2;
}

int64_t parts_of(int64_t size, int64_t of) {
  return (size + of - 1) / of;
}

// A packed weight and what it was unpacked to.
struct Weight {
  int64_t size, blocks, groups;
  Memory packed, codes, absmax, nested, out;
  Nf4Task task{};

  Weight(int64_t size, Dtype type, bool is_nested, size_t offset, std::mt19937& random)
      : size(size),
        blocks(parts_of(size, kNf4Block)),
        groups(parts_of(blocks, kNf4ScaleBlock)),
        packed((size + 1) / 2, offset),
        codes(blocks, 0),
        absmax(blocks * 4, 0),
        nested((257 + groups) * 4, 0),
        out(size * bytes_of(type), offset) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < (size + 1) / 2; ++i) packed.at[i] = static_cast<char>(random());
    for (int64_t b = 0; b < blocks; ++b) {
      codes.at[b] = static_cast<char>(random());
      absmax.floats()[b] = normal(random);
    }
    for (int64_t i = 0; i < 257 + groups; ++i) nested.floats()[i] = normal(random);
    task.packed = packed.bytes();
    task.scales =
        is_nested ? Nf4Scales{nullptr, codes.bytes(), nested.floats()} : Nf4Scales{absmax.floats(), nullptr, nullptr};
    task.out = out.at;
    task.size = size;
    task.type = type;
    task.is_aligned = offset % 16 == 0;
  }

  void unpack() {
    Nf4Shared shared;
    emulate<int>(
        nf4_programs_of(size), kThreads,
        [&](int64_t program, int thread, std::vector<int>&) {
          if (thread == 0) std::memset(static_cast<void*>(&shared), 0xee, sizeof shared);  // not the last program's
          nf4_load_all(task, program, thread, shared);
        },
        [&](int64_t program, int thread, std::vector<int>&) { nf4_store_all(task, program, thread, shared); });
  }

  int64_t floor_bytes() const {
    const bool is_nested = task.scales.codes != nullptr;
    return (size + 1) / 2 + size * bytes_of(task.type) + (is_nested ? blocks + (257 + groups) * 4 : blocks * 4);
  }
};

bool is_unpacked(int64_t size, Dtype type, bool is_nested, size_t offset, std::mt19937& random) {
  Weight weight(size, type, is_nested, offset, random);
  weight.unpack();
  for (int64_t i = 0; i < size; ++i) {
    const uint8_t byte = weight.packed.bytes()[i / 2];
    const float value = nf4_value(i % 2 == 0 ? byte >> 4 : byte & 15) * nf4_scale(weight.task.scales, i / kNf4Block);
    Group expected{};
    expected.put(0, type, value);
    if (std::memcmp(&expected.word[0], weight.out.at + i * bytes_of(type), bytes_of(type)) != 0) {
      std::printf("wrong: value %ld of %ld, type %d, nested %d, offset %zu\n", long(i), long(size), int(type),
                  is_nested, offset);
      return false;
    }
  }
  return true;
}

void pack(const Nf4PackTask& task) {
  emulate<Nf4PackThread>(
      nf4_pack_programs_of(task.size), kThreads,
      [&](int64_t program, int thread, std::vector<Nf4PackThread>& block) {
        nf4_pack_load(task, program, thread, block[thread]);
      },
      [&](int64_t, int thread, std::vector<Nf4PackThread>& block) {  // the shuffles: the first sharer gathers for all
        if (thread % kNf4Sharers != 0) return;
        for (int g = 0; g < kNf4PackGroups; ++g) {
          uint32_t largest = 0;
          for (int t = thread; t < thread + kNf4Sharers; ++t) largest = std::max(largest, block[t].largest[g]);
          for (int t = thread; t < thread + kNf4Sharers; ++t) block[t].largest[g] = largest;
        }
      },
      [&](int64_t program, int thread, std::vector<Nf4PackThread>& block) {
        nf4_pack_store(task, program, thread, block[thread]);
      });
}

void nest(const Nf4NestTask& task) {
  Nf4NestShared shared;
  emulate<int>(
      nf4_nest_programs_of(task.size), kThreads,
      [&](int64_t program, int thread, std::vector<int>&) {
        if (thread == 0) std::memset(static_cast<void*>(&shared), 0xee, sizeof shared);
        nf4_nest_load(task, program, thread, shared);
      },
      [&](int64_t program, int thread, std::vector<int>&) { nf4_nest_store(task, program, thread, shared); });
}

// One value in 500 is NaN, one block in 8 is zero.
bool is_packed(int64_t size, Dtype type, size_t offset, std::mt19937& random) {
  const int64_t blocks = parts_of(size, kNf4Block);
  Memory values(size * bytes_of(type), offset), packed((size + 1) / 2, offset), absmax(blocks * 4, 0);
  std::vector<float> wide(size);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < size; ++i) {
    Group one{};
    const bool is_nan = random() % 500 == 0;
    one.put(0, type, is_nan ? std::numeric_limits<float>::quiet_NaN() : i / kNf4Block % 8 == 1 ? 0.0f : normal(random));
    wide[i] = one.value(0, type);
    std::memcpy(values.at + i * bytes_of(type), &one.word[0], bytes_of(type));
  }
  Nf4PackTask task{values.at, packed.bytes(), absmax.floats(), size, type, offset % 16 == 0};
  pack(task);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = b * kNf4Block, end = std::min(size, first + kNf4Block);
    uint32_t largest = 0;
    for (int64_t i = first; i < end; ++i) largest = std::max(largest, magnitude_bits(wide[i]));
    const Nf4Divisor by = nf4_divisor(float_of_bits(largest), end - first == kNf4Block);
    bool is_right = bits_of_float(absmax.floats()[b]) == bits_of_float(by.stored());
    for (int64_t i = first; i < end; i += 2) {
      const uint32_t low = i + 1 < end ? by.code(wide[i + 1]) : nf4_code(0.0f);
      is_right &= packed.bytes()[i / 2] == (by.code(wide[i]) << 4 | low);
    }
    if (!is_right) {
      std::printf("wrong: block %ld of %ld values packed, type %d, offset %zu\n", long(b), long(size), int(type),
                  offset);
      return false;
    }
  }
  return true;
}

bool is_nested(int64_t size, std::mt19937& random) {
  const int64_t groups = parts_of(size, kNf4ScaleBlock);
  Memory absmax(size * 4, 0), codes(size, 0), nested((257 + groups) * 4, 0);
  const DynamicMap map = dynamic_map(true);
  std::memcpy(nested.at, map.code, sizeof map.code);
  nested.floats()[256] = 0.75f;
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < size; ++i) absmax.floats()[i] = i < 256 ? 0.75f : std::fabs(normal(random));  // alike, not
  nest({absmax.floats(), codes.bytes(), nested.floats(), size});
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = g * kNf4ScaleBlock, end = std::min(size, first + kNf4ScaleBlock);
    float most = 0.0f;
    for (int64_t i = first; i < end; ++i) most = std::max(most, std::fabs(absmax.floats()[i] - 0.75f));
    bool is_right = nested.floats()[257 + g] == most;
    for (int64_t i = first; i < end; ++i)
      is_right &= codes.bytes()[i] == nf4_nested_code(absmax.floats()[i] - 0.75f, most, map.code);
    if (!is_right) {
      std::printf("wrong: scales %ld of %ld nested\n", long(g), long(size));
      return false;
    }
  }
  return true;
}

void print_traffic(const char* what, Dtype type, const char* scales, int64_t floor) {
  std::printf("%s %s, %s: %ld bytes, floor %ld\n", what, type == Dtype::float32 ? "float32" : "16 bits", scales,
              long(traffic.loaded + traffic.stored), long(floor));
  traffic = {};
}

// Of a projection of 1024 x 1000 values, whose last program is not full.
void traffic_of_launches() {
  std::mt19937 random(1);
  const int64_t size = 1024 * 1000;
  for (const Dtype type : {Dtype::float32, Dtype::bfloat16}) {
    for (const bool is_nested : {false, true}) {
      Weight weight(size, type, is_nested, 0, random);
      weight.unpack();
      print_traffic("nf4_dequantize", type, is_nested ? "nested scales" : "float32 scales", weight.floor_bytes());
    }
    Memory values(size * bytes_of(type), 0), packed(size / 2, 0), absmax(size / kNf4Block * 4, 0);
    pack({values.at, packed.bytes(), absmax.floats(), size, type, 1});
    print_traffic("nf4_quantize", type, "float32 scales", size * bytes_of(type) + size / 2 + size / kNf4Block * 4);
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 2 && std::strcmp(arguments[1], "traffic") == 0) {
    traffic_of_launches();
    return 0;
  }
  std::mt19937 random(1);
  int tensors = 0, wrong = 0;
  for (const int64_t size : {1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 8191, 8193, 16383, 16384, 16385, 40001})
    for (const Dtype type : {Dtype::float32, Dtype::bfloat16, Dtype::float16})
      for (const size_t offset : {0, 4}) {
        tensors += 3;
        for (const bool nested : {false, true}) wrong += !is_unpacked(size, type, nested, offset, random);
        wrong += !is_packed(size, type, offset, random);
      }
  for (const int64_t scales : {1, 255, 256, 257, 1000}) {
    ++tensors;
    wrong += !is_nested(scales, random);
  }
  std::printf("%d tensors, %d wrong\n", tensors, wrong);
  return wrong == 0 ? 0 : 1;
}
