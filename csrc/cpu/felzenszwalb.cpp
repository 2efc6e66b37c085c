// pix2rep_native::felzenszwalb on the CPU: schema and argument checks. No gradient, no other backend; pix2rep_kernels/superpixels.py is its home.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <vector>

#include "../common/view.h"
#include "felzenszwalb_core.h"

namespace pix2rep {
namespace {

Tensor segment(Tensor image, double scale, std::vector<double> sigma, int64_t min_size) {
  const int64_t axes = image.dim();
  PIX2REP_EXPECT(axes == 2 || axes == 3, "image", "have shape [H, W] or [D, H, W]", axes, " axes");
  PIX2REP_EXPECT(image.scalar_type() == ScalarType::Double, "image", "be float64", "scalar type ", int(image.scalar_type()));
  PIX2REP_EXPECT(image.numel() <= (int64_t(1) << 32) / kForward, "image", "have at most 330382099 voxels", image.numel());
  PIX2REP_EXPECT(int64_t(sigma.size()) == axes, "sigma", "be a number an axis of image", sigma.size(), " of them");
  PIX2REP_EXPECT(scale >= 0 && std::isfinite(scale), "scale", "be >= 0 and finite", scale);
  PIX2REP_EXPECT(min_size >= 0, "min_size", "be >= 0", min_size);
  for (double s : sigma) PIX2REP_EXPECT(s >= 0 && s <= 1e6, "sigma", "be 0 to 1e6", s);
  const bool solid = axes == 3;
  const Grid grid{solid ? image.size(0) : 1, image.size(axes - 2), image.size(axes - 1)};
  std::vector<int64_t> shape(image.sizes().begin(), image.sizes().end());
  Tensor labels = torch::stable::new_empty(image, shape, ScalarType::Int);
  if (image.numel() == 0) return labels;
  const Tensor given = torch::stable::contiguous(image);
  const Scratch<double> blurred(grid.voxels());
  std::copy_n(data<double>(given), grid.voxels(), blurred.get());
  for (int64_t i = 0; i < grid.voxels(); ++i)  // differences must be finite too
    PIX2REP_EXPECT(std::fabs(blurred.get()[i]) <= 1e300, "image", "be finite, -1e300 to 1e300", blurred.get()[i], " at element ", i);
  blur(blurred.get(), grid, {solid ? sigma[0] : 0.0, sigma[size_t(axes - 2)], sigma[size_t(axes - 1)]});
  felzenszwalb(blurred.get(), grid, scale, min_size, mutable_data<int32_t>(labels));
  return labels;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pix2rep_native, m) { m.def("felzenszwalb(Tensor image, float scale, float[] sigma, int min_size) -> Tensor labels"); }

STABLE_TORCH_LIBRARY_IMPL(pix2rep_native, CPU, m) { m.impl("felzenszwalb", TORCH_BOX(&segment)); }

}  // namespace pix2rep
