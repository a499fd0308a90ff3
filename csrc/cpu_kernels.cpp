// RMSNorm, SwiGLU, rotary embedding and attention for one instruction set of the CPU:
//
//     -DISA=avx512 -DWIDTH=16 -DROWS=8 -march=x86-64-v4
//
// WIDTH floats are a vector, ROWS the queries that attention computes together. All in fp32,
// rounded once; vectors are the compiler's own, so that there is but one source.
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "cpu.h"

namespace llm2vec_fast {
namespace {

typedef float Vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Bits __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));
constexpr int64_t kWidth = WIDTH, kRows = ROWS;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Bf16 {
  uint16_t bits;
};

template <class To, class From>
inline To as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline Vec load(const float* from) {
  Vec x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

inline Vec load(const Bf16* from) {
  Halves x;
  std::memcpy(&x, from, sizeof(x));
  return as<Vec>(__builtin_convertvector(x, Bits) << 16);
}

inline void store(float* to, Vec x) { std::memcpy(to, &x, sizeof(x)); }

inline Halves rounded(Vec x) {  // to the nearest, halves to even; every NaN becomes the same
#ifdef __AVX512BF16__
  return as<Halves>(_mm512_cvtneps_pbh(as<__m512>(x)));  // and what is less than normal becomes 0
#else
  const Bits bits = as<Bits>(x);
  const Bits near = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(x == x ? near : Bits{} + 0x7fc0, Halves);
#endif
}

inline void store(Bf16* to, Vec x) {
  const Halves bits = rounded(x);
  std::memcpy(to, &bits, sizeof(bits));
}

// The first n numbers of a vector; the others are 0.
template <class T>
inline Vec load(const T* from, int64_t n) {
  if (n >= kWidth) return load(from);
  T padded[kWidth] = {};
  std::memcpy(padded, from, n * sizeof(T));
  return load(padded);
}

template <class T>
inline void store(T* to, Vec x, int64_t n) {
  if (n >= kWidth) return store(to, x);
  T padded[kWidth];
  store(padded, x);
  std::memcpy(to, padded, n * sizeof(T));
}

inline Vec as_stored(Vec x, const float*) { return x; }
inline Vec as_stored(Vec x, const Bf16*) {
  return as<Vec>(__builtin_convertvector(rounded(x), Bits) << 16);
}

template <int step, size_t... n>
inline Vec turned(Vec x, std::index_sequence<n...>) {
  return __builtin_shufflevector(x, x, ((n + step) % WIDTH)...);
}

// All numbers of a vector combined, pair by pair.
template <int step = WIDTH / 2, class F>
inline float reduced(Vec x, const F& f) {
  x = f(x, turned<step>(x, std::make_index_sequence<WIDTH>()));
  if constexpr (step > 1) return reduced<step / 2>(x, f);
  return x[0];
}

inline Vec larger(Vec x, Vec y) { return x < y ? y : x; }
inline float sum(Vec x) {
  return reduced(x, [](Vec a, Vec b) { return a + b; });
}

// y * 2^turns, turns a whole number.
inline Vec scaled(Vec y, Vec turns) {
#ifdef __AVX512F__
  return as<Vec>(_mm512_scalef_ps(as<__m512>(y), as<__m512>(turns)));
#else
  return y * as<Vec>((__builtin_convertvector(turns, Ints) + 127) << 23);
#endif
}

// exp of numbers up to 88. What would be less than the smallest normal number is 0: those take a
// hundred times as long. NaN stays NaN. Within 2 units in the last place, or, rough, within 1 part
// of 20,000: a hundredth of what bf16 rounds off.
template <bool rough = false>
inline Vec exp(Vec x) {
  const Ints vanishes = x < -87.0f;
  x = vanishes ? Vec{} - 87.0f : x;
  const Vec magic = Vec{} + 12582912.0f;  // adding it rounds to a whole number
  const Vec turns = (x * 1.44269504f + magic) - magic;
  Vec rest = x - turns * 0.693359375f, y;
  rest += turns * 2.12194440e-4f;
  if constexpr (rough) {
    y = rest * (1 / 24.0f) + 1 / 6.0f;
    y = y * rest + 0.5f;
    y = y * rest + 1.0f;
    y = y * rest + 1.0f;
  } else {
    y = rest * 1.9875691500e-4f + 1.3981999507e-3f;  // Cephes' expf
    y = y * rest + 8.3334519073e-3f;
    y = y * rest + 4.1665795894e-2f;
    y = y * rest + 1.6666665459e-1f;
    y = y * rest + 5.0000001201e-1f;
    y = y * (rest * rest) + rest + 1.0f;
  }
  return vanishes ? Vec{} : scaled(y, turns);
}

// 1 / x of normal numbers.
inline Vec inverse(Vec x) {
#ifdef __AVX512F__
  const Vec near = as<Vec>(_mm512_rcp14_ps(as<__m512>(x)));
  return near * (2.0f - x * near);  // one step of Newton's: a division takes as long as ten others
#else
  return 1.0f / x;
#endif
}

// --- row by row ---

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

// --- attention: L keys of a text, H the head dimension rounded up to whole vectors ---

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

template <size_t... n>
inline Vec zipped(Vec a, Vec b, bool high, std::index_sequence<n...>) {
  constexpr int half = WIDTH / 2;
  return high ? __builtin_shufflevector(a, b, (n / 2 + n % 2 * WIDTH + half)...)
              : __builtin_shufflevector(a, b, (n / 2 + n % 2 * WIDTH)...);
}

// A square of WIDTH vectors, transposed in registers; `next` is room.
template <size_t... n>
inline void transposed(Vec* square, Vec* next, std::index_sequence<n...> order) {
#pragma GCC unroll 4
  for (int rounds = WIDTH; rounds > 1; rounds /= 2) {
#pragma GCC unroll 16
    for (int row = 0; row < WIDTH / 2; ++row) {
      next[2 * row] = zipped(square[row], square[row + WIDTH / 2], false, order);
      next[2 * row + 1] = zipped(square[row], square[row + WIDTH / 2], true, order);
    }
#pragma GCC unroll 16
    for (int row = 0; row < WIDTH; ++row) square[row] = next[row];
  }
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

int64_t up(int64_t n, int64_t whole = kWidth) { return (n + whole - 1) / whole * whole; }

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

#ifdef __AMX_BF16__
#include "cpu_attention_amx.h"
#endif

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
