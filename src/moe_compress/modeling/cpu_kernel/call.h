// What is computed by one call, and by whom: sizes and tensors, the rows of experts in parts, and a thread's own memory.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "matrix.h"

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
constexpr int64_t kColumns = 256;      // of a matrix with a long outer dimension at a time

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

}  // namespace
