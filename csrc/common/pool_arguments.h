// Arguments of pool that every C++ backend checks alike, so that no kernel can read out of bounds.
#pragma once

#include <cstdint>

#include "check.h"
#include "shape.h"

namespace pix2rep {

// f(zero of the labels' type)
template <class F>
void with_label_type(const Tensor& labels, const F& f) {
  switch (labels.scalar_type()) {
    case ScalarType::Byte:
      return f(uint8_t{});
    case ScalarType::Char:
      return f(int8_t{});
    case ScalarType::Short:
      return f(int16_t{});
    case ScalarType::Int:
      return f(int32_t{});
    case ScalarType::Long:
      return f(int64_t{});
    default:
      STD_TORCH_CHECK(false, "`labels` must be uint8, int8, int16, int32 or int64, got scalar type ", int(labels.scalar_type()));
  }
}

struct PoolArguments {
  Sizes shape;  // of the features
  int64_t regions;

  PoolArguments(const Tensor& features, const Tensor& labels, int64_t regions) : shape(shape_of(features)), regions(regions) {
    PIX2REP_EXPECT(shape.size() >= 3, "features", "have shape [B, C, *S]", shape.size(), " axes");
    expect_float(features, "features");
    PIX2REP_EXPECT(regions >= 0, "regions", "be >= 0", regions);
    check_sizes(labels);
  }

  // Of the backward pass; `like` has the dtype of the features.
  PoolArguments(const Tensor& grad_means, const Tensor& counts, const Tensor& labels, const Tensor& like, const Sizes& shape) : shape(shape) {
    PIX2REP_EXPECT(shape.size() >= 3, "shape", "be [B, C, *S]", shape.size(), " axes");
    expect_float(like, "like");
    PIX2REP_EXPECT(counts.dim() == 2 && counts.size(0) == shape[0] && counts.scalar_type() == ScalarType::Long, "counts", "be int64 of shape [B, R]",
                   counts.dim(), " axes of scalar type ", int(counts.scalar_type()));
    regions = counts.size(1);
    check_sizes(labels);
    PIX2REP_EXPECT(grad_means.dim() == 3 && grad_means.size(0) == shape[0] && grad_means.size(1) == regions && grad_means.size(2) == shape[1], "grad_means",
                   "have shape [B, R, C]", grad_means.dim(), " axes");
    PIX2REP_EXPECT(grad_means.scalar_type() == compute_type(like), "grad_means", "have the dtype of the means", "scalar type ",
                   int(grad_means.scalar_type()));
  }

 private:
  void check_sizes(const Tensor& labels) const {
    PIX2REP_EXPECT(shape_of(labels) == without_channels(shape), "labels", "have the shape [B, *S] of the features", labels.dim(),
                   " axes of which the first is ", labels.dim() ? labels.size(0) : 0);
    with_label_type(labels, [](auto) {});
    const double keys = double(shape[0]) * (double(regions) + 1);  // of sorted pixels, on CUDA
    PIX2REP_EXPECT(keys < double(int64_t(1) << 62), "regions", "have B * (regions + 1) < 2^62", regions);
  }
};

}  // namespace pix2rep
