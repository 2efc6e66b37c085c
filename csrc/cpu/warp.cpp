// pix2rep_native::warp and warp_backward on the CPU: schemas, argument checks, layouts, storage types.
#include <tuple>

#include "parallel.h"
#include "warp_arguments.h"

namespace pix2rep {
namespace {

// What both passes are told; `shape` is that of the features.
struct Arguments : GridArguments {
  std::optional<Tensor> given;
  int64_t count;  // points

  Arguments(const Tensor& grid, const Sizes& size, const std::optional<Tensor>& points, const std::string& mode, bool align_corners,
            const std::string& padding_mode, const Sizes& shape)
      : GridArguments(grid, size, mode, align_corners, padding_mode, shape, "features", "grid") {
    const int64_t total = shape[0] * per_image();
    count = total;
    if (!points) return;
    given = torch::stable::contiguous(*points);
    count = given->numel();
    PIX2REP_EXPECT(given->scalar_type() == ScalarType::Long && given->dim() == 1, "points", "be int64 of shape [P]", given->dim(), " axes");
    if (count == 0) return;
    const int64_t* p = data<int64_t>(*given);
    const auto [least, most] = std::minmax_element(p, p + count);
    STD_TORCH_CHECK(*least >= 0 && *most < total, "`points` must be in [0, ", total, "), got values from ", *least, " to ", *most);
  }

  Points points() const { return Points(!given, given ? data<int64_t>(*given) : nullptr, count, shape[0], per_image()); }
};

std::tuple<Tensor, Tensor, Tensor> forward(Tensor features, Tensor grid, Sizes size, std::optional<Tensor> points, std::string mode, bool align_corners,
                                           std::string padding_mode, bool normalize) {
  const Sizes shape = shape_of(features);
  const Arguments in(grid, size, points, mode, align_corners, padding_mode, shape);
  Tensor rows = torch::stable::new_empty(features, {in.count, shape[1]}), inside = torch::stable::new_empty(features, {in.count}, ScalarType::Bool);
  Tensor norms = torch::stable::new_empty(features, {normalize ? in.count : 0}, compute_type(features));
  if (in.count == 0) return {rows, inside, norms};
  with_storage(features.scalar_type(), "features", [&](auto zero) {
    using S = decltype(zero);
    Tensor held;
    const Map<const S> map = map_of<S>(features, held);
    in.with_grid([&](const auto& w) {
      warp_forward<S>(map, w, in.points(), TorchParallel{}, static_cast<S*>(rows.data_ptr()), mutable_data<bool>(inside),
                      normalize ? mutable_data<Compute<S>>(norms) : nullptr);
    });
  });
  return {rows, inside, norms};
}

Tensor backward(Tensor grad_rows, Tensor rows, Tensor norms, Tensor grid, Sizes size, std::optional<Tensor> points, std::string mode,
                bool align_corners, std::string padding_mode, bool normalize, Sizes shape, bool channels_last) {
  const Arguments in(grid, size, points, mode, align_corners, padding_mode, shape);
  PIX2REP_EXPECT(grad_rows.dim() == 2 && grad_rows.size(0) == in.count && grad_rows.size(1) == shape[1], "grad_rows", "have shape [P, C]",
                 grad_rows.dim(), " axes of which the first is ", grad_rows.size(0));
  PIX2REP_EXPECT(grad_rows.scalar_type() == rows.scalar_type(), "grad_rows", "have the dtype of rows", "scalar type ", int(grad_rows.scalar_type()));
  PIX2REP_EXPECT(rows.dim() == 2 && rows.size(0) == in.count && rows.size(1) == shape[1], "rows", "have shape [P, C]", rows.dim(),
                 " axes of which the first is ", rows.size(0));
  if (normalize) {
    PIX2REP_EXPECT(norms.dim() == 1 && norms.size(0) == in.count, "norms", "have shape [P]", norms.dim(), " axes");
    PIX2REP_EXPECT(norms.scalar_type() == compute_type(rows), "norms", "be float32, or float64 for float64 rows", "scalar type ", int(norms.scalar_type()));
    norms = torch::stable::contiguous(norms);
  }
  grad_rows = torch::stable::contiguous(grad_rows), rows = torch::stable::contiguous(rows);
  const Tensor grad = new_gradient(rows, shape, channels_last);
  if (grad.numel() > 0)
    with_storage(rows.scalar_type(), "rows", [&](auto zero) {
      using S = decltype(zero);
      in.with_grid([&](const auto& w) {
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
