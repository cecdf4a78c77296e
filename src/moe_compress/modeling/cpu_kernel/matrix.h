// Values, conversions between their types, and copies of matrices.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace c10 {
struct BFloat16 { uint16_t bits; };
struct Half { uint16_t bits; };
}  // namespace c10

namespace {

using c10::BFloat16;
using c10::Half;

// S is the type that is stored, T the one that is multiplied: the same, or fp32 where the CPU cannot multiply S.
template <class T> constexpr bool kShort = sizeof(T) == 2;

int64_t round_up(int64_t number, int64_t multiple) { return (number + multiple - 1) / multiple * multiple; }

// Values from one row to the next: 16-bit ones are multiplied in pairs.
template <class T> int64_t stride_of(int64_t width) { return kShort<T> ? round_up(width, 2) : width; }

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline void from_float(float x, float& out) { out = x; }
inline void from_float(float x, BFloat16& out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  out.bits = uint16_t(x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
#ifdef __F16C__
inline float to_float(Half x) { return _cvtsh_ss(x.bits); }
inline void from_float(float x, Half& out) { out.bits = _cvtss_sh(x, 0); }
#else
float to_float(Half);  // never called: build.py asks for F16C
void from_float(float, Half&);
#endif

template <class S, class T> void convert(const S* from, T* to, int64_t count) {
  if constexpr (std::is_same_v<S, T>) {
    std::memcpy(to, from, count * sizeof(T));
    return;
  }
  int64_t n = 0;
  // The conversions that compilers do not vectorize.
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<S, float> && std::is_same_v<T, BFloat16>)
    for (; n + 16 <= count; n += 16) {
      const __m256bh values = _mm512_cvtneps_pbh(_mm512_loadu_ps(from + n));
      std::memcpy(to + n, &values, sizeof values);
    }
#endif
#ifdef __F16C__
  if constexpr (std::is_same_v<S, Half> && std::is_same_v<T, float>)
    for (; n + 8 <= count; n += 8)
      _mm256_storeu_ps(to + n, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + n))));
  if constexpr (std::is_same_v<S, float> && std::is_same_v<T, Half>)
    for (; n + 8 <= count; n += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + n), _mm256_cvtps_ph(_mm256_loadu_ps(from + n), 0));
#endif
  for (; n < count; ++n) from_float(to_float(from[n]), to[n]);
}

// A row of `width` values, and zeros up to the stride.
template <class S, class T> void convert_row(const S* from, T* to, int64_t width) {
  convert(from, to, width);
  std::fill(to + width, to + stride_of<T>(width), T{});
}

// Has a line brought into the second cache: the first has room for what is multiplied meanwhile, and where rows are a
// multiple of 4 KB apart it holds few lines of them.
inline void read_ahead(const void* line) { __builtin_prefetch(line, 0, 2); }

// A part [depth, width] of a stored matrix.
template <class S> struct Part {
  const S* from;
  int64_t stride, depth, width;

  // At most `deep` rows from `row` on, of at most `wide` columns from `column` on.
  Part block(int64_t row, int64_t deep, int64_t column, int64_t wide) const {
    return {from + row * stride + column, stride, std::min(deep, depth - row), std::min(wide, width - column)};
  }
  // Its rows from begin / whole of them to end / whole.
  Part share(int64_t begin, int64_t end, int64_t whole) const {
    const int64_t first = depth * begin / whole;
    return {from + first * stride, stride, depth * end / whole - first, width};
  }
  void prefetch() const {
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t n = 0; n < width; n += 64 / sizeof(S)) read_ahead(from + k * stride + n);
  }
};

// A copy of a matrix as it is multiplied, with rows of `to_width` values: in fp32 as it is, in 16 bits with the values of
// two rows side by side.
template <class S, class T> void copy(const Part<S>& matrix, T* to, int64_t to_width) {
  const int64_t width = matrix.width;
  if constexpr (!kShort<T>) {
    for (int64_t k = 0; k < matrix.depth; ++k) convert(matrix.from + k * matrix.stride, to + k * to_width, width);
  } else {
    for (int64_t k = 0; k < matrix.depth; k += 2) {
      const auto* first = reinterpret_cast<const uint16_t*>(matrix.from + k * matrix.stride);
      const auto* second = first + matrix.stride;
      auto* pairs = reinterpret_cast<uint32_t*>(to) + k / 2 * to_width;
      for (int64_t n = 0; n < width; n += 32) {
        __builtin_prefetch(first + 8 * matrix.stride + n);
        __builtin_prefetch(second + 8 * matrix.stride + n);
      }
      if (k + 1 < matrix.depth)
        for (int64_t n = 0; n < width; ++n) pairs[n] = uint32_t(first[n]) | uint32_t(second[n]) << 16;
      else
        for (int64_t n = 0; n < width; ++n) pairs[n] = first[n];
    }
  }
}

}  // namespace
