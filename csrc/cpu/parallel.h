// Run independent tasks on PyTorch's own threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace pix2rep {

// f(task) for every task in [0, count), in any order and on any thread; within one thread in ascending order.
struct TorchParallel {
  int64_t workers() const { return torch::stable::get_num_threads(); }

  template <class F>
  void operator()(int64_t count, const F& f) const {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) f(task);
    });
  }
};

}  // namespace pix2rep
