// The CPU's operators: checks, outputs, threads, and which instruction set runs. Like library.cpp
// it knows only torch's stable ABI; the threads are torch's own.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu.h"

namespace llm2vec_fast {
namespace {

constexpr int64_t kNumbers = 16 * 1024;  // that a thread should get at least: some microseconds
constexpr int64_t kQueries = 512;        // rows of one piece of attention

#ifdef __x86_64__
// Linux lends the registers of the matrix units to a process that asks for them.
bool may_use_amx() {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("avx512bf16") &&
         syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif

// The best for this processor; LLM2VEC_FAST_ISA names a lesser one, for tests.
const CpuKernels& kernels() {
  static const CpuKernels& best = []() -> const CpuKernels& {
#ifdef __x86_64__
    const char* asked = std::getenv("LLM2VEC_FAST_ISA");
    const std::string isa = asked ? asked : "amx";
    __builtin_cpu_init();
    require(isa == "amx" || isa == "avx512" || isa == "avx2" || isa == "plain",
            "LLM2VEC_FAST_ISA must be amx, avx512, avx2 or plain, got ", isa);
    const bool v4 = __builtin_cpu_supports("x86-64-v4"), v3 = __builtin_cpu_supports("x86-64-v3");
    if (isa == "amx" && v4 && may_use_amx()) return kernels_amx();
    if ((isa == "amx" || isa == "avx512") && v4) return kernels_avx512();
    if (isa != "plain" && v3) return kernels_avx2();
#endif
    return kernels_plain();
  }();
  return best;
}

std::string isa() { return kernels().name; }
std::string sources() { return LLM2VEC_FAST_SOURCES; }

Dtype computed(const char* op, const Tensor& t) {
  const Dtype dtype = dtype_of(op, t);
  require(dtype != Dtype::kFloat16, op, ": float32 and bfloat16 are computed on a CPU");
  return dtype;
}

void require_rows(const char* op, const char* name, const Tensor& t) {
  require(t.dim() == 2, op, ": ", name, " must be (rows, width), got ", shape_of(t));
  require(t.size(1) >= 1 && t.size(1) <= INT32_MAX / 4, op, ": the width of ", name,
          " is out of range, ", shape_of(t));
  require(t.stride(1) == 1 || t.size(1) == 1, op, ": the last dimension of ", name,
          " must be contiguous, its stride is ", t.stride(1));
}

template <class F>
void over_rows(int64_t rows, int64_t width, const F& f) {
  if (rows * width <= kNumbers) return f(0, rows);  // waking a thread takes longer
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kNumbers / width), f);
}

std::tuple<Tensor, Tensor> norm(const char* op, const Tensor& x, const Tensor* residual,
                                const Tensor& weight, double eps) {
  require_rows(op, "x", x);
  const Dtype dtype = computed(op, x);
  const int64_t rows = x.size(0), width = x.size(1);
  require(weight.dim() == 1 && weight.size(0) == width && (weight.stride(0) == 1 || width == 1),
          op, ": weight is ", shape_of(weight), ", x is ", shape_of(x));
  const bool wide_weight = weight.scalar_type() != x.scalar_type();
  require(!wide_weight || weight.scalar_type() == ScalarType::Float, op,
          ": weight must have the dtype of x or be float32");
  Tensor y = torch::stable::new_empty(x, std::array<int64_t, 2>{rows, width}), sum;
  AddRmsNorm call{};
  if (residual != nullptr) {
    require_rows(op, "residual", *residual);
    require(residual->size(0) == rows && residual->size(1) == width &&
                residual->scalar_type() == x.scalar_type(),
            op, ": residual and x differ, ", shape_of(*residual), " and ", shape_of(x));
    sum = torch::stable::new_empty(x, std::array<int64_t, 2>{rows, width});
    call.residual = residual->const_data_ptr();
    call.residual_stride = residual->stride(0);
    call.sum = sum.mutable_data_ptr();
  }
  call.x = x.const_data_ptr();
  call.x_stride = x.stride(0);
  call.weight = weight.const_data_ptr();
  call.y = y.mutable_data_ptr();
  call.rows = rows;
  call.width = static_cast<int>(width);
  call.eps = static_cast<float>(eps);
  call.wide_weight = wide_weight;
  over_rows(rows, width, [&](int64_t begin, int64_t end) {
    kernels().add_rms_norm(call, dtype, begin, end);
  });
  return {y, sum};
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  return std::get<0>(norm("rms_norm", x, nullptr, weight, eps));
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual,
                                        const Tensor& weight, double eps) {
  return norm("add_rms_norm", x, &residual, weight, eps);
}

Tensor swiglu(const Tensor& gate_up) {
  require_rows("swiglu", "gate_up", gate_up);
  const Dtype dtype = computed("swiglu", gate_up);
  require(gate_up.size(1) % 2 == 0, "swiglu: the last dimension must be even, got ",
          shape_of(gate_up));
  const int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
  Tensor y = torch::stable::new_empty(gate_up, std::array<int64_t, 2>{rows, width});
  Swiglu call{};
  call.gate_up = gate_up.const_data_ptr();
  call.stride = gate_up.stride(0);
  call.y = y.mutable_data_ptr();
  call.rows = rows;
  call.width = static_cast<int>(width);
  over_rows(rows, width, [&](int64_t begin, int64_t end) {
    kernels().swiglu(call, dtype, begin, end);
  });
  return y;
}

// Positions are looked at: on a CPU that costs nothing, and a wrong one would read past the tables.
void rope_(Tensor qkv, const Tensor& positions, const Tensor& cos, const Tensor& sin,
           int64_t heads) {
  require_rows("rope_", "qkv", qkv);
  const Dtype dtype = computed("rope_", qkv);
  for (const Tensor* table : {&cos, &sin}) {
    require_rows("rope_", "a table", *table);
    require(table->scalar_type() == ScalarType::Float && table->size(0) == cos.size(0) &&
                table->size(1) == cos.size(1) && table->stride(0) == cos.stride(0),
            "rope_: cos and sin must be float32 and alike");
  }
  const int64_t rows = qkv.size(0);
  require(rows < 2 || qkv.stride(0) >= qkv.size(1), "rope_: rows of qkv share memory");
  require(heads >= 0 && heads * 2 * cos.size(1) <= qkv.size(1), "rope_: ", heads, " heads of ",
          2 * cos.size(1), " do not fit ", shape_of(qkv));
  const bool wide = positions.scalar_type() == ScalarType::Long;
  require(positions.dim() == 1 && positions.size(0) == rows && positions.is_contiguous() &&
              (wide || positions.scalar_type() == ScalarType::Int),
          "rope_: positions must be contiguous integers, one a row, got ", shape_of(positions));
  Rope call{};
  call.qkv = qkv.mutable_data_ptr();
  call.stride = qkv.stride(0);
  call.positions = positions.const_data_ptr();
  call.cos = static_cast<const float*>(cos.const_data_ptr());
  call.sin = static_cast<const float*>(sin.const_data_ptr());
  call.rows = rows;
  call.table_rows = cos.size(0);
  call.table_stride = cos.stride(0);
  call.heads = static_cast<int>(heads);
  call.half = static_cast<int>(cos.size(1));
  call.wide_positions = wide;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t position = wide ? static_cast<const int64_t*>(call.positions)[row]
                                  : static_cast<const int32_t*>(call.positions)[row];
    require(position >= 0 && position < call.table_rows, "rope_: position ", position,
            " is outside of tables of ", call.table_rows);
  }
  over_rows(rows, 2 * heads * call.half, [&](int64_t begin, int64_t end) {
    kernels().rope(call, dtype, begin, end);
  });
}

// All texts of up to `longest` tokens, cut where one has many queries. The longest come first, so
// that no thread is left with one of them at the end.
std::vector<Work> pieces(const int32_t* bounds, int64_t texts, int64_t tokens, int64_t max_seqlen,
                         int64_t longest, const Attention& call) {
  std::vector<Work> found;
  for (int64_t text = 0; text < texts; ++text) {
    const int64_t start = bounds[text], length = bounds[text + 1] - start;
    require(start >= 0 && length >= 1 && start + length <= tokens, "attention: text ", text,
            " from ", start, " to ", start + length, " of ", tokens, " tokens");
    require(length <= max_seqlen, "attention: text ", text, " has ", length,
            " tokens, more than max_seqlen, ", max_seqlen);
    if (length > longest) continue;
    for (int head = 0; head < call.kv_heads; ++head) {
      for (int64_t begin = 0; begin < length * call.group; begin += kQueries) {
        const int64_t end = std::min(begin + kQueries, length * call.group);
        found.push_back({start, length, head, begin, end});
      }
    }
  }
  std::stable_sort(found.begin(), found.end(), [](const Work& a, const Work& b) {
    return a.length * (a.end - a.begin) > b.length * (b.end - b.begin);
  });
  return found;
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
                 int64_t max_seqlen, bool causal, std::optional<int64_t> window, double scale,
                 int64_t longest) {
  const Dtype dtype = computed("attention", q);
  for (const Tensor* x : {&q, &k, &v}) {
    require(x->dim() == 3 && x->size(0) == q.size(0) && x->size(2) == q.size(2) &&
                x->size(1) == (x == &q ? q : k).size(1) && x->scalar_type() == q.scalar_type() &&
                (x->stride(2) == 1 || x->size(2) == 1),
            "attention: q, k and v do not fit: ", shape_of(q), ", ", shape_of(k), ", ",
            shape_of(v));
  }
  require(k.size(1) >= 1 && q.size(1) % k.size(1) == 0, "attention: heads do not fit: ",
          shape_of(q), ", ", shape_of(k));
  require(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1 && cu_seqlens.is_contiguous() &&
              cu_seqlens.scalar_type() == ScalarType::Int,
          "attention: cu_seqlens must be (B + 1,) int32");
  require(!window.has_value() || *window >= 1, "attention: window must be at least 1");
  const std::array<int64_t, 3> shape{q.size(0), q.size(1), q.size(2)};
  Tensor out = torch::stable::new_empty(q, shape);
  Attention call{};
  call.q = q.const_data_ptr();
  call.k = k.const_data_ptr();
  call.v = v.const_data_ptr();
  call.out = out.mutable_data_ptr();
  call.q_stride = q.stride(0), call.k_stride = k.stride(0), call.v_stride = v.stride(0);
  call.q_head = q.stride(1), call.k_head = k.stride(1), call.v_head = v.stride(1);
  call.window = std::min(window.value_or(0), q.size(0));  // a wider one is none
  call.kv_heads = static_cast<int>(k.size(1));
  call.group = static_cast<int>(q.size(1) / k.size(1));
  call.size = static_cast<int>(q.size(2));
  call.causal = causal;
  call.scale = static_cast<float>(scale);
  const auto* bounds = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  const std::vector<Work> work =
      pieces(bounds, cu_seqlens.size(0) - 1, q.size(0), max_seqlen, longest, call);
  if (work.empty()) return out;
  longest = 0;  // of those that are there
  for (const Work& piece : work) longest = std::max(longest, piece.length);
  const int64_t room = kernels().attention_scratch(call, dtype, longest);
  std::atomic<size_t> next{0};
  const auto some = [&](int64_t, int64_t) {
    // Tiles that are not aligned are read at a sixth of the speed.
    const std::unique_ptr<void, decltype(&std::free)> scratch(
        std::aligned_alloc(64, (room * sizeof(float) + 63) / 64 * 64), &std::free);
    if (!scratch) throw std::bad_alloc();
    for (size_t n; (n = next.fetch_add(1)) < work.size();) {
      kernels().attention(call, dtype, work[n], static_cast<float*>(scratch.get()));
    }
  };
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), work.size());
  threads > 1 ? torch::stable::parallel_for(0, threads, 1, some) : some(0, 1);
  return out;
}

}  // namespace
}  // namespace llm2vec_fast

STABLE_TORCH_LIBRARY(llm2vec_fast_cpu, m) {
  m.def("sources() -> str");
  m.def("isa() -> str");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("swiglu(Tensor gate_up) -> Tensor");
  m.def("rope_(Tensor(a!) qkv, Tensor positions, Tensor cos, Tensor sin, int heads) -> ()");
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, int max_seqlen, bool causal, "
      "int? window, float scale, int longest) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(llm2vec_fast_cpu, CompositeExplicitAutograd, m) {
  m.impl("sources", TORCH_BOX(&llm2vec_fast::sources));
  m.impl("isa", TORCH_BOX(&llm2vec_fast::isa));
}

STABLE_TORCH_LIBRARY_IMPL(llm2vec_fast_cpu, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&llm2vec_fast::rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&llm2vec_fast::add_rms_norm));
  m.impl("swiglu", TORCH_BOX(&llm2vec_fast::swiglu));
  m.impl("rope_", TORCH_BOX(&llm2vec_fast::rope_));
  m.impl("attention", TORCH_BOX(&llm2vec_fast::attention));
}
