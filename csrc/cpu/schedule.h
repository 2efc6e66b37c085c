// Walk the blocks of a matrix of pairs so that no two tasks touch the same block of rows or columns at once, and every block meets its tasks in an
// order that depends on the sizes alone: the same bits come out for any number of threads, without private copies of the outputs.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace pix2rep {

enum class Sweep {
  rows,      // every block pair; only the row block is written
  both,      // every block pair; row and column block are written
  symmetric  // rows and columns are one set: pairs I < J write both, then I = J as a full square writes its rows
};

struct Task {
  int64_t i, j;        // row and column block
  bool columns;        // whether the column block is written too
  int32_t before_i = 0, before_j = 0;  // tasks that the blocks must have seen before this one
};

// Tasks in rounds: within one, no block is met twice.
inline std::vector<Task> rounds(int64_t row_blocks, int64_t column_blocks, Sweep sweep) {
  std::vector<Task> tasks;
  if (sweep == Sweep::rows) {
    for (int64_t j = 0; j < column_blocks; ++j)
      for (int64_t i = 0; i < row_blocks; ++i) tasks.push_back({i, j, false});
  } else if (sweep == Sweep::both) {
    const int64_t few = std::min(row_blocks, column_blocks), many = std::max(row_blocks, column_blocks);
    for (int64_t step = 0; step < many; ++step)
      for (int64_t t = 0; t < few; ++t) {
        const int64_t other = (t + step) % many;
        tasks.push_back(row_blocks <= column_blocks ? Task{t, other, true} : Task{other, t, true});
      }
  } else {
    // Round-robin tournament by the circle method: in each round every block meets exactly one other.
    const int64_t even = row_blocks + row_blocks % 2, ring = even - 1;
    for (int64_t round = 0; round < ring; ++round)
      for (int64_t t = 0; t < even / 2; ++t) {
        const int64_t first = (round + t) % ring, second = t == 0 ? ring : (round + ring - t) % ring;
        if (first < row_blocks && second < row_blocks) tasks.push_back({std::min(first, second), std::max(first, second), true});
      }
    for (int64_t i = 0; i < row_blocks; ++i) tasks.push_back({i, i, false});
  }
  const int64_t shift = sweep == Sweep::symmetric ? 0 : row_blocks;  // column blocks are counted after the rows, or are the rows
  std::vector<int32_t> seen(row_blocks + column_blocks);
  for (Task& task : tasks) {
    task.before_i = seen[task.i]++;
    if (task.columns) task.before_j = seen[shift + task.j]++;
  }
  return tasks;
}

// f(I, J, writes_columns) for row blocks I and column blocks J. Threads take tasks in order and wait for the blocks, not for each other: a thread that
// loses its core to another program holds up only what needs its blocks. The first task not finished never waits, so the walk goes on.
template <class Parallel, class F>
void schedule(const Parallel& parallel, int64_t row_blocks, int64_t column_blocks, Sweep sweep, const F& f) {
  const std::vector<Task> tasks = rounds(row_blocks, column_blocks, sweep);
  const int64_t shift = sweep == Sweep::symmetric ? 0 : row_blocks;
  std::vector<std::atomic<int32_t>> done(row_blocks + column_blocks);
  std::atomic<size_t> next{0};
  std::atomic<bool> failed{false};
  const auto reached = [&](int64_t block, int32_t count) {
    for (int tries = 0; done[block].load(std::memory_order_acquire) < count; ++tries) {
      if (failed.load(std::memory_order_relaxed)) return false;
      if (tries > 64) std::this_thread::yield();
    }
    return true;
  };
  parallel(parallel.workers(), [&](int64_t) {
    for (size_t taken; (taken = next.fetch_add(1)) < tasks.size();) {
      const Task& task = tasks[taken];
      if (!reached(task.i, task.before_i) || (task.columns && !reached(shift + task.j, task.before_j))) return;
      try {
        f(task.i, task.j, task.columns);
      } catch (...) {
        failed = true;
        throw;
      }
      done[task.i].fetch_add(1, std::memory_order_release);
      if (task.columns) done[shift + task.j].fetch_add(1, std::memory_order_release);
    }
  });
}

// Edge of a block: about 64 blocks keep many cores busy, 192 rows keep one busy, and past `largest` the per-tile sums outgrow their buffers.
inline int64_t block_edge(int64_t count, int64_t unit, int64_t largest) {
  const int64_t wanted = std::max<int64_t>(192, (count + 63) / 64);
  return std::min(largest / unit * unit, (wanted + unit - 1) / unit * unit);
}

}  // namespace pix2rep
