// Dynamic 8-bit numbers (Dettmers et al. 2022, https://arxiv.org/abs/2110.02861), as bitsandbytes stores optimizer
// states: seven decades of 1, 2, 4, ... 64 evenly spaced values (unsigned: twice as many), zero and one, in units of
// the block's largest magnitude. The definition is fastpt/ops/adamw_8bit.py; no search: the index follows from a
// formula and one comparison.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

#include "common/formula.h"

namespace fastpt {

constexpr int kStateBlock = 256;  // values that share one scale

struct DynamicMap {
  float code[256];  // the value of each index, ascending
  // Signed: [128 + r] the largest value nearest to the r-th positive code (0: zero), [127 - r] the largest magnitude
  // nearest to the r-th negative one. Unsigned: [k] the largest value nearest to code k.
  float last[256];
};

// The largest float for which `stays` holds, which holds for `low` and no longer for `high`.
template <typename Stays>
constexpr float last_that_stays(float low, float high, const Stays& stays) {
  uint32_t yes = std::bit_cast<uint32_t>(low), no = std::bit_cast<uint32_t>(high);
  while (yes + 1 < no) {
    const uint32_t middle = yes + (no - yes) / 2;
    (stays(std::bit_cast<float>(middle)) ? yes : no) = middle;
  }
  return std::bit_cast<float>(yes);
}

// Rounded where torch.linspace and bitsandbytes round, so that the codes are theirs to the bit.
constexpr DynamicMap dynamic_map(bool is_signed) {
  constexpr float kDecades[] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
  float positive[256] = {};
  int n = 1;
  for (int decade = 0; decade < 7; ++decade) {
    const int count = (is_signed ? 1 : 2) << decade;
    const float step = (1.0f - 0.1f) / static_cast<float>(count);
    const auto edge = [&](int i) {
      return i < (count + 1) / 2 ? static_cast<float>(static_cast<double>(0.1f) + static_cast<double>(step) * i)
                                 : static_cast<float>(1.0 - static_cast<double>(step) * (count - i));
    };
    for (int i = 0; i < count; ++i) positive[n++] = kDecades[decade] * ((edge(i) + edge(i + 1)) / 2.0f);
  }
  positive[n++] = 1.0f;
  DynamicMap map{};
  const auto tie_goes_down = [](float low, float high) {
    return last_that_stays(low, high, [=](float x) { return !(high - x < x - low); });
  };
  const auto tie_goes_up = [](float low, float high) {
    return last_that_stays(low, high, [=](float x) { return x - low < high - x; });
  };
  if (is_signed) {
    for (int r = 0; r < 128; ++r) {
      map.code[127 - r] = -positive[r];
      map.code[127 + r] = positive[r];
      map.last[127 - r] = r < 127 ? tie_goes_up(positive[r], positive[r + 1]) : std::numeric_limits<float>::infinity();
      map.last[128 + r] = tie_goes_down(positive[r], positive[r + 1]);
    }
    map.code[255] = 1.0f;
  } else {
    for (int k = 0; k < 256; ++k) {
      map.code[k] = positive[k];
      map.last[k] = k < 255 ? tie_goes_down(positive[k], positive[k + 1]) : std::numeric_limits<float>::infinity();
    }
    map.last[0] = -1.0f;  // a second moment is not rounded to zero: the step divides by its root
  }
  return map;
}

// 2^decade * (1 + place in the decade) of a magnitude up to 1: concave, so it is the least of seven lines.
FASTPT_FORMULA float dynamic_rank(float a) {
  float rank = a * (1e6f / 0.9f) + 0.8f / 0.9f;
  const auto at_most = [&](float line) { rank = line < rank ? line : rank; };
  at_most(a * (2e5f / 0.9f) + 1.6f / 0.9f);
  at_most(a * (4e4f / 0.9f) + 3.2f / 0.9f);
  at_most(a * (8e3f / 0.9f) + 6.4f / 0.9f);
  at_most(a * (1.6e3f / 0.9f) + 12.8f / 0.9f);
  at_most(a * (3.2e2f / 0.9f) + 25.6f / 0.9f);
  at_most(a * (6.4e1f / 0.9f) + 51.2f / 0.9f);
  return rank;
}

FASTPT_FORMULA float magnitude_up_to_one(float x) {
  const float a = __builtin_fabsf(x);
  return a < 1.0f ? a : 1.0f;  // a NaN too
}

// The index of the code nearest to x: a formula gives it or its neighbour, the place in `last` decides which.
struct SignedPlace {
  float magnitude;
  int32_t sign;  // of a negative -1: with it n ^ sign is -n - 1
  int32_t slot;  // in `last`

  FASTPT_FORMULA int32_t index(float last) const { return slot + (((magnitude > last ? 1 : 0) - 1) ^ sign); }
};

FASTPT_FORMULA SignedPlace signed_place(float x) {
  const float a = magnitude_up_to_one(x);
  int32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const int32_t sign = bits >> 31;
  return {a, sign, 128 + (static_cast<int32_t>(dynamic_rank(a) - 0.5f) ^ sign)};
}

struct UnsignedPlace {
  float magnitude;
  int32_t slot;

  FASTPT_FORMULA int32_t index(float last) const { return slot + (magnitude > last ? 1 : 0); }
};

FASTPT_FORMULA UnsignedPlace unsigned_place(float x) {
  const float a = magnitude_up_to_one(x);
  return {a, static_cast<int32_t>(dynamic_rank(a) * 2.0f - 1.5f)};
}

FASTPT_FORMULA int32_t signed_index(const float* last, float x) {
  const SignedPlace place = signed_place(x);
  return place.index(last[place.slot]);
}

FASTPT_FORMULA int32_t unsigned_index(const float* last, float x) {
  const UnsignedPlace place = unsigned_place(x);
  return place.index(last[place.slot]);
}

// The same index without a table of 256: pieces on which it is floor(slope * a + offset), at most `most`: zero, seven
// decades and one. Where the floor or the end of a piece is too close to say, `last` decides. An exponent has the end
// of at most one piece.
struct MapPieces {
  static constexpr int32_t kNear = 64;          // steps of a float around the end of a piece
  static constexpr float kTooClose = 0x1p-12f;  // to a whole number: ten times what rounding moves it
  float slope[16], offset[16], most[16];
  int32_t end[32];    // of the piece that ends in an exponent, modulo 32: its bits less kNear; else beyond all
  int32_t piece[32];  // the one that an exponent begins in
};

constexpr MapPieces map_pieces(bool is_signed) {
  constexpr double kEdges[] = {1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1};
  const DynamicMap map = dynamic_map(is_signed);
  const float* last = map.last + (is_signed ? 128 : 0);  // by the number of a positive code
  MapPieces pieces{};
  float ends[8] = {};
  int first = 1;  // code of the decade
  for (int decade = 0; decade < 7; ++decade) {
    const int count = (is_signed ? 1 : 2) << decade;
    const double slope = count / (kEdges[decade] * 9.0);
    pieces.slope[decade + 1] = static_cast<float>(slope);
    pieces.offset[decade + 1] = static_cast<float>(first - kEdges[decade] * slope);
    ends[decade] = last[first - 1];
    first += count;
    pieces.most[decade + 1] = static_cast<float>(first) - 0.5f;
  }
  ends[7] = last[first - 1];
  if (!is_signed) ends[0] = static_cast<float>(kEdges[0]);  // what is below it takes the first code too
  pieces.offset[0] = pieces.most[0] = is_signed ? 0.5f : 1.5f;
  pieces.offset[8] = pieces.most[8] = static_cast<float>(first) + 0.5f;
  for (int exponent = 96, piece = 0; exponent < 128; ++exponent) {
    pieces.piece[exponent % 32] = piece;
    pieces.end[exponent % 32] = 0x7f000000;
    const int32_t bits = piece < 8 ? std::bit_cast<int32_t>(ends[piece]) : 0;
    if (bits >> 23 != exponent) continue;
    pieces.end[exponent % 32] = bits - MapPieces::kNear;
    ++piece;
  }
  return pieces;
}

// Magnitudes as integers: their maximum does not depend on the order, and a NaN is the largest.
FASTPT_FORMULA uint32_t magnitude_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits & 0x7fffffffu;
}

FASTPT_FORMULA float inverse_scale(float absmax) {
  return absmax == 0.0f ? 0.0f : 1.0f / absmax;
}

}  // namespace fastpt
