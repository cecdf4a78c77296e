// Some rows of one expert: all products up to the inner values of the down projection.

#pragma once

#include <algorithm>
#include <cstdint>

#include "call.h"
#include "products.h"

namespace {

// Measured on OLMoE's layer, see docs/SPEED.md.
constexpr int64_t kPanel = 1 << 16;    // values of a matrix with a long inner dimension at a time
constexpr int64_t kShallowest = 64;    // and at least so many of its rows
static_assert(kPanel >= kBlockDepth * kBlockColumns);
static_assert(kRows * kColumns >= kFewSums + 64 * kFewRows);

// SiLU(gate) * up, with e^-gate as 2^t by a polynomial (Remez, 2e-7), which compilers vectorize.
inline float silu_times(float gate, float up) {
  constexpr float kLog2e = 1.44269504f, kShift = 12582912.0f;  // 1.5 * 2^23: leaves the integer in the low bits
  float x = -gate;
  x = x < -87.0f ? -87.0f : x;
  x = x > 87.0f ? 87.0f : x;
  const float shifted = x * kLog2e + kShift, rest = x * kLog2e - (shifted - kShift);
  float power = 1.33335581e-3f;
  power = power * rest + 9.61812911e-3f;
  power = power * rest + 5.55041087e-2f;
  power = power * rest + 2.40226507e-1f;
  power = power * rest + 6.93147181e-1f;
  power = power * rest + 1.0f;
  uint32_t bits, exponent;
  std::memcpy(&bits, &power, 4);
  std::memcpy(&exponent, &shifted, 4);
  bits += exponent << 23;
  std::memcpy(&power, &bits, 4);
  return gate * up / (1.0f + power);
}

// How many rows of a matrix of `width` columns are multiplied with at a time.
int64_t panel(int64_t width) { return std::max(kShallowest, kPanel / width / 2 * 2); }

// The products of the rows of one item.
template <class S, class T> class Worker {
 public:
  // `width`: of what is gathered; `rank`: of what it is first multiplied to.
  Worker(const Call& call, int64_t width, int64_t rank)
      : call_(call), rank_stride_(stride_of<T>(call.up_rank)) {
    const int64_t longest = std::max(call.up_width, call.intermediate), columns = std::min(kColumns, longest);
    const int64_t wide = kRows * columns;  // few rows of more columns are no more
    const int64_t gathered = kRows * stride_of<T>(width), gated = wide + kRows;
    const int64_t ranks = std::max({rank, call.up_rank, call.down_rank});
    const int64_t space = std::max({kPanel, std::max(kShallowest, stride_of<T>(columns)) * ranks, rank_stride_ * columns});
    Scratch scratch(sizeof(T) * (gathered + kRows * rank_stride_ + gated + space) +
                    sizeof(float) * (2 * kRows * ranks + 2 * wide) + kAligning);
    gathered_ = scratch.take<T>(gathered);
    inner_ = scratch.take<T>(kRows * rank_stride_);
    gated_ = scratch.take<T>(gated);
    space_ = scratch.take<T>(space);
    inner_sums_ = scratch.take<float>(kRows * ranks);
    sums_ = scratch.take<float>(kRows * ranks);
    up_ = scratch.take<float>(wide);
    gate_ = scratch.take<float>(wide);
  }

  // From what the up projection reads to the rows before the gate, or to the values of the down projection. `next` is
  // the expert whose turn it is after this.
  void up(const Item& item, int64_t next) {
    const int64_t rank = call_.up_rank, width = call_.up_width, intermediate = call_.intermediate;
    const int64_t* order = begin(item);
    const auto* seen = static_cast<const S*>(call_.seen);
    gather(item, call_.seen_width, [&](int64_t row) { return seen + row / call_.top_k * call_.seen_width; });
    const int64_t columns = few() ? few_columns(rows_, std::max(width, intermediate)) : kColumns;
    const Part<S> next_in = in_part(next);
    long_product(in_part(item.expert), inner_sums_, up_part(item.expert, 0, columns));
    for (int64_t m = 0; m < rows_; ++m) convert_row(inner_sums_ + m * rank, inner_ + m * rank_stride_, rank);
    if (call_.before_gate) {
      for (int64_t j = 0; j < width; j += columns) {
        const int64_t n = std::min(columns, width - j);
        const Part<S> after = j + n < width ? up_part(item.expert, j + n, columns) : next_in;
        up_product(item, up_part(item.expert, j, n), j, up_, after);
        for (int64_t m = 0; m < item.rows; ++m)
          convert(up_ + m * n, static_cast<S*>(call_.before_gate) + order[m] * width + j, n);
      }
      return;
    }
    for (int64_t j = 0; j < intermediate; j += columns) {
      const int64_t n = std::min(columns, intermediate - j), stride = stride_of<T>(n);
      const Part<S> gate = up_part(item.expert, j, n), up = up_part(item.expert, intermediate + j, n);
      const Part<S> down = down_part(item.expert, j, n);
      const Part<S> after = j + n < intermediate ? up_part(item.expert, j + n, columns) : next_in;
      up_product(item, gate, j, gate_, up);
      up_product(item, up, intermediate + j, up_, down);
      const int64_t left = std::min(columns, intermediate - j - n);
      const Part<S> ahead[] = {down, up_part(item.expert, j + n, left), up_part(item.expert, intermediate + j + n, left)};
      for (int64_t m = 0; m < rows_; ++m) {
        if (!kTiled<T> && !few())  // tiles read ahead themselves
          for (const auto& part : ahead) part.share(m, m + 1, rows_).prefetch();
        float* row = gate_ + m * n;
        for (int64_t i = 0; i < n; ++i) row[i] = silu_times(row[i], up_[m * n + i]);
        convert_row(row, gated_ + m * stride, n);
        if (call_.gated && m < item.rows)
          convert(row, static_cast<S*>(call_.gated) + order[m] * intermediate + j, n);
      }
      product(gated_, stride, down, sums_, j > 0, after);
    }
    finish(item);
  }

  // From gated rows to the values of the down projection.
  void down(const Item& item, int64_t next) {
    const auto* gated = static_cast<const S*>(call_.gated);
    gather(item, call_.intermediate, [&](int64_t row) { return gated + row * call_.intermediate; });
    long_product(down_part(item.expert, 0, call_.intermediate), sums_, down_part(next, 0, call_.intermediate));
    finish(item);
  }

 private:
  bool few() const { return rows_ <= kFewRows; }

  const int64_t* begin(const Item& item) const { return call_.order + item.first; }

  Part<S> in_part(int64_t expert) const {
    const int64_t rank = call_.up_rank, depth = call_.seen_width;
    return {static_cast<const S*>(call_.up_in) + expert * depth * rank, rank, depth, rank};
  }
  Part<S> up_part(int64_t expert, int64_t column, int64_t count) const {
    const auto* matrix = static_cast<const S*>(call_.up_out) + expert * call_.up_rank * call_.up_width;
    return {matrix + column, call_.up_width, call_.up_rank, std::min(count, call_.up_width - column)};
  }
  Part<S> down_part(int64_t expert, int64_t row, int64_t count) const {
    const auto* matrix = static_cast<const S*>(call_.down_in) + expert * call_.intermediate * call_.down_rank;
    return {matrix + row * call_.down_rank, call_.down_rank, count, call_.down_rank};
  }

  template <class Source> void gather(const Item& item, int64_t width, Source source) {
    rows_ = item.rows <= kFewRows ? item.rows : round_up(item.rows, kMultiple<T>);
    const int64_t stride = stride_of<T>(width);
    for (int64_t m = 0; m < item.rows; ++m) convert_row(source(begin(item)[m]), gathered_ + m * stride, width);
    std::fill(gathered_ + item.rows * stride, gathered_ + rows_ * stride, T{});
  }

  void product(const T* left, int64_t left_stride, const Part<S>& right, float* out, bool add, const Part<S>& next) {
    multiply(rows_, left, left_stride, right, space_, out, add, next);
  }

  // What was gathered times a matrix with a long inner dimension.
  void long_product(const Part<S>& matrix, float* out, const Part<S>& next) {
    const int64_t most = few() ? matrix.depth : panel(matrix.width);
    for (int64_t k = 0; k < matrix.depth; k += most) {
      const Part<S> part = matrix.block(k, most, 0, matrix.width);
      const bool last = k + most >= matrix.depth;
      product(gathered_ + k, stride_of<T>(matrix.depth), part, out, k > 0,
              last ? next : matrix.block(k + most, most, 0, matrix.width));
    }
  }

  // Some columns of the up projection, from `column` on.
  void up_product(const Item& item, const Part<S>& part, int64_t column, float* out, const Part<S>& next) {
    const auto* base = static_cast<const S*>(call_.base);
    for (int64_t m = 0; base && m < item.rows; ++m)
      convert(base + begin(item)[m] / call_.top_k * call_.up_width + column, out + m * part.width, part.width);
    product(inner_, rank_stride_, part, out, base != nullptr, next);
  }

  // The values of the down projection, times the routing weights.
  void finish(const Item& item) {
    const int64_t rank = call_.down_rank, stride = stride_of<T>(rank);
    for (int64_t m = 0; m < item.rows; ++m) {
      const float weight = call_.weights[begin(item)[m]];
      for (int64_t d = 0; d < rank; ++d) sums_[m * rank + d] *= weight;
      convert_row(sums_ + m * rank, static_cast<T*>(call_.values) + (item.first + m) * stride, rank);
    }
  }

  const Call& call_;
  const int64_t rank_stride_;
  int64_t rows_ = 0;  // of the item, and those that fill up
  T *gathered_, *inner_, *gated_, *space_;
  float *inner_sums_, *sums_, *up_, *gate_;
};

}  // namespace
