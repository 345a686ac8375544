// Operands of lora_linear packed into the panels that gemm_tile reads: of tensors, and of 4-bit weights part by part.
#include "cpu/lora_linear.h"

#define FASTPT_KERNELS "cpu/lora_linear_kernels.h"
#include "cpu/for_each_isa.h"

namespace fastpt {
namespace {

// Transposes a piece of a second operand into its place in a panel.
template <typename T>
void transpose_into(int64_t rows, int64_t depth, int64_t ld, const T* from, T* to) {
  if constexpr (std::is_same_v<T, float>)
    transpose(rows, depth, ld, kPanel, from, to);
  else
    pack_vnni_transposed(depth, rows, ld, kPanel, from, to);
}

// Copies `valid` rows of a second operand into a panel, and zeros up to `depth` rows.
template <typename T>
void copy_into(int64_t valid, int64_t depth, int64_t columns, int64_t ld, const T* from, T* to) {
  if constexpr (std::is_same_v<T, float>)
    for (int64_t r = 0; r < valid; ++r) std::copy_n(from + r * ld, columns, to + r * kPanel);
  else
    pack_vnni(valid, columns, ld, kPanel, from, to);
  const int64_t written = std::is_same_v<T, float> ? valid : even(valid);
  std::fill(to + written * kPanel, to + depth * kPanel, T(0.0f));
}

constexpr int64_t kStripDepth = 512;
// Of the place of a column in a panel: a column of bfloat16 is pairs of one word.
template <typename T>
constexpr int64_t kColumnStep = std::is_same_v<T, float> ? 1 : 2;

}  // namespace

// Rows [first, first + kPanel) of all panels.
template <typename T>
template <typename S>
void Packed<T>::fill_rows(int64_t first, const S* source, int64_t rows, int64_t ld) {
  constexpr int64_t kStrip = 8;  // even, so that pairs of bfloat16 stay together
  std::vector<T> strip(std::is_same_v<S, T> ? 0 : kStrip * columns_);
  for (int64_t k = first; k < std::min(even(depth_), first + kPanel); k += kStrip) {
    const int64_t depth = std::min(kStrip, even(depth_) - k), valid = std::clamp<int64_t>(rows - k, 0, depth);
    const T* from;
    int64_t ld_from = ld;
    if constexpr (std::is_same_v<S, T>) {
      from = source + k * ld;
    } else {
      FASTPT_BY_ISA(convert_rows<S, T>)(valid, columns_, ld, source + k * ld, 1.0f, columns_, strip.data());
      from = strip.data(), ld_from = columns_;
    }
    for (int64_t p = 0; p < panels(); ++p, from += kPanel) {
      copy_into<T>(valid, depth, width(p), ld_from, from, panel_0_ + (p * even(depth_) + k) * kPanel);
    }
  }
}

// Panel p, from kPanel rows of the source.
template <typename T>
template <typename S>
void Packed<T>::fill_transposed(int64_t p, const S* source, int64_t ld) {
  constexpr int64_t kStrip = 16;
  T* panel = panel_0_ + p * even(depth_) * kPanel;
  source += p * kPanel * ld;
  if constexpr (std::is_same_v<S, T>) {
    transpose_into<T>(width(p), depth_, ld, source, panel);
  } else {
    T strip[kStrip * kStripDepth];
    for (int64_t r = 0; r < width(p); r += kStrip) {
      const int64_t rows = std::min(kStrip, width(p) - r);
      for (int64_t k = 0; k < depth_; k += kStripDepth) {
        const int64_t depth = std::min(kStripDepth, depth_ - k);
        FASTPT_BY_ISA(convert_rows<S, T>)(rows, depth, ld, source + r * ld + k, 1.0f, kStripDepth, strip);
        transpose_into<T>(rows, depth, kStripDepth, strip, panel + k * kPanel + r * kColumnStep<T>);
      }
    }
  }
}

#define FASTPT_FILL(T, S)                                                     \
  template void Packed<T>::fill_rows<S>(int64_t, const S*, int64_t, int64_t); \
  template void Packed<T>::fill_transposed<S>(int64_t, const S*, int64_t);
FASTPT_FILL(float, float)
FASTPT_FILL(c10::BFloat16, float)
FASTPT_FILL(c10::BFloat16, c10::BFloat16)
#undef FASTPT_FILL

template <typename T>
void unpack_transposed(const Projection& projection, int64_t p, T* panel) {
  constexpr int64_t kStrip = 16;
  T strip[kStrip * kStripDepth];
  const int64_t D = projection.in(), first = p * kPanel, columns = std::min(kPanel, projection.out() - first);
  for (int64_t r = 0; r < columns; r += kStrip) {
    const int64_t rows = std::min(kStrip, columns - r);
    for (int64_t k = 0; k < D; k += kStripDepth) {
      const int64_t depth = std::min(kStripDepth, D - k);
      for (int64_t i = 0; i < rows; ++i)
        projection.nf4->unpack<T>((first + r + i) * D + k, depth, strip + i * kStripDepth);
      transpose_into<T>(rows, depth, kStripDepth, strip, panel + k * kPanel + r * kColumnStep<T>);
    }
  }
}

template <typename T>
void unpack_columns(const Projection& projection, int64_t p, T* panel) {
  constexpr int64_t kStrip = 32;
  T strip[kStrip * kPanel];
  const int64_t D = projection.in(), O = projection.out(), first = p * kPanel, columns = std::min(kPanel, D - first);
  for (int64_t k = 0; k < O; k += kStrip) {
    const int64_t rows = std::min(kStrip, O - k);
    for (int64_t i = 0; i < rows; ++i) projection.nf4->unpack<T>((k + i) * D + first, columns, strip + i * kPanel);
    copy_into<T>(rows, even(rows), columns, kPanel, strip, panel + k * kPanel);
  }
}

#define FASTPT_UNPACK(T)                                              \
  template void unpack_transposed<T>(const Projection&, int64_t, T*); \
  template void unpack_columns<T>(const Projection&, int64_t, T*);
FASTPT_UNPACK(float)
FASTPT_UNPACK(c10::BFloat16)
#undef FASTPT_UNPACK

}  // namespace fastpt
