// What a kernel file offers to library.cpp: one plain struct and one function per operation. No
// torch and no CUDA type stands here, so that only library.cpp has to read torch's headers.
//
// A launcher returns nullptr, or the reason why the kernel was not started. Strides are in
// elements. Shapes, dtypes and devices have been checked by library.cpp.
#pragma once

#include <cstdint>

namespace llm2vec_fast {

enum class Dtype { kFloat32, kFloat16, kBFloat16 };

struct AddRmsNorm {
  const void* x;         // (rows, width)
  const void* residual;  // like x, or nullptr
  const void* weight;    // (width,), of x's dtype, or float if wide_weight
  void* y;               // (rows, width), contiguous; of x's dtype, or e4m3 if scale is given
  void* sum;             // (rows, width), contiguous: x + residual; nullptr without a residual
  float* scale;          // (rows,), or nullptr
  int64_t rows, x_stride, residual_stride;
  int width;
  float eps;
  bool wide_weight;
};
const char* launch_add_rms_norm(const AddRmsNorm& call, Dtype dtype, void* stream);

struct Swiglu {
  const void* gate_up;  // (rows, 2 * width), gate first
  void* y;              // (rows, width), contiguous; of gate_up's dtype, or e4m3 if scale is given
  float* scale;         // (rows,), or nullptr
  int64_t rows, stride;
  int width;
};
const char* launch_swiglu(const Swiglu& call, Dtype dtype, void* stream);

// The order of names is that of POOL_MODES in ops/pool.py and of PRECISIONS in vectors.py.
enum class Mode { kMean, kWeightedMean, kLast, kFirst };
enum class Precision { kFloat32, kFloat16, kInt8, kBinary };

// Long texts are summed in slices of this many tokens, counted from the start of the text: what a
// text gets does not depend on its neighbours.
constexpr int kSliceTokens = 256;
// finish_kernel keeps a vector in shared memory; 96 KiB is what every architecture from 8.0 has.
constexpr int kWidestVector = 24 * 1024;

struct Pool {
  const void* hidden;  // (tokens, at least width)
  const void* spans;   // (texts, 2), contiguous int32 or int64; ascending and disjoint
  float* sums;         // scratch (pool_slices(texts, tokens), width); unused by last and first
  void* vectors;       // (texts, width) of the precision; binary: (texts, ceil(width / 8)) bytes
  float* scale;        // (texts,) for int8, else nullptr
  int64_t texts, tokens, hidden_stride;
  int width;  // the columns that count: after truncation
  bool wide_spans, normalize;
  Mode mode;
  Precision precision;
};
const char* launch_pool(const Pool& call, Dtype dtype, void* stream);

// Slice s of a text that starts at token t has the number text + t / kSliceTokens + s. For
// ascending disjoint spans these numbers never collide, and no prefix sum is needed anywhere.
inline int64_t pool_slices(int64_t texts, int64_t tokens) { return texts + tokens / kSliceTokens; }

}  // namespace llm2vec_fast
