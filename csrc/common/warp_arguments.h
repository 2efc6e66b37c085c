// Arguments of warp that every C++ backend checks alike, so that no kernel can read out of bounds.
#pragma once

#include <optional>

#include "grid_arguments.h"

namespace pix2rep {

// Of both passes; `shape` is that of the features. Whether the points lie in the grid is left to those who may read them.
struct WarpArguments : GridArguments {
  std::optional<Tensor> given;  // contiguous
  int64_t count;                // points

  WarpArguments(const Tensor& grid, const Sizes& size, const std::optional<Tensor>& points, const std::string& mode, bool align_corners,
                const std::string& padding_mode, const Sizes& shape)
      : GridArguments(grid, size, mode, align_corners, padding_mode, shape, "features", "grid"), count(shape[0] * per_image()) {
    if (!points) return;
    PIX2REP_EXPECT(points->dim() == 1, "points", "have shape [P]", points->dim(), " axes");
    PIX2REP_EXPECT(points->scalar_type() == ScalarType::Long, "points", "be int64", "scalar type ", int(points->scalar_type()));
    given = torch::stable::contiguous(*points);
    count = given->numel();
    PIX2REP_EXPECT(count == 0 || shape[0] * per_image() > 0, "points", "be empty where the grid has no points", count);
  }

  // What the backward pass is given of the forward one, made contiguous.
  void expect_saved(Tensor& grad_rows, Tensor& rows, Tensor& norms, bool normalize) const {
    expect_float(rows, "rows");
    for (const auto& [t, name] : {std::pair{&grad_rows, "grad_rows"}, std::pair{&rows, "rows"}})
      PIX2REP_EXPECT(t->dim() == 2 && t->size(0) == count && t->size(1) == shape[1], name, "have shape [P, C]", t->dim(), " axes of which the first is ",
                     t->dim() ? t->size(0) : 0);
    PIX2REP_EXPECT(grad_rows.scalar_type() == rows.scalar_type(), "grad_rows", "have the dtype of rows", "scalar type ", int(grad_rows.scalar_type()));
    grad_rows = torch::stable::contiguous(grad_rows), rows = torch::stable::contiguous(rows);
    if (!normalize) return;
    PIX2REP_EXPECT(norms.dim() == 1 && norms.size(0) == count, "norms", "have shape [P]", norms.dim(), " axes");
    PIX2REP_EXPECT(norms.scalar_type() == compute_type(rows), "norms", "be float32, or float64 for float64 rows", "scalar type ", int(norms.scalar_type()));
    norms = torch::stable::contiguous(norms);
  }
};

}  // namespace pix2rep
