// pix2rep_native::warp and warp_backward on the CPU: schemas, argument checks, layouts, storage types.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "../common/warp_arguments.h"
#include "maps.h"
#include "parallel.h"
#include "warp_grid.h"

namespace pix2rep {
namespace {

// What both passes are told; points that lie outside the grid are refused here, where they can be read.
struct Arguments : WarpArguments {
  using WarpArguments::WarpArguments;

  Points points() const {
    const int64_t total = shape[0] * per_image(), *p = given ? data<int64_t>(*given) : nullptr;
    if (p && count > 0) {
      const auto [least, most] = std::minmax_element(p, p + count);
      STD_TORCH_CHECK(*least >= 0 && *most < total, "`points` must be in [0, ", total, "), got values from ", *least, " to ", *most);
    }
    return Points(!given, p, count, shape[0], per_image());
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(Tensor features, Tensor grid, Sizes size, std::optional<Tensor> points, std::string mode, bool align_corners,
                                           std::string padding_mode, bool normalize) {
  const Sizes shape = shape_of(features);
  const Arguments in(grid, size, points, mode, align_corners, padding_mode, shape);
  expect_float(features, "features");
  Tensor rows = torch::stable::new_empty(features, {in.count, shape[1]}), inside = torch::stable::new_empty(features, {in.count}, ScalarType::Bool);
  Tensor norms = torch::stable::new_empty(features, {normalize ? in.count : 0}, compute_type(features));
  if (in.count == 0) return {rows, inside, norms};
  with_storage(features.scalar_type(), "features", [&](auto zero) {
    using S = decltype(zero);
    Tensor held;
    const Map<const S> map = map_of<S>(features, held);
    with_grid(in, [&](const auto& w) {
      warp_forward<S>(map, w, in.points(), TorchParallel{}, static_cast<S*>(rows.data_ptr()), mutable_data<bool>(inside),
                      normalize ? mutable_data<Compute<S>>(norms) : nullptr);
    });
  });
  return {rows, inside, norms};
}

Tensor backward(Tensor grad_rows, Tensor rows, Tensor norms, Tensor grid, Sizes size, std::optional<Tensor> points, std::string mode,
                bool align_corners, std::string padding_mode, bool normalize, Sizes shape, bool channels_last) {
  const Arguments in(grid, size, points, mode, align_corners, padding_mode, shape);
  in.expect_saved(grad_rows, rows, norms, normalize);
  const Tensor grad = new_gradient(rows, shape, channels_last);
  if (grad.numel() > 0)
    with_storage(rows.scalar_type(), "rows", [&](auto zero) {
      using S = decltype(zero);
      with_grid(in, [&](const auto& w) {
        warp_backward<S>(static_cast<const S*>(grad_rows.data_ptr()), static_cast<const S*>(rows.data_ptr()),
                         normalize ? data<Compute<S>>(norms) : nullptr, w, in.points(), TorchParallel{},
                         map_of_gradient<S>(grad, shape, channels_last || shape[1] == 1));
      });
    });
  return in_place(grad, channels_last);
}

}  // namespace

#define PIX2REP_WARP_OPTIONS "SymInt[] size, Tensor? points, str mode, bool align_corners, str padding_mode, bool normalize"

STABLE_TORCH_LIBRARY_FRAGMENT(pix2rep_native, m) {
  m.def("warp(Tensor features, Tensor grid, " PIX2REP_WARP_OPTIONS ") -> (Tensor rows, Tensor inside, Tensor norms)");
  m.def("warp_backward(Tensor grad_rows, Tensor rows, Tensor norms, Tensor grid, " PIX2REP_WARP_OPTIONS
        ", SymInt[] shape, bool channels_last) -> Tensor grad_features");
}

STABLE_TORCH_LIBRARY_IMPL(pix2rep_native, CPU, m) {
  m.impl("warp", TORCH_BOX(&forward));
  m.impl("warp_backward", TORCH_BOX(&backward));
}

}  // namespace pix2rep
