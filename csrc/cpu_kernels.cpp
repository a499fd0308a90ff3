// RMSNorm, SwiGLU, rotary embedding and attention for one instruction set of the CPU:
//
//     -DISA=avx512 -DWIDTH=16 -DROWS=8 -march=x86-64-v4
//
// WIDTH floats are a vector, ROWS the queries that attention computes together. All in fp32,
// rounded once; vectors are the compiler's own, so that there is but one source.
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
  const Bits bits = as<Bits>(x);
  const Bits near = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(x == x ? near : Bits{} + 0x7fc0, Halves);
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

// exp of numbers up to 88 or so, within 2 units in the last place; what would be less than the
// smallest normal number is 0. NaN stays NaN.
inline Vec exp(Vec x) {
  const Vec above = x < -87.33f ? Vec{} - 87.33f : x;
  const Vec magic = Vec{} + 12582912.0f;  // adding it rounds to a whole number
  const Vec turns = (above * 1.44269504f + magic) - magic;
  const Vec rest = (above - turns * 0.693359375f) + turns * 2.12194440e-4f;
  Vec y = Vec{} + 1.9875691500e-4f;  // Cephes' expf
  y = y * rest + 1.3981999507e-3f;
  y = y * rest + 8.3334519073e-3f;
  y = y * rest + 4.1665795894e-2f;
  y = y * rest + 1.6666665459e-1f;
  y = y * rest + 5.0000001201e-1f;
  y = y * rest * rest + rest + 1.0f;
  const Ints power = __builtin_convertvector(turns, Ints);
  return x < -87.33f ? Vec{} : y * as<Vec>((power + 127) << 23);
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
      const Vec sigmoid = (x < 0.0f ? small : Vec{} + 1.0f) / (small + 1.0f);
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

// Keys side by side: to[h][key]. Rows are read in squares that are transposed in registers.
template <class T>
void transpose(const T* from, int64_t stride, int64_t rows, int64_t columns, float* to,
               int64_t to_stride) {
  constexpr auto order = std::make_index_sequence<WIDTH>();
  for (int64_t row = 0; row < rows; row += kWidth) {
    for (int64_t column = 0; column < columns; column += kWidth) {
      Vec square[WIDTH] = {}, next[WIDTH];
      for (int64_t n = 0; n < kWidth && row + n < rows; ++n) {
        square[n] = load(from + (row + n) * stride + column, columns - column);
      }
#pragma GCC unroll 4
      for (int rounds = WIDTH; rounds > 1; rounds /= 2) {
#pragma GCC unroll 16
        for (int n = 0; n < WIDTH / 2; ++n) {
          next[2 * n] = zipped(square[n], square[n + WIDTH / 2], false, order);
          next[2 * n + 1] = zipped(square[n], square[n + WIDTH / 2], true, order);
        }
#pragma GCC unroll 16
        for (int n = 0; n < WIDTH; ++n) square[n] = next[n];
      }
      for (int64_t n = 0; n < kWidth; ++n) store(to + (column + n) * to_stride + row, square[n]);
    }
  }
}

// Scores to weights, in place, of the keys [first, last) that a query sees; the row's sum.
float softmax(float* scores, int64_t columns, int64_t first, int64_t last) {
  for (int64_t n = 0; n < first; ++n) scores[n] = -kInfinity;
  for (int64_t n = last; n < columns; ++n) scores[n] = -kInfinity;
  Vec top = load(scores), total = {};
  for (int64_t n = kWidth; n < columns; n += kWidth) top = larger(top, load(scores + n));
  const float most = reduced(top, larger);
  for (int64_t n = 0; n < columns; n += kWidth) {
    const Vec weight = exp(load(scores + n) - most);
    store(scores + n, weight);
    total += weight;
  }
  return sum(total);
}

int64_t up(int64_t n) { return (n + kWidth - 1) / kWidth * kWidth; }

int64_t attention_scratch(const Attention& call, int64_t longest) {
  const int64_t H = up(call.size), L = up(longest);
  return 2 * H * L + kRows * (2 * H + L);
}

template <class T>
void attention(const Attention& call, const Work& work, float* scratch) {
  const int64_t size = call.size, H = up(size), L = up(work.length), group = call.group;
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
  for (int64_t block = work.begin; block < work.end; block += kRows) {
    const int64_t rows = work.end - block < kRows ? work.end - block : kRows;
    const int64_t token = block / group, last_token = (block + rows - 1) / group;
    // The keys that any of these queries sees, from a whole vector on.
    const int64_t low = call.window && token >= call.window ? token - call.window + 1 : 0;
    const int64_t first = low / kWidth * kWidth;
    int64_t last = call.causal ? last_token + 1 : work.length;
    if (call.window && last > last_token + call.window) last = last_token + call.window;
    const int64_t columns = up(last - first);
    for (int64_t row = 0; row < kRows; ++row) {  // rows past the last repeat it
      const int64_t own = block + (row < rows ? row : rows - 1);
      const T* q = static_cast<const T*>(call.q) + (work.start + own / group) * call.q_stride +
                   (work.kv_head * group + own % group) * call.q_head;
      for (int64_t h = 0; h < H; h += kWidth) {
        store(q_RH + row * H + h, load(q + h, size - h) * call.scale);
      }
    }
    multiply(q_RH, size, H, keys_HL + first, L, scores_RL, L, columns);
    float sums[kRows];
    for (int64_t row = 0; row < kRows; ++row) {
      const int64_t own = (block + (row < rows ? row : rows - 1)) / group;
      int64_t from = call.window && own >= call.window ? own - call.window + 1 : 0;
      int64_t to = call.causal ? own + 1 : work.length;
      if (call.window && to > own + call.window) to = own + call.window;
      from = from > first ? from - first : 0;
      sums[row] = softmax(scores_RL + row * L, columns, from, to - first);
    }
    multiply(scores_RL, last - first, L, values_LH + first * H, H, out_RH, H, H);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t own = block + row;
      T* out = static_cast<T*>(call.out) +
               ((work.start + own / group) * call.kv_heads * group + work.kv_head * group +
                own % group) * size;
      const float part = 1.0f / sums[row];
      for (int64_t h = 0; h < size; h += kWidth) {
        store(out + h, load(out_RH + row * H + h) * part, size - h);
      }
    }
  }
}

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

void attention_of(const Attention& call, Dtype dtype, const Work& work, float* scratch) {
  dtype == Dtype::kFloat32 ? attention<float>(call, work, scratch)
                           : attention<Bf16>(call, work, scratch);
}

}  // namespace

#define STRING_OF(x) #x
#define NAME_OF(x) STRING_OF(x)
#define JOINED(a, b) a##b
#define FUNCTION_OF(isa) JOINED(kernels_, isa)

const CpuKernels& FUNCTION_OF(ISA)() {
  static const CpuKernels kernels{NAME_OF(ISA),      add_rms_norm_of, swiglu_of, rope_of,
                                  attention_scratch, attention_of};
  return kernels;
}

}  // namespace llm2vec_fast
