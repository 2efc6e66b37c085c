// pix2rep_native::warp and warp_backward on CUDA: arguments, layouts, which kernel. `warp_backward_ordered` is the backward that sorts.
#include <algorithm>
#include <tuple>

#include "../common/math.h"
#include "../common/warp_arguments.h"
#include "launch.h"
#include "sort.h"
#include "storage.h"
#include "warp_backward.cuh"
#include "warp_forward.cuh"

namespace pix2rep {
namespace {

using Optional = std::optional<Tensor>;

// f(taps an axis, dims) as constants.
template <class F>
void with_taps(int taps, int dims, const F& f) {
  using std::integral_constant;
  const auto go = [&](auto t) { dims == 3 ? f(t, integral_constant<int, 3>{}) : f(t, integral_constant<int, 2>{}); };
  if (taps == 1) return go(integral_constant<int, 1>{});
  if (taps == 2) return go(integral_constant<int, 2>{});
  f(integral_constant<int, 4>{}, integral_constant<int, 2>{});
}

struct Arguments : WarpArguments {
  using WarpArguments::WarpArguments;

  // The problem over a map whose strides are those of `map` [B, C, *S], or of pixels alone.
  WarpProblem problem(const Tensor* map) const {
    WarpProblem w{grid.data_ptr(), grid.scalar_type() == ScalarType::Double, affine, align_corners, border, false, 0, 0, 0,
                  given ? data<int64_t>(*given) : nullptr, count, shape[0], shape[1], {1, 1, 1}, {1, 1, 1}, 0, 0, {0, 0, 0}};
    w.narrow = shape[0] * per_image() < (int64_t(1) << 31);
    if (affine) w.grid_batch = grid.stride(0), w.grid_row = grid.stride(1), w.grid_column = grid.stride(2);
    int64_t pixels = 1;
    for (int axis = dims - 1; axis >= 0; --axis) {
      const int at = 3 - dims + axis;
      w.size[at] = size[axis], w.extent[at] = shape[2 + axis];
      w.stride[at] = map ? map->stride(2 + axis) : pixels;
      pixels *= shape[2 + axis];
    }
    if (map) w.stride_batch = map->stride(0), w.stride_channel = map->stride(1);
    return w;
  }
};

int64_t blocks_of(int64_t threads) { return ceil_div(threads, kWarpThreads); }

// Launches of kernels that read rows: kernel(problem, log2 of a point's lanes, points of a warp, arguments...).
struct RowLaunch {
  int log2_lanes = 0, batch;

  // Lanes cover a point's channels as far as a warp goes. A warp takes several points, each found by one lane, as long as every multiprocessor keeps as
  // many warps as have 32 KiB under way, 16 bytes a lane and tap: more than its share of what the memory answers in 0.7 us.
  RowLaunch(const Launch& launch, int64_t count, int64_t channels, int vector, int taps) {
    while (log2_lanes < 5 && int64_t(vector) << log2_lanes < channels) ++log2_lanes;
    batch = 32 >> log2_lanes;
    while (batch < 32 && count >= int64_t(2 * batch) * (64 / in_flight(taps)) * launch.multiprocessors()) batch *= 2;
  }

  template <class K, class... A>
  void operator()(const Launch& launch, const char* name, K kernel, int64_t shared, const WarpProblem& w, A... arguments) const {
    launch(name, kernel, blocks_of(ceil_div(w.count, batch) * 32), kWarpThreads, kWarpThreads / 32 * shared, w, log2_lanes, batch, arguments...);
  }
};

// Channels that a block transposes at a time.
int plane_tile(int64_t channels) { return int(channels < kPlaneChannels ? (channels + 31) / 32 * 32 : kPlaneChannels); }

// Whether rows of `count` neighbouring values may be read together everywhere in the map.
bool aligned(const Tensor& map, int count) {
  if (map.stride(1) != 1 || map.size(1) % count != 0) return false;
  for (int64_t axis = 0; axis < map.dim(); ++axis)
    if (axis != 1 && map.size(axis) > 1 && map.stride(axis) % count != 0) return false;
  return reinterpret_cast<uintptr_t>(map.data_ptr()) % (count * map.element_size()) == 0;
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor features, Tensor grid, Sizes size, Optional points, std::string mode, bool align_corners,
                                           std::string padding_mode, bool normalize) {
  const Arguments in(grid, size, points, mode, align_corners, padding_mode, shape_of(features));
  expect_storage(features, "features");
  const Launch launch({{features, "features"}, {grid, "grid"}, {points, "points"}});
  Tensor rows = torch::stable::new_empty(features, {in.count, in.shape[1]});
  Tensor inside = torch::stable::new_empty(features, {in.count}, ScalarType::Bool);
  Tensor norms = torch::stable::new_empty(features, {normalize ? in.count : 0}, ScalarType::Float);
  if (in.count == 0) return {rows, inside, norms};
  const WarpProblem w = in.problem(&features);
  float* norm = normalize ? mutable_data<float>(norms) : nullptr;
  const bool last = features.stride(1) == 1 && features.size(1) > 1;
  with_storage(features.scalar_type(), "features", [&](auto zero) {
    using S = decltype(zero);
    with_taps(in.taps, in.dims, [&](auto taps, auto dims) {
      constexpr int t = taps, d = dims, wide = 16 / sizeof(S);
      const S* from = static_cast<const S*>(features.data_ptr());
      S* to = static_cast<S*>(rows.data_ptr());
      const auto rows_kernel = [&](auto kernel, int vector) {
        const RowLaunch rows_launch(launch, w.count, w.channels, vector, PointTaps<t, d>::kCount);
        rows_launch(launch, "warp_rows", kernel, TapTable<t, d>::kBytes, w, from, to, mutable_data<bool>(inside), norm);
      };
      if (last && aligned(features, wide))
        rows_kernel(&warp_rows<S, wide, t, d>, wide);
      else if (last)
        rows_kernel(&warp_rows<S, 1, t, d>, 1);
      else
        launch("warp_planes", &warp_planes<S, t, d>, ceil_div(w.count, 32), kWarpThreads, PlaneShared<t, d>::bytes(plane_tile(w.channels)), w,
               plane_tile(w.channels), from, to, mutable_data<bool>(inside), norm);
    });
  });
  return {rows, inside, norms};
}

// What the two ways backward share.
struct Backward {
  Arguments in;
  Tensor grad_rows, rows, norms;
  bool normalize, channels_last;
  Sizes memory;  // of the gradient: channels-last is allocated as [B, *S, C]

  Backward(const Tensor& grad_rows, const Tensor& rows, const Tensor& norms, const Tensor& grid, const Sizes& size, const Optional& points,
           const std::string& mode, bool align_corners, const std::string& padding_mode, bool normalize, const Sizes& shape, bool channels_last)
      : in(grid, size, points, mode, align_corners, padding_mode, shape), grad_rows(grad_rows), rows(rows), norms(norms), normalize(normalize),
        channels_last(channels_last), memory(memory_of(shape, channels_last)) {
    in.expect_saved(this->grad_rows, this->rows, this->norms, normalize);
    expect_storage(rows, "rows");
  }

  // Whether `count` neighbouring values of a row may be read together.
  bool aligned(int count) const {
    const auto fits = [&](const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data_ptr()) % (count * t.element_size()) == 0; };
    return in.shape[1] % count == 0 && fits(rows) && fits(grad_rows);
  }

  template <class S>
  WarpUpstream<S> upstream() const {
    return {static_cast<const S*>(grad_rows.data_ptr()), static_cast<const S*>(rows.data_ptr()), normalize ? data<float>(norms) : nullptr};
  }
};

Tensor backward(Tensor grad_rows, Tensor rows, Tensor norms, Tensor grid, Sizes size, Optional points, std::string mode, bool align_corners,
                std::string padding_mode, bool normalize, Sizes shape, bool channels_last) {
  const Backward it(grad_rows, rows, norms, grid, size, points, mode, align_corners, padding_mode, normalize, shape, channels_last);
  const Launch launch({{rows, "rows"}, {grad_rows, "grad_rows"}, {norms, "norms"}, {grid, "grid"}, {points, "points"}});
  Tensor sums = torch::stable::new_zeros(rows, it.memory, ScalarType::Float);
  const Tensor view = in_place(sums, channels_last);
  const WarpProblem w = it.in.problem(&view);
  Tensor grad = rows.scalar_type() == ScalarType::Float ? sums : torch::stable::new_empty(rows, it.memory);
  with_storage(rows.scalar_type(), "rows", [&](auto zero) {
    using S = decltype(zero);
    with_taps(it.in.taps, it.in.dims, [&](auto taps, auto dims) {
      constexpr int t = taps, d = dims;
      if (it.rows.numel() == 0) return;
      const auto up = it.upstream<S>();
      float* to = mutable_data<float>(sums);
      constexpr int wide = 16 / sizeof(S);
      const auto rows_kernel = [&](auto kernel, int vector) {
        const RowLaunch rows_launch(launch, w.count, w.channels, vector, PointTaps<t, d>::kCount);
        rows_launch(launch, "warp_scatter_rows", kernel, TapTable<t, d>::kBytes, w, up, to);
      };
      const auto planes_kernel = [&](auto kernel) {
        launch("warp_scatter_planes", kernel, ceil_div(w.count, 32), kWarpThreads, PlaneShared<t, d>::bytes(plane_tile(w.channels)), w,
               plane_tile(w.channels), up, to);
      };
      if (w.stride_channel == 1 && it.aligned(4))
        rows_kernel(&warp_scatter_rows<S, 4, t, d>, 4);
      else if (w.stride_channel == 1)
        rows_kernel(&warp_scatter_rows<S, 1, t, d>, 1);
      else if (it.aligned(wide))
        planes_kernel(&warp_scatter_planes<S, wide, t, d>);
      else
        planes_kernel(&warp_scatter_planes<S, 1, t, d>);
    });
    if constexpr (sizeof(S) == 2)
      launch("warp_convert", &warp_convert<S>, blocks_of(ceil_div(sums.numel(), 8)), kWarpThreads, 0, sums.numel(), data<float>(sums),
             static_cast<S*>(grad.data_ptr()));
  });
  return in_place(grad, channels_last);
}

Tensor backward_ordered(Tensor grad_rows, Tensor rows, Tensor norms, Tensor grid, Sizes size, Optional points, std::string mode, bool align_corners,
                        std::string padding_mode, bool normalize, Sizes shape, bool channels_last) {
  const Backward it(grad_rows, rows, norms, grid, size, points, mode, align_corners, padding_mode, normalize, shape, channels_last);
  const Launch launch({{rows, "rows"}, {grad_rows, "grad_rows"}, {norms, "norms"}, {grid, "grid"}, {points, "points"}});
  const WarpProblem w = it.in.problem(nullptr);
  if (it.rows.numel() == 0) return in_place(torch::stable::new_zeros(rows, it.memory), channels_last);
  Tensor grad = torch::stable::new_empty(rows, memory_of(shape, true));
  with_storage(rows.scalar_type(), "rows", [&](auto zero) {
    using S = decltype(zero);
    with_taps(it.in.taps, it.in.dims, [&](auto taps, auto dims) {
      constexpr int t = taps, d = dims, count = PointTaps<t, d>::kCount;
      Tensor keys = torch::stable::new_empty(rows, {w.count * count}, ScalarType::Long);
      Tensor weights = torch::stable::new_empty(rows, {w.count * count}, ScalarType::Float);
      Tensor dots = torch::stable::new_empty(rows, {normalize ? w.count : 0}, ScalarType::Float);
      const auto up = it.upstream<S>();
      launch("warp_records", &warp_records<S, t, d>, blocks_of(w.count * 32), kWarpThreads, 0, w, up, mutable_data<int64_t>(keys),
             mutable_data<float>(weights), mutable_data<float>(dots));
      const auto [ordered, order] = sort_stable(keys);
      const int64_t pixels = shape[0] * it.in.pixels();
      launch("warp_sum_records", &warp_sum_records<S>, blocks_of(pixels * 32), kWarpThreads, 0, pixels, w.channels,
             count == 1 ? 0 : count == 4 ? 2 : count == 8 ? 3 : 4, w.count * count,
             data<int64_t>(ordered), data<int64_t>(order), data<float>(weights), data<float>(dots), up, static_cast<S*>(grad.data_ptr()));
    });
  });
  grad = in_place(grad, true);
  return channels_last ? grad : torch::stable::contiguous(grad);
}

}  // namespace

PIX2REP_CUDA_FRAGMENT(m) {
  m.def("warp_backward_ordered(Tensor grad_rows, Tensor rows, Tensor norms, Tensor grid, SymInt[] size, Tensor? points, str mode, bool align_corners, "
        "str padding_mode, bool normalize, SymInt[] shape, bool channels_last) -> Tensor grad_features");
}

PIX2REP_CUDA_LIBRARY(m) {
  m.impl("warp", TORCH_BOX(&forward));
  m.impl("warp_backward", TORCH_BOX(&backward));
  m.impl("warp_backward_ordered", TORCH_BOX(&backward_ordered));
}

}  // namespace pix2rep
