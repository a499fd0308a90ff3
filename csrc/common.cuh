// What the kernels share: conversions, how threads divide a row, reductions, launching.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <type_traits>

#include "kernels.h"

#ifdef LLM2VEC_FAST_EMULATE
#include "emulate.h"
#endif

namespace llm2vec_fast {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kE4m3Max = 448.0f;
// Blocks of at most 512 threads leave a thread 128 registers: room for a part of a row.
constexpr int kRowThreads = 512;

__device__ inline float widen(float v) { return v; }
__device__ inline float widen(__half v) { return __half2float(v); }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T, int n>
struct alignas(n * sizeof(T) < 16 ? n * sizeof(T) : 16) Values {
  T at[n];
};

// Rounds to nearest even, e4m3 with saturation. Two at once are one instruction (half precision
// from 8.0 on, e4m3 from 8.9 on).
__device__ inline void narrow2(float a, float b, float* to) { to[0] = a, to[1] = b; }
__device__ inline void narrow2(float a, float b, __half* to) {
  const __half2 pair = __floats2half2_rn(a, b);
  to[0] = __low2half(pair), to[1] = __high2half(pair);
}
__device__ inline void narrow2(float a, float b, __nv_bfloat16* to) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  to[0] = __low2bfloat16(pair), to[1] = __high2bfloat16(pair);
}
__device__ inline void narrow2(float a, float b, __nv_fp8_storage_t* to) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
  const auto pair = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
  to[0] = static_cast<__nv_fp8_storage_t>(pair & 0xff);
  to[1] = static_cast<__nv_fp8_storage_t>(pair >> 8);
#else
  __trap();  // library.cpp has refused; emulating it would only be code to carry
#endif
}
template <class T>
__device__ inline T narrow(float v) {
  T pair[2];
  narrow2(v, 0.0f, pair);
  return pair[0];
}
template <class T, int n>
__device__ inline void narrow(const float (&from)[n], Values<T, n>* to) {
#pragma unroll
  for (int i = 0; i + 1 < n; i += 2) narrow2(from[i], from[i + 1], &to->at[i]);
  if (n % 2 == 1) to->at[n - 1] = narrow<T>(from[n - 1]);
}

// The larger of `largest` >= 0 and |v|. NaN wins, which with fmaxf it would lose.
__device__ inline float larger(float largest, float v) {
#ifdef LLM2VEC_FAST_EMULATE
  return v != v || std::fabs(v) > largest ? std::fabs(v) : largest;
#else
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(largest) : "f"(largest), "f"(fabsf(v)));
  return largest;
#endif
}

template <int bytes>
struct WordOf { using type = uint4; };  // 16 and more: as many words as it takes
template <>
struct WordOf<8> { using type = uint2; };
template <>
struct WordOf<4> { using type = uint32_t; };
template <>
struct WordOf<2> { using type = uint16_t; };
template <>
struct WordOf<1> { using type = uint8_t; };

// Packs of 16 bytes, or of one element where a row is not aligned to them or not made of them.
template <class T, bool kAligned>
constexpr int kPackOf = kAligned ? 16 / int(sizeof(T)) : 1;

// What one of `lanes` threads owns of a row: every lanes-th pack. The width is a multiple of kPack.
template <int kPack>
struct RowShare {
  int width, lane, lanes;

  __device__ int column(int slot) const { return (slot * lanes + lane) * kPack; }
  __device__ bool owns(int slot) const { return column(slot) < width; }

  template <class T>
  __device__ Values<T, kPack> load(const T* row, int slot) const {
    using Word = typename WordOf<kPack * sizeof(T)>::type;
    static_assert(sizeof(Word) == kPack * sizeof(T), "one load for a pack");
    Word word{};  // beyond the row: zeros
    if (owns(slot)) word = __ldg(reinterpret_cast<const Word*>(row + column(slot)));
    return reinterpret_cast<const Values<T, kPack>&>(word);
  }

  template <class T>
  __device__ void store(T* row, int slot, const Values<T, kPack>& values) const {
    using Word = typename WordOf<kPack * sizeof(T)>::type;
    if (!owns(slot)) return;
#pragma unroll
    for (int i = 0; i < int(kPack * sizeof(T) / sizeof(Word)); ++i) {
      reinterpret_cast<Word*>(row + column(slot))[i] = reinterpret_cast<const Word*>(&values)[i];
    }
  }
};

// Reductions over the threadIdx.x of a block; every thread gets the same bits, in an order that is
// fixed by blockDim.x alone. `shared` has kWarp entries; each reduction of a kernel has its own, so
// that no barrier is needed between them. Blocks of one warp in x need no barrier at all
// and may hold several rows, one for each threadIdx.y.
template <class V, class Reduce>
__device__ inline V across_warps(V v, V nothing, V* shared, Reduce reduce) {
  v = reduce(v);
  if (blockDim.x == kWarp) return v;
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = v;
  __syncthreads();
  const unsigned lane = threadIdx.x % kWarp;
  return reduce(lane < blockDim.x / kWarp ? shared[lane] : nothing);
}

struct WarpSum {
  __device__ float operator()(float v) const {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
    return v;
  }
};
// Bits of floats that are not negative have the order of the floats, with NaN at the top, and the
// maximum of integers over a warp is one instruction.
struct WarpMax {
  __device__ unsigned operator()(unsigned v) const { return __reduce_max_sync(kAllLanes, v); }
};

__device__ inline float block_sum(float v, float* shared) {
  return across_warps(v, 0.0f, shared, WarpSum());
}
__device__ inline float block_max(float v, unsigned* shared) {
  return __uint_as_float(across_warps(__float_as_uint(v), 0u, shared, WarpMax()));
}

// Row-wise e4m3: v / scale with scale = max |v| / 448, and 1 for a row of zeros. The quotient is
// rounded as a division rounds it, by one correction of a product with the reciprocal (Markstein):
// three instructions in place of about ten. Below 2^-100 or so the correction fades out, and the
// scale stays a normal number, so that it has a reciprocal.
struct E4m3Row {
  float scale, inverse;

  __device__ explicit E4m3Row(float largest) {
    scale = largest / kE4m3Max;
    if (scale < FLT_MIN) scale = largest == 0.0f ? 1.0f : FLT_MIN;
    inverse = 1.0f / scale;
  }
  __device__ float operator()(float v) const {
    const float near = v * inverse;
    return fmaf(fmaf(-near, scale, v), inverse, near);
  }
};

// Divides what the threads of a row hold by the scale of the row, and tells the scale.
template <int slots, int n>
__device__ inline void quantize(float (&values)[slots][n], unsigned* shared, float* scale) {
  float most = 0.0f;
#pragma unroll
  for (int s = 0; s < slots; ++s) {
#pragma unroll
    for (int i = 0; i < n; ++i) most = larger(most, values[s][i]);
  }
  const E4m3Row divide(block_max(most, shared));
  if (threadIdx.x == 0) *scale = divide.scale;
#pragma unroll
  for (int s = 0; s < slots; ++s) {
#pragma unroll
    for (int i = 0; i < n; ++i) values[s][i] = divide(values[s][i]);
  }
}

// ---------------------------------------------------------------------------------- host side

inline bool aligned(const void* pointer, int64_t stride_bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride_bytes % 16 == 0;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One block for a row, or four rows in a block where one warp is enough for a row.
inline dim3 row_block(int64_t packs, int slots) {
  const int64_t warps = std::max<int64_t>(1, ceil_div(packs, kWarp * slots));
  return warps == 1 ? dim3(kWarp, 4) : dim3(static_cast<unsigned>(warps * kWarp));
}
inline dim3 any_row_block(int64_t width) {
  const int64_t warps = ceil_div(width, kWarp);
  return dim3(static_cast<unsigned>(kWarp * std::min<int64_t>(kRowThreads / kWarp, warps)));
}

template <class Function>
const char* with_dtype(Dtype dtype, Function function) {
  switch (dtype) {
    case Dtype::kFloat32: return function(float());
    case Dtype::kFloat16: return function(__half());
    case Dtype::kBFloat16: return function(__nv_bfloat16());
  }
  return "unknown dtype";
}

#ifndef LLM2VEC_FAST_EMULATE
template <class V>
__device__ inline V* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char llm2vec_fast_shared[];
  return reinterpret_cast<V*>(llm2vec_fast_shared);
}
template <class Call>
cudaError_t launch_checked(void (*kernel)(Call), dim3 grid, dim3 block, int shared, void* stream,
                           const Call& call) {
  // A block may use more than 48 KiB of shared memory only after it has asked for it.
  if (shared > 48 * 1024) {
    const auto error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(call);
  return cudaGetLastError();
}
#endif

// `blocks` in x, by `columns` in y. Returns nullptr, or why the kernel was not started.
template <class Call>
const char* launch(void (*kernel)(Call), int64_t blocks, dim3 block, void* stream, const Call& call,
                   int64_t columns = 1, int shared = 0) {
  if (blocks > INT32_MAX || columns > 65535) return "too many rows for one launch";
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(columns));
  const cudaError_t error = launch_checked(kernel, grid, block, shared, stream, call);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace llm2vec_fast
