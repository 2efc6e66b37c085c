// What the infonce kernels are given: sources as they lie in memory, operands prepared from them, weights of anchors.
#pragma once

#include "../common/math.h"
#include "device.h"

namespace pix2rep::infonce {

constexpr int kTile = 128;   // rows of prepared operands come in whole tiles
constexpr int kPanel = 64;   // features that a tile holds in one piece of shared memory: 128 bytes a row
constexpr int kPieces = 64;  // of a group's anchors, each with its largest gradient and smallest lse

constexpr int kRowThreads = 256;  // of kernels that give a row to each warp
constexpr int kRowWarps = kRowThreads / 32;

// How exp2(s) keeps its range: as it is; less one constant, rows that it would flush swept again; with a running maximum.
enum class Regime { plain, shifted, online };

enum class Storage { float16, bfloat16, float32 };

// Rows [G, count, width] in any strides. index: [G, count] names the row that comes k-th, or nullptr.
struct Source {
  const void* data;
  Storage storage;
  int64_t group_stride, row_stride, feature_stride, count;
  int width;
  const int64_t* index;

  __device__ int64_t home(int64_t group, int64_t k) const { return index ? index[group * count + k] : k; }
  __device__ bool has(int64_t row) const { return row >= 0 && row < count; }
  __device__ float operator()(int64_t group, int64_t row, int feature) const {
    const int64_t at = group * group_stride + row * row_stride + feature * feature_stride;
    if (storage == Storage::float32) return static_cast<const float*>(data)[at];
    if (storage == Storage::float16) return static_cast<const torch::headeronly::Half*>(data)[at];
    return static_cast<const torch::headeronly::BFloat16*>(data)[at];
  }
};

// Prepared rows. `split` keeps float32's digits: a row is float16 high and low parts for the similarities and three bfloat16 parts for the gradient.
struct Operand {
  uint16_t* scaled;  // [G, padded, scaled_width] float16 rows times sqrt(log2(e) / tau), 0 where invalid
  uint16_t* plain;   // [G, padded, plain_width] bfloat16, nullptr in the forward pass
  float* bias;       // [G, padded] 0, -inf where invalid
  int64_t* ids;      // [G, padded] or nullptr
  int64_t groups, count, padded;
  int d;  // features, a multiple of 16; of 64 when split
  bool split;

  __device__ __host__ int scaled_width() const { return split ? 2 * d : d; }
  __device__ __host__ int plain_width() const { return split ? 3 * d : d; }
};

// Weights [G, padded] of the anchors among an operand's rows; all nullptr where its rows are none.
struct Weights {
  float* share;           // g exp2(c - lse2), the weight of an anchor's exp2(s - c) in (infonce.5)
  float* positive_share;  // that of its positive
  float* grad;
  float* lse2;
};

struct Temperature {
  const float* value;
  float floor, headroom;  // 125 - log2(candidates)

  // tau, clamped to its floor; NaN stays.
  __device__ float operator()() const { return *value < floor ? floor : *value; }
  // The smallest c >= 0 with which a sum of exp2(s - c) cannot overflow; rounded unit rows may reach a cosine of 1.002.
  __device__ float shift() const {
    const float most = 1.004f / (*this)() * kLog2E;
    return most < headroom ? 0 : most - headroom;
  }
};

__device__ __forceinline__ float warp_sum(float x) {
  for (int step = 16; step > 0; step /= 2) x += device::shuffle_xor(x, step);
  return x;
}

__device__ __forceinline__ float half_bits(uint16_t bits) { return torch::headeronly::Half(bits, torch::headeronly::Half::from_bits()); }
__device__ __forceinline__ float bfloat16_bits(uint16_t bits) {
  return torch::headeronly::BFloat16(bits, torch::headeronly::BFloat16::from_bits());
}

// Sums over one set of candidates: parts [parts, G, padded] that add up, or log2 of the whole where a running maximum found it.
struct Sums {
  float* parts;
  float* lse2;
  int64_t count;
  float too_small;  // a sum above it lost less than 2^-20 to flushed terms

  __device__ float log2(int64_t row, int64_t stride, float shift, Regime regime) const {
    if (regime == Regime::online) return lse2[row];
    float total = 0;
    for (int64_t part = threadIdx.x % 32; part < count; part += 32) total += parts[part * stride + row];
    total = warp_sum(total);
    return regime == Regime::shifted && total < too_small ? lse2[row] : log2f(total) + shift;
  }
};

// One view's anchors: prepared rows from `offset` on, partners from `partner_offset` on or where `positive` [G, count] says, losses from `column` on.
struct View {
  Operand own, partner;
  int64_t offset, partner_offset, count, partner_count, column, anchors;
  const int64_t* index;  // [G, count] where an anchor's loss belongs
  const int64_t* positive;
};

// Largest |g| and smallest lse of the anchors of each piece of a group, [G, kPieces] each.
struct Extremes {
  float *largest, *smallest;
};

// Of a group, by every warp that asks.
__device__ __forceinline__ float largest_of(const float* pieces, int64_t group) {
  const float* mine = pieces + group * kPieces + threadIdx.x % 32;
  float found = fmaxf(mine[0], mine[32]);
  for (int step = 16; step > 0; step /= 2) found = fmaxf(found, device::shuffle_xor(found, step));
  return found;
}
__device__ __forceinline__ float smallest_of(const float* pieces, int64_t group) {
  const float* mine = pieces + group * kPieces + threadIdx.x % 32;
  float found = fminf(mine[0], mine[32]);
  for (int step = 16; step > 0; step /= 2) found = fminf(found, device::shuffle_xor(found, step));
  return found;
}

// Whether one constant c would flush a weight exp2(c - lse2) of a group: then the running maximum's way serves it.
__device__ __forceinline__ bool flushed(const float* smallest, int64_t group, float shift) {
  return shift - smallest_of(smallest, group) * kLog2E > 100;
}

}  // namespace pix2rep::infonce
