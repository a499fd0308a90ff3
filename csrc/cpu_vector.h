// The compiler's vectors of WIDTH floats, and what kernels do with them; in fp32, rounded once.
// Part of cpu_kernels.cpp.
#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

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

// The sum of all numbers of a vector, pair by pair.
template <int step = WIDTH / 2>
inline float sum(Vec x) {
  x += turned<step>(x, std::make_index_sequence<WIDTH>());
  if constexpr (step > 1) return sum<step / 2>(x);
  return x[0];
}

inline Vec larger(Vec x, Vec y) { return x < y ? y : x; }

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

int64_t up(int64_t n, int64_t whole = kWidth) { return (n + whole - 1) / whole * whole; }

}  // namespace
}  // namespace llm2vec_fast
