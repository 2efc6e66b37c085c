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

// All taps of a point: index k counts x fastest.
template <int kTaps, int kDims>
struct WarpTaps {
  static constexpr int kPlanes = kDims == 3 ? kTaps : 1;
  static constexpr int kCount = kPlanes * kTaps * kTaps;

  static __device__ __forceinline__ WarpTap at(const WarpProblem& w, const WarpPoint& point, int k) {
    return tap<kTaps, kDims>(w, point, k / (kTaps * kTaps), k / kTaps % kTaps, k % kTaps);
  }
};

}  // namespace pix2rep
