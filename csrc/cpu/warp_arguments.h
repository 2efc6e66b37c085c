// What warp and align are told, checked: a grid, the size of its output, the options; maps and gradients as raw memory.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <vector>

#include "../common/check.h"
#include "../common/view.h"
#include "warp_core.h"

namespace pix2rep {

using Sizes = std::vector<int64_t>;

template <class F>
void with_storage(ScalarType type, const char* argument, const F& f) {
  if (type == ScalarType::Half) return f(F16{});
  if (type == ScalarType::BFloat16) return f(BF16{});
  with_float_type(type, argument, [&](auto zero) {
    if constexpr (sizeof(zero) > 2) f(zero);
  });
}

inline int64_t product(const int64_t* begin, const int64_t* end) {
  int64_t out = 1;
  for (; begin != end; ++begin) out *= *begin;
  return out;
}

inline Sizes shape_of(const Tensor& tensor) {
  Sizes shape;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) shape.push_back(tensor.size(axis));
  return shape;
}

// One grid over a map of the given shape; the names are those of the map and the grid.
struct GridArguments {
  Tensor grid;
  Sizes size, shape;
  Mode mode;
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
    this->mode = mode == "linear" ? Mode::linear : mode == "nearest" ? Mode::nearest : Mode::bicubic;
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

  // f(WarpGrid) of the grid's type.
  template <class F>
  void with_grid(const F& f) const {
    const auto run = [&](auto zero) {
      using G = decltype(zero);
      WarpGrid<G> w{data<G>(grid), 0, 0, 0, {}, affine, align_corners, border, mode, dims, {1, 1, 1}, {1, 1, 1}};
      if (affine) w.batch_stride = grid.stride(0), w.row_stride = grid.stride(1), w.column_stride = grid.stride(2);
      for (int axis = 0; axis < dims; ++axis) w.size[3 - dims + axis] = size[axis], w.extent[3 - dims + axis] = shape[2 + axis];
      const std::vector<G> output = affine ? output_coordinates(w) : std::vector<G>();
      f(w);
    };
    grid.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  }

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

// A tensor as a map, copied when it is in neither layout: `held` keeps the copy.
template <class S>
Map<const S> map_of(const Tensor& features, Tensor& held) {
  const auto pixels_at = [&](const Tensor& t, int64_t stride) {  // whether the spatial axes are one axis of that stride
    for (int64_t axis = t.dim() - 1; axis >= 2; --axis) {
      if (t.size(axis) > 1 && t.stride(axis) != stride) return false;
      stride *= t.size(axis);
    }
    return true;
  };
  held = features;
  int64_t pixel_stride = 1;
  for (int64_t axis = features.dim() - 1; axis >= 2; --axis)
    if (features.size(axis) > 1) {
      pixel_stride = features.stride(axis);
      break;
    }
  const bool last = features.stride(1) == 1 && features.size(1) > 1 && pixels_at(features, pixel_stride);
  if (!last && !pixels_at(features, 1)) held = torch::stable::contiguous(features);
  Map<const S> map{reinterpret_cast<const S*>(held.data_ptr()), held.size(0), held.size(1), 1, held.stride(0), last ? pixel_stride : held.stride(1), last};
  for (int64_t axis = 2; axis < held.dim(); ++axis) map.pixels *= held.size(axis);
  return map;
}

// A gradient of that shape and the dtype of `like`. Channels-last memory is allocated as [B, *S, C]: `in_place` puts the axes in place at the end.
inline Tensor new_gradient(const Tensor& like, Sizes shape, bool channels_last) {
  const int64_t channels = shape[1];
  if (channels_last) shape.erase(shape.begin() + 1), shape.push_back(channels);
  return torch::stable::new_empty(like, shape);
}

inline Tensor in_place(Tensor gradient, bool channels_last) {
  if (channels_last)
    for (int64_t axis = gradient.dim() - 1; axis > 1; --axis) gradient = torch::stable::transpose(gradient, axis - 1, axis);
  return gradient;
}

template <class S>
Map<S> map_of_gradient(const Tensor& gradient, const GridArguments& in, bool channels_last) {
  const int64_t channels = in.shape[1], pixels = in.pixels();
  const bool last = channels_last || channels == 1;
  return {static_cast<S*>(gradient.data_ptr()), in.shape[0], channels, pixels, channels * pixels, last ? channels : pixels, last};
}

}  // namespace pix2rep
