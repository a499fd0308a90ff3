// What both libraries ask of their tensors; only torch's stable ABI.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <string>

#include "kernels.h"

#ifndef LLM2VEC_FAST_SOURCES  // a digest of all files here, from setup.py
#define LLM2VEC_FAST_SOURCES ""
#endif

namespace llm2vec_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream told;
  (told << ... << parts);
  throw std::runtime_error(told.str());
}

inline std::string shape_of(const Tensor& t) {
  std::string told = "(";
  for (int64_t d = 0; d < t.dim(); ++d) told += (d ? ", " : "") + std::to_string(t.size(d));
  return told + ")";
}

inline Dtype dtype_of(const char* op, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::Half: return Dtype::kFloat16;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    default: break;
  }
  throw std::runtime_error(std::string(op) + ": only float32, float16 and bfloat16 are computed");
}

}  // namespace llm2vec_fast
