// Products of some rows with a matrix: by tiles of ours, by oneDNN, or of a few rows without a copy of the matrix.

#pragma once

#include "tiles.h"

namespace at::native::cpublas {  // in libtorch_cpu.so; declared here, for its headers take long to compile
void brgemm(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, const bool, const float*, const float*, float*, bool);
void brgemm(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, const bool, const c10::BFloat16*,
            const c10::BFloat16*, float*, bool);
void brgemm(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, const bool, const c10::Half*, const c10::Half*,
            float*, bool);
void brgemm_release(bool);
}  // namespace at::native::cpublas

namespace {

template <class T> constexpr int64_t kMultiple = kTiled<T> ? 1 : 4;  // of which the rows of `multiply_many` are
constexpr int64_t kFewRows = 2;   // up to so many are multiplied without a copy of the matrix
constexpr int64_t kFewDepth = 4;  // rows of a matrix that `multiply_few` adds at a time

// out [rows, width] (+)= left [rows, depth] right [depth, width], for a multiple of kMultiple rows; `space` holds a copy
// of the right side, where it takes one. `next` is the matrix whose turn it is after this; tiles read it ahead.
template <class S, class T>
void multiply_many(int64_t rows, const T* left, int64_t left_stride, const Part<S>& right, T* space, float* out,
                   bool add, const Part<S>& next) {
  if constexpr (kTiled<T>) {
    const auto row = [&](int64_t m) { return out + m * right.width; };
    multiply_tiles(rows, left, left_stride, right, space, row, add, next);
  } else {
    const int64_t depth = stride_of<T>(right.depth), width = right.width;
    const T* matrix = space;
    int64_t stride = width;
    if constexpr (std::is_same_v<S, float>) {
      matrix = right.from;
      stride = right.stride;
    } else {
      copy(right, space, width);
    }
    // In 64, 16 and 4 rows: oneDNN compiles a kernel for every number of them (and every other size), in each thread.
    for (int64_t m = 0, some = 64; m < rows; m += some) {
      while (some > rows - m) some /= 4;
      at::native::cpublas::brgemm(some, width, depth, left_stride, stride, width, add, left + m * left_stride, matrix,
                                  out + m * width, kShort<T>);
    }
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
              float* out, bool add, const Part<S>& next) {
  if (rows <= kFewRows) multiply_few(rows, left, left_stride, right, few_space, out, add);
  else multiply_many(round_up(rows, kMultiple<T>), left, left_stride, right, space, out, add, next);
}

}  // namespace
