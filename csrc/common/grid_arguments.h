// What warp and align are told of a grid over a map, checked for every C++ backend: the affine or dense grid, the size of its output, the options.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <string>

#include "check.h"
#include "shape.h"

namespace pix2rep {

// One grid over a map of the given shape; the names are those of the map and the grid.
struct GridArguments {
  Tensor grid;
  Sizes size, shape;
  int taps;  // an axis: nearest 1, linear 2, bicubic 4
  bool affine, align_corners, border;
  int dims;

  GridArguments(const Tensor& grid, const Sizes& size, const std::string& mode, bool align_corners, const std::string& padding_mode, const Sizes& shape,
                const char* map_name, const char* grid_name)
      : grid(grid.dim() == 3 ? grid : torch::stable::contiguous(grid)), size(size), shape(shape), affine(grid.dim() == 3), align_corners(align_corners),
        border(padding_mode == "border"), dims(int(shape.size()) - 2) {
    PIX2REP_EXPECT(dims == 2 || dims == 3, map_name, "have shape [B, C, H, W] or [B, C, D, H, W]", shape.size(), " axes");
    PIX2REP_EXPECT(int(size.size()) == dims, "size", "have one entry a spatial axis", size.size());
    for (const int64_t n : size) PIX2REP_EXPECT(n >= 0 && n <= (1 << 24), "size", "have entries of 0 to 2^24", n);
    double points = double(shape[0]);
    for (const int64_t n : size) points *= double(n);
    PIX2REP_EXPECT(points < double(int64_t(1) << 62), "size", "have B * prod(size) < 2^62 points", points);
    PIX2REP_EXPECT(border || padding_mode == "zeros", "padding_mode", "be 'zeros' or 'border'", padding_mode);
    PIX2REP_EXPECT(mode == "linear" || mode == "nearest" || (mode == "bicubic" && dims == 2), "mode", "be 'linear', 'nearest' or, in 2D, 'bicubic'", mode);
    taps = mode == "linear" ? 2 : mode == "nearest" ? 1 : 4;
    double pixels = 1;  // of an image, whose indices are int32; coordinates are float
    for (int axis = 0; axis < dims; ++axis) {
      PIX2REP_EXPECT(shape[2 + axis] > 0 && shape[2 + axis] <= (1 << 24), map_name, "have spatial axes of 1 to 2^24", shape[2 + axis]);
      pixels *= double(shape[2 + axis]);
    }
    PIX2REP_EXPECT(pixels < double(int64_t(1) << 31), map_name, "have fewer than 2^31 pixels an image", pixels);
    check_grid(grid_name);
  }

  int64_t pixels() const { return product(&shape[2], shape.data() + shape.size()); }
  int64_t per_image() const { return product(size.data(), size.data() + size.size()); }

 private:
  void check_grid(const char* name) const {
    const auto type = grid.scalar_type();
    PIX2REP_EXPECT(type == ScalarType::Float || type == ScalarType::Double, name, "be float32 or float64", "scalar type ", int(type));
    bool fits = grid.dim() > 0 && grid.size(0) == shape[0];
    if (affine) {
      fits = fits && grid.size(1) == dims && grid.size(2) == dims + 1;
    } else {
      fits = fits && grid.dim() == dims + 2 && grid.size(dims + 1) == dims;
      for (int axis = 0; fits && axis < dims; ++axis) fits = grid.size(1 + axis) == size[axis];
    }
    PIX2REP_EXPECT(fits, name, "have shape [B, d, d + 1] or [B, *size, d]", grid.dim(), " axes");
  }
};

}  // namespace pix2rep
