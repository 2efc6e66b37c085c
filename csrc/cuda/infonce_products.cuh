// Gradient products (infonce.6) over the negatives: a block recomputes the similarities of its rows tile by tile and multiplies them at once.
//
// With w_i = g_i exp2(c - lse2_i), the pair (i, j) weighs P_ij = exp2(s_ij - c) (w_i + w_j): in "joint" and "cross" each row of a pair is an
// anchor to the other, so that one product a side is the whole gradient. "forward" has w = 0 on one side. P never leaves the registers: what a
// lane holds of a product is what it holds of the next one's left factor.
#pragma once

#include "infonce_sweeps.h"

namespace pix2rep::infonce {

// kForm: exp2(s); that less a constant, or where it would flush weights the running maximum's way; the same with pairs left out by ids or lists.
enum Form { kPlain, kShifted, kListed };

// A warp has 16 kM of the block's rows, and kSlice features of their gradient in its registers.
template <int kSlice, int kForm, bool kSplit, bool kWide>
struct Shape {
  static constexpr int kM = kSlice <= 64 || (kSlice == 128 && kForm != kListed) ? 2 : 1;
  static constexpr int kThreads = kTile / (16 * kM) * 32;
  static constexpr int kPanels = (kSlice + kPanel - 1) / kPanel;        // of the slice
  static constexpr int kExtra = kSplit ? 3 * kPanels : kPanels;
  // On a multiprocessor, by their registers.
  static constexpr int kBlocks = kForm == kListed || kSplit || kSlice == 256 ? 1 : kSlice == 128 ? 2 : 3;
  using Panels = Ring<kThreads, kColumns, 4, kExtra, kTile, kWide>;
};

// total += P Z for 64 rows of a panel of Z: features [0, 16 kGroups) of it into total from 2 * first on.
template <int kM, int kFirst, int kGroups, int kCount>
__device__ __forceinline__ void add_weighed(float (&total)[kM][kCount][4], const uint32_t (&p)[kM][kColumns / 16][4], const unsigned char* panel) {
  const int lane = threadIdx.x % 32;
  const auto z = device::shared_address(panel + (lane & 15) * kRowBytes + (((lane >> 4) ^ (lane & 7)) << 4));
#pragma unroll
  for (int k = 0; k < kColumns / 16; ++k)
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      uint32_t y[4];
      device::load_tiles<true>(y, (z ^ (group << 5)) + k * 16 * kRowBytes);
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int m = 0; m < kM; ++m)
          device::multiply(total[m][kFirst + 2 * group + half], p[m][k], {y[2 * half], y[2 * half + 1]}, torch::headeronly::BFloat16());
    }
}

// The bfloat16 part of s as the left factor of the next product; kRest: s becomes what is left.
template <bool kRest, int kM>
__device__ __forceinline__ void pack(Product<kM>& s, uint32_t (&p)[kM][kColumns / 16][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float &low = s[m][n][2 * h], &high = s[m][n][2 * h + 1];
        const uint32_t pair = device::pack_bfloat16(low, high);
        p[m][n / 2][n % 2 * 2 + h] = pair;
        if (kRest) low -= bfloat16_bits(uint16_t(pair)), high -= bfloat16_bits(uint16_t(pair >> 16));
      }
}

// P without a common constant. A row of zeros adds nothing as long as its weight is finite, which one constant ensures and this does not.
template <int kM>
__device__ __forceinline__ void by_maximum(Product<kM>& s, const ProductsTask& task, int64_t row, int64_t column) {
  device::rarely();
  const auto read = [](const float* from, int64_t k, float otherwise) { return from ? from[k] : otherwise; };
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t j = column + 8 * n + i;
      const bool valid = task.stream.bias[j] == 0;
      const float grad = read(task.stream_weights.grad, j, 0), lse2 = read(task.stream_weights.lse2, j, INFINITY);
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float& x = s[m][n][2 * h + i];
          const int64_t k = row + 16 * m + 8 * h;
          const float own = read(task.own_weights.grad, k, 0) * device::exp2_fast(x - read(task.own_weights.lse2, k, INFINITY));
          const float p = own + grad * device::exp2_fast(x - lse2);
          x = valid && x != -INFINITY ? p : 0;
        }
    }
}

template <int kSlice, int kForm, bool kSplit, bool kWide>
__global__ void __launch_bounds__(Shape<kSlice, kForm, kSplit, kWide>::kThreads, Shape<kSlice, kForm, kSplit, kWide>::kBlocks) products(ProductsTask task) {
  using S = Shape<kSlice, kForm, kSplit, kWide>;
  constexpr int kM = S::kM;
  const Operand &own = task.own, &stream = task.stream;
  const int part = blockIdx.x % task.parts, first_feature = blockIdx.x / task.parts % task.slices * kSlice;
  const int blocks = int((own.count + kTile - 1) / kTile), own_first = blockIdx.x / task.parts / task.slices % blocks * kTile;
  const int group = blockIdx.x / task.parts / task.slices / blocks;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = warp * 16 * kM + lane / 4, column = lane % 4 * 2;  // the lane's first, of a tile
  const int first_tile = part * task.part_tiles, tiles = int((stream.count + kColumns - 1) / kColumns);
  const int last_tile = first_tile + task.part_tiles < tiles ? first_tile + task.part_tiles : tiles;
  float shift = task.regime == Regime::shifted ? task.temperature.shift() : 0;
  const bool online = kForm != kPlain && (task.regime == Regime::online || (task.regime == Regime::shifted && flushed(task.smallest, group, shift)));
  if (threadIdx.x == 0) {
    Walk& walk = S::Panels::walk() = Walk(own, stream, group, own_first, first_tile, last_tile, !kWide);
    const int64_t stream_row = walk.stream_group * stream.padded;
    walk.out = task.out + ((part * own.groups + group) * own.padded + own_first) * own.d + first_feature;
    walk.out_width = own.d - first_feature;
    walk.plain = reinterpret_cast<const unsigned char*>(stream.plain + stream_row * stream.plain_width() + first_feature);
    if (kSplit) walk.extra_bytes = 2 * own.d, walk.extra_features = 0;
    walk.shift = online ? 0 : shift, walk.online = online;
    walk.vector = task.stream_weights.share + stream_row;
  }
  if (threadIdx.x < kTile)
    S::Panels::floats()[threadIdx.x] = task.own_weights.share[group * own.padded + own_first + threadIdx.x];
  __syncthreads();
  typename S::Panels ring;

  float total[kM][kSlice / 8][4] = {};
  for (int tile = S::Panels::walk().first; tile < S::Panels::walk().last; ++tile) {
    Product<kM> s;
    const int rows = warp * 16 * kM * kRowBytes;
    const unsigned char* slot = ring.next();
    if (kForm != kPlain) clear<kM>(s, -S::Panels::walk().shift);
    add_panel<kForm == kPlain, kM>(s, ring.kept(slot, 0) + rows, slot, ring.width(0));
#pragma unroll 1
    for (int step = 1; step < S::Panels::walk().steps; ++step) {
      slot = ring.next();
      add_panel<false, kM>(s, ring.kept(slot, step) + rows, slot, ring.width(step));
    }
    const Walk& walk = S::Panels::walk();
    const int ahead = tile * kColumns - walk.own_first;  // of the first column before the first row
    if (task.left_out.touch<kTile, kColumns>(ahead)) task.left_out.apply<kM>(s, ahead + column - row);
    if (kForm == kListed) {
      const Masks masks(task.left_out, own, stream, walk.group, walk.stream_group, task.ids);
      masks.apply<true, kM>(s, walk.own_first + row, tile * kColumns + column);
    }
    if (kForm != kPlain && walk.online) {
      by_maximum<kM>(s, task, walk.group * own.padded + walk.own_first + row, walk.stream_group * stream.padded + tile * kColumns + column);
    } else {
      const float *share = ring.vector(slot) + column, *own_shares = S::Panels::floats() + row;
      float own_share[kM][2];
#pragma unroll
      for (int m = 0; m < kM; ++m) own_share[m][0] = own_shares[16 * m], own_share[m][1] = own_shares[16 * m + 8];
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        const float2 weight = *reinterpret_cast<const float2*>(share + 8 * n);
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            s[m][n][i] = device::exp2_fast(s[m][n][i]) * (own_share[m][i / 2] + (i % 2 ? weight.y : weight.x));  // (infonce.5)
      }
    }
    uint32_t p[kM][kColumns / 16][4];
    if constexpr (kSplit) {
      // Three parts of P by three of Z hold float32's digits; products beyond its last are left out.
      uint32_t q[kM][kColumns / 16][4], r[kM][kColumns / 16][4];
      static_assert(S::kPanels == 1);
      pack<true, kM>(s, p), pack<true, kM>(s, q), pack<false, kM>(s, r);
      slot = ring.next();
      add_weighed<kM, 0, kSlice / 16>(total, r, slot);
      add_weighed<kM, 0, kSlice / 16>(total, q, slot);
      add_weighed<kM, 0, kSlice / 16>(total, p, slot);
      slot = ring.next();
      add_weighed<kM, 0, kSlice / 16>(total, q, slot);
      add_weighed<kM, 0, kSlice / 16>(total, p, slot);
      slot = ring.next();
      add_weighed<kM, 0, kSlice / 16>(total, p, slot);
    } else {
      pack<false, kM>(s, p);
      constexpr int kGroups = kSlice < kPanel ? kSlice / 16 : kPanel / 16;
      slot = ring.next();
      add_weighed<kM, 0, kGroups>(total, p, slot);
      if constexpr (S::kPanels > 1) slot = ring.next(), add_weighed<kM, 8, kGroups>(total, p, slot);
      if constexpr (S::kPanels > 2) slot = ring.next(), add_weighed<kM, 16, kGroups>(total, p, slot);
      if constexpr (S::kPanels > 3) slot = ring.next(), add_weighed<kM, 24, kGroups>(total, p, slot);
    }
  }
  const Walk& walk = S::Panels::walk();
  float* out = walk.out + row * int64_t(own.d) + column;
  const int left = walk.out_width - column;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kSlice / 8; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (8 * n < left)
          *reinterpret_cast<float2*>(out + (16 * m + 8 * h) * int64_t(own.d) + 8 * n) = {total[m][n][2 * h], total[m][n][2 * h + 1]};
}

}  // namespace pix2rep::infonce
