// Pooling over spans, then L2 normalisation and the form in which vectors are stored.
//
// slice_kernel sums slices of kSliceTokens tokens, so that one long text is spread over many
// blocks; finish_kernel adds the slices of a text in order and writes its vector. There is no
// atomic: the order of every sum depends on the length of the text alone. `last` and `first` need
// only the second kernel, with one hidden state in the place of the slices.
#include "common.cuh"

namespace llm2vec_fast {
namespace {

constexpr int kSliceWarps = 8;
constexpr int kFinishThreads = 512;
constexpr int kInFlight = 4;  // 16-byte loads that a thread has under way

struct Span {
  int64_t start, length;
};

__device__ inline Span span_of(const Pool& call, int64_t text) {
  int64_t start, end;
  if (call.wide_spans) {
    start = static_cast<const int64_t*>(call.spans)[2 * text];
    end = static_cast<const int64_t*>(call.spans)[2 * text + 1];
  } else {
    start = static_cast<const int32_t*>(call.spans)[2 * text];
    end = static_cast<const int32_t*>(call.spans)[2 * text + 1];
  }
  return {start, max(end - start, int64_t(0))};
}

__device__ inline int64_t first_slice(int64_t text, const Span& span) {
  return text + span.start / kSliceTokens;
}

// The last text whose first slice is not after this one, or -1. First slices ascend strictly.
__device__ inline int64_t text_of(const Pool& call, int64_t slice) {
  int64_t below = -1, above = call.texts;
  while (above - below > 1) {
    const int64_t text = (below + above) / 2;
    if (first_slice(text, span_of(call, text)) <= slice) {
      below = text;
    } else {
      above = text;
    }
  }
  return below;
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kWarp * kSliceWarps) slice_kernel(const Pool call) {
  constexpr int kPack = kPackOf<T, kAligned>;
  constexpr int kColumns = kWarp * kPack;  // a block has this many columns, one pack for each lane
  __shared__ float sums[kSliceWarps][kColumns];

  // Some numbers belong to no slice: there are as many as the worst case needs.
  const int64_t text = text_of(call, blockIdx.x);
  if (text < 0) return;
  const Span span = span_of(call, text);
  const int64_t skipped = (blockIdx.x - first_slice(text, span)) * kSliceTokens;
  if (skipped >= span.length) return;

  const int count = int(min(span.length - skipped, int64_t(kSliceTokens)));
  const int first_column = blockIdx.y * kColumns;
  const RowShare<kPack> mine{call.width - first_column, int(threadIdx.x), kWarp};
  const T* rows = static_cast<const T*>(call.hidden) +
                  (span.start + skipped) * call.hidden_stride + first_column;
  const bool weighted = call.mode == Mode::kWeightedMean;

  float sum[kPack] = {};
  for (int token = threadIdx.y; token < count; token += kSliceWarps * kInFlight) {
    Values<T, kPack> packs[kInFlight] = {};
#pragma unroll
    for (int n = 0; n < kInFlight; ++n) {
      const int64_t at = token + n * kSliceWarps;
      if (at < count) packs[n] = mine.load(rows + at * call.hidden_stride, 0);
    }
#pragma unroll
    for (int n = 0; n < kInFlight; ++n) {
      const float weight = weighted ? float(skipped + token + n * kSliceWarps + 1) : 1.0f;
#pragma unroll
      for (int i = 0; i < kPack; ++i) sum[i] = fmaf(weight, widen(packs[n].at[i]), sum[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kPack; ++i) sums[threadIdx.y][mine.column(0) + i] = sum[i];
  __syncthreads();
  const int column = threadIdx.y * kWarp + threadIdx.x;
  if (column >= kColumns || column >= mine.width) return;
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kSliceWarps; ++warp) total += sums[warp][column];
  call.sums[int64_t(blockIdx.x) * call.width + first_column + column] = total;
}

__device__ inline void store_vector(const Pool& call, int64_t text, const float* vector,
                                    float scale) {
  const int64_t offset = text * call.width;
  const int threads = blockDim.x;
  if (call.precision == Precision::kBinary) {
    const int bytes = (call.width + 7) / 8;
    for (int byte = threadIdx.x; byte < bytes; byte += threads) {
      unsigned bits = 0;
      for (int bit = 0; bit < 8; ++bit) {  // numpy.packbits: the first is the highest
        const int column = 8 * byte + bit;
        bits = 2 * bits + (column < call.width && vector[column] > 0.0f);
      }
      static_cast<uint8_t*>(call.vectors)[text * bytes + byte] = uint8_t(bits);
    }
    return;
  }
  for (int column = threadIdx.x; column < call.width; column += threads) {
    const float v = vector[column];
    if (call.precision == Precision::kFloat32) {
      static_cast<float*>(call.vectors)[offset + column] = v;
    } else if (call.precision == Precision::kFloat16) {
      static_cast<__half*>(call.vectors)[offset + column] = __float2half_rn(v);
    } else {
      const int step = __float2int_rn(v / (scale > 0.0f ? scale : 1.0f));
      static_cast<int8_t*>(call.vectors)[offset + column] = int8_t(max(-127, min(127, step)));
    }
  }
}

// T is float where slices are added, else the dtype of the hidden states.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const Pool call) {
  constexpr int kPack = kPackOf<T, kAligned>;
  __shared__ float squares_of[kWarp];
  __shared__ unsigned largest_of[kWarp];
  float* vector = dynamic_shared<float>();

  const int64_t text = blockIdx.x;
  const Span span = span_of(call, text);
  const T* rows = static_cast<const T*>(call.hidden);
  int64_t stride = call.hidden_stride, first = span.start, count = span.length > 0;
  float total = 1.0f;
  if (call.mode == Mode::kLast) {
    first += span.length - 1;
  } else if (call.mode != Mode::kFirst) {
    rows = reinterpret_cast<const T*>(call.sums);
    stride = call.width;
    first = first_slice(text, span);
    count = (span.length + kSliceTokens - 1) / kSliceTokens;
    total = call.mode == Mode::kMean ? float(span.length)
                                     : float(span.length * (span.length + 1) / 2);
  }
  if (span.length == 0) total = 1.0f;  // a text without tokens is the zero vector

  const RowShare<kPack> mine{call.width, int(threadIdx.x), int(blockDim.x)};
  float squares = 0.0f;
  float largest = 0.0f;
  for (int slot = 0; mine.owns(slot); ++slot) {
    float sum[kPack] = {};
#pragma unroll 4
    for (int64_t row = first; row < first + count; ++row) {
      const Values<T, kPack> pack = mine.load(rows + row * stride, slot);
#pragma unroll
      for (int i = 0; i < kPack; ++i) sum[i] += widen(pack.at[i]);
    }
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const float v = sum[i] / total;
      vector[mine.column(slot) + i] = v;
      squares = fmaf(v, v, squares);
      largest = larger(largest, v);
    }
  }
  // Each thread divides what it has written itself; the barriers come after.
  if (call.normalize) {
    const float norm = fmaxf(sqrtf(block_sum(squares, squares_of)), 1e-12f);
    largest = 0.0f;
    for (int slot = 0; mine.owns(slot); ++slot) {
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        float& v = vector[mine.column(slot) + i];
        v /= norm;
        largest = larger(largest, v);
      }
    }
  }
  if (call.precision == Precision::kInt8) {
    largest = block_max(largest, largest_of);
    if (threadIdx.x == 0) call.scale[text] = largest / 127.0f;
  }
  __syncthreads();  // from here on threads read what others have written
  store_vector(call, text, vector, largest / 127.0f);
}

template <class T, bool kAligned>
const char* finish(const Pool& call, void* stream) {
  const int64_t warps = ceil_div(call.width, kWarp * kPackOf<T, kAligned>);
  const dim3 block(unsigned(kWarp * std::min<int64_t>(kFinishThreads / kWarp, warps)));
  return launch(finish_kernel<T, kAligned>, call.texts, block, stream, call, 1,
                call.width * int(sizeof(float)));
}

template <class T, bool kAligned>
const char* start(const Pool& call, void* stream) {
  if (call.mode == Mode::kLast || call.mode == Mode::kFirst) {
    return finish<T, kAligned>(call, stream);
  }
  const char* error = launch(slice_kernel<T, kAligned>, pool_slices(call.texts, call.tokens),
                             dim3(kWarp, kSliceWarps), stream, call,
                             ceil_div(call.width, kWarp * kPackOf<T, kAligned>));
  if (error != nullptr) return error;
  return aligned(call.sums, call.width * sizeof(float)) ? finish<float, true>(call, stream)
                                                        : finish<float, false>(call, stream);
}

}  // namespace

const char* launch_pool(const Pool& call, Dtype dtype, void* stream) {
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool fits = aligned(call.hidden, call.hidden_stride * sizeof(T)) &&
                      call.width * sizeof(T) % 16 == 0;
    return fits ? start<T, true>(call, stream) : start<T, false>(call, stream);
  });
}

}  // namespace llm2vec_fast
