// Attention on packed texts, by vectors; part of cpu_kernels.cpp. L keys of a text, H the head
// dimension rounded up to whole vectors, R queries that are computed together.
#pragma once

#include "cpu.h"
#include "cpu_vector.h"

namespace llm2vec_fast {
namespace {

struct Span {
  int64_t first, last;
};

// The keys [first, last) that any of the queries of some tokens sees.
Span seen(const Attention& call, const Work& work, int64_t token, int64_t last_token) {
  Span span{0, call.causal ? last_token + 1 : work.length};
  if (call.window && token >= call.window) span.first = token - call.window + 1;
  if (call.window && span.last > last_token + call.window) span.last = last_token + call.window;
  return span;
}

// Some rows of a piece that are computed together, and the keys that any of them sees, from a
// multiple of `step` on.
struct Block {
  Block(const Attention& call, const Work& work, int64_t begin, int64_t most, int64_t step)
      : begin(begin), rows(work.end - begin < most ? work.end - begin : most) {
    const Span all = seen(call, work, begin / call.group, (begin + rows - 1) / call.group);
    first = all.first / step * step;
    last = all.last;
    columns = (last - first + step - 1) / step * step;
  }
  int64_t begin, rows, first, last, columns;
};

// Where a row's query or output lies, in tokens of `stride` and heads of `head` numbers.
int64_t place_of(const Attention& call, const Work& work, int64_t row, int64_t stride,
                 int64_t head) {
  return (work.start + row / call.group) * stride +
         (work.kv_head * call.group + row % call.group) * head;
}

// Which of the numbers n, n + 1, ... of a vector are in [first, last).
inline Ints between(int64_t n, int64_t first, int64_t last) {
  Ints at;
  for (int lane = 0; lane < WIDTH; ++lane) at[lane] = lane;
  at += static_cast<int32_t>(n);
  return (at >= static_cast<int32_t>(first)) & (at < static_cast<int32_t>(last));
}

// Scores to weights of the keys that each query sees; 1 / the sum of each row. Maxima and sums of
// all rows are found together: a vector of each row, transposed.
template <class T>
Vec softmax(const Attention& call, const Work& work, const Block& block, float* scores,
            int64_t stride, T* weights, int64_t weights_stride) {
  constexpr auto order = std::make_index_sequence<WIDTH>();
  Vec tops[WIDTH] = {}, totals[WIDTH] = {}, room[WIDTH];
  for (int64_t row = 0; row < block.rows; ++row) {
    float* own = scores + row * stride;
    const int64_t token = (block.begin + row) / call.group;
    const Span span = seen(call, work, token, token);
    const int64_t first = span.first - block.first, last = span.last - block.first;
    Vec top = Vec{} - kInfinity;
    for (int64_t n = 0; n < block.columns; n += kWidth) {
      Vec score = load(own + n) * call.scale;
      if (n < first || n + kWidth > last) score = between(n, first, last) ? score : -kInfinity;
      store(own + n, score);
      top = larger(top, score);
    }
    tops[row] = top;
  }
  transposed(tops, room, order);
  for (int n = 1; n < WIDTH; ++n) tops[0] = larger(tops[0], tops[n]);
  for (int64_t row = 0; row < block.rows; ++row) {
    Vec total = {};
    for (int64_t n = 0; n < block.columns; n += kWidth) {
      const Vec weight = exp<sizeof(T) == 2>(load(scores + row * stride + n) - tops[0][row]);
      store(weights + row * weights_stride + n, weight);
      total += weight;
    }
    totals[row] = total;
  }
  transposed(totals, room, order);
  for (int step = WIDTH / 2; step; step /= 2) {
    for (int n = 0; n < step; ++n) totals[n] += totals[n + step];
  }
  return 1.0f / totals[0];
}

// A block's outputs: sums of values, each times its part.
template <class T>
void put(const Attention& call, const Work& work, const Block& block, const float* sums,
         int64_t stride, Vec parts, T* out) {
  const int64_t size = call.size, tokens = size * call.group * call.kv_heads;
  for (int64_t row = 0; row < block.rows; ++row) {
    T* to = out + place_of(call, work, block.begin + row, tokens, size);
    for (int64_t h = 0; h < size; h += kWidth) {
      store(to + h, load(sums + row * stride + h) * parts[row], size - h);
    }
  }
}

template <int64_t vectors>
inline void product(const float* a, int64_t depth, int64_t a_stride, const float* b,
                    int64_t b_stride, float* c, int64_t c_stride) {
  Vec sums[kRows][vectors] = {};
  for (int64_t n = 0; n < depth; ++n) {
    Vec right[vectors];
#pragma GCC unroll 8
    for (int64_t v = 0; v < vectors; ++v) right[v] = load(b + n * b_stride + v * kWidth);
#pragma GCC unroll 16
    for (int64_t row = 0; row < kRows; ++row) {
      const float left = a[row * a_stride + n];
#pragma GCC unroll 8
      for (int64_t v = 0; v < vectors; ++v) sums[row][v] += left * right[v];
    }
  }
#pragma GCC unroll 16
  for (int64_t row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int64_t v = 0; v < vectors; ++v) store(c + row * c_stride + v * kWidth, sums[row][v]);
  }
}

// c (kRows, columns) = a (kRows, depth) b (depth, columns), columns in whole vectors
void multiply(const float* a, int64_t depth, int64_t a_stride, const float* b, int64_t b_stride,
              float* c, int64_t c_stride, int64_t columns) {
  int64_t n = 0;
  for (; n + 2 * kWidth <= columns; n += 2 * kWidth) {
    product<2>(a, depth, a_stride, b + n, b_stride, c + n, c_stride);
  }
  if (n < columns) product<1>(a, depth, a_stride, b + n, b_stride, c + n, c_stride);
}

// Keys side by side: to[h][key].
template <class T>
void transpose(const T* from, int64_t stride, int64_t rows, int64_t columns, float* to,
               int64_t to_stride) {
  for (int64_t row = 0; row < rows; row += kWidth) {
    for (int64_t column = 0; column < columns; column += kWidth) {
      Vec square[WIDTH] = {}, next[WIDTH];
      for (int64_t n = 0; n < kWidth && row + n < rows; ++n) {
        square[n] = load(from + (row + n) * stride + column, columns - column);
      }
      transposed(square, next, std::make_index_sequence<WIDTH>());
      for (int64_t n = 0; n < kWidth; ++n) store(to + (column + n) * to_stride + row, square[n]);
    }
  }
}

// Room for a row of n numbers: a cache line more, because rows that are a power of two apart share
// few places in the cache.
int64_t apart(int64_t n) { return up(n, 32) + 16; }

int64_t attention_scratch(const Attention& call, int64_t longest) {
  const int64_t H = up(call.size), L = apart(longest);
  return 2 * H * L + kRows * (2 * H + L);
}

template <class T>
void attention(const Attention& call, const Work& work, float* scratch) {
  static_assert(kRows <= kWidth);
  const int64_t size = call.size, H = up(size), L = apart(work.length);
  float *keys_HL = scratch, *values_LH = keys_HL + H * L, *q_RH = values_LH + L * H;
  float *out_RH = q_RH + kRows * H, *scores_RL = out_RH + kRows * H;
  const auto at = [&](const void* x, int64_t stride, int64_t head) {
    return static_cast<const T*>(x) + work.start * stride + work.kv_head * head;
  };
  transpose(at(call.k, call.k_stride, call.k_head), call.k_stride, work.length, size, keys_HL, L);
  const T* values = at(call.v, call.v_stride, call.v_head);
  for (int64_t n = 0; n < work.length; ++n) {
    for (int64_t h = 0; h < H; h += kWidth) {
      store(values_LH + n * H + h, load(values + n * call.v_stride + h, size - h));
    }
  }
  std::memset(q_RH, 0, kRows * H * sizeof(float));  // for rows past the last
  for (int64_t begin = work.begin; begin < work.end; begin += kRows) {
    const Block block(call, work, begin, kRows, kWidth);
    for (int64_t row = 0; row < block.rows; ++row) {
      const T* q = static_cast<const T*>(call.q);
      q += place_of(call, work, begin + row, call.q_stride, call.q_head);
      for (int64_t h = 0; h < H; h += kWidth) store(q_RH + row * H + h, load(q + h, size - h));
    }
    multiply(q_RH, size, H, keys_HL + block.first, L, scores_RL, L, block.columns);
    const Vec parts = softmax(call, work, block, scores_RL, L, scores_RL, L);
    multiply(scores_RL, block.last - block.first, L, values_LH + block.first * H, H, out_RH, H, H);
    put(call, work, block, out_RH, H, parts, static_cast<T*>(call.out));
  }
}

}  // namespace
}  // namespace llm2vec_fast
