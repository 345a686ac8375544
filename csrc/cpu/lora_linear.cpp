// lora_linear forward on the CPU: the low-rank hidden of every projection first, then one task a tile of rows and a few
// panels of columns, whose sum starts with the low-rank term. The definition is fastpt/ops/lora_linear.py.
#include "cpu/lora_linear.h"

#include <tuple>
#include <ATen/ops/constant_pad_nd.h>
#include <torch/library.h>

#include "cpu/dispatch.h"
#include "cpu/row_blocks.h"
#define FASTPT_KERNELS "cpu/lora_linear_kernels.h"
#include "cpu/for_each_isa.h"

namespace fastpt {

std::vector<Projection> read_projections(const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases,
                                         const OptionalTensors& lora_a, const OptionalTensors& lora_b,
                                         at::ArrayRef<double> scales, at::ArrayRef<int64_t> seeds,
                                         const Nf4Lists* nf4) {
  const size_t n = weights.size();
  TORCH_CHECK(n > 0 && biases.size() == n && lora_a.size() == n && lora_b.size() == n && scales.size() == n,
              "lora_linear: ", n, " weights, ", biases.size(), " biases, ", lora_a.size(), " and ", lora_b.size(),
              " adapters, ", scales.size(), " scales; give one each");
  std::vector<Projection> found;
  for (size_t i = 0; i < n; ++i) {
    const at::Tensor& weight = weights[i];
    const std::optional<at::Tensor> absmax = nf4 ? nf4->absmax.get(i) : std::nullopt;
    TORCH_CHECK(weight.dim() == 2 && weight.size(1) * (absmax ? 2 : 1) == x.size(-1) &&
                    (absmax || weight.scalar_type() == x.scalar_type() || weight.scalar_type() == at::kFloat),
                "lora_linear: weight ", i, " is ", weight.sizes(), " ", weight.scalar_type(), ", x is ", x.sizes(), " ",
                x.scalar_type(), "; it must be [O, D] of x's dtype or float");
    Projection p{absmax ? weight.contiguous() : dense(weight),
                 {},
                 {},
                 {},
                 {},
                 static_cast<float>(scales[i]),
                 seeds.empty() ? 0 : seeds[i]};
    if (absmax) p.nf4.emplace(p.weight, *absmax, nf4->nested.get(i), 2 * weight.numel());
    if (const std::optional<at::Tensor> bias = biases[i]; bias) p.bias = bias->to(at::kFloat).contiguous();
    const std::optional<at::Tensor> a = lora_a[i], b = lora_b[i];
    if (a && b) {
      TORCH_CHECK(a->dim() == 2 && b->dim() == 2 && a->size(1) == p.in() && b->size(0) == weight.size(0) &&
                      a->size(0) == b->size(1) && a->scalar_type() == b->scalar_type(),
                  "lora_linear: adapter ", i, " is ", a->sizes(), " and ", b->sizes(), " for a weight ", weight.sizes(),
                  "; it must be [R, D] and [O, R]");
      const auto low = c10::promoteTypes(x.scalar_type(), a->scalar_type());
      p.a = a->to(low).contiguous(), p.b = b->to(low).contiguous();
    }
    found.push_back(std::move(p));
  }
  return found;
}

at::Tensor dropped(const at::Tensor& x, const Dropout& dropout, int64_t seed) {
  auto out = at::empty(x.sizes(), x.options());
  by_dtype(x, [&]<typename T>() {
    const T* in = x.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    const int64_t columns = x.size(1);
    at::parallel_for(0, x.size(0), row_grain(columns), [&](int64_t lo, int64_t hi) {
      FASTPT_BY_ISA(drop_rows<T>)
      (lo, hi - lo, columns, seed, dropout.rule, in + lo * columns, to + lo * columns);
    });
  });
  return out;
}

at::Tensor row_parts(const at::Tensor& a, int64_t parts) {
  if (parts == 1) return a;
  auto split = at::empty({parts * a.size(0), a.size(1)}, a.options().dtype(at::kBFloat16));
  FASTPT_BY_ISA(split_numbers)(a.numel(), a.const_data_ptr<float>(), a.numel(),
                               split.mutable_data_ptr<c10::BFloat16>());
  return split;
}

at::Tensor column_parts(const at::Tensor& b, int64_t parts) {
  if (parts == 1) return b;
  const int64_t R = b.size(1);
  auto split = at::empty({b.size(0), parts * R}, b.options().dtype(at::kBFloat16));
  c10::BFloat16* to = split.mutable_data_ptr<c10::BFloat16>();
  for (int64_t o = 0; o < b.size(0); ++o)
    FASTPT_BY_ISA(split_numbers)(R, b.const_data_ptr<float>() + o * R, R, to + o * parts * R);
  return split;
}

namespace {

constexpr int64_t kPanelsOfTask = 4;  // at 128 rows a task of 4 panels takes some 100 microseconds

// What a projection needs besides itself: packed operands, and the low-rank hidden rounded for the second product.
template <typename T>
struct Operands {
  Packed<T> weight, a_parts, b;
  at::Tensor x_low, xa_low;  // x as its adapter sees it; round(scale * xa), [T, even(R)]
  int64_t parts = 1;
};

template <typename T>
class Forward {
 public:
  Forward(const at::Tensor& x, const std::vector<Projection>& projections, Dropout dropout, std::vector<at::Tensor>& ys,
          std::vector<at::Tensor>& xas)
      : x_(x), projections_(projections), dropout_(dropout), ys_(ys), xas_(xas), operands_(projections.size()) {}

  void operator()() {
    pack();
    low_rank();
    base();
  }

 private:
  void pack() {
    Jobs jobs;
    for (size_t i = 0; i < projections_.size(); ++i) {
      const Projection& p = projections_[i];
      Operands<T>& o = operands_[i];
      o.weight = p.nf4 ? Packed<T>(width(), p.out()) : Packed<T>(width(), p.out(), x_.options());
      if (!p.nf4) o.weight.add(jobs, p.weight.t());
      if (p.rank() == 0) continue;
      o.parts = parts_of<T>(p.a);
      o.x_low = dropout_.drops ? dropped(x_, dropout_, p.seed) : x_;
      o.xa_low = empty_padded<T>(x_.size(0), p.rank(), even(p.rank()), x_.options());
      o.a_parts = Packed<T>(width(), o.parts * p.rank(), x_.options());
      o.a_parts.add_transposed(jobs, row_parts(p.a, o.parts));
      o.b = Packed<T>(p.rank(), p.out(), x_.options());
      o.b.add_transposed(jobs, p.b);
    }
    run(jobs);
  }

  // xa = x · aᵀ for each row tile.
  void low_rank() {
    std::vector<size_t> adapted;
    int64_t columns = 0;  // of a tile and its sums
    for (size_t i = 0; i < projections_.size(); ++i) {
      if (projections_[i].rank() == 0) continue;
      adapted.push_back(i);
      columns = std::max(columns, (operands_[i].parts + 1) * projections_[i].rank());
    }
    const Scratch<float> scratch(kRows * columns, x_.options().dtype(at::kFloat));
    const int64_t tiles = row_tiles(x_.size(0)), n = adapted.size();
    for_each_task(tiles * n, [&](int64_t worker, int64_t task) {
      low_rank_tile(adapted[task % n], task / n * kRows, scratch.of(worker));
    });
  }

  void low_rank_tile(size_t i, int64_t r0, float* tile) {
    const int64_t rows = std::min(kRows, x_.size(0) - r0), R = projections_[i].rank();
    const Operands<T>& o = operands_[i];
    const int64_t ldc = o.parts * R;
    for (int64_t p = 0; p < o.a_parts.panels(); ++p)
      multiply<T>(rows, o.a_parts.width(p), width(), x_.stride(0), data(o.x_low, r0), o.a_parts.panel(p), false, ldc,
                  tile + p * kPanel);
    float* sums = tile + kRows * ldc;
    FASTPT_BY_ISA(join_parts)(rows, R, o.parts, ldc, tile, dropout_.factor, R, sums);
    const float scale = projections_[i].scale;
    FASTPT_BY_ISA(convert_rows<float, T>)(rows, R, R, sums, scale, o.xa_low.stride(0), data(o.xa_low, r0));
    by_dtype(xas_[i], [&]<typename Low>() {
      FASTPT_BY_ISA(convert_rows<float, Low>)
      (rows, R, R, sums, 1.0f, R, xas_[i].template mutable_data_ptr<Low>() + r0 * R);
    });
  }

  // y = xa_low · bᵀ + x · weightᵀ + bias, tile by tile.
  void base() {
    std::vector<std::pair<size_t, int64_t>> panels;  // of all projections
    for (size_t i = 0; i < projections_.size(); ++i)
      for (int64_t p = 0; p < operands_[i].weight.panels(); ++p) panels.emplace_back(i, p);
    const bool unpacks = any_nf4(projections_);
    const int64_t tiles = row_tiles(x_.size(0)), panels_of_task = unpacks ? 1 : kPanelsOfTask;
    const int64_t tiles_of_task = unpacks ? tiles_of_unpacked(panels.size(), tiles) : 1;
    const int64_t groups = (panels.size() + panels_of_task - 1) / panels_of_task;
    const Scratch<float> scratch(kRows * kPanel, x_.options().dtype(at::kFloat));
    const Scratch<T> unpacked(unpacks ? even(width()) * kPanel : 0, x_.options());
    for_each_task((tiles + tiles_of_task - 1) / tiles_of_task * groups, [&](int64_t worker, int64_t task) {
      const int64_t first = task % groups * panels_of_task, tile = task / groups * tiles_of_task;
      for (size_t at = first; at < std::min<size_t>(panels.size(), first + panels_of_task); ++at) {
        const auto [i, p] = panels[at];
        const T* panel = weight_panel(i, p, unpacked.of(worker));
        for (int64_t t = tile; t < std::min(tiles, tile + tiles_of_task); ++t)
          base_tile(i, p, panel, t * kRows, scratch.of(worker));
      }
    });
  }

  const T* weight_panel(size_t i, int64_t p, T* unpacked) const {
    if (!projections_[i].nf4) return operands_[i].weight.panel(p);
    unpack_transposed(projections_[i], p, unpacked);
    return unpacked;
  }

  void base_tile(size_t i, int64_t p, const T* panel, int64_t r0, float* tile) {
    const Operands<T>& o = operands_[i];
    const int64_t rows = std::min(kRows, x_.size(0) - r0), columns = o.weight.width(p);
    const bool has_low = projections_[i].rank() > 0;
    if (has_low)
      multiply<T>(rows, columns, o.b.depth(), o.xa_low.stride(0), data(o.xa_low, r0), o.b.panel(p), false, kPanel,
                  tile);
    multiply<T>(rows, columns, width(), x_.stride(0), data(x_, r0), panel, has_low, kPanel, tile);
    const at::Tensor& bias = projections_[i].bias;
    const int64_t ldy = projections_[i].out();
    FASTPT_BY_ISA(store_tile<T>)
    (rows, columns, kPanel, tile, bias.defined() ? bias.const_data_ptr<float>() + p * kPanel : nullptr, ldy,
     ys_[i].mutable_data_ptr<T>() + r0 * ldy + p * kPanel);
  }

  int64_t width() const { return projections_[0].in(); }
  static T* data(const at::Tensor& t, int64_t row) { return t.mutable_data_ptr<T>() + row * t.stride(0); }

  const at::Tensor& x_;  // [T, even(D) for bfloat16]
  const std::vector<Projection>& projections_;
  Dropout dropout_;
  std::vector<at::Tensor>&ys_, &xas_;
  std::vector<Operands<T>> operands_;
};

}  // namespace

LinearOutputs linear_forward(const at::Tensor& x, const std::vector<Projection>& projections, double dropout_p) {
  const auto rows = gemm_rows(x);
  std::vector<at::Tensor> ys, xas;
  for (const Projection& p : projections) {
    auto sizes = x.sizes().vec();
    sizes.back() = p.out();
    ys.push_back(at::empty(sizes, x.options()));
    xas.push_back(at::empty({rows.size(0), p.rank()}, x.options().dtype(p.rank() ? p.a.scalar_type() : at::kFloat)));
  }
  project(rows, projections, Dropout{dropout_p}, ys, xas);
  return {ys, xas};
}

namespace {

LinearOutputs lora_linear(const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases,
                          const OptionalTensors& lora_a, const OptionalTensors& lora_b, at::ArrayRef<double> scales,
                          double dropout_p, at::IntArrayRef seeds) {
  static const auto reference = reference_of<decltype(lora_linear)>("fastpt::lora_linear");
  if (!is_native(x)) return reference(x, weights, biases, lora_a, lora_b, scales, dropout_p, seeds);
  return linear_forward(x, read_projections(x, weights, biases, lora_a, lora_b, scales, seeds), dropout_p);
}

}  // namespace

void project(const at::Tensor& x, const std::vector<Projection>& projections, const Dropout& dropout,
             std::vector<at::Tensor>& ys, std::vector<at::Tensor>& xas) {
  if (x.size(0) > 0) by_dtype(x, [&]<typename T>() { Forward<T>(x, projections, dropout, ys, xas)(); });
}

at::Tensor gemm_rows(const at::Tensor& x) {
  const auto rows = x.reshape({-1, x.size(-1)}).contiguous();
  const bool is_odd = x.scalar_type() == at::kBFloat16 && x.size(-1) % 2 != 0;
  return is_odd ? at::constant_pad_nd(rows, {0, 1}) : rows;
}

}  // namespace fastpt

TORCH_LIBRARY_IMPL(fastpt, CPU, m) {
  m.impl("lora_linear", &fastpt::lora_linear);
}
