// pix2rep_native::align and align_backward on the CPU: schemas, argument checks, layouts, storage types.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "align_core.h"
#include "maps.h"
#include "parallel.h"
#include "warp_grid.h"

namespace pix2rep {
namespace {

// What both passes are told.
struct Arguments {
  Tensor f1, f2;
  GridArguments one, two;

  Arguments(const Tensor& f1, const Tensor& f2, const Tensor& grid1, const Tensor& grid2, const Sizes& size, const std::string& mode, bool align_corners,
            const std::string& padding_mode)
      : f1(f1), f2(f2), one(grid1, size, mode, align_corners, padding_mode, shape_of(f1), "f1", "grid1"),
        two(grid2, size, mode, align_corners, padding_mode, shape_of(f2), "f2", "grid2") {
    PIX2REP_EXPECT(mode != "bicubic", "mode", "be 'linear' or 'nearest'", mode);
    PIX2REP_EXPECT(two.dims == one.dims && two.shape[0] == one.shape[0] && two.shape[1] == one.shape[1], "f2", "have the batch, channels and rank of f1",
                   two.shape.size(), " axes of which the first are ", two.shape[0], ", ", two.shape[1]);
    expect_float(f1, "f1");
    PIX2REP_EXPECT(f1.scalar_type() == f2.scalar_type(), "f2", "have the dtype of f1", "scalar type ", int(f2.scalar_type()));
  }

  int64_t batch() const { return one.shape[0]; }
  int64_t count() const { return batch() * one.per_image(); }
  ScalarType compute() const { return compute_type(f1); }
  Sizes points_shape() const {
    Sizes shape = one.size;
    shape.insert(shape.begin(), batch());
    return shape;
  }

  // f(storage zero, sides, points)
  template <class F>
  void with_sides(const F& f) const {
    const Points points(true, nullptr, count(), batch(), one.per_image());
    with_storage(f1.scalar_type(), "f1", [&](auto zero) {
      using S = decltype(zero);
      Tensor held[2];
      Side<S> sides[2] = {{map_of<S>(f1, held[0]), nullptr}, {map_of<S>(f2, held[1]), nullptr}};
      with_taps(one, points, sides[0], [&] { with_taps(two, points, sides[1], [&] { f(zero, sides, points); }); });
    });
  }

 private:
  template <class S, class F>
  static void with_taps(const GridArguments& in, const Points& points, Side<S>& side, const F& f) {
    with_grid(in, [&](const auto& w) {
      const Warp<S, std::decay_t<decltype(w.grid[0])>> warp{w, points};
      side.locate = [&warp](const Points::Range& range, int32_t* index, Compute<S>* weight, bool* inside) {
        return warp.chunk(range, index, weight, inside);
      };
      f();
    });
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor f1, Tensor f2, Tensor grid1, Tensor grid2, Sizes size, std::string mode, bool align_corners,
                                                   std::string padding_mode) {
  const Arguments in(f1, f2, grid1, grid2, size, mode, align_corners, padding_mode);
  const Sizes shape = in.points_shape();
  const auto empty = [&](ScalarType type) { return torch::stable::new_empty(f1, shape, type); };
  Tensor dot = empty(in.compute()), sq1 = empty(in.compute()), sq2 = empty(in.compute()), valid = empty(ScalarType::Bool);
  if (in.count() > 0)
    in.with_sides([&](auto zero, const auto* sides, const Points& points) {
      using T = Compute<decltype(zero)>;
      T* const sums[3] = {mutable_data<T>(dot), mutable_data<T>(sq1), mutable_data<T>(sq2)};
      align_forward(sides, points, TorchParallel{}, sums, mutable_data<bool>(valid));
    });
  return {dot, sq1, sq2, valid};
}

std::tuple<Tensor, Tensor> backward(Tensor grad_dot, Tensor grad_sq1, Tensor grad_sq2, Tensor f1, Tensor f2, Tensor grid1, Tensor grid2, Sizes size,
                                    std::string mode, bool align_corners, std::string padding_mode, bool need_1, bool need_2, bool channels_last_1,
                                    bool channels_last_2) {
  const Arguments in(f1, f2, grid1, grid2, size, mode, align_corners, padding_mode);
  const Sizes shape = in.points_shape();
  Tensor upstream[3] = {grad_dot, grad_sq1, grad_sq2};
  const char* const names[3] = {"grad_dot", "grad_sq1", "grad_sq2"};
  for (int i = 0; i < 3; ++i) {
    PIX2REP_EXPECT(shape_of(upstream[i]) == shape, names[i], "have shape [B, *size]", upstream[i].dim(), " axes");
    PIX2REP_EXPECT(upstream[i].scalar_type() == in.compute(), names[i], "be float32, or float64 for float64 maps", "scalar type ",
                   int(upstream[i].scalar_type()));
    upstream[i] = torch::stable::contiguous(upstream[i]);
  }
  const bool need[2] = {need_1, need_2}, last[2] = {channels_last_1, channels_last_2};
  const GridArguments* const maps[2] = {&in.one, &in.two};
  Tensor grads[2];
  for (int s = 0; s < 2; ++s) grads[s] = need[s] ? new_gradient(s ? f2 : f1, maps[s]->shape, last[s]) : torch::stable::new_empty(f1, {0});
  if ((need_1 || need_2) && f1.numel() > 0)
    in.with_sides([&](auto zero, const auto* sides, const Points& points) {
      using S = decltype(zero);
      using T = Compute<S>;
      const T* const from[3] = {data<T>(upstream[0]), data<T>(upstream[1]), data<T>(upstream[2])};
      Map<S> gradients[2] = {};
      for (int s = 0; s < 2; ++s)
        if (need[s]) gradients[s] = map_of_gradient<S>(grads[s], maps[s]->shape, last[s] || maps[s]->shape[1] == 1);
      align_backward(sides, points, TorchParallel{}, from, gradients, need);
    });
  for (int s = 0; s < 2; ++s)
    if (need[s]) grads[s] = in_place(grads[s], last[s]);
  return {grads[0], grads[1]};
}

}  // namespace

#define PIX2REP_ALIGN_OPTIONS "Tensor f1, Tensor f2, Tensor grid1, Tensor grid2, SymInt[] size, str mode, bool align_corners, str padding_mode"

STABLE_TORCH_LIBRARY_FRAGMENT(pix2rep_native, m) {
  m.def("align(" PIX2REP_ALIGN_OPTIONS ") -> (Tensor dot, Tensor sq1, Tensor sq2, Tensor valid)");
  m.def("align_backward(Tensor grad_dot, Tensor grad_sq1, Tensor grad_sq2, " PIX2REP_ALIGN_OPTIONS
        ", bool need_1, bool need_2, bool channels_last_1, bool channels_last_2) -> (Tensor grad_1, Tensor grad_2)");
}

STABLE_TORCH_LIBRARY_IMPL(pix2rep_native, CPU, m) {
  m.impl("align", TORCH_BOX(&forward));
  m.impl("align_backward", TORCH_BOX(&backward));
}

}  // namespace pix2rep
