// Products of some rows with a matrix by AVX-512: tiles of up to 6 rows and 64 columns, whose sums stay in registers.

#pragma once

#include "matrix.h"

namespace {

// Whether T is multiplied so; else by oneDNN, which has AMX and what CPUs without AVX-512 can do. Tests leave it out.
#if defined(WITHOUT_TILES)
template <class T> constexpr bool kTiled = false;
#elif defined(__AVX512F__) && defined(__AVX512BF16__) && !defined(__AMX_BF16__)
template <class T> constexpr bool kTiled = !std::is_same_v<T, Half>;
#elif defined(__AVX512F__)
template <class T> constexpr bool kTiled = std::is_same_v<T, float>;
#else
template <class T> constexpr bool kTiled = false;
#endif

constexpr int kTileRows = 6, kTileColumns = 64;  // 24 registers of sums
// Of a matrix at a time, which is copied; a tile's columns of it stay in the first cache. Few rows and many columns, for
// where rows are a multiple of 4 KB apart, caches hold few of them.
constexpr int64_t kBlockDepth = 64, kBlockColumns = 4 * kTileColumns;

#ifdef __AVX512F__

// What is multiplied at once: one row of the matrix, or two of a 16-bit type.
template <class T> constexpr int kUnit = kShort<T> ? 2 : 1;
template <class S> int vectors_of(const Part<S>& part) { return int(part.width + 15) / 16; }

// out [M] rows of [16 V] (+)= left [M, depth] right [depth, 16 V], a copy; `last` says which of the last 16 columns
// there are.
template <class T, int M, int V>
void tile(const T* left, int64_t left_stride, const T* right, int64_t depth, __mmask16 last, float* const* out, bool add) {
  __m512 sums[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const __mmask16 mask = v == V - 1 ? last : __mmask16(-1);
      sums[m][v] = add ? _mm512_maskz_loadu_ps(mask, out[m] + 16 * v) : _mm512_setzero_ps();
    }
  for (int64_t k = 0; k < depth; k += kUnit<T>) {
    __m512 row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      row[v] = _mm512_maskz_loadu_ps(v == V - 1 ? last : __mmask16(-1), right + kUnit<T> * 16 * v);
    right += kUnit<T> * 16 * V;
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      float value;  // or two 16-bit ones
      std::memcpy(&value, left + m * left_stride + k, 4);
      const __m512 values = _mm512_set1_ps(value);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        if constexpr (std::is_same_v<T, float>) sums[m][v] = _mm512_fmadd_ps(values, row[v], sums[m][v]);
#ifdef __AVX512BF16__
        else sums[m][v] = _mm512_dpbf16_ps(sums[m][v], __m512bh(values), __m512bh(row[v]));
#endif
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      _mm512_mask_storeu_ps(out[m] + 16 * v, v == V - 1 ? last : __mmask16(-1), sums[m][v]);
}

template <class T> using Tile = void (*)(const T*, int64_t, const T*, int64_t, __mmask16, float* const*, bool);

template <class T, int M> constexpr Tile<T> tiles_of(int vectors) {
  return vectors == 1 ? tile<T, M, 1> : vectors == 2 ? tile<T, M, 2> : vectors == 3 ? tile<T, M, 3> : tile<T, M, 4>;
}
template <class T> Tile<T> tile_of(int64_t rows, int vectors) {
  switch (rows) {
    case 1: return tiles_of<T, 1>(vectors);
    case 2: return tiles_of<T, 2>(vectors);
    case 3: return tiles_of<T, 3>(vectors);
    case 4: return tiles_of<T, 4>(vectors);
    case 5: return tiles_of<T, 5>(vectors);
    default: return tiles_of<T, 6>(vectors);
  }
}

// out(m) [width] (+)= left [rows, depth] right [depth, width] for each row m; `space` has room for a block. Meanwhile
// the first values of `next` are brought into the cache.
template <class S, class T, class Rows>
void multiply_tiles(int64_t rows, const T* left, int64_t left_stride, const Part<S>& right, T* space, Rows out, bool add,
                    const Part<S>& next) {
  const int64_t width = right.width, parts = (rows + kTileRows - 1) / kTileRows;
  const auto block_of = [](const Part<S>& matrix, int64_t k, int64_t j) {
    return matrix.block(k, kBlockDepth, j, kBlockColumns);
  };
  for (int64_t j = 0; j < width; j += kBlockColumns)
    for (int64_t k = 0; k < right.depth; k += kBlockDepth) {
      const Part<S> block = block_of(right, k, j);
      const Part<S> after = k + block.depth < right.depth ? block_of(right, k + block.depth, j)
                            : j + block.width < width     ? block_of(right, 0, j + block.width)
                                                          : block_of(next, 0, 0);
      const int64_t steps = parts * ((block.width + kTileColumns - 1) / kTileColumns);
      // All of it before the products: in between, in small pieces, took longer.
      const int64_t copied = stride_of<T>(block.depth);
      for (int64_t c = 0; c < block.width; c += kTileColumns) {
        const Part<S> columns = block.block(0, block.depth, c, kTileColumns);
        copy(columns, space + copied * c, 16 * vectors_of(columns));
      }
      for (int64_t c = 0, step = 0; c < block.width; c += kTileColumns) {
        const Part<S> columns = block.block(0, block.depth, c, kTileColumns);
        const int vectors = vectors_of(columns);
        const auto last = __mmask16(0xffff >> (16 * vectors - columns.width));
        for (int64_t part = 0; part < parts; ++part, ++step) {
          after.share(step, step + 1, steps).prefetch();
          const int64_t m = rows * part / parts, count = rows * (part + 1) / parts - m;
          float* to[kTileRows];
          for (int64_t i = 0; i < count; ++i) to[i] = out(m + i) + j + c;
          tile_of<T>(count, vectors)(left + m * left_stride + k, left_stride, space + copied * c, block.depth, last,
                                     to, add || k > 0);
        }
      }
    }
}

#endif

}  // namespace
