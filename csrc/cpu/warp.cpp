// pix2rep_native::warp and warp_backward on the CPU: schemas, argument checks, layouts, storage types.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <tuple>

#include "../common/check.h"
#include "../common/view.h"
#include "parallel.h"
#include "warp_core.h"

namespace pix2rep {
namespace {

using Sizes = std::vector<int64_t>;

template <class F>
void with_storage(ScalarType type, const F& f) {
  if (type == ScalarType::Half) return f(F16{});
  if (type == ScalarType::BFloat16) return f(BF16{});
  with_float_type(type, "features", [&](auto zero) {
    if constexpr (sizeof(zero) > 2) f(zero);
  });
}

int64_t product(const int64_t* begin, const int64_t* end) {
  int64_t out = 1;
  for (; begin != end; ++begin) out *= *begin;
  return out;
}

// What both passes are told; `shape` is that of the features.
struct Arguments {
  Tensor grid;
  Sizes size, shape;
  std::optional<Tensor> given;
  Mode mode;
  bool affine, align_corners, border;
  int dims;
  int64_t count;  // points

  Arguments(const Tensor& grid, const Sizes& size, const std::optional<Tensor>& points, const std::string& mode, bool align_corners,
            const std::string& padding_mode, const Sizes& shape)
      : grid(grid.dim() == 3 ? grid : torch::stable::contiguous(grid)), size(size), shape(shape), affine(grid.dim() == 3), align_corners(align_corners),
        border(padding_mode == "border"), dims(int(shape.size()) - 2) {
    PIX2REP_EXPECT(dims == 2 || dims == 3, "features", "have shape [B, C, H, W] or [B, C, D, H, W]", shape.size(), " axes");
    PIX2REP_EXPECT(int(size.size()) == dims, "size", "have one entry a spatial axis", size.size());
    PIX2REP_EXPECT(border || padding_mode == "zeros", "padding_mode", "be 'zeros' or 'border'", padding_mode);
    PIX2REP_EXPECT(mode == "linear" || mode == "nearest" || (mode == "bicubic" && dims == 2), "mode", "be 'linear', 'nearest' or, in 2D, 'bicubic'", mode);
    this->mode = mode == "linear" ? Mode::linear : mode == "nearest" ? Mode::nearest : Mode::bicubic;
    // int32 pixel indices and float coordinates.
    PIX2REP_EXPECT(product(&shape[2], shape.data() + shape.size()) < (int64_t(1) << 31), "features", "have fewer than 2^31 pixels an image", shape[2]);
    for (int axis = 0; axis < dims; ++axis)
      PIX2REP_EXPECT(shape[2 + axis] > 0 && shape[2 + axis] <= (1 << 24), "features", "have spatial axes of 1 to 2^24", shape[2 + axis]);
    check_grid();
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

  int64_t per_image() const { return product(size.data(), size.data() + size.size()); }
  Points points() const { return Points(!given, given ? data<int64_t>(*given) : nullptr, count, shape[0], per_image()); }

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
  void check_grid() const {
    const auto type = grid.scalar_type();
    PIX2REP_EXPECT(type == ScalarType::Float || type == ScalarType::Double, "grid", "be float32 or float64", "scalar type ", int(type));
    bool fits = grid.size(0) == shape[0];
    if (affine) {
      fits = fits && grid.size(1) == dims && grid.size(2) == dims + 1;
    } else {
      fits = fits && grid.dim() == dims + 2 && grid.size(dims + 1) == dims;
      for (int axis = 0; fits && axis < dims; ++axis) fits = grid.size(1 + axis) == size[axis];
    }
    PIX2REP_EXPECT(fits, "grid", "have shape [B, d, d + 1] or [B, *size, d]", grid.dim(), " axes of which the first is ", grid.size(0));
  }
};

// The features as a map, copied when they are in neither layout: `held` keeps the copy.
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

std::tuple<Tensor, Tensor, Tensor> forward(Tensor features, Tensor grid, Sizes size, std::optional<Tensor> points, std::string mode, bool align_corners,
                                        std::string padding_mode, bool normalize) {
  Sizes shape;
  for (int64_t axis = 0; axis < features.dim(); ++axis) shape.push_back(features.size(axis));
  const Arguments in(grid, size, points, mode, align_corners, padding_mode, shape);
  const auto norm_type = features.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor rows = torch::stable::new_empty(features, {in.count, shape[1]}), inside = torch::stable::new_empty(features, {in.count}, ScalarType::Bool);
  Tensor norms = torch::stable::new_empty(features, {normalize ? in.count : 0}, norm_type);
  if (in.count == 0) return {rows, inside, norms};
  with_storage(features.scalar_type(), [&](auto zero) {
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
  grad_rows = torch::stable::contiguous(grad_rows), rows = torch::stable::contiguous(rows);
  const int64_t channels = shape[1], pixels = product(&shape[2], shape.data() + shape.size());
  // Channels-last memory is allocated as [B, *S, C]; the axes are put in place at the end.
  Sizes memory = shape;
  if (channels_last) memory.erase(memory.begin() + 1), memory.push_back(channels);
  Tensor grad = torch::stable::new_empty(rows, memory);
  if (grad.numel() > 0)
    with_storage(rows.scalar_type(), [&](auto zero) {
      using S = decltype(zero);
      const bool last = channels_last || channels == 1;
      const Map<S> map{static_cast<S*>(grad.data_ptr()), shape[0], channels, pixels, channels * pixels, last ? channels : pixels, last};
      in.with_grid([&](const auto& w) {
        warp_backward<S>(static_cast<const S*>(grad_rows.data_ptr()), static_cast<const S*>(rows.data_ptr()),
                         normalize ? data<Compute<S>>(norms) : nullptr, w, in.points(), TorchParallel{}, map);
      });
    });
  if (!channels_last) return grad;
  for (int64_t axis = grad.dim() - 1; axis > 1; --axis) grad = torch::stable::transpose(grad, axis - 1, axis);
  return grad;
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
