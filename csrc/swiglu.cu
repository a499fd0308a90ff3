// silu(gate) * up; optionally with row-wise e4m3 output.
//
// Without a scale every element stands alone and a row is cut into balanced chunks. With a scale
// one block has a whole row: the products wait in registers, in fp32, for the largest of them, so
// that nothing is read or computed twice.
#include <type_traits>

#include "common.cuh"

namespace llm2vec_fast {
namespace {

constexpr int kChunkSlots = 2;
constexpr int kChunkThreads = 256;
using Fp8 = __nv_fp8_storage_t;

// For gate far below zero the exponential is infinite and the quotient -0, as the limit is.
template <class T>
__device__ inline float gated(T gate, T up) {
  const float wide = widen(gate);
  return __fdividef(wide, 1.0f + __expf(-wide)) * widen(up);
}

struct Chunks {
  Swiglu of;
  int in_row;
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(kChunkThreads) swiglu_kernel(const Chunks call) {
  constexpr int kPack = kPackOf<T, kAligned>;
  const int64_t row = blockIdx.x / call.in_row;
  const int chunk = blockIdx.x % call.in_row;
  const RowShare<kPack> mine{call.of.width, int(chunk * blockDim.x + threadIdx.x),
                             int(call.in_row * blockDim.x)};

  const T* gate_row = static_cast<const T*>(call.of.gate_up) + row * call.of.stride;
  Values<T, kPack> gate[kChunkSlots], up[kChunkSlots];
#pragma unroll
  for (int s = 0; s < kChunkSlots; ++s) {
    gate[s] = mine.load(gate_row, s);
    up[s] = mine.load(gate_row + call.of.width, s);
  }
#pragma unroll
  for (int s = 0; s < kChunkSlots; ++s) {
    float wide[kPack];
#pragma unroll
    for (int i = 0; i < kPack; ++i) wide[i] = gated(gate[s].at[i], up[s].at[i]);
    Values<T, kPack> out;
    narrow(wide, &out);
    mine.store(static_cast<T*>(call.of.y) + row * call.of.width, s, out);
  }
}

template <class T, int kSlots>
__global__ void __launch_bounds__(kRowThreads) swiglu_fp8_kernel(const Swiglu call) {
  constexpr int kPack = kPackOf<T, true>;
  __shared__ unsigned largest[kWarp];
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= call.rows) return;  // only in blocks of one-warp rows, which have no barrier
  const RowShare<kPack> mine{call.width, int(threadIdx.x), int(blockDim.x)};

  const T* gate_row = static_cast<const T*>(call.gate_up) + row * call.stride;
  float product[kSlots][kPack];
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    const Values<T, kPack> gate = mine.load(gate_row, s);
    const Values<T, kPack> up = mine.load(gate_row + call.width, s);
#pragma unroll
    for (int i = 0; i < kPack; ++i) product[s][i] = gated(gate.at[i], up.at[i]);
  }
  quantize(product, largest, call.scale + row);
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    Values<Fp8, kPack> out;
    narrow(product[s], &out);
    mine.store(static_cast<Fp8*>(call.y) + row * call.width, s, out);
  }
}

// Any width and any alignment: element by element, computed twice.
template <class T>
__global__ void __launch_bounds__(kRowThreads) any_row_kernel(const Swiglu call) {
  __shared__ unsigned largest[kWarp];
  const int64_t row = blockIdx.x;
  const T* gate = static_cast<const T*>(call.gate_up) + row * call.stride;
  const T* up = gate + call.width;
  Fp8* y = static_cast<Fp8*>(call.y) + row * call.width;
  const int first = threadIdx.x, step = blockDim.x;

  float most = 0.0f;
  for (int i = first; i < call.width; i += step) most = larger(most, gated(gate[i], up[i]));
  const E4m3Row divide(block_max(most, largest));
  if (threadIdx.x == 0) call.scale[row] = divide.scale;
  for (int i = first; i < call.width; i += step) y[i] = narrow<Fp8>(divide(gated(gate[i], up[i])));
}

template <class T, bool kAligned>
const char* start_chunks(const Swiglu& call, void* stream) {
  // Chunks of equal size: 1792 packs are four times 224 threads, not three and a half of 256.
  const int64_t packs = call.width / kPackOf<T, kAligned>;
  const int64_t chunks = ceil_div(packs, kChunkThreads * kChunkSlots);
  const int64_t threads = ceil_div(ceil_div(packs, chunks * kChunkSlots), kWarp) * kWarp;
  return launch(swiglu_kernel<T, kAligned>, call.rows * chunks, dim3(unsigned(threads)), stream,
                Chunks{call, int(chunks)});
}

template <class T, int kSlots>
const char* start_rows(const Swiglu& call, void* stream) {
  const dim3 block = row_block(call.width / kPackOf<T, true>, kSlots);
  return launch(swiglu_fp8_kernel<T, kSlots>, ceil_div(call.rows, block.y), block, stream, call);
}

}  // namespace

const char* launch_swiglu(const Swiglu& call, Dtype dtype, void* stream) {
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool fits = aligned(call.gate_up, call.stride * sizeof(T)) &&
                      call.width * sizeof(T) % 16 == 0;  // so that up and each row of y are aligned
    if (call.scale == nullptr) {
      return fits ? start_chunks<T, true>(call, stream) : start_chunks<T, false>(call, stream);
    }
    // Four packs a thread are the rule, because more blocks then share a multiprocessor.
    const int packs = call.width / kPackOf<T, true>;
    if (fits && packs <= 4 * kRowThreads) return start_rows<T, 4>(call, stream);
    if (fits && packs <= 8 * kRowThreads) return start_rows<T, 8>(call, stream);
    return launch(any_row_kernel<T>, call.rows, any_row_block(call.width), stream, call);
  });
}

}  // namespace llm2vec_fast
