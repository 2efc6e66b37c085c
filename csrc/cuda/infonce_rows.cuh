// What infonce does once a row around the sweeps over pairs: prepared operands, losses (infonce.3-4), weights of the gradients. One warp a row.
#pragma once

#include "infonce_operands.cuh"

namespace pix2rep::infonce {

// The part of x that 16 bits hold, as bits; x becomes what is left, 0 where the part is not finite.
template <class S>
__device__ __forceinline__ uint16_t take(float& x) {
  const S part(x);
  x = fabsf(float(part)) < INFINITY ? x - float(part) : 0.0f;
  return part.x;
}

// Rows offset .. offset + written of an operand from `source`: invalid ones and those after its last are 0, those from outside it NaN.
__global__ void prepare(Source source, const bool* valid, const int64_t* ids, Operand out, Temperature temperature, int64_t offset, int64_t written) {
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  const int lane = threadIdx.x % 32;
  const int64_t task = int64_t(blockIdx.x) * kRowWarps + threadIdx.x / 32, group = task / written, k = task % written;
  if (group >= out.groups) return;
  const bool present = k < source.count;
  const int64_t home = present ? source.home(group, k) : 0;
  const bool inside = present && source.has(home), kept = present && (!inside || !valid || valid[group * source.count + home]);
  const float root = sqrtf(1 / temperature() * kLog2E);
  const int64_t row = group * out.padded + offset + k;
  uint16_t* scaled = out.scaled + row * out.scaled_width();
  uint16_t* plain = out.plain ? out.plain + row * out.plain_width() : nullptr;
  for (int f = lane; f < out.d; f += 32) {
    float x = 0;
    if (kept && f < source.width) x = inside ? source(group, home, f) : NAN;
    float s = x * root;
    scaled[f] = take<Half>(s);
    if (out.split) scaled[out.d + f] = take<Half>(s);
    if (!plain) continue;
    for (int part = 0; part < (out.split ? 3 : 1); ++part) plain[part * out.d + f] = take<BFloat16>(x);
  }
  if (lane == 0) {
    out.bias[row] = kept ? 0.0f : -INFINITY;
    if (out.ids) out.ids[row] = inside ? ids[group * source.count + home] : 0;
  }
}

__global__ void losses(View view, Sums sums, Sums queue, float* losses, float* lse, Temperature temperature, Regime regime) {
  const int lane = threadIdx.x % 32;
  const int64_t task = int64_t(blockIdx.x) * kRowWarps + threadIdx.x / 32, group = task / view.count, anchor = task % view.count;
  const Operand &own = view.own, &partner = view.partner;
  if (group >= own.groups) return;
  const int64_t match = view.positive ? view.positive[group * view.count + anchor] : anchor;
  const bool inside = match >= 0 && match < view.partner_count;
  const int64_t row = group * own.padded + view.offset + anchor, partner_row = group * partner.padded + view.partner_offset + match;
  float s = NAN;
  if (inside) {  // of the operands that the sums used
    const uint16_t *x = own.scaled + row * own.scaled_width(), *y = partner.scaled + partner_row * partner.scaled_width();
    s = 0;
    for (int f = lane; f < own.d; f += 32) {
      float u = half_bits(x[f]), v = half_bits(y[f]);
      if (own.split) u += half_bits(x[own.d + f]), v += half_bits(y[own.d + f]);
      s += u * v;
    }
    s = warp_sum(s);
  }
  const bool active = own.bias[row] == 0 && (!inside || partner.bias[partner_row] == 0);
  const float shift = regime == Regime::shifted ? temperature.shift() : 0;
  float r = sums.log2(row, own.groups * own.padded, shift, regime);  // (infonce.2)
  if (queue.count > 0) {
    const float extra = queue.log2(row, own.groups * own.padded, shift, regime);
    const float top = fmaxf(fmaxf(r, extra), -1e30f);  // finite: -inf less -inf is NaN
    r = top + log2f(exp2f(r - top) + exp2f(extra - top));
  }
  const float loss = softplus2(r - s);  // (infonce.3)
  const int64_t home = view.index ? view.index[group * view.count + anchor] : anchor;
  if (lane > 0 || home < 0 || home >= view.count) return;
  const int64_t out = group * view.anchors + view.column + home;
  losses[out] = active ? loss : 0;
  lse[out] = active ? s * kLn2 + loss : INFINITY;  // (infonce.4)
}

struct Upstream {
  const void* data;
  Storage storage;
  int64_t group_stride, anchor_stride;

  __device__ float operator()(int64_t group, int64_t anchor) const {
    const int64_t at = group * group_stride + anchor * anchor_stride;
    if (storage == Storage::float32) return static_cast<const float*>(data)[at];
    if (storage == Storage::float16) return static_cast<const torch::headeronly::Half*>(data)[at];
    return static_cast<const torch::headeronly::BFloat16*>(data)[at];
  }
};

__global__ void extremes(Upstream upstream, const float* lse, int64_t groups, int64_t anchors, Extremes out) {
  const int lane = threadIdx.x % 32;
  const int64_t task = int64_t(blockIdx.x) * kRowWarps + threadIdx.x / 32, group = task / kPieces, piece = task % kPieces;
  if (group >= groups) return;
  float largest = 0, smallest = INFINITY;
  const int64_t span = (anchors + kPieces - 1) / kPieces, last = (piece + 1) * span < anchors ? (piece + 1) * span : anchors;
  for (int64_t anchor = piece * span + lane; anchor < last; anchor += 32) {
    const float l = lse[group * anchors + anchor], g = fabsf(upstream(group, anchor));
    if (l != INFINITY && g < INFINITY) largest = fmaxf(largest, g);
    smallest = fminf(smallest, l);
  }
  for (int step = 16; step > 0; step /= 2) {
    largest = fmaxf(largest, device::shuffle_xor(largest, step));
    smallest = fminf(smallest, device::shuffle_xor(smallest, step));
  }
  if (lane == 0) out.largest[task] = largest, out.smallest[task] = smallest;
}

// Weights of rows offset .. offset + written, a lane each. g is divided by the group's largest, so that no weight underflows that another does not dwarf.
__global__ void weights(View view, Upstream upstream, const float* losses, const float* lse, Extremes found, Weights out,
                        Temperature temperature, Regime regime, int64_t written) {
  const int64_t warps = (written + 31) / 32, task = int64_t(blockIdx.x) * kRowWarps + threadIdx.x / 32, group = task / warps;
  if (group >= view.own.groups) return;
  const float largest = largest_of(found.largest, group);
  const int64_t anchor = task % warps * 32 + threadIdx.x % 32;
  if (anchor >= written) return;
  float l = INFINITY, loss = 0, grad = 0;
  if (anchor < view.count) {
    const int64_t home = view.index ? view.index[group * view.count + anchor] : anchor;
    const bool inside = home >= 0 && home < view.count;
    const int64_t saved = group * view.anchors + view.column + home;
    l = inside ? lse[saved] : NAN;
    if (inside) loss = losses[saved], grad = upstream(group, view.column + home);
  }
  const bool active = l != INFINITY;
  grad = active ? grad / (largest > 0 ? largest : 1) : 0;
  const float shift = regime == Regime::shifted ? temperature.shift() : 0;
  const int64_t row = group * view.own.padded + view.offset + anchor;
  out.share[row] = active ? grad * exp2f(shift - l * kLog2E) : 0;
  out.positive_share[row] = active ? -grad * one_minus_exp(loss) : 0;
  out.grad[row] = grad;
  out.lse2[row] = l * kLog2E;
}

}  // namespace pix2rep::infonce
