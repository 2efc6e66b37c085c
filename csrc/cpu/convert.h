// Storage to float and back, by bits so that loops over them vectorise for every instruction set; rounding is to nearest even. Included by
// `<op>_kernels.cpp` only, as simd.h is.
#pragma once

#include <cstring>

#include "simd.h"
#include "storage.h"

namespace pix2rep {
namespace PIX2REP_ISA {
namespace {

// V and W are vectors or scalars of float and uint32.
template <class V, class W>
static inline V widen_bits(W bits, BF16) {
  const W wide = bits << 16;
  V out;
  std::memcpy(&out, &wide, sizeof(out));
  return out;
}

template <class V, class W>
static inline V widen_bits(W bits, F16) {
  const W magnitude = (bits & 0x7fff) << 13;
  V out;
  std::memcpy(&out, &magnitude, sizeof(out));
  out *= 0x1p112f;  // moves the exponent's bias, exact for denormals too
  W wide;
  std::memcpy(&wide, &out, sizeof(out));
  const W special = magnitude >= 0x0f800000u ? W{} + 0x7f800000u : W{};  // inf and NaN keep their exponent; in 16 bits this would be slower
  wide |= special | (bits & 0x8000) << 16;
  std::memcpy(&out, &wide, sizeof(out));
  return out;
}

static inline float widen(float x) { return x; }
static inline double widen(double x) { return x; }
static inline float widen(BF16 x) { return widen_bits<float, uint32_t>(x.bits, x); }
static inline float widen(F16 x) { return widen_bits<float, uint32_t>(x.bits, x); }

static inline void narrow(float x, float& out) { out = x; }
static inline void narrow(double x, double& out) { out = x; }

static inline void narrow(float x, BF16& out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out.bits = uint16_t(x == x ? rounded : 0x7fc0);
}

static inline void narrow(float x, F16& out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits & 0x80000000u, magnitude = bits ^ sign;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  float absolute;
  std::memcpy(&absolute, &magnitude, 4);
  const float shifted = absolute + 0.5f;  // 24 bits below 2^-1 end where a denormal's 10 do
  uint32_t denormal;
  std::memcpy(&denormal, &shifted, 4);
  denormal -= 126u << 23;
  uint32_t half = magnitude < (113u << 23) ? denormal : normal;
  half = magnitude >= (143u << 23) ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  out.bits = uint16_t(half | sign >> 16);
}

template <class S, class T>
void load_line(const void* from, int64_t stride, int64_t n, T* __restrict to) {
  const S* p = static_cast<const S*>(from);
  if (stride == 1)
    for (int64_t i = 0; i < n; ++i) to[i] = T(widen(p[i]));
  else
    for (int64_t i = 0; i < n; ++i) to[i] = T(widen(p[i * stride]));
}

template <class S, class T>
void store_line(const T* __restrict from, int64_t n, void* to) {
  S* p = static_cast<S*>(to);
  for (int64_t i = 0; i < n; ++i) narrow(Compute<S>(from[i]), p[i]);
}

template <class T>
constexpr Lines<T> lines() {
  return {{load_line<F16, T>, load_line<BF16, T>, load_line<float, T>, load_line<double, T>},
          {store_line<F16, T>, store_line<BF16, T>, store_line<float, T>, store_line<double, T>}};
}

}  // namespace
}  // namespace PIX2REP_ISA
}  // namespace pix2rep
