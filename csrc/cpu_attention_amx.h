// Attention in bf16 on matrix units (Intel AMX); part of cpu_kernels.cpp where -mamx-bf16 is given.
// Products are tiles of 16 x 32 by 32 x 16 numbers, summed in fp32. The second factor lies in
// pairs: a row of its tile has 16 columns of two numbers that follow each other in depth. Scores,
// maxima and exponentials are fp32; weights are rounded to bf16, as in flash attention.
#pragma once

#include "cpu_attention.h"

namespace llm2vec_fast {
namespace {

constexpr int64_t kTile = 16, kDepth = 32;  // rows or columns of a tile, numbers summed by one
constexpr int64_t kPairs = kTile * kTile;   // in a tile of pairs

struct TileShape {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// What is written before is in memory: the compiler does not know that tiles are read from there.
inline void settle() { asm volatile("" ::: "memory"); }

// c (16, 16 columns) = a (16, 32 depth) b; tiles of b lie one behind the other: tile (d, column)
// is at b + (column * b_column + d * b_depth) * kPairs.
void tiles(const Bf16* a, int64_t a_stride, int64_t depth, const uint32_t* b, int64_t b_column,
           int64_t b_depth, float* c, int64_t c_stride, int64_t columns) {
  settle();
  int64_t n = 0;
  for (; n + 4 <= columns; n += 4) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t d = 0; d < depth; ++d) {
      const uint32_t* right = b + (n * b_column + d * b_depth) * kPairs;
      _tile_loadd(4, a + d * kDepth, a_stride * 2);
      _tile_loadd(5, right, 64);
      _tile_loadd(6, right + b_column * kPairs, 64);
      _tile_dpbf16ps(0, 4, 5);
      _tile_dpbf16ps(1, 4, 6);
      _tile_loadd(7, right + 2 * b_column * kPairs, 64);
      _tile_loadd(5, right + 3 * b_column * kPairs, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, c + n * kTile, c_stride * 4);
    _tile_stored(1, c + (n + 1) * kTile, c_stride * 4);
    _tile_stored(2, c + (n + 2) * kTile, c_stride * 4);
    _tile_stored(3, c + (n + 3) * kTile, c_stride * 4);
  }
  for (; n < columns; ++n) {
    _tile_zero(0);
    for (int64_t d = 0; d < depth; ++d) {
      _tile_loadd(4, a + d * kDepth, a_stride * 2);
      _tile_loadd(5, b + (n * b_column + d * b_depth) * kPairs, 64);
      _tile_dpbf16ps(0, 4, 5);
    }
    _tile_stored(0, c + n * kTile, c_stride * 4);
  }
}

// The first n of `most` numbers; the others are 0.
template <int64_t most, class To>
inline To loaded(const Bf16* from, int64_t n) {
  To x;
  static_assert(sizeof(x) == most * sizeof(Bf16));
  if (n >= most) {
    std::memcpy(&x, from, sizeof(x));
    return x;
  }
  Bf16 padded[most] = {};
  std::memcpy(padded, from, n * sizeof(Bf16));
  std::memcpy(&x, padded, sizeof(x));
  return x;
}

// Rows of keys to tiles of pairs: two numbers of a key are one of 32 bits; those are transposed.
void pair_keys(const Bf16* keys, int64_t stride, int64_t length, int64_t size, int64_t depth,
               uint32_t* to) {
  for (int64_t row = 0; row < up(length, kDepth); row += kTile) {
    for (int64_t d = 0; d < depth; ++d, to += kPairs) {
      Vec square[kTile] = {}, next[kTile];
      for (int64_t n = 0; n < kTile && row + n < length; ++n) {
        square[n] = loaded<kDepth, Vec>(keys + (row + n) * stride + d * kDepth, size - d * kDepth);
      }
      transposed(square, next, std::make_index_sequence<WIDTH>());
      std::memcpy(to, square, sizeof(square));
    }
  }
}

// Rows of values to tiles of pairs: a value and that of the next key side by side.
void pair_values(const Bf16* values, int64_t stride, int64_t length, int64_t size, int64_t columns,
                 uint32_t* to) {
  for (int64_t row = 0; row < length; row += kDepth) {
    for (int64_t column = 0; column < columns; ++column) {
      for (int64_t n = row; n < row + kDepth; n += 2, to += kTile) {
        const Bf16* from = values + n * stride + column * kTile;
        const int64_t left = size - column * kTile;
        Bits pair = {};
        if (n < length && left > 0) {
          pair = __builtin_convertvector((loaded<kTile, Halves>(from, left)), Bits);
        }
        if (n + 1 < length && left > 0) {
          pair |= __builtin_convertvector((loaded<kTile, Halves>(from + stride, left)), Bits) << 16;
        }
        std::memcpy(to, &pair, sizeof(pair));
      }
    }
  }
}

int64_t amx_scratch(const Attention& call, int64_t longest) {
  const int64_t H = up(call.size, kDepth), L = up(longest, kDepth);
  const int64_t S = apart(longest);
  return L * H + kTile * (H / 2 + S + S + H);  // floats: pairs of keys and of values, and a block
}

void attention_amx(const Attention& call, const Work& work, float* scratch) {
  static_assert(kTile == kWidth);
  const int64_t size = call.size, H = up(size, kDepth), L = up(work.length, kDepth);
  const int64_t depth = H / kDepth, columns = H / kTile, S = apart(work.length);
  auto* keys = reinterpret_cast<uint32_t*>(scratch);
  uint32_t* values = keys + L * H / 2;
  auto* q_RH = reinterpret_cast<Bf16*>(values + L * H / 2);
  auto* scores_RL = reinterpret_cast<float*>(q_RH + kTile * H);
  auto* weights_RL = reinterpret_cast<Bf16*>(scores_RL + kTile * S);
  auto* out_RH = reinterpret_cast<float*>(weights_RL + 2 * kTile * S);
  const auto at = [&](const void* x, int64_t stride, int64_t head) {
    return static_cast<const Bf16*>(x) + work.start * stride + work.kv_head * head;
  };
  pair_keys(at(call.k, call.k_stride, call.k_head), call.k_stride, work.length, size, depth, keys);
  pair_values(at(call.v, call.v_stride, call.v_head), call.v_stride, work.length, size, columns,
              values);
  std::memset(q_RH, 0, kTile * H * sizeof(Bf16));  // for rows past the last
  const TileShape shape;
  asm volatile("" ::"r"(&shape) : "memory");  // the next line reads more of it than it says
  _tile_loadconfig(&shape);
  for (int64_t begin = work.begin; begin < work.end; begin += kTile) {
    const Block block(call, work, begin, kTile, kDepth);
    for (int64_t row = 0; row < block.rows; ++row) {
      const Bf16* q = static_cast<const Bf16*>(call.q);
      q += place_of(call, work, begin + row, call.q_stride, call.q_head);
      for (int64_t h = 0; h < size; h += kDepth) {
        const Vec some = loaded<kDepth, Vec>(q + h, size - h);
        std::memcpy(q_RH + row * H + h, &some, sizeof(some));
      }
    }
    tiles(q_RH, H, depth, keys + block.first / kTile * depth * kPairs, depth, 1, scores_RL, S,
          block.columns / kTile);
    const Vec parts = softmax(call, work, block, scores_RL, S, weights_RL, 2 * S);
    tiles(weights_RL, 2 * S, block.columns / kDepth,
          values + block.first / kDepth * columns * kPairs, 1, columns, out_RH, H, columns);
    put(call, work, block, out_RH, H, parts, static_cast<Bf16*>(call.out));
  }
  _tile_release();
}

}  // namespace
}  // namespace llm2vec_fast
