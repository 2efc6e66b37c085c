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
  const int64_t largest = p.batch * (regions + 1);
  const ScalarType key_type = largest < (1 << 15) ? ScalarType::Short : largest < (int64_t(1) << 31) ? ScalarType::Int : ScalarType::Long;
  Tensor keys = torch::stable::new_empty(features, {total}, key_type);
  with_label_type(labels, [&](auto zero) {
    using L = decltype(zero);
    launch("pool_keys", &pool_keys<L>, blocks_of(total), kPoolThreads, 0, p, data<L>(labels), PoolKeys{keys.data_ptr(), int(keys.element_size())});
  });
  Tensor ordered = keys, order = keys;
  std::tie(ordered, order) = sort_stable(keys);
  Tensor starts = torch::stable::new_empty(features, {p.batch * (regions + 1) + 1}, ScalarType::Long);
  Tensor slots = torch::stable::new_empty(features, {chunks, 2, p.channels}, ScalarType::Double);
  const PoolOrder sorted{{ordered.data_ptr(), int(keys.element_size())}, data<int64_t>(order), data<int64_t>(starts)};
  launch("pool_starts", &pool_starts, blocks_of(starts.numel()), kPoolThreads, 0, p, sorted.keys, mutable_data<int64_t>(starts),
         mutable_data<int64_t>(counts));
  with_storage(features.scalar_type(), "features", [&](auto zero) {
    using S = decltype(zero);
    constexpr int wide = 16 / sizeof(S);
    const S* from = static_cast<const S*>(features.data_ptr());
    const bool last = p.stride_channel == 1 && p.channels > 1;
    const bool aligned = p.channels % wide == 0 && p.stride_pixel % wide == 0 && p.stride_batch % wide == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0;
    const auto rows = [&](auto kernel, int vector) {
      int log2_lanes = 0;
      while (log2_lanes < 5 && int64_t(vector) << log2_lanes < p.channels) ++log2_lanes;
      const int64_t blocks = ceil_div(p.channels, vector << log2_lanes);
      launch("pool_rows", kernel, blocks_of(chunks * blocks * 32), kPoolThreads, 0, p, log2_lanes, blocks, from, sorted, mutable_data<float>(means),
             mutable_data<double>(slots));
    };
    if (last && aligned)
      rows(&pool_rows<S, wide>, wide);
    else if (last)
      rows(&pool_rows<S, 1>, 1);
    else
      launch("pool_planes", &pool_planes<S>, blocks_of(chunks * ((p.channels + kPoolPlanes - 1) / kPoolPlanes) * 32), kPoolThreads, 0, p, from, sorted,
             mutable_data<float>(means), mutable_data<double>(slots));
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
        const S* from = static_cast<const S*>(table.data_ptr());
        void* to = grad.data_ptr();
        const auto rows = [&](auto kernel, auto vector) {
          const int64_t threads = ceil_div(p.batch * p.pixels, kPoolSpread) * (channels / vector);
          launch("pool_spread_rows", kernel, blocks_of(threads), kPoolThreads, 0, p, data<L>(labels), from, static_cast<Bits<S, vector>*>(to));
        };
        const auto planes = [&](auto kernel, auto vector) {
          const int64_t threads = p.batch * ceil_div(channels, kPoolPlanes) * (p.pixels / vector);
          launch("pool_spread_planes", kernel, blocks_of(threads), kPoolThreads, 0, p, data<L>(labels), from, static_cast<Bits<S, vector>*>(to));
        };
        using One = std::integral_constant<int, 1>;
        using Wide = std::integral_constant<int, wide>;
        if (channels_last)
          channels % wide == 0 ? rows(&pool_spread_rows<S, L, wide>, Wide{}) : rows(&pool_spread_rows<S, L, 1>, One{});
        else
          p.pixels % wide == 0 ? planes(&pool_spread_planes<S, L, wide>, Wide{}) : planes(&pool_spread_planes<S, L, 1>, One{});
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
