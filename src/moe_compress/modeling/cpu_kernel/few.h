// Products of a few rows with a matrix as it lies in memory: where reading the matrix is what takes the time.

#pragma once

#include "matrix.h"

namespace {

// Measured on OLMoE's layer, see docs/SPEED.md.
constexpr int64_t kFewRows = 12;          // up to so many a copy of the matrix takes longer
constexpr int kFewDepth = 8;              // rows of the matrix at a time
constexpr int64_t kFewAhead = 16 * 1024;  // bytes between what is multiplied and what is brought into the cache
constexpr int64_t kFewSums = 16 * 1024;   // values that are added to at a time: they have to stay in the cache

// Of a matrix of `width` columns those that are multiplied with `rows` rows at a time.
inline int64_t few_columns(int64_t rows, int64_t width) {
  return std::min(width, round_up(kFewSums / std::max(rows, int64_t(1)), 64));
}

// Rows of stored values that follow each other by `stride`.
template <class S> struct Rows {
  const S* from;
  int64_t stride;

  const S* at(int row, int64_t column) const { return from + row * stride + column; }
};

template <int N, class S> void to_floats(const S* from, float* to) {
  if constexpr (std::is_same_v<S, Half> && N >= 8) convert(from, to, N);
  else
    for (int i = 0; i < N; ++i) to[i] = to_float(from[i]);
}

// Columns of `add_rows` from `n` on, N at a time while there are as many; returns where they end. With N known,
// compilers make vectors of the loops.
template <int D, int N, class S, class Out>
int64_t add_columns(const float* factors, int64_t rows, Rows<S> matrix, Rows<S> coming, int64_t n, int64_t width, Out out) {
  for (; n + N <= width; n += N) {
    float values[D][N];
#pragma GCC unroll 8
    for (int d = 0; d < D; ++d) {
      read_ahead(coming.at(d, n));
      to_floats<N>(matrix.at(d, n), values[d]);
    }
    for (int64_t m = 0; m < rows; ++m) {
      float* sums = out(m) + n;
      for (int i = 0; i < N; ++i) {
        float sum = sums[i];
#pragma GCC unroll 8
        for (int d = 0; d < D; ++d) sum += factors[m * D + d] * values[d][i];
        sums[i] = sum;
      }
    }
  }
  return n;
}

// out(m) [width] += left [rows, D] times D rows of a matrix, for each row m. Meanwhile D rows of `coming` are brought
// into the cache, line by line: a thread that waits for what it reads gets half of the memory's rate.
template <int D, class S, class T, class Out>
void add_rows(const T* left, int64_t left_stride, int64_t rows, Rows<S> matrix, Rows<S> coming, int64_t width, Out out) {
  float factors[kFewRows * D];
  for (int64_t m = 0; m < rows; ++m) to_floats<D>(left + m * left_stride, factors + m * D);
  int64_t n = add_columns<D, 64 / sizeof(S)>(factors, rows, matrix, coming, 0, width, out);
  if constexpr (kShort<S>) n = add_columns<D, 16>(factors, rows, matrix, coming, n, width, out);
  n = add_columns<D, 8>(factors, rows, matrix, coming, n, width, out);
  add_columns<D, 1>(factors, rows, matrix, coming, n, width, out);
}

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
// The same of bf16 values, of which two rows are multiplied at once.
template <int D, class Out>
void add_pairs(const BFloat16* left, int64_t left_stride, int64_t rows, Rows<BFloat16> matrix, Rows<BFloat16> coming,
               int64_t width, Out out) {
  alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                    8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t n = 0; n < width; n += 32) {
    const auto mask = __mmask32(width - n < 32 ? (1u << (width - n)) - 1 : ~0u);
    const auto values = [&](int d) {
      read_ahead(coming.at(d, n));
      return _mm512_maskz_loadu_epi16(mask, matrix.at(d, n));
    };
    __m512bh pairs[D / 2][2];
#pragma GCC unroll 8
    for (int d = 0; d < D; d += 2) {
      const __m512i first = values(d), second = values(d + 1);
      pairs[d / 2][0] = __m512bh(_mm512_permutex2var_epi16(first, low, second));
      pairs[d / 2][1] = __m512bh(_mm512_permutex2var_epi16(first, high, second));
    }
    for (int64_t m = 0; m < rows; ++m) {
      float* to = out(m) + n;
      __m512 sums[2] = {_mm512_maskz_loadu_ps(__mmask16(mask), to),
                        _mm512_maskz_loadu_ps(__mmask16(mask >> 16), to + 16)};
#pragma GCC unroll 8
      for (int d = 0; d < D; d += 2) {
        int32_t both;
        std::memcpy(&both, left + m * left_stride + d, 4);
        const auto factors = __m512bh(_mm512_set1_epi32(both));
        for (int v = 0; v < 2; ++v) sums[v] = _mm512_dpbf16_ps(sums[v], factors, pairs[d / 2][v]);
      }
      _mm512_mask_storeu_ps(to, __mmask16(mask), sums[0]);
      _mm512_mask_storeu_ps(to + 16, __mmask16(mask >> 16), sums[1]);
    }
  }
}
#endif

// out(m) [width] += left [rows, depth] right [depth, width] for each of up to kFewRows rows m. Meanwhile the first
// values of `next` are brought into the cache.
template <class S, class T, class Out>
void multiply_few(int64_t rows, const T* left, int64_t left_stride, const Part<S>& right, Out out, const Part<S>& next) {
  const int64_t width = right.width, ahead = round_up(kFewAhead / int64_t(width * sizeof(S)) + 1, kFewDepth);
  const auto rows_of = [&](int64_t k) {
    const Part<S>& part = k < right.depth ? right : next;
    const int64_t row = k < right.depth ? k : std::min(k - right.depth, next.depth - 1);
    return Rows<S>{part.from + row * part.stride, part.stride};
  };
  int64_t k = 0;
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
  if constexpr (std::is_same_v<S, BFloat16> && std::is_same_v<T, BFloat16>) {
    for (; k + kFewDepth <= right.depth; k += kFewDepth)
      add_pairs<kFewDepth>(left + k, left_stride, rows, rows_of(k), rows_of(k + ahead), width, out);
    for (; k + 2 <= right.depth; k += 2)  // as in tiles, so that both have the same sums
      add_pairs<2>(left + k, left_stride, rows, rows_of(k), rows_of(k + ahead), width, out);
  }
#endif
  for (; k + kFewDepth <= right.depth; k += kFewDepth)
    add_rows<kFewDepth>(left + k, left_stride, rows, rows_of(k), rows_of(k + ahead), width, out);
  for (; k < right.depth; ++k)
    add_rows<1>(left + k, left_stride, rows, rows_of(k), rows_of(k + ahead), width, out);
}

}  // namespace
