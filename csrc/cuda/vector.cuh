// Several neighbours of memory at once, as float: 16 bytes where alignment allows, else one value.
#pragma once

#include "device.h"

namespace pix2rep {

template <class S, int kCount>
struct alignas(sizeof(S) * kCount) Pack {
  S value[kCount];
};

template <class S, int kCount>
__device__ __forceinline__ void load(const S* from, float (&to)[kCount]) {
  device::expect_aligned(from, sizeof(Pack<S, kCount>));
  const auto pack = *reinterpret_cast<const Pack<S, kCount>*>(from);
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = float(pack.value[i]);
}

template <class S, int kCount>
__device__ __forceinline__ void store(S* to, const float (&from)[kCount]) {
  Pack<S, kCount> pack;
#pragma unroll
  for (int i = 0; i < kCount; ++i) pack.value[i] = S(from[i]);
  device::expect_aligned(to, sizeof(Pack<S, kCount>));
  *reinterpret_cast<Pack<S, kCount>*>(to) = pack;
}

// Sum over groups of `lanes` neighbouring lanes, a power of two; every lane of the warp must call.
template <class T>
__device__ __forceinline__ T sum_lanes(T value, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) value += device::shuffle_xor(value, mask);
  return value;
}

}  // namespace pix2rep
