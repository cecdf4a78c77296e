// Products of some rows with a matrix: by tiles of ours, by oneDNN, or of a few rows without a copy of the matrix.

#pragma once

#include "few.h"
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

// The same for any number of rows; up to the next multiple of kMultiple, `left` and `out` have to be there.
template <class S, class T>
void multiply(int64_t rows, const T* left, int64_t left_stride, const Part<S>& right, T* space, float* out, bool add,
              const Part<S>& next) {
  if (rows > kFewRows) {
    multiply_many(round_up(rows, kMultiple<T>), left, left_stride, right, space, out, add, next);
    return;
  }
  if (!add) std::fill(out, out + rows * right.width, 0.0f);
  multiply_few(rows, left, left_stride, right, [&](int64_t m) { return out + m * right.width; }, next);
}

}  // namespace
