// Where the points of warp are and what they sum: coordinates (warp.1), positions and taps (warp.2-3), in the reference's order of operations and without
// fused multiply-adds, so that a tie of "nearest" falls the same way.
#pragma once

#include "../common/math.h"
#include "device.h"

namespace pix2rep {

// Sizes and strides of the spatial axes are slowest first, of three: 2D has a leading 1 (stride 0).
struct WarpProblem {
  const void* grid;  // affine [B, dims, dims + 1] in any strides, or dense [B, *size, dims]
  bool wide_grid;    // float64; coordinates are float32
  bool affine, align_corners, border;
  bool narrow;  // 32 bits hold every point: their divisions are several times cheaper
  int64_t grid_batch, grid_row, grid_column;  // strides of an affine grid
  const int64_t* points;                      // nullptr: every point in order
  int64_t count, batch, channels;
  int64_t size[3], extent[3];
  int64_t stride_batch, stride_channel, stride[3];  // of the map that is read or added to
};

struct WarpPoint {
  bool ok, inside, bad;  // names a point of the grid; lies inside; has a NaN coordinate or names none
  int64_t image;
  float x, y, z;
};

struct WarpTap {
  int64_t offset;  // inside the image
  float weight;    // 0: not read
};

__device__ __forceinline__ float load_grid(const WarpProblem& w, int64_t at) {
  return w.wide_grid ? float(static_cast<const double*>(w.grid)[at]) : static_cast<const float*>(w.grid)[at];
}

// Normalised coordinate of output index i, as in F.affine_grid.
__device__ __forceinline__ float output_coordinate(int64_t i, int64_t extent, bool align_corners) {
  const int64_t last = extent - 1;
  return __fdiv_rn(float(2 * i - last), float(align_corners ? (last > 1 ? last : 1) : extent));
}

template <int kDims>
__device__ __forceinline__ float affine_row(const WarpProblem& w, int64_t at, float x, float y, float z) {
  float g = __fadd_rn(__fmul_rn(load_grid(w, at), x), __fmul_rn(load_grid(w, at + w.grid_column), y));
  if (kDims == 3) g = __fadd_rn(g, __fmul_rn(load_grid(w, at + 2 * w.grid_column), z));
  return __fadd_rn(g, load_grid(w, at + kDims * w.grid_column));
}

// (warp.2), moved into the map when padding is "border"; bicubic moves its taps instead.
__device__ __forceinline__ float position(const WarpProblem& w, float g, int64_t extent, bool clamped) {
  float x = w.align_corners ? __fmul_rn(__fmul_rn(__fadd_rn(g, 1.0f), 0.5f), float(extent - 1))
                            : __fmul_rn(__fadd_rn(__fmul_rn(__fadd_rn(g, 1.0f), float(extent)), -1.0f), 0.5f);
  if (clamped) x = x < 0.0f ? 0.0f : x > float(extent - 1) ? float(extent - 1) : x;  // NaN passes
  return x;
}

// a / b of a >= 0, b > 0
__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b, bool narrow) { return narrow ? int64_t(uint32_t(a) / uint32_t(b)) : a / b; }

template <int kTaps, int kDims>
__device__ __forceinline__ WarpPoint locate(const WarpProblem& w, int64_t p) {
  const int64_t total = w.size[0] * w.size[1] * w.size[2];
  int64_t point = p < w.count ? (w.points ? w.points[p] : p) : -1;
  WarpPoint out;
  out.ok = point >= 0 && point < w.batch * total;
  point = out.ok ? point : 0;
  out.image = total > 0 ? quotient(point, total, w.narrow) : 0;
  float g[3] = {0.0f, 0.0f, 0.0f};
  if (out.ok && w.affine) {
    const int64_t rest = point - out.image * total, line = quotient(rest, w.size[2], w.narrow), plane = quotient(line, w.size[1], w.narrow);
    const float x = output_coordinate(rest - line * w.size[2], w.size[2], w.align_corners);
    const float y = output_coordinate(line - plane * w.size[1], w.size[1], w.align_corners);
    const float z = output_coordinate(plane, w.size[0], w.align_corners);
#pragma unroll
    for (int axis = 0; axis < kDims; ++axis) g[axis] = affine_row<kDims>(w, out.image * w.grid_batch + axis * w.grid_row, x, y, z);
  } else if (out.ok) {
#pragma unroll
    for (int axis = 0; axis < kDims; ++axis) g[axis] = load_grid(w, point * kDims + axis);
  }
  out.inside = out.ok && fabsf(g[0]) <= 1.0f && fabsf(g[1]) <= 1.0f && fabsf(g[2]) <= 1.0f;
  out.bad = !out.ok || g[0] != g[0] || g[1] != g[1] || g[2] != g[2];
  const bool clamped = w.border && kTaps != 4;
  out.x = position(w, g[0], w.extent[2], clamped);
  out.y = position(w, g[1], w.extent[1], clamped);
  out.z = kDims == 3 ? position(w, g[2], w.extent[0], clamped) : 0.0f;
  return out;
}

// Index and weight of tap k of one axis; the index is always inside the map.
template <int kTaps>
__device__ __forceinline__ float axis_tap(const WarpProblem& w, float x, int64_t extent, int k, int64_t& index) {
  const float base = floorf(x), t = __fadd_rn(x, -base);
  float centre, weight = 1.0f;
  if (kTaps == 1) {
    centre = rintf(x);
  } else if (kTaps == 2) {
    centre = base + float(k);
    weight = k == 1 ? t : 1.0f - t;
  } else {
    centre = base + float(k - 1);
    const float d = k == 0 ? t + 1.0f : k == 1 ? t : k == 2 ? 1.0f - t : 2.0f - t;
    weight = k == 1 || k == 2 ? near_weight(d) : far_weight(d);
  }
  const float last = float(extent - 1);
  if (!w.border && (centre < 0.0f || centre > last)) weight = 0.0f;
  centre = centre >= 0.0f ? centre : 0.0f;  // NaN too
  index = int64_t(centre > last ? last : centre);
  return weight;
}

template <int kTaps, int kDims>
__device__ __forceinline__ WarpTap tap(const WarpProblem& w, const WarpPoint& point, int kz, int ky, int kx) {
  int64_t iy, ix;
  const float wy = axis_tap<kTaps>(w, point.y, w.extent[1], ky, iy);
  const float wx = axis_tap<kTaps>(w, point.x, w.extent[2], kx, ix);
  WarpTap out{iy * w.stride[1] + ix * w.stride[2], wy};
  if (kDims == 3) {
    int64_t iz;
    out.weight = __fmul_rn(axis_tap<kTaps>(w, point.z, w.extent[0], kz, iz), wy);
    out.offset += iz * w.stride[0];
  }
  out.weight = point.bad ? __int_as_float(0x7fc00000) : __fmul_rn(out.weight, wx);
  return out;
}

// Taps of a point in registers, by axis: tap k counts x fastest.
template <int kTaps, int kDims>
struct PointTaps {
  static constexpr int kAxes = kTaps * kDims;
  static constexpr int kCount = kDims == 3 ? kTaps * kTaps * kTaps : kTaps * kTaps;

  int64_t offset[kAxes];  // of index k of axis a, x first, at a kTaps + k; that of y also leads to the image
  float weight[kAxes];

  __device__ __forceinline__ PointTaps() {}
  // A point that is not `present` has no weight.
  __device__ __forceinline__ PointTaps(const WarpProblem& w, const WarpPoint& point, bool present) {
#pragma unroll
    for (int axis = 0; axis < kDims; ++axis)
#pragma unroll
      for (int k = 0; k < kTaps; ++k) {
        int64_t index;
        const float x = axis == 0 ? point.x : axis == 1 ? point.y : point.z;
        weight[axis * kTaps + k] = axis_tap<kTaps>(w, x, w.extent[2 - axis], k, index);
        offset[axis * kTaps + k] = index * w.stride[2 - axis] + (axis == 1 ? point.image * w.stride_batch : 0);
      }
#pragma unroll
    for (int k = 0; k < kTaps; ++k) weight[k] = !present ? 0.0f : point.bad ? __int_as_float(0x7fc00000) : weight[k];
  }

  __device__ __forceinline__ WarpTap at(int k) const {
    const int x = k % kTaps, y = kTaps + k / kTaps % kTaps, z = 2 * kTaps + k / (kTaps * kTaps);
    if constexpr (kDims == 3) return {offset[z] + offset[y] + offset[x], __fmul_rn(__fmul_rn(weight[z], weight[y]), weight[x])};
    return {offset[y] + offset[x], __fmul_rn(weight[y], weight[x])};
  }
};

// Taps of 32 points in shared memory: each is located by one lane, for all that share its channels.
template <int kTaps, int kDims>
struct TapTable {
  using Taps = PointTaps<kTaps, kDims>;
  static constexpr int kBytes = Taps::kAxes * 32 * 12;

  int64_t* offset;
  float* weight;

  __device__ __forceinline__ explicit TapTable(unsigned char* bytes)
      : offset(reinterpret_cast<int64_t*>(bytes)), weight(reinterpret_cast<float*>(bytes + Taps::kAxes * 32 * 8)) {}

  __device__ __forceinline__ void write(int place, const Taps& taps) const {
#pragma unroll
    for (int k = 0; k < Taps::kAxes; ++k) offset[k * 32 + place] = taps.offset[k], weight[k * 32 + place] = taps.weight[k];
  }
  __device__ __forceinline__ Taps read(int place) const {
    Taps taps;
#pragma unroll
    for (int k = 0; k < Taps::kAxes; ++k) taps.offset[k] = offset[k * 32 + place], taps.weight[k] = weight[k * 32 + place];
    return taps;
  }
};

// Finds the points that a warp takes, `batch` neighbours from `begin` on, and leaves their taps to its lanes. With `named`, indices that name no point of
// the grid have no taps; else NaN ones.
template <int kTaps, int kDims>
__device__ __forceinline__ TapTable<kTaps, kDims> share_points(const WarpProblem& w, int64_t begin, int batch, bool* inside, bool named) {
  const int lane = threadIdx.x % 32;
  const TapTable<kTaps, kDims> table(device::shared_memory() + threadIdx.x / 32 * TapTable<kTaps, kDims>::kBytes);
  if (lane < batch) {
    const int64_t p = begin + lane;
    const WarpPoint point = locate<kTaps, kDims>(w, p);
    if (inside && p < w.count) inside[p] = point.inside;
    table.write(lane, PointTaps<kTaps, kDims>(w, point, named ? point.ok : p < w.count));
  }
  __syncwarp();
  return table;
}

}  // namespace pix2rep
