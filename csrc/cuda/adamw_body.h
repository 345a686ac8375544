// What one thread of the AdamW kernel does, in phases between which threads exchange values. The kernel and the tests'
// emulation of it on the host run these same functions. The definition is fastpt/ops/adamw.py and adamw_8bit.py.
#pragma once

#include "common/dynamic_map.h"
#include "cuda/words.h"

namespace fastpt::cuda {

constexpr int kGroups = kThreadValues / kGroup;
constexpr int kScaleThreads = kStateBlock / kThreadValues;  // neighbours whose 8-bit moments share a scale

// The last row that begins at this program or before.
FASTPT_FORMULA int64_t row_of_program(const AdamWRow* rows, int64_t row_count, int64_t program) {
  int64_t low = 0, high = row_count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (rows[middle].first_program <= program ? low : high) = middle;
  }
  return low;
}

// What a thread holds between the phases.
struct AdamWThread {
  float exp_avg[kThreadValues];
  float exp_avg_sq[kThreadValues];
  uint32_t largest;  // of the magnitudes of its moments, as bits; then of all that share the scale
  uint32_t largest_sq;
};

struct Place {
  int64_t first;  // of the row's values
  int count;      // that are there, at most kGroup
  bool is_wide;
};

// Group `g` of a thread. Beside 8-bit moments its groups are neighbours, so that one access moves all its codes; else a
// warp's groups are, so that its accesses are.
FASTPT_FORMULA Place place_of(const AdamWRow& row, int64_t tile_first, int thread, int g) {
  const bool is_8bit = row.exp_avg_absmax != nullptr;
  const int warp = thread / 32, lane = thread % 32;
  const int offset = is_8bit ? thread * kThreadValues + g * kGroup : ((warp * kGroups + g) * 32 + lane) * kGroup;
  const int64_t first = tile_first + offset, left = row.size - first;
  const int count = left >= kGroup ? kGroup : left > 0 ? static_cast<int>(left) : 0;
  return {first, count, row.is_aligned != 0 && count == kGroup};
}

// A thread's codes of a moment, four in a word as they lie in memory: unpacked at their use, not where they are loaded.
struct Codes {
  Words4 words;

  FASTPT_FORMULA uint8_t at(int i) const { return static_cast<uint8_t>(words.at[i / 4] >> (i % 4 * 8)); }
  FASTPT_FORMULA void put(int i, int32_t code) {  // once for each i
    words.at[i / 4] |= static_cast<uint32_t>(code) << (i % 4 * 8);
  }
};

// Of both its groups, of which `count` are there.
FASTPT_FORMULA Codes load_codes(const void* base, int64_t first, int count, bool is_wide) {
  const uint8_t* from = static_cast<const uint8_t*>(base) + first;
  if (is_wide) return {load_16_bytes(from)};
  Codes codes{};
  FASTPT_UNROLL
  for (int i = 0; i < kThreadValues; ++i) {
    if (i >= count) continue;
    count_loaded(1);
    codes.put(i, from[i]);
  }
  return codes;
}

FASTPT_FORMULA void store_codes(void* base, int64_t first, int count, bool is_wide, const Codes& codes) {
  uint8_t* to = static_cast<uint8_t*>(base) + first;
  if (is_wide) {
    store_16_bytes(to, codes.words);
    return;
  }
  FASTPT_UNROLL
  for (int i = 0; i < kThreadValues; ++i) {
    if (i >= count) continue;
    count_stored(1);
    to[i] = codes.at(i);
  }
}

FASTPT_FORMULA void store_param(const AdamWRow& row, const Place& place, const float* values) {
  Group group{};
  FASTPT_UNROLL
  for (int i = 0; i < kGroup; ++i) {
    if (row.is_stochastic != 0) {
      const uint64_t index = static_cast<uint64_t>(place.first) + static_cast<uint64_t>(i);
      const uint32_t random = random_bits(row.stream, static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32));
      group.put(i, round_stochastically(values[i], random));
    } else {
      group.put(i, row.param_type, values[i]);
    }
  }
  store_group(row.param, row.param_type, place.first, place.count, place.is_wide, group);
}

// New values of a group from its old ones and the moments in `exp_avg`, `exp_avg_sq`, which become the new ones.
FASTPT_FORMULA void update_group(const AdamWRow& row, const AdamW& c, const Place& place, const Group& old,
                                 const Group& grad, float* exp_avg, float* exp_avg_sq) {
  const bool has_master = row.master != nullptr;
  float values[kGroup];
  FASTPT_UNROLL
  for (int i = 0; i < kGroup; ++i) {
    const float value = old.value(i, has_master ? Dtype::float32 : row.param_type);
    values[i] = adamw_value(c, value, grad.value(i, row.grad_type), exp_avg[i], exp_avg_sq[i]);
  }
  if (has_master) {
    Group group{};
    FASTPT_UNROLL
    for (int i = 0; i < kGroup; ++i) group.put(i, Dtype::float32, values[i]);
    store_group(row.master, Dtype::float32, place.first, place.count, place.is_wide, group);
  }
  store_param(row, place, values);
}

// Phase 1: a thread's values are read and updated, its moments left in registers. All loads come before the first use.
FASTPT_FORMULA void update_tile(const AdamWRow& row, const AdamW& shared, const float* first_code,
                                const float* second_code, int64_t tile_first, int thread, AdamWThread& own) {
  AdamW c = shared;
  c.step_size = row.step_size;
  c.inverse_correction = row.inverse_correction;
  const void* base = row.master != nullptr ? row.master : row.param;
  const Dtype type = row.master != nullptr ? Dtype::float32 : row.param_type;
  Place places[kGroups];
  Group olds[kGroups], grads[kGroups];
  FASTPT_UNROLL
  for (int g = 0; g < kGroups; ++g) {
    places[g] = place_of(row, tile_first, thread, g);
    grads[g] = load_group(row.grad, row.grad_type, places[g].first, places[g].count, places[g].is_wide);
    olds[g] = load_group(base, type, places[g].first, places[g].count, places[g].is_wide);
  }
  own.largest = own.largest_sq = 0;
  const int count = places[0].count + places[1].count;
  if (row.exp_avg_absmax != nullptr) {
    const bool is_wide = places[1].is_wide;
    const Codes codes = load_codes(row.exp_avg, places[0].first, count, is_wide);
    const Codes codes_sq = load_codes(row.exp_avg_sq, places[0].first, count, is_wide);
    const int64_t block = places[0].first / kStateBlock;
    if (count > 0) count_loaded(8);
    const float scale = count > 0 ? row.exp_avg_absmax[block] : 0.0f;
    const float scale_sq = count > 0 ? row.exp_avg_sq_absmax[block] : 0.0f;
    FASTPT_UNROLL
    for (int i = 0; i < kThreadValues; ++i) {
      own.exp_avg[i] = first_code[codes.at(i)] * scale;
      own.exp_avg_sq[i] = second_code[codes_sq.at(i)] * scale_sq;
    }
  } else {
    FASTPT_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      const Place& at = places[g];
      const Group m = load_group(row.exp_avg, Dtype::float32, at.first, at.count, at.is_wide);
      const Group v = load_group(row.exp_avg_sq, Dtype::float32, at.first, at.count, at.is_wide);
      FASTPT_UNROLL
      for (int i = 0; i < kGroup; ++i) {
        own.exp_avg[g * kGroup + i] = m.value(i, Dtype::float32);
        own.exp_avg_sq[g * kGroup + i] = v.value(i, Dtype::float32);
      }
    }
  }
  FASTPT_UNROLL
  for (int g = 0; g < kGroups; ++g)
    update_group(row, c, places[g], olds[g], grads[g], own.exp_avg + g * kGroup, own.exp_avg_sq + g * kGroup);
  FASTPT_UNROLL
  for (int i = 0; i < kThreadValues; ++i) {
    if (i >= count) continue;
    const uint32_t bits = magnitude_bits(own.exp_avg[i]), bits_sq = magnitude_bits(own.exp_avg_sq[i]);
    own.largest = bits > own.largest ? bits : own.largest;
    own.largest_sq = bits_sq > own.largest_sq ? bits_sq : own.largest_sq;
  }
}

// Phase 2: the moments are stored; those of 8 bits by the largest magnitudes of all threads that share the scale.
FASTPT_FORMULA void store_moments(const AdamWRow& row, const float* first_last, const float* second_last,
                                  int64_t tile_first, int thread, const AdamWThread& own) {
  if (row.exp_avg_absmax == nullptr) {
    FASTPT_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      const Place at = place_of(row, tile_first, thread, g);
      Group m{}, v{};
      FASTPT_UNROLL
      for (int i = 0; i < kGroup; ++i) {
        m.put(i, Dtype::float32, own.exp_avg[g * kGroup + i]);
        v.put(i, Dtype::float32, own.exp_avg_sq[g * kGroup + i]);
      }
      store_group(row.exp_avg, Dtype::float32, at.first, at.count, at.is_wide, m);
      store_group(row.exp_avg_sq, Dtype::float32, at.first, at.count, at.is_wide, v);
    }
    return;
  }
  const Place low = place_of(row, tile_first, thread, 0), high = place_of(row, tile_first, thread, 1);
  const int count = low.count + high.count;
  if (count == 0) return;
  const float absmax = float_of_bits(own.largest), absmax_sq = float_of_bits(own.largest_sq);
  const float inverse = inverse_scale(absmax), inverse_sq = inverse_scale(absmax_sq);
  Codes codes{}, codes_sq{};
  FASTPT_UNROLL
  for (int i = 0; i < kThreadValues; ++i) {
    codes.put(i, signed_index(first_last, own.exp_avg[i] * inverse));
    codes_sq.put(i, unsigned_index(second_last, own.exp_avg_sq[i] * inverse_sq));
  }
  store_codes(row.exp_avg, low.first, count, high.is_wide, codes);
  store_codes(row.exp_avg_sq, low.first, count, high.is_wide, codes_sq);
  if (thread % kScaleThreads == 0) {
    count_stored(8);
    row.exp_avg_absmax[low.first / kStateBlock] = absmax;
    row.exp_avg_sq_absmax[low.first / kStateBlock] = absmax_sq;
  }
}

}  // namespace fastpt::cuda
