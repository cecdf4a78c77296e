// The low-rank experts of one MoE layer on a CPU, without gradient. Compiled and called by __init__.py.
//
// A thread takes some rows of one expert through all products up to the inner values of the down projection, so that
// what lies between them stays in its cache. Products are ours where AVX-512 does them (tiles.h), else oneDNN's, by the
// interface to its small GEMMs that PyTorch has for kernels of its own (brgemm); both sum in fp32. Of a matrix a copy is
// made on the way, in the order that the instructions want. Each product has the matrix after it read ahead.
//
// A row is one (token, chosen expert) pair, numbered token * top_k + choice.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "products.h"

extern "C" struct Call {
  int64_t tokens, top_k, experts, seen_width, up_rank, up_width, intermediate, down_rank, hidden, threads;
  const int64_t* order;  // rows, sorted by expert
  const int64_t* ends;   // [experts], where those of each expert end
  const float* weights;  // [tokens * top_k] of the routing, by row
  const void* seen;      // [tokens, seen_width]: what the up projection reads
  const void* base;      // [tokens, up_width]: what its low-rank product is added to; or null
  const void* up_in;     // [experts, seen_width, up_rank]
  const void* up_out;    // [experts, up_rank, up_width]
  const void* down_in;   // [experts, intermediate, down_rank]
  const void* down_out;  // [experts, down_rank, hidden]
  void* before_gate;     // [tokens * top_k, up_width] by row; or null: the gate is SiLU(first half) * second half
  void* gated;           // [tokens * top_k, intermediate] by row; may be null with this gate
  void* values;          // [tokens * top_k + 128, down_rank rounded up], of the type that is multiplied, sorted
  void* out;             // [tokens, hidden]
};

namespace {

// Measured on OLMoE's layer, see docs/SPEED.md.
constexpr int64_t kRows = 128;         // of an expert at a time
constexpr int64_t kPanel = 1 << 16;    // values of a matrix with a long inner dimension at a time
constexpr int64_t kShallowest = 64;    // and at least so many of its rows
constexpr int64_t kColumns = 256;      // of a matrix with a long outer dimension at a time
static_assert(kPanel >= kBlockDepth * kBlockColumns);
constexpr int64_t kSums = 512 * 256;   // values of the output that a thread adds up at a time

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

// What a thread needs in between; kept, so that no call has to get memory from the system.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    static thread_local std::vector<char> kept;
    if (kept.size() < size_t(bytes)) kept.resize(bytes);
    next_ = reinterpret_cast<char*>(round_up(reinterpret_cast<int64_t>(kept.data()), 64));
  }
  template <class T> T* take(int64_t count) {
    char* begin = next_;
    next_ += round_up(count * sizeof(T), 64);
    return reinterpret_cast<T*>(begin);
  }

 private:
  char* next_;
};
constexpr int64_t kAligning = 1024;  // bytes that this takes beyond the values

// How many rows of a matrix of `width` columns are multiplied with at a time.
int64_t panel(int64_t width) { return std::max(kShallowest, kPanel / width / 2 * 2); }

// Where the rows of an expert begin in `order`.
int64_t begin_of(const Call& call, int64_t expert) { return expert ? call.ends[expert - 1] : 0; }

struct Item { int64_t expert, first, rows; };

// The rows of each expert, in parts of nearly the same size; the largest first, so that threads end together.
std::vector<Item> items_of(const Call& call) {
  std::vector<Item> items;
  for (int64_t e = 0; e < call.experts; ++e) {
    const int64_t first = begin_of(call, e), count = call.ends[e] - first, parts = (count + kRows - 1) / kRows;
    for (int64_t part = 0, begin = 0; part < parts; ++part) {
      const int64_t end = std::min(count, round_up(count * (part + 1) / parts, 4));
      if (end > begin) items.push_back({e, first + begin, end - begin});
      begin = end;
    }
  }
  std::stable_sort(items.begin(), items.end(), [](const Item& left, const Item& right) { return left.rows > right.rows; });
  return items;
}

// The products of the rows of one item.
template <class S, class T> class Worker {
 public:
  // `width`: of what is gathered; `rank`: of what it is first multiplied to.
  Worker(const Call& call, int64_t width, int64_t rank)
      : call_(call), rank_stride_(stride_of<T>(call.up_rank)) {
    const int64_t longest = std::max(call.up_width, call.intermediate), columns = std::min(kColumns, longest);
    const int64_t wide = std::max(kRows * columns, kFewRows * longest);  // [rows, columns] of few rows, or of some columns
    const int64_t gathered = kRows * stride_of<T>(width), gated = wide + kRows;
    const int64_t ranks = std::max({rank, call.up_rank, call.down_rank});
    const int64_t space = std::max({kPanel, std::max(kShallowest, stride_of<T>(columns)) * ranks, rank_stride_ * columns});
    Scratch scratch(sizeof(T) * (gathered + kRows * rank_stride_ + gated + space) +
                    sizeof(float) * (2 * kRows * ranks + 2 * wide + kFewDepth * (ranks + longest)) + kAligning);
    gathered_ = scratch.take<T>(gathered);
    inner_ = scratch.take<T>(kRows * rank_stride_);
    gated_ = scratch.take<T>(gated);
    space_ = scratch.take<T>(space);
    inner_sums_ = scratch.take<float>(kRows * ranks);
    sums_ = scratch.take<float>(kRows * ranks);
    up_ = scratch.take<float>(wide);
    gate_ = scratch.take<float>(wide);
    row_ = scratch.take<float>(kFewDepth * (ranks + longest));
  }

  // From what the up projection reads to the rows before the gate, or to the values of the down projection. `next` is
  // the expert whose turn it is after this.
  void up(const Item& item, int64_t next) {
    const int64_t rank = call_.up_rank, width = call_.up_width, intermediate = call_.intermediate;
    const int64_t* order = begin(item);
    const auto* seen = static_cast<const S*>(call_.seen);
    gather(item, call_.seen_width, [&](int64_t row) { return seen + row / call_.top_k * call_.seen_width; });
    // Few rows take a matrix as it lies in memory.
    const int64_t columns = few() ? std::max(width, intermediate) : kColumns;
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
      for (int64_t m = 0; m < rows_; ++m) {
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
    multiply(rows_, left, left_stride, right, space_, row_, out, add, next);
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
  float *inner_sums_, *sums_, *up_, *gate_, *row_;
};

template <class S, class T> void up_or_down(const Call& call, bool up) {
  const std::vector<Item> items = items_of(call);
  std::atomic<size_t> taken{0};
#pragma omp parallel num_threads(call.threads)
  {
    Worker<S, T> worker(call, up ? call.seen_width : call.intermediate, up ? call.up_rank : call.down_rank);
    // A thread knows its next item when it begins with one.
    for (size_t number = taken++; number < items.size();) {
      const size_t after = taken++;
      const Item& item = items[number];
      const int64_t next = items[std::min(after, items.size() - 1)].expert;
      up ? worker.up(item, next) : worker.down(item, next);
      number = after;
    }
    at::native::cpublas::brgemm_release(kShort<T>);
  }
}

// The sums over each token's rows. A thread has some columns of some tokens, which no other thread adds to.
template <class S, class T> void sum_out(const Call& call) {
  const int64_t rank = call.down_rank, hidden = call.hidden, stride = stride_of<T>(rank);
  std::vector<int64_t> used;
  for (int64_t e = 0; e < call.experts; ++e)
    if (call.ends[e] > begin_of(call, e)) used.push_back(e);
  // Few rows take a matrix as it lies in memory.
  const bool few = call.tokens * call.top_k <= kFewRows * int64_t(used.size());
  int64_t columns = few ? hidden : std::min(kColumns, hidden);
  while (columns > 64 && (hidden + columns - 1) / columns < call.threads) columns = (columns + 1) / 2;
  const int64_t wide = (hidden + columns - 1) / columns;
  int64_t deep = std::max((call.threads + wide - 1) / wide, (call.tokens * columns + kSums - 1) / kSums);
  deep = std::min(deep, call.tokens);
  const int64_t most = (call.tokens + deep - 1) / deep;
#pragma omp parallel num_threads(call.threads)
  {
    const int64_t copied = std::max(kPanel, stride * columns);
    Scratch scratch(sizeof(T) * copied + sizeof(float) * (kRows + most + kFewDepth) * columns + kAligning);
    T* space = scratch.take<T>(copied);
    float* products = scratch.take<float>(kRows * columns);
    float* sums = scratch.take<float>(most * columns);
    float* row = scratch.take<float>(kFewDepth * columns);
    float* sum_of[kRows];
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < wide * deep; ++task) {
      const int64_t j = task % wide * columns, n = std::min(columns, hidden - j);
      const int64_t begin = std::min(call.tokens, task / wide * most), end = std::min(call.tokens, begin + most);
      std::fill(sums, sums + (end - begin) * n, 0.0f);
      for (size_t number = 0; number < used.size(); ++number) {
        const auto part_of = [&](int64_t e) {
          return Part<S>{static_cast<const S*>(call.down_out) + e * rank * hidden + j, hidden, rank, n};
        };
        const int64_t e = used[number];
        const auto part = part_of(e), next = part_of(used[std::min(number + 1, used.size() - 1)]);
        // The rows of an expert are in the order of their tokens.
        const int64_t* last = call.order + call.ends[e];
        const int64_t* first = std::lower_bound(call.order + begin_of(call, e), last, begin * call.top_k);
        last = std::lower_bound(first, last, end * call.top_k);
        for (int64_t count; first < last; first += count) {
          count = std::min(kRows, int64_t(last - first));
          const T* values = static_cast<const T*>(call.values) + (first - call.order) * stride;
          bool distinct = true;  // unless a token has an expert twice
          for (int64_t m = 0; m < count; ++m) {
            sum_of[m] = sums + (first[m] / call.top_k - begin) * n;
            distinct &= m == 0 || sum_of[m] != sum_of[m - 1];
          }
          if constexpr (kTiled<T>)
            if (distinct && count > kFewRows) {
              multiply_tiles(count, values, stride, part, space, [&](int64_t m) { return sum_of[m]; }, true, next);
              continue;
            }
          multiply(count, values, stride, part, space, row, products, false, next);
          for (int64_t m = 0; m < count; ++m)
            for (int64_t i = 0; i < n; ++i) sum_of[m][i] += products[m * n + i];
        }
      }
      for (int64_t t = begin; t < end; ++t)
        convert(sums + (t - begin) * n, static_cast<S*>(call.out) + t * hidden + j, n);
    }
    at::native::cpublas::brgemm_release(kShort<T>);
  }
}

enum Step { kUp, kDown, kOut };

template <class S, class T> void run(const Call& call, int step) {
  step == kOut ? sum_out<S, T>(call) : up_or_down<S, T>(call, step == kUp);
}

template <class T> bool can_multiply() {
  std::vector<T> matrix(4 * 16);
  std::vector<float> out(4 * 16);
  try {
    at::native::cpublas::brgemm(4, 16, 4, 4, 16, 16, false, matrix.data(), matrix.data(), out.data(), kShort<T>);
    at::native::cpublas::brgemm_release(kShort<T>);
  } catch (...) {
    return false;
  }
  return true;
}

}  // namespace

extern "C" {

// Types by number: 0 fp32, 1 bf16, 2 fp16.

bool multiplies(int type) {
  return type == 0 ? can_multiply<float>() : type == 1 ? can_multiply<BFloat16>() : can_multiply<Half>();
}

// Sorts rows by expert, in the order of their tokens, without those of no expert; returns how many there are.
int64_t sort_rows(const int64_t* index, int64_t rows, int64_t experts, int64_t* order, int64_t* ends) {
  std::vector<int64_t> next(experts + 1, 0);
  for (int64_t row = 0; row < rows; ++row)
    if (index[row] < experts) ++next[index[row] + 1];
  for (int64_t e = 0; e < experts; ++e) next[e + 1] += next[e];
  for (int64_t e = 0; e < experts; ++e) ends[e] = next[e + 1];
  for (int64_t row = 0; row < rows; ++row)
    if (index[row] < experts) order[next[index[row]]++] = row;
  return experts ? ends[experts - 1] : 0;
}

void run_step(const Call* call, int step, int stored, int multiplied) {
  if (stored == 0) run<float, float>(*call, step);
  else if (stored == 1) multiplied == 1 ? run<BFloat16, BFloat16>(*call, step) : run<BFloat16, float>(*call, step);
  else multiplied == 2 ? run<Half, Half>(*call, step) : run<Half, float>(*call, step);
}

}
