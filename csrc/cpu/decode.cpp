// decode_block and decode_logits for float and bfloat16 on the CPU: one new token for each of a few rows, whose time is
// that of reading the weights once (few_rows). The definition is fastpt/ops/decode.py.
#include <algorithm>
#include <array>
#include <optional>
#include <type_traits>
#include <vector>
#include <ATen/Parallel.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/dispatch.h"
#include "cpu/few_rows.h"
#include "cpu/row_blocks.h"

namespace fastpt {
constexpr int64_t kBlockKeys = 32;  // keys of one block of the cache: one cache line a dim in bfloat16
}
#define FASTPT_KERNELS "cpu/decode_kernels.h"
#include "cpu/for_each_isa.h"

namespace fastpt {
namespace {

using at::Tensor;
using Optionals = c10::List<std::optional<Tensor>>;

enum Part { kQuery, kKey, kValue, kOutput, kGate, kUp, kDown, kParts };
enum NormAt { kInput, kQueryNorm, kKeyNorm, kAfterAttention, kMlpInput, kAfterMlp, kNorms };

constexpr int64_t kUnit = 16;     // columns: the finest cut of a product
constexpr int64_t kColumns = 64;  // columns of a product that one thread holds in float32 at a time

// One linear layer; the low-rank term is there where rank > 0.
template <typename T>
struct Linear {
  const T *weight, *bias = nullptr;
  int64_t out, in, stride, rank = 0;
  const float *a = nullptr, *b = nullptr;
  float scale = 1.0f;

  Linear(const Tensor& w, const std::optional<Tensor>& bias_, const std::optional<Tensor>& a_,
         const std::optional<Tensor>& b_, double scale_)
      : weight(w.const_data_ptr<T>()), out(w.size(0)), in(w.size(1)), stride(w.stride(0)) {
    if (bias_) bias = bias_->const_data_ptr<T>();
    if (!a_) return;
    rank = a_->size(0);
    a = a_->const_data_ptr<float>();
    b = b_->const_data_ptr<float>();
    scale = static_cast<float>(scale_);
  }

  // scale * x aᵀ [M, rank]: small enough for the calling thread.
  std::vector<float> low(int64_t M, const T* x) const {
    std::vector<float> result(M * rank), wide;
    if (rank == 0) return result;
    const float* rows;
    if constexpr (std::is_same_v<T, float>) {
      rows = x;
    } else {
      wide.resize(M * in);
      FASTPT_BY_ISA(decode_widen<T>)(M * in, x, wide.data());
      rows = wide.data();
    }
    few_rows(M, rank, in, rows, in, a, in, result.data(), rank);
    for (float& value : result) value *= scale;
    return result;
  }

  // Columns [n0, n0 + n) of the layer's float32 result -> sums [M, n]; scratch is of the same size.
  void columns(int64_t M, const T* x, const float* low, int64_t n0, int64_t n, float* sums, float* scratch) const {
    few_rows(M, n, in, x, in, weight + n0 * stride, stride, sums, n);
    if (rank > 0) few_rows(M, n, rank, low, rank, b + n0 * rank, rank, scratch, n);
    if (rank > 0 || bias != nullptr)
      FASTPT_BY_ISA(decode_add<T>)(M, n, rank > 0 ? scratch : nullptr, bias == nullptr ? bias : bias + n0, sums);
  }
};

// Calls body(first column, columns, scratch) for pieces of at most kColumns of `total` columns, on all threads, each of
// which gets one run of them (so that what it asks memory for in advance is its own); scratch holds `floats`.
template <typename Body>
void for_columns(int64_t total, int64_t weights_a_column, int64_t floats, const Body& body) {
  const int64_t units = (total + kUnit - 1) / kUnit;
  const int64_t grain = std::max<int64_t>(1, 2 * kRowGrain / std::max<int64_t>(1, weights_a_column * kUnit));
  at::parallel_for(0, units, grain, [&](int64_t lo, int64_t hi) {
    std::vector<float> scratch(floats);
    const int64_t end = std::min(total, hi * kUnit);
    for (int64_t n = lo * kUnit; n < end; n += kColumns) body(n, std::min(kColumns, end - n), scratch.data());
  });
}

// The layers' results side by side, out [M, sum of their widths], rounded to T.
template <typename T>
void project(std::initializer_list<const Linear<T>*> layers, int64_t M, const T* x, T* out) {
  std::vector<std::vector<float>> lows;
  int64_t total = 0;
  for (const auto* layer : layers) {
    lows.push_back(layer->low(M, x));
    total += layer->out;
  }
  const auto round = FASTPT_BY_ISA(decode_round<T>);
  for_columns(total, (*layers.begin())->in, 2 * M * kColumns, [&](int64_t n0, int64_t n, float* scratch) {
    int64_t start = 0, i = 0;
    for (const auto* layer : layers) {
      const int64_t from = std::max(n0, start), to = std::min(n0 + n, start + layer->out);
      if (from < to) {
        layer->columns(M, x, lows[i].data(), from - start, to - from, scratch, scratch + M * kColumns);
        round(M, to - from, scratch, out + from, total);
      }
      start += layer->out;
      ++i;
    }
  });
}

// activation(gate(x)) * up(x) [M, I].
template <typename T>
void project_gated(const Linear<T>& gate, const Linear<T>& up, int activation, int64_t M, const T* x, T* out) {
  const auto gate_low = gate.low(M, x), up_low = up.low(M, x);
  const auto round = FASTPT_BY_ISA(decode_round<T>);
  const auto activate = FASTPT_BY_ISA(decode_activate<T>);
  for_columns(gate.out, 2 * gate.in, 4 * M * kColumns, [&](int64_t n0, int64_t n, float* scratch) {
    float *sums = scratch, *other = sums + M * kColumns;
    T *g = reinterpret_cast<T*>(other + M * kColumns), *u = g + M * kColumns;
    gate.columns(M, x, gate_low.data(), n0, n, sums, other);
    round(M, n, sums, g, n);
    up.columns(M, x, up_low.data(), n0, n, sums, other);
    round(M, n, sums, u, n);
    for (int64_t m = 0; m < M; ++m) activate(activation, n, g + m * n, u + m * n, out + m * gate.out + n0);
  });
}

struct Norm {
  const float* scale;  // offset + weight; null: no norm here
  float eps;
};

// Everything about a call but its rows; see the schema in fastpt/ops/decode.py.
template <typename T>
struct Block {
  std::vector<Linear<T>> layers;
  std::array<Norm, kNorms> norms;
  bool casts_first;
  int activation;
  int64_t window;  // keys that a query sees, its own among them
  float softcap, scale;
  int64_t heads, kv_heads, K, capacity;
  T *keys, *values;
  Tensor cos, sin;  // contiguous

  // norm(x) of M rows, or of s = x + residual, which is then stored.
  void norm(NormAt at, int64_t M, int64_t D, const T* x, const T* residual, T* s, T* y) const {
    const auto kernel = residual == nullptr ? (casts_first ? FASTPT_BY_ISA(rms_norm_rows<T, false, true>)
                                                           : FASTPT_BY_ISA(rms_norm_rows<T, false, false>))
                                            : (casts_first ? FASTPT_BY_ISA(rms_norm_rows<T, true, true>)
                                                           : FASTPT_BY_ISA(rms_norm_rows<T, true, false>));
    at::parallel_for(0, M, row_grain(D), [&](int64_t lo, int64_t hi) {
      std::vector<float> rstd(hi - lo);
      const int64_t start = lo * D;
      kernel(hi - lo, D, x + start, residual == nullptr ? nullptr : residual + start, norms[at].scale, norms[at].eps,
             s == nullptr ? nullptr : s + start, y + start, rstd.data());
    });
  }

  // qkv [M, (H + 2 Hkv) K]: rotates, stores the new keys and values, attends -> out [M, H K].
  void attend(int64_t M, const T* qkv, const int64_t* slots, const int64_t* positions, T* out) const {
    const int64_t longest = std::min(window + kBlockKeys, *std::max_element(positions, positions + M) + 1);
    const int64_t grain = std::max<int64_t>(1, kRowGrain / std::max<int64_t>(1, longest * K));
    at::parallel_for(0, M * kv_heads, grain, [&](int64_t lo, int64_t hi) {
      const int64_t group = heads / kv_heads, R = cos.size(1);
      std::vector<T> turned((2 * group + 2) * K);  // q and k, each with room for its normed form
      std::vector<float> q(group * K), angles(2 * R), scores(4 * capacity), sums(4 * K), rstd(group);
      for (int64_t task = lo; task < hi; ++task)
        attend_one(qkv, slots, positions, task / kv_heads, task % kv_heads, turned.data(), q.data(), angles.data(),
                   scores.data(), sums.data(), rstd.data(), out);
    });
  }

 private:
  void attend_one(const T* qkv, const int64_t* slots, const int64_t* positions, int64_t m, int64_t h, T* turned,
                  float* wide, float* angles, float* scores, float* sums, float* rstd, T* out) const {
    const int64_t group = heads / kv_heads, R = cos.size(1), position = positions[m],
                  width = (heads + 2 * kv_heads) * K;
    const T *q = qkv + m * width + h * group * K, *k = qkv + m * width + (heads + h) * K, *v = k + kv_heads * K;
    T *q_turned = turned + (group + 1) * K, *k_turned = q_turned + group * K;
    float *c = angles, *s = angles + R;
    by_dtype(cos, [&]<typename C>() {
      FASTPT_BY_ISA(rope_angles<C>)
      (R, cos.const_data_ptr<C>() + position * R, sin.const_data_ptr<C>() + position * R, false, false, c, s);
    });
    const auto turn = FASTPT_BY_ISA(decode_heads<T>);
    const Norm &q_norm = norms[kQueryNorm], &k_norm = norms[kKeyNorm];
    turn(group, K, R, q, q_norm.scale, q_norm.eps, casts_first, c, s, turned, rstd, q_turned);
    turn(1, K, R, k, k_norm.scale, k_norm.eps, casts_first, c, s, turned, rstd, k_turned);
    const int64_t cached = (slots[m] * kv_heads + h) * capacity * K;
    FASTPT_BY_ISA(decode_store<T>)(K, position, k_turned, v, keys + cached, values + cached);
    FASTPT_BY_ISA(decode_widen<T>)(group * K, q_turned, wide);
    FASTPT_BY_ISA(decode_attention<T>)
    (group, std::max<int64_t>(0, position + 1 - window), position + 1, K, wide, keys + cached, values + cached, scale,
     softcap, capacity, scores, sums, out + (m * heads + h * group) * K);
  }
};

// The residual stream x [M, D] through the block -> out.
template <typename T>
void run(const Block<T>& block, int64_t M, const T* x, const int64_t* slots, const int64_t* positions, T* out) {
  const auto& layers = block.layers;
  const int64_t D = layers[kQuery].in, inner = block.heads * block.K, I = layers[kGate].out;
  const int64_t width = inner + 2 * block.kv_heads * block.K;
  std::vector<T> y(M * D), branch(M * D), s(M * D), qkv(M * width), attended(M * inner), gated(M * I);
  block.norm(kInput, M, D, x, nullptr, nullptr, y.data());
  project<T>({&layers[kQuery], &layers[kKey], &layers[kValue]}, M, y.data(), qkv.data());
  block.attend(M, qkv.data(), slots, positions, attended.data());
  project<T>({&layers[kOutput]}, M, attended.data(), branch.data());
  if (block.norms[kAfterAttention].scale != nullptr) {
    block.norm(kAfterAttention, M, D, branch.data(), nullptr, nullptr, y.data());
    branch.swap(y);
  }
  block.norm(kMlpInput, M, D, branch.data(), x, s.data(), y.data());
  project_gated(layers[kGate], layers[kUp], block.activation, M, y.data(), gated.data());
  project<T>({&layers[kDown]}, M, gated.data(), branch.data());
  if (block.norms[kAfterMlp].scale != nullptr) {
    block.norm(kAfterMlp, M, D, branch.data(), nullptr, nullptr, y.data());
    branch.swap(y);
  }
  for (int64_t i = 0; i < M * D; ++i) out[i] = T(static_cast<float>(s[i]) + static_cast<float>(branch[i]));
}

int activation_code(c10::string_view name) {
  constexpr std::array<c10::string_view, 3> names{"silu", "gelu_tanh", "gelu"};
  const auto found = std::find(names.begin(), names.end(), name);
  TORCH_CHECK(found != names.end(), "decode_block: activation is ", name, "; give silu, gelu_tanh or gelu");
  return static_cast<int>(found - names.begin());
}

// The kernels read and write by these numbers, so what the caller gave is checked.
void check_rows(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& slots, const Tensor& positions,
                const Tensor& keys, const Tensor& values) {
  const int64_t M = x.size(0);
  TORCH_CHECK(keys.dim() == 5 && keys.size(4) == kBlockKeys && values.dim() == 4 && values.size(0) == keys.size(0) &&
                  values.size(1) == keys.size(1) && values.size(2) == keys.size(2) * kBlockKeys &&
                  values.size(3) == keys.size(3) && keys.is_contiguous() && values.is_contiguous(),
              "decode_block: keys are ", keys.sizes(), ", values ", values.sizes(),
              "; they must be contiguous [S, Hkv, C / ", kBlockKeys, ", K, ", kBlockKeys, "] and [S, Hkv, C, K]");
  TORCH_CHECK(slots.dim() == 1 && positions.dim() == 1 && slots.size(0) == M && positions.size(0) == M &&
                  slots.scalar_type() == at::kLong && positions.scalar_type() == at::kLong,
              "decode_block: slots are ", slots.sizes(), ", positions ", positions.sizes(), "; both must be int64 [", M,
              "]");
  TORCH_CHECK(cos.dim() == 2 && cos.sizes() == sin.sizes() && cos.scalar_type() == sin.scalar_type() &&
                  cos.size(1) % 2 == 0 && cos.size(1) <= keys.size(3),
              "decode_block: cos is ", cos.sizes(), ", sin ", sin.sizes(), "; both must be [P, R], R even and at most ",
              keys.size(3));
  const int64_t *slot = slots.const_data_ptr<int64_t>(), *position = positions.const_data_ptr<int64_t>();
  const int64_t capacity = std::min(values.size(2), cos.size(0));
  std::vector<bool> is_taken(values.size(0), false);
  for (int64_t m = 0; m < M; ++m) {
    TORCH_CHECK_INDEX(slot[m] >= 0 && slot[m] < values.size(0) && !is_taken[slot[m]], "decode_block: slots[", m,
                      "] is ", slot[m], "; rows need slots of their own below ", values.size(0));
    TORCH_CHECK_INDEX(position[m] >= 0 && position[m] < capacity, "decode_block: positions[", m, "] is ", position[m],
                      ", the cache and the rotary tables hold ", capacity);
    is_taken[slot[m]] = true;
  }
}

void check_weights(const Tensor& x, at::TensorList weights, const Optionals& biases, const Optionals& lora_a,
                   const Optionals& lora_b, const Optionals& norms, int64_t kv_heads, int64_t K) {
  const int64_t D = x.size(1), q = weights[kQuery].size(0), kv = kv_heads * K, I = weights[kGate].size(0);
  const std::array<std::array<int64_t, 2>, kParts> shapes{{{q, D}, {kv, D}, {kv, D}, {D, q}, {I, D}, {I, D}, {D, I}}};
  for (int i = 0; i < kParts; ++i) {
    const auto& w = weights[i];
    const std::optional<Tensor> bias = biases.get(i), a = lora_a.get(i), b = lora_b.get(i);
    TORCH_CHECK(w.dim() == 2 && w.size(0) == shapes[i][0] && w.size(1) == shapes[i][1] && w.stride(1) == 1 &&
                    w.scalar_type() == x.scalar_type(),
                "decode_block: weights[", i, "] is ", w.sizes(), " ", w.scalar_type(), "; expected [", shapes[i][0],
                ", ", shapes[i][1], "] ", x.scalar_type(), " with contiguous rows");
    TORCH_CHECK(
        !bias || (bias->numel() == w.size(0) && bias->is_contiguous() && bias->scalar_type() == x.scalar_type()),
        "decode_block: biases[", i, "] must be [", w.size(0), "] ", x.scalar_type());
    TORCH_CHECK(a.has_value() == b.has_value() &&
                    (!a || (a->dim() == 2 && b->dim() == 2 && a->size(1) == w.size(1) && b->size(0) == w.size(0) &&
                            a->size(0) == b->size(1) && a->is_contiguous() && b->is_contiguous() &&
                            a->scalar_type() == at::kFloat && b->scalar_type() == at::kFloat)),
                "decode_block: the adapter of weights[", i, "] must be contiguous float32 [R, ", w.size(1), "] and [",
                w.size(0), ", R]");
  }
  TORCH_CHECK(q % (kv_heads * K) == 0, "decode_block: ", q, " columns of q are no multiple of ", kv_heads, " heads of ",
              K);
  for (int i = 0; i < kNorms; ++i) {
    const std::optional<Tensor> norm = norms.get(i);
    const int64_t width = i == kQueryNorm || i == kKeyNorm ? K : D;
    TORCH_CHECK(norm.has_value() || (i != kInput && i != kMlpInput), "decode_block: norms[", i, "] is missing");
    TORCH_CHECK(!norm || (norm->numel() == width && norm->is_contiguous() && norm->scalar_type() == at::kFloat),
                "decode_block: norms[", i, "] must be contiguous float32 [", width, "]");
  }
}

Tensor decode_block(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& slots, const Tensor& positions,
                    Tensor keys, Tensor values, at::TensorList weights, const Optionals& biases,
                    const Optionals& lora_a, const Optionals& lora_b, at::ArrayRef<double> scales,
                    const Optionals& norms, at::ArrayRef<double> norm_eps, bool casts_first,
                    c10::string_view activation, std::optional<int64_t> window, std::optional<double> softcap,
                    double scale) {
  static const auto reference =
      reference_of<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, Tensor, Tensor,
                          at::TensorList, const Optionals&, const Optionals&, const Optionals&, at::ArrayRef<double>,
                          const Optionals&, at::ArrayRef<double>, bool, c10::string_view, std::optional<int64_t>,
                          std::optional<double>, double)>("fastpt::decode_block");
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "decode_block: x is ", x.sizes(), "; it must be contiguous [M, D]");
  TORCH_CHECK(weights.size() == kParts && biases.size() == kParts && lora_a.size() == kParts &&
                  lora_b.size() == kParts && scales.size() == kParts && norms.size() == kNorms &&
                  norm_eps.size() == kNorms,
              "decode_block: give ", int(kParts), " weights, biases, adapters and scales, and ", int(kNorms), " norms");
  check_rows(x, cos, sin, slots, positions, keys, values);
  if (!is_native(x))
    return reference(x, cos, sin, slots, positions, keys, values, weights, biases, lora_a, lora_b, scales, norms,
                     norm_eps, casts_first, activation, window, softcap, scale);
  check_weights(x, weights, biases, lora_a, lora_b, norms, values.size(1), values.size(3));
  TORCH_CHECK(keys.scalar_type() == x.scalar_type() && values.scalar_type() == x.scalar_type(),
              "decode_block: keys are ", keys.scalar_type(), ", x is ", x.scalar_type());
  auto out = at::empty(x.sizes(), x.options());
  if (x.size(0) == 0) return out;
  const auto table = [&cos](const Tensor& t) { return (is_native(cos) ? t : t.to(at::kFloat)).contiguous(); };
  by_dtype(x, [&]<typename T>() {
    Block<T> block{{},
                   {},
                   casts_first,
                   activation_code(activation),
                   window.value_or(values.size(2)),
                   static_cast<float>(softcap.value_or(0)),
                   static_cast<float>(scale),
                   weights[kQuery].size(0) / values.size(3),
                   values.size(1),
                   values.size(3),
                   values.size(2),
                   keys.mutable_data_ptr<T>(),
                   values.mutable_data_ptr<T>(),
                   table(cos),
                   table(sin)};
    for (int i = 0; i < kParts; ++i)
      block.layers.emplace_back(weights[i], biases.get(i), lora_a.get(i), lora_b.get(i), scales[i]);
    for (int i = 0; i < kNorms; ++i) {
      const std::optional<Tensor> norm = norms.get(i);
      block.norms[i] = {norm ? norm->const_data_ptr<float>() : nullptr, static_cast<float>(norm_eps[i])};
    }
    run(block, x.size(0), x.const_data_ptr<T>(), slots.const_data_ptr<int64_t>(), positions.const_data_ptr<int64_t>(),
        out.mutable_data_ptr<T>());
  });
  return out;
}

// hidden [M, D] -> float32 [M, V], never rounded to bfloat16.
Tensor decode_logits(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias) {
  static const auto reference =
      reference_of<Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&)>("fastpt::decode_logits");
  TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && weight.size(1) == hidden.size(1) &&
                  weight.scalar_type() == hidden.scalar_type() && (!bias || bias->numel() == weight.size(0)),
              "decode_logits: hidden is ", hidden.sizes(), " ", hidden.scalar_type(), ", weight ", weight.sizes(), " ",
              weight.scalar_type(), "; they must be [M, D] and [V, D] of one dtype, the bias [V]");
  if (!is_native(hidden)) return reference(hidden, weight, bias);
  const auto x = hidden.contiguous(), w = weight.stride(1) == 1 ? weight : weight.contiguous();
  const auto b = bias ? std::optional<Tensor>(bias->to(x.scalar_type()).contiguous()) : std::nullopt;
  const int64_t M = x.size(0), V = w.size(0);
  auto logits = at::empty({M, V}, x.options().dtype(at::kFloat));
  if (M == 0) return logits;
  by_dtype(x, [&]<typename T>() {
    const Linear<T> head(w, b, std::nullopt, std::nullopt, 1.0);
    const auto copy = FASTPT_BY_ISA(decode_round<float>);
    const T* rows = x.const_data_ptr<T>();
    float* out = logits.mutable_data_ptr<float>();
    for_columns(V, head.in, M * kColumns, [&](int64_t n0, int64_t n, float* sums) {
      head.columns(M, rows, nullptr, n0, n, sums, nullptr);
      copy(M, n, sums, out + n0, V);
    });
  });
  return logits;
}

}  // namespace
}  // namespace fastpt

TORCH_LIBRARY_IMPL(fastpt, CPU, m) {
  m.impl("decode_block", &fastpt::decode_block);
  m.impl("decode_logits", &fastpt::decode_logits);
}
