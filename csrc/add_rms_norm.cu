// Residual add and RMSNorm; optionally with row-wise e4m3 output.
//
// x and the residual are read once: a row waits in registers, packed in its own dtype, while its
// squares are summed. The norm is taken of the rounded sum, as add_rms_norm_ref does.
#include <type_traits>

#include "common.cuh"

namespace llm2vec_fast {
namespace {

constexpr int kSlots = 4;  // packs of a thread: rows of up to 512 * 4 * 16 bytes
using Fp8 = __nv_fp8_storage_t;

__device__ inline float rstd_of(const AddRmsNorm& call, float squares) {
  return __frsqrt_rn(squares / float(call.width) + call.eps);
}

// The four packs of a thread, all on their way before the first is used.
template <class T, int kPack>
struct Row {
  Values<T, kPack> pack[kSlots];

  __device__ Row(const RowShare<kPack>& mine, const void* row) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) pack[s] = mine.load(static_cast<const T*>(row), s);
  }
  __device__ void add(const Row& other) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      float wide[kPack];
#pragma unroll
      for (int i = 0; i < kPack; ++i) wide[i] = at(s, i) + other.at(s, i);
      narrow(wide, &pack[s]);
    }
  }
  __device__ float at(int s, int i) const { return widen(pack[s].at[i]); }
};

template <class T, class Out>
__global__ void __launch_bounds__(kRowThreads) add_rms_norm_kernel(const AddRmsNorm call) {
  constexpr int kPack = kPackOf<T, true>;
  __shared__ float sums[kWarp];
  __shared__ unsigned largest[kWarp];

  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= call.rows) return;  // only in blocks of one-warp rows, which have no barrier
  const RowShare<kPack> mine{call.width, int(threadIdx.x), int(blockDim.x)};

  Row<T, kPack> r(mine, static_cast<const T*>(call.x) + row * call.x_stride);
  if (call.residual != nullptr) {
    r.add(Row<T, kPack>(mine, static_cast<const T*>(call.residual) + row * call.residual_stride));
    T* sum = static_cast<T*>(call.sum) + row * call.width;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) mine.store(sum, s, r.pack[s]);
  }
  // Asked for before the barrier, so that the weights arrive while the warps wait for each other.
  const Row<T, kPack> weight(mine, call.weight);

  float squares = 0.0f;
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
#pragma unroll
    for (int i = 0; i < kPack; ++i) squares = fmaf(r.at(s, i), r.at(s, i), squares);
  }
  const float rstd = rstd_of(call, block_sum(squares, sums));

  float y[kSlots][kPack];
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
#pragma unroll
    for (int i = 0; i < kPack; ++i) y[s][i] = r.at(s, i) * rstd * weight.at(s, i);
  }
  if constexpr (std::is_same<Out, Fp8>::value) quantize(y, largest, call.scale + row);
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    Values<Out, kPack> out;
    narrow(y[s], &out);
    mine.store(static_cast<Out*>(call.y) + row * call.width, s, out);
  }
}

// Any width, any alignment, a weight of another dtype: element by element, and what registers
// cannot hold is read again.
template <class T, class Weight, class Out>
__global__ void __launch_bounds__(kRowThreads) any_row_kernel(const AddRmsNorm call) {
  __shared__ float sums[kWarp];
  __shared__ unsigned largest[kWarp];
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(call.x) + row * call.x_stride;
  const Weight* weight = static_cast<const Weight*>(call.weight);
  Out* y = static_cast<Out*>(call.y) + row * call.width;
  const int first = threadIdx.x, step = blockDim.x;

  if (call.residual != nullptr) {
    const T* residual = static_cast<const T*>(call.residual) + row * call.residual_stride;
    T* sum = static_cast<T*>(call.sum) + row * call.width;
    for (int i = first; i < call.width; i += step) {
      sum[i] = narrow<T>(widen(x[i]) + widen(residual[i]));
    }
    x = sum;  // below, each thread reads back only what it has written
  }
  float squares = 0.0f;
  for (int i = first; i < call.width; i += step) squares = fmaf(widen(x[i]), widen(x[i]), squares);
  const float rstd = rstd_of(call, block_sum(squares, sums));
  const auto normed = [&](int i) { return widen(x[i]) * rstd * widen(weight[i]); };

  if constexpr (std::is_same<Out, Fp8>::value) {
    float most = 0.0f;
    for (int i = first; i < call.width; i += step) most = larger(most, normed(i));
    const E4m3Row divide(block_max(most, largest));
    if (threadIdx.x == 0) call.scale[row] = divide.scale;
    for (int i = first; i < call.width; i += step) y[i] = narrow<Out>(divide(normed(i)));
  } else {
    for (int i = first; i < call.width; i += step) y[i] = narrow<Out>(normed(i));
  }
}

template <class T, class Out>
const char* start(const AddRmsNorm& call, void* stream) {
  const bool fits = aligned(call.x, call.x_stride * sizeof(T)) &&
                    aligned(call.residual, call.residual_stride * sizeof(T)) &&
                    aligned(call.weight, call.width * sizeof(T)) &&
                    call.width <= kRowThreads * kSlots * kPackOf<T, true>;
  if (!fits || call.wide_weight) {
    const auto kernel =
        call.wide_weight ? any_row_kernel<T, float, Out> : any_row_kernel<T, T, Out>;
    return launch(kernel, call.rows, any_row_block(call.width), stream, call);
  }
  const dim3 block = row_block(call.width / kPackOf<T, true>, kSlots);
  return launch(add_rms_norm_kernel<T, Out>, ceil_div(call.rows, block.y), block, stream, call);
}

}  // namespace

const char* launch_add_rms_norm(const AddRmsNorm& call, Dtype dtype, void* stream) {
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    return call.scale == nullptr ? start<T, T>(call, stream) : start<T, Fp8>(call, stream);
  });
}

}  // namespace llm2vec_fast
