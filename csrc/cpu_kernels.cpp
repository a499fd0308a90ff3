// RMSNorm, SwiGLU, rotary embedding and attention for one instruction set of the CPU:
//
//     -DISA=avx512 -DWIDTH=16 -DROWS=8 -march=x86-64-v4
//
// WIDTH floats are a vector, ROWS the queries that attention computes together. All in fp32,
// rounded once; vectors are the compiler's own, so that there is but one source.
#include <cmath>

#include "cpu.h"
#include "cpu_attention.h"
#include "cpu_vector.h"
#ifdef __AMX_BF16__
#include "cpu_attention_amx.h"
#endif

namespace llm2vec_fast {
namespace {

template <class T, class W>
void add_rms_norm(const AddRmsNorm& call, int64_t begin, int64_t end) {
  const int64_t width = call.width;
  const W* weight = static_cast<const W*>(call.weight);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(call.x) + row * call.x_stride;
    T* y = static_cast<T*>(call.y) + row * width;
    T* stream = nullptr;
    Vec squares[2] = {};
    if (call.residual != nullptr) {
      const T* residual = static_cast<const T*>(call.residual) + row * call.residual_stride;
      stream = static_cast<T*>(call.sum) + row * width;
      for (int64_t n = 0, turn = 0; n < width; n += kWidth, turn ^= 1) {
        const Vec both = as_stored(load(x + n, width - n) + load(residual + n, width - n), x);
        store(stream + n, both, width - n);
        squares[turn] += both * both;
      }
      x = stream;
    } else {
      for (int64_t n = 0, turn = 0; n < width; n += kWidth, turn ^= 1) {
        const Vec value = load(x + n, width - n);
        squares[turn] += value * value;
      }
    }
    const float rstd = 1.0f / std::sqrt(sum(squares[0] + squares[1]) / width + call.eps);
    for (int64_t n = 0; n < width; n += kWidth) {
      const int64_t left = width - n;
      store(y + n, load(x + n, left) * rstd * load(weight + n, left), left);
    }
  }
}

template <class T>
void swiglu(const Swiglu& call, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(call.gate_up) + row * call.stride;
    const T* up = gate + call.width;
    T* y = static_cast<T*>(call.y) + row * call.width;
    for (int64_t n = 0; n < call.width; n += kWidth) {
      const int64_t left = call.width - n;
      const Vec x = load(gate + n, left);
      // exp of a positive number may overflow, of a negative one not.
      const Vec small = exp(x < 0.0f ? x : -x);
      const Vec sigmoid = (x < 0.0f ? small : Vec{} + 1.0f) * inverse(small + 1.0f);
      store(y + n, x * sigmoid * load(up + n, left), left);
    }
  }
}

template <class T>
void rope(const Rope& call, int64_t begin, int64_t end) {
  const int64_t half = call.half;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t position = call.wide_positions
                                 ? static_cast<const int64_t*>(call.positions)[row]
                                 : static_cast<const int32_t*>(call.positions)[row];
    const float* cos = call.cos + position * call.table_stride;
    const float* sin = call.sin + position * call.table_stride;
    T* heads = static_cast<T*>(call.qkv) + row * call.stride;
    for (int64_t n = 0; n < half; n += kWidth) {
      const int64_t left = half - n;
      const Vec c = load(cos + n, left), s = load(sin + n, left);
      for (int head = 0; head < call.heads; ++head) {
        T* x = heads + 2 * head * half + n;
        const Vec a = load(x, left), b = load(x + half, left);
        store(x, a * c - b * s, left);
        store(x + half, b * c + a * s, left);
      }
    }
  }
}

// --- by dtype ---

void add_rms_norm_of(const AddRmsNorm& call, Dtype dtype, int64_t begin, int64_t end) {
  if (dtype == Dtype::kFloat32) return add_rms_norm<float, float>(call, begin, end);
  if (call.wide_weight) return add_rms_norm<Bf16, float>(call, begin, end);
  add_rms_norm<Bf16, Bf16>(call, begin, end);
}

void swiglu_of(const Swiglu& call, Dtype dtype, int64_t begin, int64_t end) {
  dtype == Dtype::kFloat32 ? swiglu<float>(call, begin, end) : swiglu<Bf16>(call, begin, end);
}

void rope_of(const Rope& call, Dtype dtype, int64_t begin, int64_t end) {
  dtype == Dtype::kFloat32 ? rope<float>(call, begin, end) : rope<Bf16>(call, begin, end);
}

int64_t scratch_of(const Attention& call, Dtype dtype, int64_t longest) {
#ifdef __AMX_BF16__
  if (dtype == Dtype::kBFloat16) return amx_scratch(call, longest);
#endif
  return attention_scratch(call, longest);
}

void attention_of(const Attention& call, Dtype dtype, const Work& work, float* scratch) {
  if (dtype == Dtype::kFloat32) return attention<float>(call, work, scratch);
#ifdef __AMX_BF16__
  attention_amx(call, work, scratch);
#else
  attention<Bf16>(call, work, scratch);
#endif
}

}  // namespace

#define STRING_OF(x) #x
#define NAME_OF(x) STRING_OF(x)
#define JOINED(a, b) a##b
#define FUNCTION_OF(isa) JOINED(kernels_, isa)

const CpuKernels& FUNCTION_OF(ISA)() {
  static const CpuKernels kernels{NAME_OF(ISA),      add_rms_norm_of, swiglu_of, rope_of,
                                  scratch_of,       attention_of};
  return kernels;
}

}  // namespace llm2vec_fast
