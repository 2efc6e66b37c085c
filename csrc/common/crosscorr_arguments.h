// Arguments of crosscorr that every C++ backend checks alike, so that no kernel can read out of bounds.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>

#include "check.h"
#include "view.h"

namespace pix2rep {

// Of both passes.
struct CrosscorrArguments {
  Tensor x, y;
  std::optional<Tensor> weight;  // contiguous
  int64_t n, d1, d2;
  ScalarType type;  // of the arithmetic

  CrosscorrArguments(const Tensor& x, const Tensor& y, const std::optional<Tensor>& weight) : x(x), y(y) {
    PIX2REP_EXPECT(x.dim() == 2, "x", "have shape [N, D1]", x.dim(), " axes");
    n = x.size(0), d1 = x.size(1);
    PIX2REP_EXPECT(y.dim() == 2 && y.size(0) == n, "y", "have shape [N, D2] with x's N", y.dim(), " axes of which the first is ",
                   y.dim() ? y.size(0) : 0);
    d2 = y.size(1);
    expect_float(x, "x"), expect_float(y, "y");
    type = compute_type(x, y);
    if (weight) this->weight = vector(*weight, "weight", n);
  }

  // Contiguous, of the arithmetic's type.
  Tensor vector(const Tensor& t, const char* name, int64_t count) const {
    PIX2REP_EXPECT(t.dim() == 1 && t.size(0) == count, name, "be a vector with one entry a row (weight) or feature", t.dim(), " axes and ", t.numel(),
                   " entries");
    return typed(t, name);
  }
  Tensor typed(const Tensor& t, const char* name) const {
    PIX2REP_EXPECT(t.scalar_type() == type, name, "be float64 where x or y is, else float32", "scalar type ", int(t.scalar_type()));
    return torch::stable::contiguous(t);
  }
};

// What the backward pass is given besides: gradients of the moments, and their pivots, contiguous.
struct CrosscorrUpstream {
  Tensor sum_x, sum_y, square_x, square_y, product, pivot_x, pivot_y;

  CrosscorrUpstream(const CrosscorrArguments& in, const Tensor& sum_x, const Tensor& sum_y, const Tensor& square_x, const Tensor& square_y,
                    const Tensor& product, const Tensor& pivot_x, const Tensor& pivot_y)
      : sum_x(in.vector(sum_x, "grad_sum_x", in.d1)), sum_y(in.vector(sum_y, "grad_sum_y", in.d2)), square_x(in.vector(square_x, "grad_square_x", in.d1)),
        square_y(in.vector(square_y, "grad_square_y", in.d2)), pivot_x(in.vector(pivot_x, "pivot_x", in.d1)), pivot_y(in.vector(pivot_y, "pivot_y", in.d2)) {
    PIX2REP_EXPECT(product.dim() == 2 && product.size(0) == in.d1 && product.size(1) == in.d2, "grad_product", "have shape [D1, D2]", product.dim(),
                   " axes and ", product.numel(), " entries");
    this->product = in.typed(product, "grad_product");
  }
};

}  // namespace pix2rep
