// lora_linear backward on the CPU. dY · B is formed once, in float32, for both dA and dX; dX sums over all projections
// of the input before it is rounded; products over tokens (dA, dB, dW) take the transposed small factor as first
// operand.
#include <tuple>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "cpu/dispatch.h"
#include "cpu/lora_linear.h"
#include "cpu/row_blocks.h"
#define FASTPT_KERNELS "cpu/lora_linear_kernels.h"
#include "cpu/for_each_isa.h"

namespace fastpt {
namespace {

constexpr int64_t kTokens = 256;  // depth of one step of a product over tokens: its operands stay in L2

int64_t padded_tokens(int64_t n) {  // few different depths, as for the heights of tiles
  return (n + 31) / 32 * 32;
}

template <typename T>
struct Operands {
  at::Tensor grad;               // [T, even(O)]
  Packed<T> weight, b_parts, a;  // as second operands: of dX, of dY · B, of the low-rank part of dX
  at::Tensor dxa_low;            // round(dxa), [T, even(R)]
  at::Tensor dxa_t, xa_t;        // [parts * R, padded tokens]
  at::Tensor x_low, grad_t;      // x as the adapter sees it; [O, padded tokens]
  int64_t parts = 1;
};

template <typename T>
class Backward {
 public:
  Backward(const at::Tensor& x, const std::vector<Projection>& projections, at::TensorList grads,
           const std::vector<at::Tensor>& xas, Dropout dropout, bool wants_x, const std::vector<Wants>& wants,
           Gradients& out)
      : x_(x),
        projections_(projections),
        xas_(xas),
        dropout_(dropout),
        wants_x_(wants_x),
        wants_(wants),
        out_(out),
        operands_(projections.size()),
        tokens_(x.size(0)),
        padded_(padded_tokens(tokens_)) {
    for (size_t i = 0; i < grads.size(); ++i) operands_[i].grad = gemm_rows(grads[i]);
  }

  void operator()() {
    pack();
    low_rank();
    if (wants_x_) input();
    adapters();
    weights();
  }

 private:
  bool has_low(size_t i) const { return projections_[i].rank() > 0; }
  int64_t width() const { return projections_[0].in(); }
  int64_t low_rows(size_t i) const { return operands_[i].parts * projections_[i].rank(); }
  static T* data(const at::Tensor& t, int64_t row) { return t.mutable_data_ptr<T>() + row * t.stride(0); }

  void pack() {
    Jobs jobs;
    for (size_t i = 0; i < projections_.size(); ++i) {
      const Projection& p = projections_[i];
      Operands<T>& o = operands_[i];
      if (wants_x_) {
        o.weight = p.nf4 ? Packed<T>(p.out(), width()) : Packed<T>(p.out(), width(), x_.options());
        if (!p.nf4) o.weight.add(jobs, p.weight);
      }
      if (!has_low(i)) continue;
      o.parts = parts_of<T>(p.a);
      if (wants_x_ || wants_[i].a) {
        o.b_parts = Packed<T>(p.out(), low_rows(i), x_.options());
        o.b_parts.add_rows(jobs, column_parts(p.b, o.parts));
      }
      if (wants_x_) {
        o.a = Packed<T>(p.rank(), width(), x_.options());
        o.a.add_rows(jobs, p.a);
        o.dxa_low = empty_padded<T>(tokens_, p.rank(), even(p.rank()), x_.options());
      }
      if (wants_[i].a) {
        o.x_low = dropout_.drops ? dropped(x_, dropout_, p.seed) : x_;
        o.dxa_t = empty_padded<T>(low_rows(i), tokens_, padded_, x_.options());
      }
      if (wants_[i].b) o.xa_t = empty_padded<T>(low_rows(i), tokens_, padded_, x_.options());
    }
    run(jobs);
  }

  // dxa = scale * dY · B and, for the products over tokens, the parts of dxa and xa transposed.
  void low_rank() {
    std::vector<size_t> adapted;
    int64_t widest = 0, rank = 0;
    for (size_t i = 0; i < projections_.size(); ++i) {
      if (!has_low(i)) continue;
      adapted.push_back(i);
      widest = std::max(widest, low_rows(i)), rank = std::max(rank, projections_[i].rank());
    }
    const Scratch<float> scratch(kRows * (widest + 2 * rank), x_.options().dtype(at::kFloat));
    const int64_t n = adapted.size();
    for_each_task(row_tiles(tokens_) * n, [&](int64_t worker, int64_t task) {
      low_rank_tile(adapted[task % n], task / n * kRows, scratch.of(worker));
    });
  }

  void low_rank_tile(size_t i, int64_t r0, float* tile) {
    const int64_t rows = std::min(kRows, tokens_ - r0), R = projections_[i].rank(), ldc = low_rows(i);
    const Operands<T>& o = operands_[i];
    float *sums = tile + kRows * ldc, *transposed = sums + kRows * R;
    if (wants_[i].b) {
      by_dtype(xas_[i], [&]<typename Low>() {
        FASTPT_BY_ISA(convert_rows<Low, float>)
        (rows, R, R, xas_[i].template const_data_ptr<Low>() + r0 * R, 1.0f, R, sums);
      });
      store_transposed(rows, i, sums, transposed, data(o.xa_t, 0) + r0);
    }
    if (!wants_x_ && !wants_[i].a) return;
    for (int64_t p = 0; p < o.b_parts.panels(); ++p)
      multiply<T>(rows, o.b_parts.width(p), projections_[i].out(), o.grad.stride(0), data(o.grad, r0),
                  o.b_parts.panel(p), false, ldc, tile + p * kPanel);
    FASTPT_BY_ISA(join_parts)(rows, R, o.parts, ldc, tile, projections_[i].scale, R, sums);
    if (wants_x_) FASTPT_BY_ISA(convert_rows<float, T>)
    (rows, R, R, sums, dropout_.factor, o.dxa_low.stride(0), data(o.dxa_low, r0));
    if (wants_[i].a) store_transposed(rows, i, sums, transposed, data(o.dxa_t, 0) + r0);
  }

  // The parts of sums [rows, R], transposed: out [parts * R, padded tokens].
  void store_transposed(int64_t rows, size_t i, const float* sums, float* transposed, T* out) {
    const int64_t R = projections_[i].rank();
    transpose(rows, R, R, kRows, sums, transposed);
    for (int64_t r = 0; r < R; ++r) {
      const float* in = transposed + r * kRows;
      if constexpr (std::is_same_v<T, c10::BFloat16>) {
        if (operands_[i].parts > 1) {
          FASTPT_BY_ISA(split_numbers)(rows, in, R * padded_, out + r * padded_);
          continue;
        }
      }
      FASTPT_BY_ISA(convert_rows<float, T>)(1, rows, rows, in, 1.0f, padded_, out + r * padded_);
    }
  }

  // dX, tile by tile.
  void input() {
    const bool unpacks = any_nf4(projections_);
    const int64_t panels = operands_[0].weight.panels(), panels_of_task = unpacks ? 1 : 3, tiles = row_tiles(tokens_);
    const int64_t groups = (panels + panels_of_task - 1) / panels_of_task;
    const int64_t tiles_of_task = unpacks ? tiles_of_unpacked(panels, tiles) : 1;
    int64_t depth = 0;  // of all 4-bit weights
    for (const Projection& p : projections_) depth += p.nf4 ? even(p.out()) : 0;
    const Scratch<float> scratch(2 * kRows * kPanel, x_.options().dtype(at::kFloat));
    const Scratch<T> unpacked(depth * kPanel, x_.options());
    for_each_task((tiles + tiles_of_task - 1) / tiles_of_task * groups, [&](int64_t worker, int64_t task) {
      const int64_t first = task % groups * panels_of_task, tile = task / groups * tiles_of_task;
      for (int64_t p = first; p < std::min(panels, first + panels_of_task); ++p) {
        const auto weights = weight_panels(p, unpacked.of(worker));
        for (int64_t t = tile; t < std::min(tiles, tile + tiles_of_task); ++t)
          input_tile(p, weights, t * kRows, scratch.of(worker));
      }
    });
  }

  std::vector<const T*> weight_panels(int64_t p, T* unpacked) const {
    std::vector<const T*> panels;
    for (size_t i = 0; i < projections_.size(); ++i) {
      panels.push_back(projections_[i].nf4 ? unpacked : operands_[i].weight.panel(p));
      if (!projections_[i].nf4) continue;
      unpack_columns(projections_[i], p, unpacked);
      unpacked += even(projections_[i].out()) * kPanel;
    }
    return panels;
  }

  void input_tile(int64_t p, const std::vector<const T*>& weights, int64_t r0, float* tile) {
    const int64_t rows = std::min(kRows, tokens_ - r0), columns = operands_[0].weight.width(p);
    float* low = dropout_.drops ? tile + kRows * kPanel : tile;
    bool is_first = true;
    for (size_t i = 0; i < projections_.size(); ++i) {
      const Operands<T>& o = operands_[i];
      if (has_low(i) && !dropout_.drops) add_low(i, p, rows, r0, !is_first, low);
      multiply<T>(rows, columns, projections_[i].out(), o.grad.stride(0), data(o.grad, r0), weights[i],
                  !is_first || (has_low(i) && !dropout_.drops), kPanel, tile);
      is_first = false;
      if (!has_low(i) || !dropout_.drops) continue;
      add_low(i, p, rows, r0, false, low);
      FASTPT_BY_ISA(add_kept)
      (r0, rows, p * kPanel, columns, projections_[i].seed, dropout_.rule, kPanel, low, tile);
    }
    FASTPT_BY_ISA(store_tile<T>)
    (rows, columns, kPanel, tile, nullptr, width(), out_.x.mutable_data_ptr<T>() + r0 * width() + p * kPanel);
  }

  void add_low(size_t i, int64_t p, int64_t rows, int64_t r0, bool accumulate, float* tile) {
    const Operands<T>& o = operands_[i];
    multiply<T>(rows, o.a.width(p), o.a.depth(), o.dxa_low.stride(0), data(o.dxa_low, r0), o.a.panel(p), accumulate,
                kPanel, tile);
  }

  // dA = dxaᵀ · x and dB = scale * dYᵀ · xa, a panel of columns of x or of dY at a time.
  void adapters() {
    struct Task {
      size_t projection;
      bool is_a;
      int64_t panel;
    };
    std::vector<Task> tasks;
    int64_t most_rows = 0;
    for (size_t i = 0; i < projections_.size(); ++i) {
      if (!has_low(i)) continue;
      most_rows = std::max(most_rows, low_rows(i));
      for (bool is_a : {true, false})
        if (is_a ? wants_[i].a : wants_[i].b)
          for (int64_t c = 0; c < (is_a ? width() : projections_[i].out()); c += kPanel) tasks.push_back({i, is_a, c});
    }
    const Scratch<float> scratch(2 * most_rows * kPanel, x_.options().dtype(at::kFloat));
    const Scratch<T> packed(kTokens * kPanel, x_.options());
    for_each_task(tasks.size(), [&](int64_t worker, int64_t at) {
      const Task& task = tasks[at];
      const Operands<T>& o = operands_[task.projection];
      float* tile = scratch.of(worker);
      if (task.is_a) {
        const int64_t columns = std::min(kPanel, width() - task.panel);
        over_tokens(o.dxa_t, o.x_low, task.panel, columns, packed.of(worker), tile);
        store_da(task.projection, task.panel, columns, tile);
      } else {
        const int64_t columns = std::min(kPanel, projections_[task.projection].out() - task.panel);
        over_tokens(o.xa_t, o.grad, task.panel, columns, packed.of(worker), tile);
        store_db(task.projection, task.panel, columns, tile, tile + low_rows(task.projection) * kPanel);
      }
    });
  }

  // tile = small · columns [first, first + columns) of large; small [parts * R, padded tokens], large [T, ...].
  void over_tokens(const at::Tensor& small, const at::Tensor& large, int64_t first, int64_t columns, T* packed,
                   float* tile) {
    for (int64_t t = 0; t < padded_; t += kTokens) {
      const int64_t depth = std::min(kTokens, padded_ - t), valid = std::min(depth, tokens_ - t);
      const T* from = data(large, t) + first;
      if constexpr (std::is_same_v<T, float>) {
        for (int64_t r = 0; r < valid; ++r) std::copy_n(from + r * large.stride(0), columns, packed + r * kPanel);
      } else {
        pack_vnni(valid, columns, large.stride(0), kPanel, from, packed);
      }
      const int64_t written = std::is_same_v<T, float> ? valid : even(valid);
      std::fill(packed + written * kPanel, packed + depth * kPanel, T(0.0f));
      multiply<T>(small.size(0), columns, depth, small.stride(0), data(small, 0) + t, packed, t > 0, kPanel, tile);
    }
  }

  void store_da(size_t i, int64_t first, int64_t columns, const float* tile) {
    FASTPT_BY_ISA(join_row_parts)
    (projections_[i].rank(), columns, operands_[i].parts, kPanel, tile, dropout_.factor, width(),
     out_.a[i].mutable_data_ptr<float>() + first);
  }

  void store_db(size_t i, int64_t first, int64_t columns, const float* tile, float* sums) {
    const int64_t R = projections_[i].rank();
    FASTPT_BY_ISA(join_row_parts)
    (R, columns, operands_[i].parts, kPanel, tile, projections_[i].scale, kPanel, sums);
    transpose(R, columns, kPanel, R, sums, out_.b[i].mutable_data_ptr<float>() + first * R);
  }

  // dW = dYᵀ · x and the column sums of dY.
  void weights() {
    Jobs jobs;
    const bool any = std::any_of(wants_.begin(), wants_.end(), [](const Wants& w) { return w.weight; });
    Packed<T> packed(any ? padded_ : 0, any ? width() : 0, x_.options());
    if (any) packed.add_rows(jobs, x_);
    std::vector<std::pair<size_t, int64_t>> blocks;
    for (size_t i = 0; i < projections_.size(); ++i) {
      if (!wants_[i].weight) continue;
      operands_[i].grad_t = at::empty({projections_[i].out(), padded_}, x_.options());
      for (int64_t o = 0; o < projections_[i].out(); o += kRows) {
        blocks.emplace_back(i, o);
        jobs.push_back([this, i, o] { transpose_grad(i, o); });
      }
    }
    run(jobs);
    const Scratch<float> scratch(any ? kRows * width() : 0, x_.options().dtype(at::kFloat));
    for_each_task(blocks.size(), [&](int64_t worker, int64_t at) {
      weight_rows(blocks[at].first, blocks[at].second, packed, scratch.of(worker));
    });
    for (size_t i = 0; i < projections_.size(); ++i)
      if (wants_[i].bias) out_.biases[i] = column_sums(operands_[i].grad, projections_[i].out());
  }

  void transpose_grad(size_t i, int64_t o) {
    const at::Tensor& grad = operands_[i].grad;
    const int64_t rows = std::min(kRows, projections_[i].out() - o);
    T* out = data(operands_[i].grad_t, o);
    transpose(tokens_, rows, grad.stride(0), padded_, data(grad, 0) + o, out);
    for (int64_t r = 0; r < rows; ++r) std::fill(out + r * padded_ + tokens_, out + (r + 1) * padded_, T(0.0f));
  }

  void weight_rows(size_t i, int64_t o, const Packed<T>& x, float* sums) {
    const int64_t rows = std::min(kRows, projections_[i].out() - o);
    const at::Tensor& dweight = out_.weights[i];
    const bool is_float = dweight.scalar_type() == at::kFloat;
    if (is_float) sums = dweight.mutable_data_ptr<float>() + o * width();
    const int64_t step = padded_ <= 2 * kTokens ? padded_ : kTokens;  // few tokens in one go: sums are stored once
    for (int64_t t = 0; t < padded_; t += step)
      for (int64_t p = 0; p < x.panels(); ++p)
        multiply<T>(rows, x.width(p), std::min(step, padded_ - t), padded_, data(operands_[i].grad_t, o) + t,
                    x.panel(p) + t * kPanel, t > 0, width(), sums + p * kPanel);
    if (!is_float) FASTPT_BY_ISA(store_tile<T>)
    (rows, width(), width(), sums, nullptr, width(), dweight.mutable_data_ptr<T>() + o * width());
  }

  at::Tensor column_sums(const at::Tensor& grad, int64_t columns) {
    const int64_t ld = grad.stride(0);
    return sum_row_blocks(tokens_, columns, columns, x_.options().dtype(at::kFloat),
                          [&](int64_t lo, int64_t hi, float* sums) {
                            FASTPT_BY_ISA(add_columns<T>)(hi - lo, columns, ld, data(grad, lo), sums);
                          });
  }

  const at::Tensor& x_;  // [T, even(D) for bfloat16]
  const std::vector<Projection>& projections_;
  const std::vector<at::Tensor>& xas_;
  Dropout dropout_;
  bool wants_x_;
  const std::vector<Wants>& wants_;
  Gradients& out_;
  std::vector<Operands<T>> operands_;
  int64_t tokens_, padded_;
};

}  // namespace

LinearGradients linear_backward(at::TensorList grads, const at::Tensor& x, const std::vector<Projection>& projections,
                                at::TensorList xas, double dropout_p, bool wants_x, const c10::List<bool>& wants) {
  const size_t n = projections.size();
  TORCH_CHECK(grads.size() == n && xas.size() == n && wants.size() == 4 * n, "lora_linear_backward: ", grads.size(),
              " gradients, ", xas.size(), " low-rank hiddens and ", wants.size(), " wants for ", n, " weights");
  const auto rows = gemm_rows(x);
  const auto wide = x.options().dtype(at::kFloat);
  const auto array = [&](at::IntArrayRef sizes, bool wanted) {
    return !wanted ? at::empty({0}, wide) : rows.size(0) > 0 ? at::empty(sizes, wide) : at::zeros(sizes, wide);
  };
  Gradients out{at::empty(wants_x ? x.sizes() : at::IntArrayRef{0}, x.options()), {}, {}, {}, {}};
  std::vector<Wants> wanted;
  std::vector<at::Tensor> low;
  for (size_t i = 0; i < n; ++i) {
    const Projection& p = projections[i];
    wanted.push_back(
        {wants[4 * i], wants[4 * i + 1], p.rank() > 0 && wants[4 * i + 2], p.rank() > 0 && wants[4 * i + 3]});
    TORCH_CHECK(grads[i].size(-1) == p.out() && grads[i].scalar_type() == x.scalar_type(),
                "lora_linear_backward: grad ", i, " is ", grads[i].sizes(), " ", grads[i].scalar_type(),
                " for a weight ", p.weight.sizes());
    TORCH_CHECK(!p.nf4 || !wanted[i].weight, "nf4_linear_backward: weight ", i, " is frozen");
    out.weights.push_back(array({p.out(), p.in()}, wanted[i].weight));
    out.biases.push_back(array({p.out()}, wanted[i].bias));
    out.a.push_back(p.rank() ? array(p.a.sizes(), wanted[i].a) : array({0}, false));
    out.b.push_back(p.rank() ? array(p.b.sizes(), wanted[i].b) : array({0}, false));
    low.push_back(xas[i].contiguous());
  }
  project_backward(rows, projections, grads, low, Dropout{dropout_p}, wants_x, wanted, out);
  return {out.x, out.weights, out.biases, out.a, out.b};
}

namespace {

LinearGradients lora_linear_backward(at::TensorList grads, const at::Tensor& x, at::TensorList weights,
                                     const OptionalTensors& lora_a, const OptionalTensors& lora_b, at::TensorList xas,
                                     at::ArrayRef<double> scales, double dropout_p, at::IntArrayRef seeds, bool wants_x,
                                     const c10::List<bool>& wants, bool in_float32) {
  static const auto reference = reference_of<decltype(lora_linear_backward)>("fastpt::lora_linear_backward");
  if (!is_native(x))
    return reference(grads, x, weights, lora_a, lora_b, xas, scales, dropout_p, seeds, wants_x, wants, in_float32);
  const auto projections = read_projections(x, weights, no_tensors(weights.size()), lora_a, lora_b, scales, seeds);
  auto found = linear_backward(grads, x, projections, xas, dropout_p, wants_x, wants);
  return in_float32 ? found : rounded(std::move(found), weights, lora_a, lora_b);
}

}  // namespace

void project_backward(const at::Tensor& x, const std::vector<Projection>& projections, at::TensorList grads,
                      const std::vector<at::Tensor>& xas, const Dropout& dropout, bool wants_x,
                      const std::vector<Wants>& wants, Gradients& out) {
  if (x.size(0) == 0) return;
  by_dtype(x, [&]<typename T>() { Backward<T>(x, projections, grads, xas, dropout, wants_x, wants, out)(); });
}

}  // namespace fastpt

TORCH_LIBRARY_IMPL(fastpt, CPU, m) {
  m.impl("lora_linear_backward", &fastpt::lora_linear_backward);
}
