// Walk the blocks of a matrix of pairs so that no two tasks of one step touch the same block of rows or columns. The order in which a block is added
// to depends on the sizes alone: the same bits come out for any number of threads, without private copies of the outputs.
#pragma once

#include <algorithm>
#include <cstdint>

namespace pix2rep {

enum class Sweep {
  rows,      // every block pair; only the row block is written
  both,      // every block pair; row and column block are written
  symmetric  // rows and columns are one set: pairs I < J write both, then I = J as a full square writes its rows
};

// f(I, J, writes_columns) for row blocks I and column blocks J.
template <class Parallel, class F>
void schedule(const Parallel& parallel, int64_t row_blocks, int64_t column_blocks, Sweep sweep, const F& f) {
  if (row_blocks == 0 || column_blocks == 0) return;
  if (sweep == Sweep::rows) {
    parallel(row_blocks, [&](int64_t i) {
      for (int64_t j = 0; j < column_blocks; ++j) f(i, j, false);
    });
    return;
  }
  if (sweep == Sweep::both) {
    const int64_t few = std::min(row_blocks, column_blocks), many = std::max(row_blocks, column_blocks);
    for (int64_t step = 0; step < many; ++step)
      parallel(few, [&](int64_t t) {
        const int64_t other = (t + step) % many;
        row_blocks <= column_blocks ? f(t, other, true) : f(other, t, true);
      });
    return;
  }
  // Round-robin tournament by the circle method: in each round every block meets exactly one other.
  const int64_t even = row_blocks + row_blocks % 2, ring = even - 1;
  for (int64_t round = 0; round < ring; ++round)
    parallel(even / 2, [&](int64_t t) {
      const int64_t first = (round + t) % ring, second = t == 0 ? ring : (round + ring - t) % ring;
      if (first < row_blocks && second < row_blocks) f(std::min(first, second), std::max(first, second), true);
    });
  parallel(row_blocks, [&](int64_t i) { f(i, i, false); });
}

// Edge of a block: about 64 blocks keep many cores busy, 192 rows keep one busy, and past `largest` the per-tile sums outgrow their buffers.
inline int64_t block_edge(int64_t count, int64_t unit, int64_t largest) {
  const int64_t wanted = std::max<int64_t>(192, (count + 63) / 64);
  return std::min(largest / unit * unit, (wanted + unit - 1) / unit * unit);
}

}  // namespace pix2rep
