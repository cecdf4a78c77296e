// The low-rank experts of one MoE layer on a CPU, without gradient. Compiled and called by __init__.py.
//
// A thread takes some rows of one expert through all products up to the inner values of the down projection, so that
// what lies between them stays in its cache. Products are ours where AVX-512 does them (tiles.h), else oneDNN's, by the
// interface to its small GEMMs that PyTorch has for kernels of its own (brgemm); both sum in fp32. Of a matrix a copy is
// made on the way, in the order that the instructions want, unless rows are few (few.h). Each product has the matrix
// after it read ahead.
//
// A row is one (token, chosen expert) pair, numbered token * top_k + choice.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "worker.h"

namespace {

constexpr int64_t kSums = 512 * 256;   // values of the output that a thread adds up at a time (measured on OLMoE's layer)

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
  const int64_t rows = call.tokens * call.top_k / std::max(int64_t(used.size()), int64_t(1));  // of an expert
  int64_t columns = rows <= kFewRows ? few_columns(rows, hidden) : std::min(kColumns, hidden);
  while (columns > 64 && (hidden + columns - 1) / columns < call.threads) columns = (columns + 1) / 2;
  const int64_t wide = (hidden + columns - 1) / columns;
  int64_t deep = std::max((call.threads + wide - 1) / wide, (call.tokens * columns + kSums - 1) / kSums);
  deep = std::min(deep, call.tokens);
  const int64_t most = (call.tokens + deep - 1) / deep;
#pragma omp parallel num_threads(call.threads)
  {
    const int64_t copied = kTiled<T> ? kPanel : std::max(kPanel, stride * columns);
    Scratch scratch(sizeof(T) * copied + sizeof(float) * (kRows + most) * columns + kAligning);
    T* space = scratch.take<T>(copied);
    float* products = scratch.take<float>(kRows * columns);
    float* sums = scratch.take<float>(most * columns);
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
            if (distinct) {
              const auto out = [&](int64_t m) { return sum_of[m]; };
              if (count > kFewRows) multiply_tiles(count, values, stride, part, space, out, true, next);
              else multiply_few(count, values, stride, part, out, next);
              continue;
            }
          multiply(count, values, stride, part, space, products, false, next);
          for (int64_t m = 0; m < count; ++m) {
            if (!kTiled<T>) next.share(m, m + 1, count).prefetch();
            for (int64_t i = 0; i < n; ++i) sum_of[m][i] += products[m * n + i];
          }
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
