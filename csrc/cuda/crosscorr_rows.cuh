// What crosscorr does around its sweeps over the rows: pivots, what is to be known of weights and of gP, the sum of the ranges.
#pragma once

#include "crosscorr_tiles.cuh"

namespace pix2rep::crosscorr {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kPilotRows = 128;

struct PivotsTask {
  View x, y;
  const float* weight;
  int64_t weight_stride, n;
  float *pivot_x, *pivot_y;      // [d]
  void *rounded_x, *rounded_y;   // the same in the views' 16 bits, and the pivots rounded so; nullptr: not wanted
  int blocks_x;                  // of 32 features
};

// Mean of the pilot rows that take part (those of reference/crosscorr.py), 0 when none does: 32 features a block, 16 pilots a warp.
__global__ void __launch_bounds__(kThreads) pivots(PivotsTask task) {
  const bool for_x = int(blockIdx.x) < task.blocks_x;
  const View& view = for_x ? task.x : task.y;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, feature = (int(blockIdx.x) - (for_x ? 0 : task.blocks_x)) * 32 + lane;
  const int64_t step = task.n / kPilotRows > 1 ? task.n / kPilotRows : 1;
  float sum = 0, count = 0;
  for (int k = 0; k < kPilotRows / kWarps; ++k) {
    const int64_t pilot = warp * (kPilotRows / kWarps) + k, row = pilot * step + ((pilot * 40503 & 0xffff) * step >> 16);
    if (pilot >= task.n || (task.weight && task.weight[row * task.weight_stride] == 0)) continue;
    ++count;
    if (feature < view.d) sum += view(row, feature);
  }
  float* sums = reinterpret_cast<float*>(device::shared_memory());
  float* counts = sums + kThreads;
  sums[threadIdx.x] = sum, counts[threadIdx.x] = count;
  __syncthreads();
  if (warp != 0 || feature >= view.d) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w * 32 + lane], count += counts[w * 32 + lane];
  float pivot = count > 0 ? __fdiv_rn(sum, count) : 0.0f;
  if (void* rounded = for_x ? task.rounded_x : task.rounded_y) {
    if (view.storage == Storage::float16) {
      const Half narrow(pivot);
      static_cast<Half*>(rounded)[feature] = narrow, pivot = float(narrow);
    } else {
      const BFloat16 narrow(pivot);
      static_cast<BFloat16*>(rounded)[feature] = narrow, pivot = float(narrow);
    }
  }
  (for_x ? task.pivot_x : task.pivot_y)[feature] = pivot;
}

// Sums and largest magnitudes of kParts pieces of a matrix: pieces of its only row, or rows in turn. sums may be nullptr. NaN are not largest.
__global__ void __launch_bounds__(kThreads) survey(const float* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride, double* sums,
                                                   float* largest) {
  const int64_t piece = rows == 1 ? (columns + kParts - 1) / kParts : columns, begin = rows == 1 ? blockIdx.x * piece : 0;
  const int64_t end = begin + piece < columns ? begin + piece : columns;
  double sum = 0;
  float most = 0;
  for (int64_t row = rows == 1 ? 0 : blockIdx.x; row < rows; row += kParts)
    for (int64_t at = begin + threadIdx.x; at < end; at += kThreads) {
      const float value = data[row * row_stride + at * column_stride];
      sum += value, most = fmaxf(most, fabsf(value));
    }
  double* all = reinterpret_cast<double*>(device::shared_memory());
  float* all_most = reinterpret_cast<float*>(all + kThreads);
  all[threadIdx.x] = sum, all_most[threadIdx.x] = most;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) >= half) continue;
    all[threadIdx.x] += all[threadIdx.x + half], all_most[threadIdx.x] = fmaxf(all_most[threadIdx.x], all_most[threadIdx.x + half]);
  }
  if (threadIdx.x != 0) return;
  if (sums) sums[blockIdx.x] = all[0];
  largest[blockIdx.x] = all_most[0];
}

struct AddTask {
  const float* parts;  // [splits, size]
  int64_t size, splits;
  float *product, *sum_x, *sum_y, *square_x, *square_y, *count;
  int64_t d1, d2, n;
  const double* weights;  // [kParts] sums of them, nullptr: all 1

  __device__ float* to(int64_t at) const {
    if (at < d1 * d2) return product + at;
    at -= d1 * d2;
    if (at < d1) return sum_x + at;
    if ((at -= d1) < d2) return sum_y + at;
    if ((at -= d2) < d1) return square_x + at;
    return square_y + (at - d1);
  }
};

// The ranges' moments added in order, 32 numbers a block: each warp every kWarps-th range, then the warps. The first block adds the weights too.
__global__ void __launch_bounds__(kThreads) add_parts(AddTask task) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t at = blockIdx.x * int64_t(32) + lane;
  double sum = 0;
#pragma unroll 8
  for (int64_t part = warp; part < task.splits; part += kWarps)
    if (at < task.size) sum += task.parts[part * task.size + at];
  double* sums = reinterpret_cast<double*>(device::shared_memory());
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w * 32 + lane];
  if (at < task.size) *task.to(at) = float(sum);
  if (blockIdx.x != 0 || lane != 0) return;
  double count = task.weights ? 0.0 : double(task.n);
  for (int part = 0; task.weights && part < kParts; ++part) count += task.weights[part];
  *task.count = float(count);
}

struct OperandTask {
  const float* g;  // [D own, D other] of the product
  int64_t own_stride, other_stride;
  int d_own, d_other, padded_own, padded_other;
  const float *grad_sum, *grad_square, *pivot_own, *pivot_other;
  const float* largest;
  float top;
  void* operand;  // [padded_own, padded_other] or nullptr
  float *constant, *slope;  // [padded_own]
};

// g as the products take it, and with 16-bit factors what the pivots add: a warp an own feature. The sum over the other features is of the rounded g, so that
// the products with the other view and with its pivot cancel.
template <class T>
__global__ void __launch_bounds__(kThreads) prepare(OperandTask task) {
  const int lane = threadIdx.x % 32, own = int(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (own >= task.padded_own) return;
  const bool present = own < task.d_own;
  const float unit = sizeof(T) == 2 ? power_of_two(task.largest) / task.top : 1.0f, per_unit = 1 / unit;
  T* const operand = static_cast<T*>(task.operand) + int64_t(own) * task.padded_other;
  double shift = 0;
  for (int other = lane; other < task.padded_other; other += 32) {
    const bool inside = present && other < task.d_other;
    const T value(inside ? task.g[own * task.own_stride + other * task.other_stride] * per_unit : 0.0f);
    if (task.operand) operand[other] = value;
    if (sizeof(T) == 2 && inside) shift += double(float(value)) * task.pivot_other[other];
  }
  if (sizeof(T) == 2) shift = sum_lanes(shift, 32);
  if (lane != 0) return;
  const double slope = present ? 2.0 * task.grad_square[own] : 0.0;
  double constant = present ? task.grad_sum[own] : 0.0;
  if (sizeof(T) == 2 && present) constant -= slope * task.pivot_own[own] + unit * shift;
  task.constant[own] = float(constant), task.slope[own] = float(slope);
}

}  // namespace pix2rep::crosscorr
