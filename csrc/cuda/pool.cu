// pix2rep_native::pool and pool_backward on CUDA: arguments, layouts, which kernel.
#include <tuple>

#include "../common/math.h"
#include "../common/pool_arguments.h"
#include "launch.h"
#include "pool_kernels.cuh"
#include "sort.h"
#include "storage.h"

namespace pix2rep {
namespace {

// Whether the spatial axes are one axis; its stride, 0 of no axis longer than 1.
bool one_axis(const Tensor& t, int64_t& stride) {
  stride = 0;
  int64_t expected = -1;  // of no axis yet; an expanded one has 0
  for (int64_t axis = t.dim() - 1; axis >= 2; --axis) {
    if (t.size(axis) == 1) continue;
    if (expected < 0) stride = expected = t.stride(axis);
    if (t.stride(axis) != expected) return false;
    expected *= t.size(axis);
  }
  return true;
}

int64_t blocks_of(int64_t threads) { return ceil_div(threads, kPoolThreads); }

std::tuple<Tensor, Tensor> forward(Tensor features, Tensor labels, int64_t regions) {
  const PoolArguments in(features, labels, regions);
  expect_storage(features, "features");
  const Launch launch({{features, "features"}, {labels, "labels"}});
  const Sizes& shape = in.shape;
  Tensor means = torch::stable::new_empty(features, {shape[0], regions, shape[1]}, ScalarType::Float);
  Tensor counts = torch::stable::new_empty(features, {shape[0], regions}, ScalarType::Long);
  if (counts.numel() == 0) return {means, counts};
  PoolProblem p{shape[0], shape[1], labels.numel() / shape[0], regions, 0, 0, 0};
  if (!one_axis(features, p.stride_pixel)) features = torch::stable::contiguous(features), one_axis(features, p.stride_pixel);
  p.stride_batch = features.stride(0), p.stride_channel = features.stride(1);
  labels = torch::stable::contiguous(labels);
  const int64_t total = p.batch * p.pixels, chunks = ceil_div(total, kPoolChunk);
  Tensor keys = torch::stable::new_empty(features, {total}, ScalarType::Long);
  with_label_type(labels, [&](auto zero) {
    using L = decltype(zero);
    launch("pool_keys", &pool_keys<L>, blocks_of(total), kPoolThreads, 0, p, data<L>(labels), mutable_data<int64_t>(keys));
  });
  Tensor sorted = keys, order = keys;
  std::tie(sorted, order) = sort_stable(keys);
  Tensor starts = torch::stable::new_empty(features, {p.batch * (regions + 1) + 1}, ScalarType::Long);
  Tensor slots = torch::stable::new_empty(features, {chunks, 2, p.channels}, ScalarType::Double);
  launch("pool_starts", &pool_starts, blocks_of(starts.numel()), kPoolThreads, 0, p, data<int64_t>(sorted), mutable_data<int64_t>(starts),
         mutable_data<int64_t>(counts));
  with_storage(features.scalar_type(), "features", [&](auto zero) {
    using S = decltype(zero);
    constexpr int wide = 16 / sizeof(S);
    const S* from = static_cast<const S*>(features.data_ptr());
    const bool last = p.stride_channel == 1 && p.channels > 1;
    const bool aligned = p.channels % wide == 0 && p.stride_pixel % wide == 0 && p.stride_batch % wide == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0;
    const auto rows = [&](auto kernel, int vector) {
      const int64_t blocks = ceil_div(p.channels, 32 * vector);
      launch("pool_rows", kernel, blocks_of(chunks * blocks * 32), kPoolThreads, 0, p, blocks, from, data<int64_t>(sorted), data<int64_t>(order),
             data<int64_t>(starts), mutable_data<float>(means), mutable_data<double>(slots));
    };
    if (last && aligned)
      rows(&pool_rows<S, wide>, wide);
    else if (last)
      rows(&pool_rows<S, 1>, 1);
    else
      launch("pool_planes", &pool_planes<S>, blocks_of(chunks * p.channels * 32), kPoolThreads, 0, p, from, data<int64_t>(sorted), data<int64_t>(order),
             data<int64_t>(starts), mutable_data<float>(means), mutable_data<double>(slots));
  });
  launch("pool_finish", &pool_finish, blocks_of(means.numel()), kPoolThreads, 0, p, data<int64_t>(starts), data<double>(slots), mutable_data<float>(means));
  return {means, counts};
}

Tensor backward(Tensor grad_means, Tensor counts, Tensor labels, Tensor like, Sizes shape, bool channels_last) {
  const PoolArguments in(grad_means, counts, labels, like, shape);
  expect_storage(like, "like");
  const Launch launch({{like, "like"}, {grad_means, "grad_means"}, {counts, "counts"}, {labels, "labels"}});
  const int64_t regions = in.regions, channels = shape[1];
  grad_means = torch::stable::contiguous(grad_means), counts = torch::stable::contiguous(counts), labels = torch::stable::contiguous(labels);
  const Tensor grad = torch::stable::new_empty(like, memory_of(shape, channels_last));
  if (grad.numel() > 0)
    with_storage(like.scalar_type(), "like", [&](auto zero) {
      using S = decltype(zero);
      constexpr int wide = 16 / sizeof(S);
      const PoolProblem p{shape[0], channels, labels.numel() / shape[0], regions, 0, 0, 0};
      Tensor table = torch::stable::new_empty(like, {grad_means.numel()});
      launch("pool_table", &pool_table<S>, blocks_of(grad_means.numel()), kPoolThreads, 0, shape[0] * regions, channels, data<float>(grad_means),
             data<int64_t>(counts), static_cast<S*>(table.data_ptr()));
      with_label_type(labels, [&](auto label) {
        using L = decltype(label);
        const auto spread = [&](auto kernel, int vector) {
          launch("pool_spread", kernel, blocks_of(grad.numel() / vector), kPoolThreads, 0, p, data<L>(labels), static_cast<const S*>(table.data_ptr()),
                 static_cast<S*>(grad.data_ptr()));
        };
        if (channels_last)
          channels % wide == 0 ? spread(&pool_spread<S, L, wide, true>, wide) : spread(&pool_spread<S, L, 1, true>, 1);
        else
          p.pixels % wide == 0 ? spread(&pool_spread<S, L, wide, false>, wide) : spread(&pool_spread<S, L, 1, false>, 1);
      });
    });
  return in_place(grad, channels_last);
}

}  // namespace

PIX2REP_CUDA_LIBRARY(m) {
  m.impl("pool", TORCH_BOX(&forward));
  m.impl("pool_backward", TORCH_BOX(&backward));
}

}  // namespace pix2rep
