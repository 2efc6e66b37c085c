// Own sums with a running maximum, right at any temperature: every row below the regime of one constant, else the rows that it flushed.
#pragma once

#include "infonce_sweeps.h"

namespace pix2rep::infonce {

constexpr int kOnlineThreads = 256;
using OnlineRing = Ring<kOnlineThreads, kColumns, 3, 0, 0, true>;

__global__ void __launch_bounds__(kOnlineThreads, 1) online(OnlineTask task) {
  const Operand &own = task.own, &stream = task.stream;
  const int blocks = int((own.count + kTile - 1) / kTile), own_first = blockIdx.x % blocks * kTile, tiles = int((stream.count + kColumns - 1) / kColumns);
  const int group = blockIdx.x / blocks, stream_group = int(group % stream.groups);
  const int64_t own_row = group * own.padded + own_first;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = own_first + warp * 16 + lane / 4, column = lane % 4 * 2;

  if (task.rescue) {
    int* wanted = reinterpret_cast<int*>(device::shared_memory());
    if (threadIdx.x == 0) *wanted = 0;
    __syncthreads();
    if (threadIdx.x < kTile && own.bias[own_row + threadIdx.x] == 0) {
      float sum = 0;
      for (int64_t part = 0; part < task.found.count; ++part) sum += task.found.parts[part * own.groups * own.padded + own_row + threadIdx.x];
      if (sum < task.found.too_small) *wanted = 1;
    }
    __syncthreads();
    const bool nobody = *wanted == 0;
    __syncthreads();
    if (nobody) return;
  }
  if (threadIdx.x == 0) {
    Walk& walk = OnlineRing::walk() = Walk(own, stream, group, own_first, 0, tiles, false);
    walk.vector = stream.bias + stream_group * stream.padded;
  }
  __syncthreads();
  OnlineRing ring;
  float top[2] = {-1e30f, -1e30f}, total[2] = {};  // finite: -inf less -inf is NaN
  for (int tile = 0; tile < tiles; ++tile) {
    Product<1> s;
    const unsigned char* slot = nullptr;
    clear<1>(s);
#pragma unroll 1
    for (int step = 0; step < OnlineRing::walk().steps; ++step) {
      slot = ring.next();
      add_panel<false, 1>(s, ring.kept(slot, step) + warp * 16 * kRowBytes, slot, ring.width(step));
    }
    const int stream_first = tile * kColumns;
    if (task.left_out.touch<kTile, kColumns>(stream_first - own_first)) task.left_out.apply<1>(s, stream_first + column - row);
    const Masks masks(task.left_out, own, stream, group, stream_group, task.ids);
    masks.apply<true, 1>(s, row, stream_first + column);
    const float* bias = ring.vector(slot) + column;
    float above[2] = {top[0], top[1]};
    each<1>(s, 0, 0, [&](float& x, int r, int c) {
      if (bias[c] != 0) x = -INFINITY;
      above[r / 8] = fmaxf(above[r / 8], x);  // drops NaN, which exp2(x) brings back
    });
    for (int h = 0; h < 2; ++h) {
      for (int step = 1; step < 4; step *= 2) above[h] = fmaxf(above[h], device::shuffle_xor(above[h], step));
      total[h] *= exp2f(top[h] - above[h]);
      top[h] = above[h];
    }
    each<1>(s, 0, 0, [&](float& x, int r, int) { total[r / 8] += device::exp2_fast(x - top[r / 8]); });
  }
  for (int h = 0; h < 2; ++h) {
    for (int step = 1; step < 4; step *= 2) total[h] += device::shuffle_xor(total[h], step);
    if (lane % 4 == 0) task.found.lse2[group * own.padded + row + 8 * h] = top[h] + log2f(total[h]);
  }
}

}  // namespace pix2rep::infonce
