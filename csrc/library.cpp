// Schemas, checks and outputs of the operators: the only file that knows torch, and only its stable
// ABI, so that one build serves every torch from 2.10 on. It loads where torch has no CUDA at all.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>

#include "checks.h"
#include "device.h"
#include "kernels.h"

namespace llm2vec_fast {
namespace {

// (rows, width) on the device, the elements of a row side by side; rows may lie apart.
void require_rows(const char* op, const char* name, const Tensor& t) {
  require(t.dim() == 2, op, ": ", name, " must be (rows, width), got ", shape_of(t));
  require(on_device(t), op, ": ", name, " must be on a CUDA device");
  require(t.size(1) >= 1, op, ": ", name, " has no columns, ", shape_of(t));
  require(t.size(1) <= INT32_MAX / 4, op, ": ", name, " is too wide, ", shape_of(t));
  require(t.stride(1) == 1 || t.size(1) == 1, op, ": the last dimension of ", name,
          " must be contiguous, its stride is ", t.stride(1));
}

void require_like(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  require(t.scalar_type() == x.scalar_type(), op, ": ", name, " and x differ in dtype");
  require(on_device(t) && t.get_device_index() == x.get_device_index(), op, ": ", name,
          " and x are on different devices");
}

Tensor empty(const Tensor& like, std::array<int64_t, 2> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

void started(const char* op, const char* error) {
  require(error == nullptr, op, ": the kernel could not be started: ", error ? error : "");
}

struct Normed {
  Tensor y, sum, scale;
};

Normed norm(const char* op, const Tensor& x, const Tensor* residual, const Tensor& weight,
            double eps, bool fp8) {
  require_rows(op, "x", x);
  const Dtype dtype = dtype_of(op, x);
  const int64_t rows = x.size(0), width = x.size(1);
  require(weight.dim() == 1 && weight.size(0) == width, op, ": weight is ", shape_of(weight),
          ", x is ", shape_of(x));
  require(weight.stride(0) == 1 || width == 1, op, ": weight must be contiguous");
  const bool wide_weight = weight.scalar_type() != x.scalar_type();
  require(!wide_weight || weight.scalar_type() == ScalarType::Float, op,
          ": weight must have the dtype of x or be float32");
  require(on_device(weight) && weight.get_device_index() == x.get_device_index(), op,
          ": weight and x are on different devices");
  if (residual != nullptr) {
    require_rows(op, "residual", *residual);
    require(residual->size(0) == rows && residual->size(1) == width, op, ": residual is ",
            shape_of(*residual), ", x is ", shape_of(x));
    require_like(op, "residual", *residual, x);
  }
  const OnDevice here(op, x, fp8);

  Normed out;
  out.y = empty(x, {rows, width}, fp8 ? ScalarType::Float8_e4m3fn : x.scalar_type());
  if (residual != nullptr) out.sum = empty(x, {rows, width}, x.scalar_type());
  if (fp8) out.scale = empty(x, {rows, 1}, ScalarType::Float);
  if (rows == 0) return out;

  AddRmsNorm call{};
  call.x = x.const_data_ptr();
  call.x_stride = x.stride(0);
  call.weight = weight.const_data_ptr();
  if (residual != nullptr) {
    call.residual = residual->const_data_ptr();
    call.residual_stride = residual->stride(0);
    call.sum = out.sum.mutable_data_ptr();
  }
  call.y = out.y.mutable_data_ptr();
  call.scale = fp8 ? static_cast<float*>(out.scale.mutable_data_ptr()) : nullptr;
  call.rows = rows;
  call.width = static_cast<int>(width);
  call.eps = static_cast<float>(eps);
  call.wide_weight = wide_weight;
  started(op, launch_add_rms_norm(call, dtype, here.stream()));
  return out;
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  return norm("rms_norm", x, nullptr, weight, eps, false).y;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual,
                                        const Tensor& weight, double eps) {
  const Normed out = norm("add_rms_norm", x, &residual, weight, eps, false);
  return {out.y, out.sum};
}

std::tuple<Tensor, Tensor> rms_norm_fp8(const Tensor& x, const Tensor& weight, double eps) {
  const Normed out = norm("rms_norm_fp8", x, nullptr, weight, eps, true);
  return {out.y, out.scale};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_fp8(const Tensor& x, const Tensor& residual,
                                                    const Tensor& weight, double eps) {
  const Normed out = norm("add_rms_norm_fp8", x, &residual, weight, eps, true);
  return {out.y, out.scale, out.sum};
}

std::tuple<Tensor, Tensor> gated(const char* op, const Tensor& gate_up, bool fp8) {
  require_rows(op, "gate_up", gate_up);
  const Dtype dtype = dtype_of(op, gate_up);
  require(gate_up.size(1) % 2 == 0, op, ": the last dimension must be even, got ",
          shape_of(gate_up));
  const int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
  const OnDevice here(op, gate_up, fp8);
  const ScalarType stored = fp8 ? ScalarType::Float8_e4m3fn : gate_up.scalar_type();
  Tensor y = empty(gate_up, {rows, width}, stored), scale;
  if (fp8) scale = empty(gate_up, {rows, 1}, ScalarType::Float);
  if (rows == 0) return {y, scale};

  Swiglu call{};
  call.gate_up = gate_up.const_data_ptr();
  call.stride = gate_up.stride(0);
  call.y = y.mutable_data_ptr();
  call.scale = fp8 ? static_cast<float*>(scale.mutable_data_ptr()) : nullptr;
  call.rows = rows;
  call.width = static_cast<int>(width);
  started(op, launch_swiglu(call, dtype, here.stream()));
  return {y, scale};
}

std::string sources() { return LLM2VEC_FAST_SOURCES; }

Tensor swiglu(const Tensor& gate_up) { return std::get<0>(gated("swiglu", gate_up, false)); }

std::tuple<Tensor, Tensor> swiglu_fp8(const Tensor& gate_up) {
  return gated("swiglu_fp8", gate_up, true);
}

template <size_t n>
int position(const char* what, const std::string& name, const std::array<const char*, n>& known) {
  const auto found = std::find(known.begin(), known.end(), name);
  require(found != known.end(), "pool: unknown ", what, " '", name, "'");
  return static_cast<int>(found - known.begin());
}

constexpr std::array<const char*, 4> kModes{"mean", "weighted_mean", "last", "first"};
constexpr std::array<const char*, 4> kPrecisions{"float32", "float16", "int8", "binary"};
constexpr std::array<ScalarType, 4> kStored{ScalarType::Float, ScalarType::Half, ScalarType::Char,
                                            ScalarType::Byte};

std::tuple<Tensor, Tensor> pool(const Tensor& hidden, const Tensor& spans, const std::string& mode,
                                bool normalize, std::optional<int64_t> truncate_dim,
                                const std::string& precision) {
  require_rows("pool", "hidden", hidden);
  const Dtype dtype = dtype_of("pool", hidden);
  require(spans.dim() == 2 && spans.size(1) == 2 && spans.is_contiguous(),
          "pool: spans must be a contiguous (B, 2), got ", shape_of(spans));
  const bool wide = spans.scalar_type() == ScalarType::Long;
  require(wide || spans.scalar_type() == ScalarType::Int, "pool: spans must be int32 or int64");
  require(on_device(spans) && spans.get_device_index() == hidden.get_device_index(),
          "pool: spans and hidden are on different devices");
  const int64_t texts = spans.size(0), tokens = hidden.size(0);
  const int64_t width = truncate_dim.value_or(hidden.size(1));
  require(width >= 1 && width <= hidden.size(1), "pool: truncate_dim must be 1 to ",
          hidden.size(1), ", got ", width);
  require(width <= kWidestVector, "pool: vectors of at most ", kWidestVector, " columns, got ",
          width);

  Pool call{};
  call.mode = static_cast<Mode>(position("mode", mode, kModes));
  call.precision = static_cast<Precision>(position("precision", precision, kPrecisions));
  const bool binary = call.precision == Precision::kBinary;
  const bool int8 = call.precision == Precision::kInt8;
  const bool sliced = call.mode == Mode::kMean || call.mode == Mode::kWeightedMean;
  const OnDevice here("pool", hidden, false);

  Tensor vectors = empty(hidden, {texts, binary ? (width + 7) / 8 : width},
                         kStored[static_cast<size_t>(call.precision)]);
  Tensor scale = torch::stable::new_empty(hidden, std::array<int64_t, 1>{int8 ? texts : 0},
                                          ScalarType::Float);
  if (texts == 0) return {vectors, scale};
  Tensor sums = empty(hidden, {sliced ? pool_slices(texts, tokens) : 0, width}, ScalarType::Float);

  call.hidden = hidden.const_data_ptr();
  call.hidden_stride = hidden.stride(0);
  call.spans = spans.const_data_ptr();
  call.sums = static_cast<float*>(sums.mutable_data_ptr());
  call.vectors = vectors.mutable_data_ptr();
  call.scale = int8 ? static_cast<float*>(scale.mutable_data_ptr()) : nullptr;
  call.texts = texts;
  call.tokens = tokens;
  call.width = static_cast<int>(width);
  call.wide_spans = wide;
  call.normalize = normalize;
  started("pool", launch_pool(call, dtype, here.stream()));
  return {vectors, scale};
}

}  // namespace
}  // namespace llm2vec_fast

#ifdef LLM2VEC_FAST_EMULATE
#define LLM2VEC_FAST_LIBRARY(m) STABLE_TORCH_LIBRARY(llm2vec_fast_emulated, m)
#define LLM2VEC_FAST_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(llm2vec_fast_emulated, CPU, m)
#define LLM2VEC_FAST_ANYWHERE(m) \
  STABLE_TORCH_LIBRARY_IMPL(llm2vec_fast_emulated, CompositeExplicitAutograd, m)
#else
#define LLM2VEC_FAST_LIBRARY(m) STABLE_TORCH_LIBRARY(llm2vec_fast_cuda, m)
#define LLM2VEC_FAST_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(llm2vec_fast_cuda, CUDA, m)
#define LLM2VEC_FAST_ANYWHERE(m) \
  STABLE_TORCH_LIBRARY_IMPL(llm2vec_fast_cuda, CompositeExplicitAutograd, m)
#endif

LLM2VEC_FAST_LIBRARY(m) {
  m.def("sources() -> str");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("rms_norm_fp8(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def(
      "add_rms_norm_fp8(Tensor x, Tensor residual, Tensor weight, float eps) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("swiglu(Tensor gate_up) -> Tensor");
  m.def("swiglu_fp8(Tensor gate_up) -> (Tensor, Tensor)");
  m.def(
      "pool(Tensor hidden, Tensor spans, str mode, bool normalize, int? truncate_dim, "
      "str precision) -> (Tensor, Tensor)");
}

LLM2VEC_FAST_ANYWHERE(m) { m.impl("sources", TORCH_BOX(&llm2vec_fast::sources)); }

LLM2VEC_FAST_KERNELS(m) {
  m.impl("rms_norm", TORCH_BOX(&llm2vec_fast::rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&llm2vec_fast::add_rms_norm));
  m.impl("rms_norm_fp8", TORCH_BOX(&llm2vec_fast::rms_norm_fp8));
  m.impl("add_rms_norm_fp8", TORCH_BOX(&llm2vec_fast::add_rms_norm_fp8));
  m.impl("swiglu", TORCH_BOX(&llm2vec_fast::swiglu));
  m.impl("swiglu_fp8", TORCH_BOX(&llm2vec_fast::swiglu_fp8));
  m.impl("pool", TORCH_BOX(&llm2vec_fast::pool));
}
