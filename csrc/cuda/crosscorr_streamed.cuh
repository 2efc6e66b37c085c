// One gradient (crosscorr.6) where gP does not fit into shared memory: 128 rows by 64 own features a block, panels of the other view and of gP streaming
// past. float32 takes the pivots off as it multiplies and splits both factors in two; what 16-bit views need of their pivots is in `constant`.
#pragma once

#include "crosscorr_gradients.cuh"

namespace pix2rep::crosscorr {

constexpr int kStreamedRows = 128, kStreamedThreads = 128, kStreamedM = 4, kStreamedN = 4;  // 2 x 2 warps of 64 rows by 32 own features
constexpr int kStreamedSlot = (kStreamedRows + kGradientFeatures) * kRowBytes;
constexpr int kStreamedBytes = 3 * kStreamedSlot;

using Streamed = float[kStreamedM][kStreamedN][4];

// One panel of 16-bit factors.
template <class T>
__device__ __forceinline__ void add_panel(Streamed& total, const unsigned char* t, const unsigned char* g, const float*, int) {
  const int lane = threadIdx.x % 32;
  const auto a = device::shared_address(t + (lane & 15) * kRowBytes + (((lane >> 4) ^ (lane & 7)) << 4));
  const auto b = device::shared_address(g + ((lane & 7) + ((lane >> 4) << 3)) * kRowBytes + ((((lane >> 3) & 1) ^ (lane & 7)) << 4));
#pragma unroll
  for (int k = 0; k < kPanel<T> / 16; ++k) {
    uint32_t x[kStreamedM][4];
#pragma unroll
    for (int m = 0; m < kStreamedM; ++m) device::load_tiles<false>(x[m], (a ^ (k << 5)) + m * 16 * kRowBytes);
#pragma unroll
    for (int pair = 0; pair < kStreamedN / 2; ++pair) {
      uint32_t y[4];
      device::load_tiles<false>(y, (b ^ (k << 5)) + pair * 16 * kRowBytes);
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int m = 0; m < kStreamedM; ++m) device::multiply(total[m][2 * pair + half], x[m], {y[2 * half], y[2 * half + 1]}, T());
    }
  }
}

// One of float32, whose sum starts anew: the tensor cores cut digits off.
template <>
__device__ __forceinline__ void add_panel<float>(Streamed& total, const unsigned char* t, const unsigned char* g, const float* pivot, int left) {
  const int lane = threadIdx.x % 32, row = lane / 4, way = row << 4;
  Streamed part = {};
#pragma unroll
  for (int k = 0; k < kPanel<float> / 8; ++k) {
    Split x[kStreamedM][4];
    float c[2];
    for (int h = 0; h < 2; ++h) c[h] = 8 * k + 4 * h + lane % 4 < left ? pivot[8 * k + 4 * h + lane % 4] : 0.0f;
    const auto value = [&](const unsigned char* from, int r, int h) {
      return *reinterpret_cast<const float*>(from + (r + row) * kRowBytes + (way ^ (2 * k + h) << 4) + lane % 4 * 4);
    };
#pragma unroll
    for (int m = 0; m < kStreamedM; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) x[m][i] = split(value(t, 16 * m + i % 2 * 8, i / 2) - c[i / 2]);
#pragma unroll
    for (int n = 0; n < kStreamedN; ++n) {
      const Split y[2] = {split(value(g, 8 * n, 0)), split(value(g, 8 * n, 1))};
#pragma unroll
      for (int m = 0; m < kStreamedM; ++m) multiply_split(part[m][n], x[m], y);
    }
  }
#pragma unroll
  for (int m = 0; m < kStreamedM; ++m)
#pragma unroll
    for (int n = 0; n < kStreamedN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) total[m][n][i] += part[m][n][i];
}

__device__ __forceinline__ void store(const View& view, void* grad, int64_t at, float value) {
  if (view.storage == Storage::float32) static_cast<float*>(grad)[at] = value;
  else if (view.storage == Storage::float16) static_cast<Half*>(grad)[at] = Half(value);
  else static_cast<BFloat16*>(grad)[at] = BFloat16(value);
}

// T: of the factors.
template <class T>
__global__ void __launch_bounds__(kStreamedThreads, 2) streamed(GradientsTask task, Side own, Side other) {
  const int slices = own.padded / kGradientFeatures, slice = blockIdx.x % slices * kGradientFeatures;
  const int64_t first = blockIdx.x / slices * int64_t(kStreamedRows), left = task.n - first;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, panels = other.padded / kPanel<T>;
  const int warp_row = warp / 2 * 16 * kStreamedM, warp_own = warp % 2 * 8 * kStreamedN;
  const float unit = task.largest ? power_of_two(task.largest) / task.top : 1.0f;
  const auto alive = [left](int r) { return r < left; };
  const View g{own.g, other.padded, 1, other.padded, own.view.storage, true};
  const auto all = [](int) { return true; };
  int next = 0, slot = 0;
  const auto issue = [&] {
    if (next < panels) {
      unsigned char* to = device::shared_memory() + slot * kStreamedSlot;
      const T* const kept = nullptr;
      copy_rows<T, false, kStreamedThreads>(to, other.view, first, kStreamedRows, next * kPanel<T>, 1, left >= kStreamedRows, alive, kept);
      copy_rows<T, false, kStreamedThreads>(to + kStreamedRows * kRowBytes, g, slice, kGradientFeatures, next * kPanel<T>, 1, true, all, kept);
    }
    device::copy_commit();
    ++next, slot = slot == 2 ? 0 : slot + 1;
  };
  issue(), issue();
  Streamed total = {};
  for (int panel = 0; panel < panels; ++panel) {
    device::copy_wait<1>();
    __syncthreads();
    issue();
    const unsigned char* t = device::shared_memory() + slot * kStreamedSlot;
    add_panel<T>(total, t + warp_row * kRowBytes, t + (kStreamedRows + warp_own) * kRowBytes, other.pivot + panel * kPanel<T>,
                 other.view.d - panel * kPanel<T>);
  }
#pragma unroll
  for (int m = 0; m < kStreamedM; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t row = first + warp_row + 16 * m + 8 * h + lane / 4;
      if (row >= task.n) continue;
      const float weight = task.weight ? task.weight[row * task.weight_stride] : 1.0f;
#pragma unroll
      for (int n = 0; n < kStreamedN; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int feature = slice + warp_own + 8 * n + lane % 4 * 2 + i;
          if (feature >= own.view.d) continue;
          const float value = own.view(row, feature) - (sizeof(T) == 4 ? own.pivot[feature] : 0.0f);
          const float gradient = affine(own.constant[feature], own.slope[feature], value, unit, total[m][n][2 * h + i], weight);
          store(own.view, own.grad, row * own.view.d + feature, weight == 0 ? 0.0f : gradient);
        }
    }
}

}  // namespace pix2rep::crosscorr
