// The gradient of warp, (warp.5-6): float32 atomics, or records sorted by pixel and summed in that order, the same bits every time.
#pragma once

#include "warp_forward.cuh"

namespace pix2rep {

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
};

// Channels last: `lanes` lanes a point. grad [B, *S, C] float32, zeroed before.
template <class S, int kVector, int kTaps, int kDims>
__global__ void __launch_bounds__(kWarpThreads) warp_scatter_rows(WarpProblem w, int lanes, WarpUpstream<S> up, float* grad) {
  const int64_t p = int64_t(blockIdx.x) * (kWarpThreads / lanes) + threadIdx.x / unsigned(lanes), first = int64_t(threadIdx.x % unsigned(lanes)) * kVector;
  const int64_t step = int64_t(lanes) * kVector, row = p * w.channels;
  const WarpPoint point = locate<kTaps, kDims>(w, p);
  RowScale scale;
  if (up.norms) {
    float dot = 0.0f;
    for (int64_t c = first; point.ok && c < w.channels; c += step)
      for (int i = 0; i < kVector; ++i) dot = fmaf(float(up.grad_rows[row + c + i]), float(up.rows[row + c + i]), dot);
    dot = sum_lanes(dot, lanes);
    if (point.ok) scale = RowScale(dot, up.norms[p]);
  }
  if (!point.ok) return;
  float* image = grad + point.image * w.stride_batch;
  for (int64_t c = first; c < w.channels; c += step) {
    float df[kVector];
    load<S, kVector>(up.grad_rows + row + c, df);
#pragma unroll
    for (int i = 0; i < kVector; ++i) df[i] = scale(up, row + c + i, df[i]);
#pragma unroll
    for (int k = 0; k < WarpTaps<kTaps, kDims>::kCount; ++k) {
      const WarpTap t = WarpTaps<kTaps, kDims>::at(w, point, k);
      if (t.weight == 0.0f) continue;
      float* to = image + t.offset + c;
      if constexpr (kVector == 4)
        device::add_atomic(to, float4{t.weight * df[0], t.weight * df[1], t.weight * df[2], t.weight * df[3]});
      else
        device::add_atomic(to, t.weight * df[0]);
    }
  }
}

// Channels in planes: gradients of 32 rows transposed in shared memory, then a lane a point. grad [B, C, *S] float32, zeroed before.
template <class S, int kTaps, int kDims>
__global__ void __launch_bounds__(kWarpThreads, 3) warp_scatter_planes(WarpProblem w, WarpUpstream<S> up, float* grad) {
  constexpr int count = WarpTaps<kTaps, kDims>::kCount, warps = kWarpThreads / 32;
  const PlaneShared shared(count);
  const int64_t begin = share_taps<kTaps, kDims>(w, shared, nullptr);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (up.norms) {  // a warp four points, lanes along channels
    for (int i = warp; i < kPlanePoints; i += warps) {
      float dot = 0.0f;
      for (int64_t c = lane; begin + i < w.count && c < w.channels; c += 32)
        dot = fmaf(float(up.grad_rows[(begin + i) * w.channels + c]), float(up.rows[(begin + i) * w.channels + c]), dot);
      dot = sum_lanes(dot, 32);
      if (lane == 0) shared.partial[i] = dot;
    }
    __syncthreads();
  }
  for (int64_t first = 0; first < w.channels; first += kPlaneChannels) {
    for (int at = threadIdx.x; at < kPlaneChannels * kPlanePoints; at += kWarpThreads) {
      const int k = at % kPlaneChannels, i = at / kPlaneChannels;
      if (first + k >= w.channels || begin + i >= w.count) continue;
      const int64_t from = (begin + i) * w.channels + first + k;
      const RowScale scale = up.norms ? RowScale(shared.partial[i], up.norms[begin + i]) : RowScale();
      shared.tile[k * kPlanePitch + i] = scale(up, from, float(up.grad_rows[from]));
    }
    __syncthreads();
    for (int k = warp; k < kPlaneChannels; k += warps) {
      if (first + k >= w.channels || begin + lane >= w.count) continue;
      const float df = shared.tile[k * kPlanePitch + lane];
#pragma unroll
      for (int t = 0; t < count; ++t) {
        const float weight = shared.weight[t * kPlanePoints + lane];
        if (weight != 0.0f) device::add_atomic(grad + shared.offset[t * kPlanePoints + lane] + (first + k) * w.stride_channel, weight * df);
      }
    }
    __syncthreads();
  }
}

// One record a tap: key = image * prod(S) + pixel (B * prod(S) where it weighs nothing) and weight, [P, taps]; w.stride counts pixels. <row, drow> [P].
template <class S, int kTaps, int kDims>
__global__ void __launch_bounds__(kWarpThreads) warp_records(WarpProblem w, WarpUpstream<S> up, int64_t* keys, float* weights, float* dots) {
  constexpr int count = WarpTaps<kTaps, kDims>::kCount;
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
    const WarpTap t = WarpTaps<kTaps, kDims>::at(w, point, k);
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

template <class S>
__global__ void __launch_bounds__(kWarpThreads) convert(int64_t count, const float* from, S* to) {
  const int64_t at = int64_t(blockIdx.x) * kWarpThreads + threadIdx.x;
  if (at < count) to[at] = S(from[at]);
}

}  // namespace pix2rep
