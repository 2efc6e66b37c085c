// The gradient of warp, (warp.5-6): float32 atomics, or records sorted by pixel and summed in that order, the same bits every time.
#pragma once

#include "warp_forward.cuh"

namespace pix2rep {

constexpr int scatter_blocks(int taps) { return taps == 1 ? 4 : row_blocks(taps); }

template <class S>
struct WarpUpstream {
  const S* grad_rows;  // [P, C]
  const S* rows;       // [P, C], and
  const float* norms;  // [P], where rows were normalised; else nullptr
};

// (warp.5) of the values of one point: (drow - dot row) scale.
struct RowScale {
  float dot, scale;

  __device__ __forceinline__ RowScale(float dot, float norm) : dot(norm < kWarpEpsilon ? 0.0f : dot), scale(1.0f / (norm < kWarpEpsilon ? kWarpEpsilon : norm)) {}
  __device__ __forceinline__ RowScale() : dot(0.0f), scale(1.0f) {}

  template <class S>
  __device__ __forceinline__ float operator()(const WarpUpstream<S>& up, int64_t at, float drow) const {
    return up.norms ? (drow - dot * float(up.rows[at])) * scale : drow;
  }
  template <class S, int kVector>
  __device__ __forceinline__ void apply(const WarpUpstream<S>& up, int64_t at, float (&drow)[kVector]) const {
    if (!up.norms) return;
    float row[kVector];
    load<S, kVector>(up.rows + at, row);
#pragma unroll
    for (int i = 0; i < kVector; ++i) drow[i] = (drow[i] - dot * row[i]) * scale;
  }
};

// The share of <row, drow> in channels first, first + step, ... of the row at `at`, kVector at a time.
template <class S, int kVector>
__device__ __forceinline__ float row_dot(const WarpUpstream<S>& up, int64_t at, int first, int step, int channels) {
  float dot = 0.0f;
#pragma unroll 2
  for (int c = first; c < channels; c += step) {
    float drow[kVector], row[kVector];
    load<S, kVector>(up.grad_rows + at + c, drow);
    load<S, kVector>(up.rows + at + c, row);
#pragma unroll
    for (int i = 0; i < kVector; ++i) dot = fmaf(drow[i], row[i], dot);
  }
  return dot;
}

// Channels last, as warp_rows. grad [B, *S, C] float32, zeroed before.
template <class S, int kVector, int kTaps, int kDims>
__global__ void __launch_bounds__(kWarpThreads, scatter_blocks(PointTaps<kTaps, kDims>::kCount))
    warp_scatter_rows(WarpProblem w, int log2_lanes, int batch, WarpUpstream<S> up, float* grad) {
  const RowLanes my(log2_lanes, batch, kVector);
  if (my.begin >= w.count) return;
  const auto table = share_points<kTaps, kDims>(w, my.begin, batch, nullptr, true);
  const int channels = int(w.channels), step = my.lanes * kVector;
  for (int at = my.group; at < batch; at += 32 >> log2_lanes) {
    const PointTaps<kTaps, kDims> taps = table.read(at);
    const int64_t p = my.begin + at, row = p * channels;
    const bool present = p < w.count;
    RowScale scale;
    if (up.norms) {
      const float dot = sum_lanes(row_dot<S, kVector>(up, row, my.first, step, present ? channels : 0), my.lanes);
      if (present) scale = RowScale(dot, up.norms[p]);
    }
    for (int c = my.first; c < channels; c += step) {
      float df[kVector];
      if (present) load<S, kVector>(up.grad_rows + row + c, df), scale.apply(up, row + c, df);
#pragma unroll
      for (int k = 0; k < PointTaps<kTaps, kDims>::kCount; ++k) {
        const WarpTap t = taps.at(k);
        if (t.weight == 0.0f) continue;
        if constexpr (kVector == 4)
          device::add_atomic(grad + t.offset + c, float4{t.weight * df[0], t.weight * df[1], t.weight * df[2], t.weight * df[3]});
        else
          device::add_atomic(grad + t.offset + c, t.weight * df[0]);
      }
    }
  }
}

// Rows of gradients into a tile, kVector neighbours at a time.
template <class S, int kVector>
__device__ __forceinline__ void load_tile(const WarpUpstream<S>& up, const float* dots, int64_t begin, int points, int first, int last, int channels, float* tile) {
  each_vector<kVector>(last, [&](int i, int c) {
    if (i >= points) return;
    const int64_t at = (begin + i) * channels + first + c;
    float df[kVector];
    load<S, kVector>(up.grad_rows + at, df);
    if (up.norms) RowScale(dots[i], up.norms[begin + i]).apply(up, at, df);
#pragma unroll
    for (int j = 0; j < kVector; ++j) tile[(c + j) * kPlanePitch + i] = df[j];
  });
}

// Channels in planes: gradients of 32 rows transposed in shared memory, then a lane a point. grad [B, C, *S] float32, zeroed before.
template <class S, int kVector, int kTaps, int kDims>
__global__ void __launch_bounds__(kWarpThreads, 3) warp_scatter_planes(WarpProblem w, int tile, WarpUpstream<S> up, float* grad) {
  constexpr int count = PointTaps<kTaps, kDims>::kCount, warps = kWarpThreads / 32;
  const PlaneShared<kTaps, kDims> shared(tile);
  const int64_t begin = int64_t(blockIdx.x) * 32;
  const PointTaps<kTaps, kDims> taps = block_taps<kTaps, kDims>(w, begin, nullptr, true);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, channels = int(w.channels);
  const int points = w.count - begin < 32 ? int(w.count - begin) : 32;
  if (up.norms) {  // a warp four points, lanes along channels
    for (int i = warp; i < points; i += warps) {
      const float dot = sum_lanes(row_dot<S, kVector>(up, (begin + i) * channels, lane * kVector, 32 * kVector, channels), 32);
      if (lane == 0) shared.total[i] = dot;
    }
    __syncthreads();
  }
  for (int first = 0; first < channels; first += tile) {
    const int last = channels - first < tile ? channels - first : tile;
    load_tile<S, kVector>(up, shared.total, begin, points, first, last, channels, shared.tile);
    __syncthreads();
    for (int k = warp; k < last && lane < points; k += warps) {
      const float df = shared.tile[k * kPlanePitch + lane];
#pragma unroll
      for (int t = 0; t < count; ++t) {
        const WarpTap tap = taps.at(t);
        if (tap.weight != 0.0f) device::add_atomic(grad + tap.offset + (first + k) * w.stride_channel, tap.weight * df);
      }
    }
    __syncthreads();
  }
}

// One record a tap: key = image * prod(S) + pixel (B * prod(S) where it weighs nothing) and weight, [P, taps]; w.stride counts pixels. <row, drow> [P].
template <class S, int kTaps, int kDims>
__global__ void __launch_bounds__(kWarpThreads) warp_records(WarpProblem w, WarpUpstream<S> up, int64_t* keys, float* weights, float* dots) {
  constexpr int count = PointTaps<kTaps, kDims>::kCount;
  const int64_t p = (int64_t(blockIdx.x) * kWarpThreads + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (p >= w.count) return;
  if (up.norms) {
    float dot = 0.0f;
    for (int64_t c = lane; c < w.channels; c += 32) dot = fmaf(float(up.grad_rows[p * w.channels + c]), float(up.rows[p * w.channels + c]), dot);
    dot = sum_lanes(dot, 32);
    if (lane == 0) dots[p] = dot;
  }
  const int64_t pixels = w.extent[0] * w.extent[1] * w.extent[2];
  const WarpPoint point = locate<kTaps, kDims>(w, p);
  for (int k = lane; k < count; k += 32) {
    const WarpTap t = tap<kTaps, kDims>(w, point, k / (kTaps * kTaps), k / kTaps % kTaps, k % kTaps);
    const bool counts = point.ok && t.weight != 0.0f;
    keys[p * count + k] = counts ? point.image * pixels + t.offset : w.batch * pixels;
    weights[p * count + k] = t.weight;
  }
}

// (warp.6) of one pixel, by one warp: its records in sorted order, 2^shift a point. grad [B, *S, C].
template <class S>
__global__ void __launch_bounds__(kWarpThreads) warp_sum_records(int64_t pixels, int64_t channels, int shift, int64_t records, const int64_t* keys,
                                                                 const int64_t* order, const float* weights, const float* dots, WarpUpstream<S> up, S* grad) {
  const int64_t pixel = (int64_t(blockIdx.x) * kWarpThreads + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (pixel >= pixels) return;
  int64_t low = 0, high = records;  // the first record of this pixel
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (keys[middle] < pixel) low = middle + 1; else high = middle;
  }
  for (int64_t c = lane; c < channels; c += 32) {
    float total = 0.0f;
    for (int64_t r = low; r < records && keys[r] == pixel; ++r) {
      const int64_t record = order[r], p = record >> shift;
      const RowScale scale = up.norms ? RowScale(dots[p], up.norms[p]) : RowScale();
      total = fmaf(weights[record], scale(up, p * channels + c, float(up.grad_rows[p * channels + c])), total);
    }
    grad[pixel * channels + c] = S(total);
  }
}

// Both aligned to 16 bytes; eight values a thread.
template <class S>
__global__ void __launch_bounds__(kWarpThreads) warp_convert(int64_t count, const float* from, S* to) {
  const int64_t at = (int64_t(blockIdx.x) * kWarpThreads + threadIdx.x) * 8;
  if (at + 8 <= count) {
    float low[4], high[4];
    load<float, 4>(from + at, low);
    load<float, 4>(from + at + 4, high);
    const float both[8] = {low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]};
    store<S, 8>(to + at, both);
  } else {
    for (int64_t i = at; i < count; ++i) to[i] = S(from[i]);
  }
}

}  // namespace pix2rep
