// A checked grid as the CPU's kernels take it.
#pragma once

#include <vector>

#include "../common/grid_arguments.h"
#include "warp_core.h"

namespace pix2rep {

// f(WarpGrid) of the grid's type.
template <class F>
void with_grid(const GridArguments& in, const F& f) {
  const auto run = [&](auto zero) {
    using G = decltype(zero);
    WarpGrid<G> w{data<G>(in.grid), 0, 0, 0, {}, in.affine, in.align_corners, in.border, Mode(in.taps), in.dims, {1, 1, 1}, {1, 1, 1}};
    if (in.affine) w.batch_stride = in.grid.stride(0), w.row_stride = in.grid.stride(1), w.column_stride = in.grid.stride(2);
    for (int axis = 0; axis < in.dims; ++axis) w.size[3 - in.dims + axis] = in.size[axis], w.extent[3 - in.dims + axis] = in.shape[2 + axis];
    const std::vector<G> output = in.affine ? output_coordinates(w) : std::vector<G>();
    f(w);
  };
  in.grid.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
}

}  // namespace pix2rep
