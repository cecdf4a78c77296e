// Values, conversions between their types, and products of some rows with a matrix.

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

namespace at::native::cpublas {  // in libtorch_cpu.so; declared here, for its headers take long to compile
void brgemm(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, const bool, const float*, const float*, float*, bool);
void brgemm(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, const bool, const c10::BFloat16*,
            const c10::BFloat16*, float*, bool);
void brgemm(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, const bool, const c10::Half*, const c10::Half*,
            float*, bool);
void brgemm_release(bool);
}  // namespace at::native::cpublas

namespace {

using c10::BFloat16;
using c10::Half;

constexpr int64_t kMultiple = 4;  // of which the rows of `multiply_many` are
constexpr int64_t kFewRows = 2;   // up to so many are multiplied without a copy of the matrix
constexpr int64_t kFewDepth = 4;  // rows of a matrix that `multiply_few` adds at a time

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

// A part [depth, width] of a stored matrix.
template <class S> struct Part {
  const S* from;
  int64_t stride, depth, width;

  // Has one of `pieces` of it brought into the cache.
  void prefetch(int64_t piece, int64_t pieces) const {
    for (int64_t k = depth * piece / pieces; k < depth * (piece + 1) / pieces; ++k)
      for (int64_t n = 0; n < width; n += 64 / sizeof(S)) __builtin_prefetch(from + k * stride + n, 0, 2);
  }
};

// A copy of a matrix as brgemm reads it: in fp32 as it is, in 16 bits with the values of two rows side by side.
template <class S> void copy(const Part<S>& matrix, float* to) {
  for (int64_t k = 0; k < matrix.depth; ++k)
    convert(matrix.from + k * matrix.stride, to + k * matrix.width, matrix.width);
}
template <class T> void copy(const Part<T>& matrix, T* to) {
  const int64_t width = matrix.width;
  for (int64_t k = 0; k < matrix.depth; k += 2) {
    const auto* first = reinterpret_cast<const uint16_t*>(matrix.from + k * matrix.stride);
    const auto* second = first + matrix.stride;
    auto* pairs = reinterpret_cast<uint32_t*>(to) + k / 2 * width;
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

// out [rows, width] (+)= left [rows, depth] right [depth, width], for a multiple of kMultiple rows; `space` holds a copy
// of the right side, where it takes one.
template <class S, class T>
void multiply_many(int64_t rows, const T* left, int64_t left_stride, const Part<S>& right, T* space, float* out,
                   bool add) {
  const int64_t depth = stride_of<T>(right.depth), width = right.width;
  const T* matrix = space;
  int64_t stride = width;
  if constexpr (std::is_same_v<S, float>) {
    matrix = right.from;
    stride = right.stride;
  } else {
    copy(right, space);
  }
  // In 64, 16 and 4 rows: oneDNN compiles a kernel for every number of them (and every other size), in each thread.
  for (int64_t m = 0, some = 64; m < rows; m += some) {
    while (some > rows - m) some /= 4;
    at::native::cpublas::brgemm(some, width, depth, left_stride, stride, width, add, left + m * left_stride, matrix,
                                out + m * width, kShort<T>);
  }
}

// sums += factors times rows, which are `stride` apart.
template <class S>
void add_rows(const float* factors, const S* rows, int64_t stride, int64_t count, int64_t width, float* sums) {
  if (count == kFewDepth) {
    const S *first = rows, *second = rows + stride, *third = rows + 2 * stride, *fourth = rows + 3 * stride;
    const float f = factors[0], g = factors[1], h = factors[2], i = factors[3];
    for (int64_t n = 0; n < width; ++n)
      sums[n] += f * to_float(first[n]) + g * to_float(second[n]) + h * to_float(third[n]) + i * to_float(fourth[n]);
  } else {
    for (int64_t k = 0; k < count; ++k)
      for (int64_t n = 0; n < width; ++n) sums[n] += factors[k] * to_float(rows[k * stride + n]);
  }
}

// The same product for a few rows, for which a matrix is not worth a copy. `space` holds kFewDepth rows of it.
template <class S, class T>
void multiply_few(int64_t rows, const T* left, int64_t left_stride, const Part<S>& right, float* space, float* out,
                  bool add) {
  const int64_t width = right.width;
  if (!add) std::fill(out, out + rows * width, 0.0f);
  for (int64_t k = 0; k < right.depth; k += kFewDepth) {
    const int64_t count = std::min(kFewDepth, right.depth - k);
    const S* stored = right.from + k * right.stride;
    if constexpr (std::is_same_v<S, Half>)  // conversions of which are not vectorized by compilers
      for (int64_t d = 0; d < count; ++d) convert(stored + d * right.stride, space + d * width, width);
    for (int64_t m = 0; m < rows; ++m) {
      float factors[kFewDepth];
      convert(left + m * left_stride + k, factors, count);
      if constexpr (std::is_same_v<S, Half>) add_rows(factors, space, width, count, width, out + m * width);
      else add_rows(factors, stored, right.stride, count, width, out + m * width);
    }
  }
}

// The same for any number of rows; up to the next multiple of kMultiple, `left` and `out` have to be there.
template <class S, class T>
void multiply(int64_t rows, const T* left, int64_t left_stride, const Part<S>& right, T* space, float* few_space,
              float* out, bool add) {
  if (rows <= kFewRows) multiply_few(rows, left, left_stride, right, few_space, out, add);
  else multiply_many(round_up(rows, kMultiple), left, left_stride, right, space, out, add);
}

}  // namespace
