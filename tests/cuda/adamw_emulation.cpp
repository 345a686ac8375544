// The AdamW launch, emulated, against a plain loop over every value: tests/test_cuda_emulation.py builds and runs it.
// With the argument "traffic" it prints instead what a launch moves and its floor, for tests/cuda_check.py.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cuda/adamw_body.h"
#include "emulate.h"

using namespace fastpt;
using namespace fastpt::cuda;

namespace {

const DynamicMap kFirst = dynamic_map(true), kSecond = dynamic_map(false);
const AdamW kConstants = adamw_of(0.5f, 1e-2, 0.9, 0.98, 1e-8, 0.1, 3);

// Memory of exactly the size, `offset` bytes after an address of 16.
struct Memory {
  std::vector<char> kept;
  char* raw = nullptr;
  char* at = nullptr;

  Memory(size_t bytes, size_t offset) : raw(static_cast<char*>(std::malloc(bytes + offset))), at(raw + offset) {
    std::memset(raw, 0x55, bytes + offset);
    kept.resize(bytes);
  }
  void keep() {
    if (!kept.empty()) std::memcpy(kept.data(), at, kept.size());
  }
};

int bytes_of(Dtype type) {
  return type == Dtype::float32 ? 4 : 2;
}

void put(char* at, Dtype type, int64_t i, float value) {
  Group group{};
  group.put(0, type, value);
  std::memcpy(at + i * bytes_of(type), &group.word[0], bytes_of(type));
}

float get(const char* at, Dtype type, int64_t i) {
  Group group{};
  std::memcpy(&group.word[0], at + i * bytes_of(type), bytes_of(type));
  return group.value(0, type);
}

struct Case {
  int64_t size;
  Dtype param_type, grad_type;
  bool is_8bit, has_master, is_stochastic;
  size_t offset;
};

struct Tensor {
  Case c;
  int64_t blocks;
  Memory param, grad, exp_avg, exp_avg_sq, absmax, absmax_sq, master;

  Tensor(const Case& c, std::mt19937& random)
      : c(c),
        blocks(c.is_8bit ? (c.size + kStateBlock - 1) / kStateBlock : 0),
        param(c.size * bytes_of(c.param_type), c.offset),
        grad(c.size * bytes_of(c.grad_type), c.offset),
        exp_avg(c.size * (c.is_8bit ? 1 : 4), c.offset),
        exp_avg_sq(c.size * (c.is_8bit ? 1 : 4), c.offset),
        absmax(blocks * 4, 0),
        absmax_sq(blocks * 4, 0),
        master(c.has_master ? c.size * 4 : 0, 0) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < c.size; ++i) {
      put(param.at, c.param_type, i, normal(random));
      put(grad.at, c.grad_type, i, normal(random));
      if (c.has_master) put(master.at, Dtype::float32, i, normal(random));
      if (c.is_8bit) {
        exp_avg.at[i] = static_cast<char>(random());
        exp_avg_sq.at[i] = static_cast<char>(random());
      } else {
        put(exp_avg.at, Dtype::float32, i, normal(random));
        put(exp_avg_sq.at, Dtype::float32, i, std::abs(normal(random)));
      }
    }
    for (int64_t b = 0; b < blocks; ++b) {
      put(absmax.at, Dtype::float32, b, 0.1f + std::abs(normal(random)));
      put(absmax_sq.at, Dtype::float32, b, 0.1f + std::abs(normal(random)));
    }
    for (Memory* memory : all()) memory->keep();
  }

  std::vector<Memory*> all() { return {&param, &grad, &exp_avg, &exp_avg_sq, &absmax, &absmax_sq, &master}; }

  AdamWRow row(int64_t first_program, uint64_t number) {
    AdamWRow row{};
    row.param = param.at;
    row.grad = grad.at;
    row.exp_avg = exp_avg.at;
    row.exp_avg_sq = exp_avg_sq.at;
    if (c.is_8bit) {
      row.exp_avg_absmax = reinterpret_cast<float*>(absmax.at);
      row.exp_avg_sq_absmax = reinterpret_cast<float*>(absmax_sq.at);
    }
    if (c.has_master) row.master = reinterpret_cast<float*>(master.at);
    row.size = c.size;
    row.first_program = first_program;
    row.stream = random_stream(7, 3, number);
    row.step_size = kConstants.step_size;
    row.inverse_correction = kConstants.inverse_correction;
    row.param_type = c.param_type;
    row.grad_type = c.grad_type;
    row.is_stochastic = c.is_stochastic;
    row.is_aligned = c.offset % 16 == 0;
    return row;
  }

  // What the launch must have made of what was kept, value by value.
  bool is_as_expected(uint64_t number) {
    const RandomStream stream = random_stream(7, 3, number);
    for (int64_t begin = 0; begin < c.size; begin += kStateBlock) {
      const int64_t end = std::min<int64_t>(c.size, begin + kStateBlock), block = begin / kStateBlock;
      std::vector<float> m(kStateBlock), v(kStateBlock);
      uint32_t largest = 0, largest_sq = 0;
      for (int64_t i = begin; i < end; ++i) {
        float& first = m[i - begin];
        float& second = v[i - begin];
        first = c.is_8bit ? kFirst.code[static_cast<uint8_t>(exp_avg.kept[i])] *
                                get(absmax.kept.data(), Dtype::float32, block)
                          : get(exp_avg.kept.data(), Dtype::float32, i);
        second = c.is_8bit ? kSecond.code[static_cast<uint8_t>(exp_avg_sq.kept[i])] *
                                 get(absmax_sq.kept.data(), Dtype::float32, block)
                           : get(exp_avg_sq.kept.data(), Dtype::float32, i);
        const float old =
            c.has_master ? get(master.kept.data(), Dtype::float32, i) : get(param.kept.data(), c.param_type, i);
        const float value = adamw_value(kConstants, old, get(grad.kept.data(), c.grad_type, i), first, second);
        largest = std::max(largest, magnitude_bits(first));
        largest_sq = std::max(largest_sq, magnitude_bits(second));
        Group rounded{};
        if (c.is_stochastic) {
          rounded.put(0, round_stochastically(value, random_bits(stream, static_cast<uint32_t>(i), 0)));
        } else {
          rounded.put(0, c.param_type, value);
        }
        if (std::memcmp(&rounded.word[0], param.at + i * bytes_of(c.param_type), bytes_of(c.param_type)) != 0)
          return false;
        if (c.has_master && get(master.at, Dtype::float32, i) != value) return false;
      }
      for (int64_t i = begin; i < end; ++i) {
        const float first = m[i - begin], second = v[i - begin];
        if (!c.is_8bit) {
          if (get(exp_avg.at, Dtype::float32, i) != first || get(exp_avg_sq.at, Dtype::float32, i) != second)
            return false;
          continue;
        }
        const float scaled = first * inverse_scale(float_of_bits(largest));
        const float scaled_sq = second * inverse_scale(float_of_bits(largest_sq));
        if (static_cast<uint8_t>(exp_avg.at[i]) != signed_index(kFirst.last, scaled)) return false;
        if (static_cast<uint8_t>(exp_avg_sq.at[i]) != unsigned_index(kSecond.last, scaled_sq)) return false;
      }
      if (c.is_8bit && (get(absmax.at, Dtype::float32, block) != float_of_bits(largest) ||
                        get(absmax_sq.at, Dtype::float32, block) != float_of_bits(largest_sq)))
        return false;
    }
    return std::memcmp(grad.at, grad.kept.data(), grad.kept.size()) == 0;
  }
};

// As adamw_kernel in csrc/cuda/adamw.cu goes through its tiles.
void launch(const std::vector<AdamWRow>& rows, int64_t programs) {
  for (int tile = 0; tile < kTiles; ++tile) {
    const auto place = [&](int64_t program) {
      const AdamWRow& row = rows[row_of_program(rows.data(), static_cast<int64_t>(rows.size()), program)];
      return std::pair<const AdamWRow&, int64_t>(row,
                                                 (program - row.first_program) * kProgramValues + tile * kTileValues);
    };
    using Block = std::vector<AdamWThread>;
    emulate<AdamWThread>(
        programs, kThreads,
        [&](int64_t program, int thread, Block& block) {
          const auto [row, first] = place(program);
          if (first < row.size) update_tile(row, kConstants, kFirst.code, kSecond.code, first, thread, block[thread]);
        },
        [&](int64_t, int thread, Block& block) {  // the shuffles: the first of the sharers gathers for all
          if (thread % kScaleThreads != 0) return;
          uint32_t largest = 0, largest_sq = 0;
          for (int t = thread; t < thread + kScaleThreads; ++t) {
            largest = std::max(largest, block[t].largest);
            largest_sq = std::max(largest_sq, block[t].largest_sq);
          }
          for (int t = thread; t < thread + kScaleThreads; ++t) {
            block[t].largest = largest;
            block[t].largest_sq = largest_sq;
          }
        },
        [&](int64_t program, int thread, Block& block) {
          const auto [row, first] = place(program);
          if (first < row.size) store_moments(row, kFirst.last, kSecond.last, first, thread, block[thread]);
        });
  }
}

// Of a projection of 1000 x 1024 values in bfloat16. A program reads its row of the table and, for 8 bits, the maps.
void traffic_of_launches() {
  std::mt19937 random(1);
  const int64_t size = 1000 * 1024, programs = programs_of(size);
  for (const bool is_8bit : {false, true})
    for (const bool has_master : {false, true}) {
      const Case c{size, Dtype::bfloat16, Dtype::bfloat16, is_8bit, has_master, !has_master, 0};
      Tensor tensor(c, random);
      launch({tensor.row(0, 0)}, programs);
      const int64_t shared = sizeof(AdamWRow) + (is_8bit ? sizeof kFirst + sizeof kSecond : 0);
      const int64_t values = 2 + 2 + (has_master ? 8 : 2), moments = is_8bit ? 4 : 16;
      std::printf("adamw %s, %s: %ld bytes, floor %ld\n", is_8bit ? "8 bits" : "32 bits",
                  has_master ? "masters" : "stochastic", long(traffic.loaded + traffic.stored + programs * shared),
                  long(size * (values + moments) + tensor.blocks * 16));
      traffic = {};
    }
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 2 && std::strcmp(arguments[1], "traffic") == 0) {
    traffic_of_launches();
    return 0;
  }
  std::mt19937 random(1);
  std::vector<Case> cases;
  const int64_t sizes[] = {1, 7, 8, 15, 17, 255, 256, 257, 4095, 4096, 4097, 16383, 16385, 40001};
  const Dtype types[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};
  for (const int64_t size : sizes)
    for (const bool is_8bit : {true, false})
      for (const Dtype type : types)
        for (const size_t offset : {0, 4}) {
          const Dtype grad = types[cases.size() % 3];
          const int rounding = static_cast<int>(cases.size() / 2 % 3);
          cases.push_back({size, type, grad, is_8bit, type != Dtype::float32 && rounding == 1,
                           type == Dtype::bfloat16 && rounding == 2, offset});
        }
  std::vector<Tensor> tensors;
  for (const Case& c : cases) tensors.emplace_back(c, random);
  std::vector<AdamWRow> rows;
  int64_t programs = 0;
  for (Tensor& tensor : tensors) {
    rows.push_back(tensor.row(programs, rows.size()));
    programs += programs_of(tensor.c.size);
  }
  launch(rows, programs);
  int wrong = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].is_as_expected(i)) continue;
    const Case& c = tensors[i].c;
    std::printf("wrong: %ld values, types %d and %d, 8 bits %d, master %d, stochastic %d, offset %zu\n", long(c.size),
                int(c.param_type), int(c.grad_type), c.is_8bit, c.has_master, c.is_stochastic, c.offset);
    ++wrong;
  }
  std::printf("%zu tensors in %ld programs, %d wrong\n", tensors.size(), long(programs), wrong);
  return wrong == 0 ? 0 : 1;
}
