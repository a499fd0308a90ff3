// The CPU's kernels: one plain struct and one function per operation, once for each instruction
// set. cpu_kernels.cpp is compiled several times, cpu_library.cpp picks the best for the processor.
//
// A function does the rows [begin, end) of a call, so that any number of threads can share it. What
// a row gets depends on the row, or the text, alone. Strides are in elements.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace llm2vec_fast {

struct Rope {
  void* qkv;              // (rows, heads + rest) x 2 half; the first `heads` are rotated in place
  const void* positions;  // (rows,), contiguous int32 or int64
  const float* cos;       // (positions, half); sin likewise
  const float* sin;
  int64_t rows, stride, table_rows, table_stride;
  int heads, half;
  bool wide_positions;
};

struct Attention {
  const void* q;  // (tokens, kv_heads * group, size)
  const void* k;  // (tokens, kv_heads, size)
  const void* v;
  void* out;  // like q, contiguous
  int64_t q_stride, k_stride, v_stride;  // from token to token
  int64_t q_head, k_head, v_head;        // from head to head
  int64_t window;                        // 0: none
  int kv_heads, group, size;
  bool causal;
  float scale;
};

// Some query rows of one text and one kv head. A row is a query of one of the head's `group` query
// heads; those of a token follow each other.
struct Work {
  int64_t start, length;  // of the text, in tokens
  int kv_head;
  int64_t begin, end;  // of length * group rows
};

struct CpuKernels {
  const char* name;
  void (*add_rms_norm)(const AddRmsNorm&, Dtype, int64_t begin, int64_t end);
  void (*swiglu)(const Swiglu&, Dtype, int64_t begin, int64_t end);
  void (*rope)(const Rope&, Dtype, int64_t begin, int64_t end);
  int64_t (*attention_scratch)(const Attention&, Dtype, int64_t longest);  // floats, for a thread
  void (*attention)(const Attention&, Dtype, const Work&, float* scratch);
};

const CpuKernels& kernels_amx();
const CpuKernels& kernels_avx512();
const CpuKernels& kernels_avx2();
const CpuKernels& kernels_plain();

}  // namespace llm2vec_fast
