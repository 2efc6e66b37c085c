// The kernels of pool, one table for each instruction set. Pixels come in tiles, as runs of equal labels; sums are double whatever is summed.
#pragma once

#include "storage.h"
#include "tables.h"

namespace pix2rep {

constexpr int kTile = 256;    // pixels
constexpr int kPlanes = 16;   // channels that are turned into rows together, a cache line of float

// Consecutive pixels of a tile in one region.
struct Run {
  int64_t region;
  int32_t begin, count;
};

template <class S>
struct PoolKernels {
  using T = Compute<S>;  // of the means

  // sums[region][c] += rows[p][c] over the pixels of each run, in order.
  void (*add_rows)(const S* rows, int64_t row_stride, const Run* runs, int count, int64_t channels, double* sums, int64_t sums_stride);
  // The same from planes [channels][plane_stride]; the tile has `pixels` of them.
  void (*add_planes)(const S* planes, int64_t plane_stride, int pixels, const Run* runs, int count, int64_t channels, double* sums, int64_t sums_stride);
  // (pool.2) of one region: sum_k partials[k * stride][c] / count, 0 where count is 0.
  void (*mean)(const double* partials, int64_t stride, int64_t many, int64_t count, int64_t channels, T* mean);
  // One row of the table that the backward writes from: grad / count, 0 where count is 0.
  void (*share)(const T* grad, int64_t count, int64_t channels, S* row);
  // (pool.3): rows[p][c] = table[region][c].
  void (*put_rows)(const S* table, int64_t table_stride, const Run* runs, int count, int64_t channels, S* rows, int64_t row_stride);
  // The same into planes.
  void (*put_planes)(const S* table, int64_t table_stride, const Run* runs, int count, int64_t channels, S* planes, int64_t plane_stride);
};

PIX2REP_TABLES(
  extern const PoolKernels<float> pool_float;
  extern const PoolKernels<double> pool_double;
  extern const PoolKernels<F16> pool_f16;
  extern const PoolKernels<BF16> pool_bf16;)

}  // namespace pix2rep
