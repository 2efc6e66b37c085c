// Several neighbours of memory at once, as float: 16 bytes where alignment allows, else one value.
#pragma once

#include "device.h"

namespace pix2rep {

template <int kBytes>
struct Word;
template <>
struct Word<16> {
  using Type = uint4;
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<4> {
  using Type = uint32_t;
};
template <>
struct Word<2> {
  using Type = uint16_t;
};

// kCount neighbours as they lie in memory. A struct of them is stored four bytes at a time.
template <class S, int kCount>
using Bits = typename Word<sizeof(S) * kCount>::Type;

template <class S, int kCount>
__device__ __forceinline__ void unpack(const Bits<S, kCount>& bits, float (&to)[kCount]) {
  S value[kCount];
  __builtin_memcpy(value, &bits, sizeof(bits));
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = float(value[i]);
}

template <class S, int kCount>
__device__ __forceinline__ Bits<S, kCount> pack(const float (&from)[kCount]) {
  S value[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) value[i] = S(from[i]);
  Bits<S, kCount> bits;
  __builtin_memcpy(&bits, value, sizeof(bits));
  return bits;
}

template <class S, int kCount>
__device__ __forceinline__ Bits<S, kCount> load_bits(const S* from) {
  device::expect_aligned(from, sizeof(Bits<S, kCount>));
  return *reinterpret_cast<const Bits<S, kCount>*>(from);
}

template <class S, int kCount>
__device__ __forceinline__ void load(const S* from, float (&to)[kCount]) {
  unpack<S, kCount>(load_bits<S, kCount>(from), to);
}

template <class S, int kCount>
__device__ __forceinline__ void store_bits(S* to, Bits<S, kCount> bits) {
  device::expect_aligned(to, sizeof(Bits<S, kCount>));
  *reinterpret_cast<Bits<S, kCount>*>(to) = bits;
}

template <class S, int kCount>
__device__ __forceinline__ void store(S* to, const float (&from)[kCount]) {
  store_bits<S, kCount>(to, pack<S, kCount>(from));
}

// Sum over groups of `lanes` neighbouring lanes, a power of two; every lane of the warp must call.
template <class T>
__device__ __forceinline__ T sum_lanes(T value, int lanes) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const T other = device::shuffle_xor(value, mask);
    value += mask < lanes ? other : T(0);
  }
  return value;
}

}  // namespace pix2rep
