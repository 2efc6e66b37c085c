// Gather and normalise, (warp.3-4): rows read along channels where those are last, else plane by plane and transposed in shared memory.
#pragma once

#include "vector.cuh"
#include "warp_points.cuh"

namespace pix2rep {

constexpr int kWarpThreads = 256;
constexpr float kWarpEpsilon = 1e-12f;
constexpr int kWarpHeld = 4;       // vectors of a row that a lane keeps between its norm and its store
constexpr int kPlanePoints = 32;   // of a block that reads planes
constexpr int kPlaneChannels = 64; // transposed at a time
constexpr int kPlanePitch = kPlanePoints + 1;

// Features [c, c + kVector) of a point.
template <class S, int kVector, int kTaps, int kDims>
__device__ __forceinline__ void gather_channels(const WarpProblem& w, const WarpPoint& point, const S* image, int64_t c, float (&f)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) f[i] = 0.0f;
#pragma unroll
  for (int k = 0; k < WarpTaps<kTaps, kDims>::kCount; ++k) {
    const WarpTap t = WarpTaps<kTaps, kDims>::at(w, point, k);
    if (t.weight == 0.0f) continue;  // a tap without weight passes no NaN
    float value[kVector];
    load<S, kVector>(image + t.offset + c, value);
#pragma unroll
    for (int i = 0; i < kVector; ++i) f[i] = fmaf(t.weight, value[i], f[i]);
  }
}

// Channels last: `lanes` lanes a point, each kVector neighbouring channels at a time.
template <class S, int kVector, int kTaps, int kDims>
__global__ void __launch_bounds__(kWarpThreads) warp_rows(WarpProblem w, int lanes, const S* features, S* rows, bool* inside, float* norms) {
  const int64_t p = int64_t(blockIdx.x) * (kWarpThreads / lanes) + threadIdx.x / unsigned(lanes), first = int64_t(threadIdx.x % unsigned(lanes)) * kVector;
  const int64_t step = int64_t(lanes) * kVector;
  const WarpPoint point = locate<kTaps, kDims>(w, p);
  const bool present = p < w.count;
  if (present && first == 0) inside[p] = point.inside;
  const S* image = features + point.image * w.stride_batch;
  S* row = rows + p * w.channels;
  float held[kWarpHeld][kVector], squares = 0.0f;
#pragma unroll
  for (int h = 0; h < kWarpHeld; ++h) {
    const int64_t c = first + h * step;
    if (!present || c >= w.channels) continue;
    gather_channels<S, kVector, kTaps, kDims>(w, point, image, c, held[h]);
#pragma unroll
    for (int i = 0; i < kVector; ++i) squares = fmaf(held[h][i], held[h][i], squares);
  }
  const int64_t rest = first + kWarpHeld * step;
  float scale = 1.0f;
  if (norms) {
    for (int64_t c = rest; present && c < w.channels; c += step) {
      float f[kVector];
      gather_channels<S, kVector, kTaps, kDims>(w, point, image, c, f);
#pragma unroll
      for (int i = 0; i < kVector; ++i) squares = fmaf(f[i], f[i], squares);
    }
    const float norm = sqrtf(sum_lanes(squares, lanes));
    if (present && first == 0) norms[p] = norm;
    scale = 1.0f / (norm < kWarpEpsilon ? kWarpEpsilon : norm);  // NaN passes
  }
#pragma unroll
  for (int h = 0; h < kWarpHeld; ++h) {
    const int64_t c = first + h * step;
    if (!present || c >= w.channels) continue;
#pragma unroll
    for (int i = 0; i < kVector; ++i) held[h][i] *= scale;
    store<S, kVector>(row + c, held[h]);
  }
  for (int64_t c = rest; present && c < w.channels; c += step) {
    float f[kVector];
    gather_channels<S, kVector, kTaps, kDims>(w, point, image, c, f);
#pragma unroll
    for (int i = 0; i < kVector; ++i) f[i] *= scale;
    store<S, kVector>(row + c, f);
  }
}

// What the threads of a block that reads planes share: taps of its points, a tile of channels x points, sums of squares by warp.
struct PlaneShared {
  int64_t* offset;  // [taps][kPlanePoints]
  float* weight;    // [taps][kPlanePoints]
  float* tile;      // [kPlaneChannels][kPlanePitch]
  float* partial;   // [kWarpThreads / 32][kPlanePoints]

  static constexpr int64_t bytes(int taps) {
    return int64_t(taps) * kPlanePoints * 12 + int64_t(kPlaneChannels) * kPlanePitch * 4 + kWarpThreads / 32 * kPlanePoints * 4;
  }
  __device__ explicit PlaneShared(int taps) {
    offset = reinterpret_cast<int64_t*>(device::shared_memory());
    weight = reinterpret_cast<float*>(offset + taps * kPlanePoints);
    tile = weight + taps * kPlanePoints;
    partial = tile + kPlaneChannels * kPlanePitch;
  }
};

// Taps of the block's points, by its first warp; then everybody may read them. Returns the first point.
template <int kTaps, int kDims>
__device__ __forceinline__ int64_t share_taps(const WarpProblem& w, const PlaneShared& shared, bool* inside) {
  constexpr int count = WarpTaps<kTaps, kDims>::kCount;
  const int64_t begin = int64_t(blockIdx.x) * kPlanePoints;
  if (threadIdx.x < kPlanePoints) {
    const int64_t p = begin + threadIdx.x;
    const WarpPoint point = locate<kTaps, kDims>(w, p);
    if (inside && p < w.count) inside[p] = point.inside;
    for (int k = 0; k < count; ++k) {
      const WarpTap t = WarpTaps<kTaps, kDims>::at(w, point, k);
      shared.offset[k * kPlanePoints + threadIdx.x] = point.image * w.stride_batch + t.offset;
      shared.weight[k * kPlanePoints + threadIdx.x] = inside || point.ok ? t.weight : 0.0f;  // what names no point adds nothing to a gradient
    }
  }
  __syncthreads();
  return begin;
}

// Channels in planes, or in any strides: a lane a point, a warp a channel.
template <class S, int kTaps, int kDims>
__global__ void __launch_bounds__(kWarpThreads, 3) warp_planes(WarpProblem w, const S* features, S* rows, bool* inside, float* norms) {
  constexpr int count = WarpTaps<kTaps, kDims>::kCount, warps = kWarpThreads / 32;
  const PlaneShared shared(count);
  const int64_t begin = share_taps<kTaps, kDims>(w, shared, inside);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool present = begin + lane < w.count;
  const auto value = [&](int64_t c) {
    float f = 0.0f;
#pragma unroll
    for (int k = 0; k < count; ++k) {
      const float weight = shared.weight[k * kPlanePoints + lane];
      if (weight != 0.0f) f = fmaf(weight, float(features[shared.offset[k * kPlanePoints + lane] + c * w.stride_channel]), f);
    }
    return f;
  };
  float scale = 1.0f;
  if (norms) {
    float squares = 0.0f;
    for (int64_t c = warp; present && c < w.channels; c += warps) {
      const float f = value(c);
      squares = fmaf(f, f, squares);
    }
    shared.partial[warp * kPlanePoints + lane] = squares;
    __syncthreads();
    float total = 0.0f;
    for (int k = 0; k < warps; ++k) total += shared.partial[k * kPlanePoints + lane];
    const float norm = sqrtf(total);
    if (present && warp == 0) norms[begin + lane] = norm;
    scale = 1.0f / (norm < kWarpEpsilon ? kWarpEpsilon : norm);
  }
  for (int64_t first = 0; first < w.channels; first += kPlaneChannels) {
    for (int k = warp; k < kPlaneChannels; k += warps)
      if (present && first + k < w.channels) shared.tile[k * kPlanePitch + lane] = value(first + k) * scale;
    __syncthreads();
    for (int at = threadIdx.x; at < kPlaneChannels * kPlanePoints; at += kWarpThreads) {
      const int k = at % kPlaneChannels, i = at / kPlaneChannels;
      if (first + k < w.channels && begin + i < w.count) rows[(begin + i) * w.channels + first + k] = S(shared.tile[k * kPlanePitch + i]);
    }
    __syncthreads();
  }
}

}  // namespace pix2rep
