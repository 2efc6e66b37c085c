// Sums over the negatives (infonce.2): one sweep over tiles of exp2(s), whose row and column sums share one exponential a pair.
//
// A block owns a range of tiles of `own` rows, resident one at a time, and streams a range of tiles of `stream` rows past each. Own rows are the
// columns of the product: their sums stay in the lanes' registers. Sums of the streamed rows go to the block's private slice, which no other
// touches: fixed order, no atomics.
#pragma once

#include "infonce_sweeps.h"

namespace pix2rep::infonce {

constexpr int kSumThreads = 256;  // 4 x 2 warps of 32 x 64 pairs

template <bool kWide>
using SumRing = Ring<kSumThreads, kTile, kWide ? 2 : 3, 0, 9 * kTile, kWide>;

// kBiased: some rows are invalid, or exp2 needs a shift. kListed: single pairs are left out by ids or positives.
template <bool kBiased, bool kListed, bool kWide>
__global__ void __launch_bounds__(kSumThreads, kListed ? 1 : 2) sums(SumsTask task) {
  using Panels = SumRing<kWide>;
  const Operand &own = task.own, &stream = task.stream;
  if (task.triangle && task.stream_part(blockIdx.x) > task.own_part(blockIdx.x)) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = warp / 2 * 32 + lane / 4, column = warp % 2 * kColumns + lane % 4 * 2;  // of a tile, the lane's first

  float* own_bias = Panels::floats();
  float* by_row = own_bias + kTile;      // [2, 2, kTile]: of every other tile, by half of the columns
  float* by_column = by_row + 4 * kTile;  // [4, kTile]: by quarter of the rows

  const int blocks = int((own.count + kTile - 1) / kTile);
  int block = task.own_part(blockIdx.x) * task.part_blocks;
  if (block >= blocks) return;
  do {
    __syncthreads();  // the last block's shared memory is free
    int id = device::unknown(blockIdx.x), group = task.group(id);
    if (kBiased && threadIdx.x < kTile)
      own_bias[threadIdx.x] = own.bias[group * own.padded + block * kTile + threadIdx.x] - (task.regime == Regime::shifted ? task.temperature.shift() : 0);
    if (threadIdx.x == 0) {
      const int first_block = task.own_part(id) * task.part_blocks, first = task.stream_part(id) * task.part_tiles;
      const int tiles = int((stream.count + kTile - 1) / kTile);
      Walk& walk = Panels::walk() = Walk(own, stream, group, block * kTile, first, first + task.part_tiles < tiles ? first + task.part_tiles : tiles, !kWide);
      walk.last_block = first_block + task.part_blocks < blocks ? first_block + task.part_blocks : blocks;
      walk.fresh = block == first_block;
      const int64_t stream_row = walk.stream_group * stream.padded;
      walk.vector = stream.bias + stream_row;
      if (task.stream_sums) walk.out = task.stream_sums + (task.own_part(id) * own.groups + group) * stream.padded;
    }
    __syncthreads();
    Panels ring;
    float total[kColumns / 8][2] = {};
    // Adds the sums of tile `tile`, which the warps have left in by_row.
    const auto flush = [&](int tile) {
      float* to = Panels::walk().out;
      if (!to || threadIdx.x >= kTile) return;
      const float* halves = by_row + (tile & 1) * 2 * kTile + threadIdx.x;
      to += int64_t(tile) * kTile + threadIdx.x;
      const float sum = halves[0] + halves[kTile];
      *to = Panels::walk().fresh ? sum : *to + sum;
    };
    for (int tile = Panels::walk().first; tile < Panels::walk().last; ++tile) {
      Product<2> s;
      const unsigned char* slot = ring.next();
      if (tile > Panels::walk().first) flush(tile - 1);
      const int rows = warp / 2 * 32 * kRowBytes, columns = warp % 2 * kColumns * kRowBytes;
      add_panel<true, 2>(s, slot + rows, ring.kept(slot, 0) + columns, ring.width(0));
#pragma unroll 1
      for (int step = 1; step < Panels::walk().steps; ++step) {
        slot = ring.next();
        add_panel<false, 2>(s, slot + rows, ring.kept(slot, step) + columns, ring.width(step));
      }
      const int ahead = Panels::walk().own_first - tile * kTile;  // of the first column before the first row
      if (task.left_out.touch<kTile, kTile>(ahead)) task.left_out.apply<2>(s, ahead + column - row);
      if (!kBiased) {
        const int rows_left = int(stream.count) - tile * kTile, columns_left = int(own.count) - Panels::walk().own_first;
        if (rows_left < kTile || columns_left < kTile) {
          device::rarely();
          each<2>(s, row, column, [&](float& x, int r, int c) { x = r < rows_left && c < columns_left ? x : -INFINITY; });
        }
      }
      if (kListed) {
        const Masks masks(task.left_out, own, stream, Panels::walk().group, Panels::walk().stream_group, task.ids);
        masks.apply<false, 2>(s, tile * kTile + row, Panels::walk().own_first + column);
      }
      const float* bias = ring.vector(slot) + row;
      float by_lane[2][2] = {};
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        float2 column_bias{};
        if (kBiased) column_bias = *reinterpret_cast<const float2*>(own_bias + column + 8 * n);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float e[2][2];
#pragma unroll
          for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              float x = s[m][n][2 * h + i];
              if (kBiased) x += bias[16 * m + 8 * h] + (i ? column_bias.y : column_bias.x);
              e[m][h] = device::exp2_fast(x);
              by_lane[m][h] += e[m][h];
            }
          total[n][i] += (e[0][0] + e[0][1]) + (e[1][0] + e[1][1]);
        }
      }
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float x = by_lane[m][h];
          x += device::shuffle_xor(x, 1);
          x += device::shuffle_xor(x, 2);
          if (lane % 4 == 0) by_row[((tile & 1) * 2 + warp % 2) * kTile + row + 16 * m + 8 * h] = x;
        }
    }
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float x = total[n][i];
        for (int step = 4; step < 32; step *= 2) x += device::shuffle_xor(x, step);
        if (lane < 4) by_column[warp / 2 * kTile + column + 8 * n + i] = x;
      }
    __syncthreads();
    if (Panels::walk().last > Panels::walk().first) flush(Panels::walk().last - 1);
    id = device::unknown(blockIdx.x), group = task.group(id);
    // A part on the diagonal is a full square, whose stream sums are all there is.
    const int part = task.stream_part(id);
    if (threadIdx.x < kTile && !(task.triangle && part == task.own_part(id))) {
      const float* quarters = by_column + threadIdx.x;
      task.own_sums[(part * own.groups + group) * own.padded + block * kTile + threadIdx.x] =
          (quarters[0] + quarters[kTile]) + (quarters[2 * kTile] + quarters[3 * kTile]);
    }
  } while (++block < Panels::walk().last_block);
}

}  // namespace pix2rep::infonce
