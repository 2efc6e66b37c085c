// Vectors of the compiler's own extension, as wide as the instruction set in force. Included by `<op>_kernels.cpp` only.
// Nothing here may be an inline function of external linkage: the linker would keep one copy for all instruction sets.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define PIX2REP_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define PIX2REP_VECTOR_BYTES 32
#else
#define PIX2REP_VECTOR_BYTES 16
#endif

namespace pix2rep {
namespace PIX2REP_ISA {
namespace {

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(PIX2REP_VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(PIX2REP_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(PIX2REP_VECTOR_BYTES)));
  static constexpr int width = PIX2REP_VECTOR_BYTES / 4;
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(PIX2REP_VECTOR_BYTES)));
  typedef double Unaligned __attribute__((vector_size(PIX2REP_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t I __attribute__((vector_size(PIX2REP_VECTOR_BYTES)));
  static constexpr int width = PIX2REP_VECTOR_BYTES / 8;
};

template <class T>
using Vec = typename Simd<T>::V;

template <class T>
static inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::Unaligned*>(p);
}

template <class T>
static inline void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename Simd<T>::Unaligned*>(p) = v;
}

template <class T>
static inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

template <class T>
static inline T horizontal_sum(Vec<T> v) {
  T sum = 0;
  for (int i = 0; i < Simd<T>::width; ++i) sum += v[i];
  return sum;
}

// Tiles of width x width in registers: stage h exchanges the off-diagonal quarters of size h.
template <class T, int Half, size_t... Lane>
static inline void exchange(Vec<T>& a, Vec<T>& b, std::index_sequence<Lane...>) {
  constexpr int W = Simd<T>::width;
  const Vec<T> low = __builtin_shufflevector(a, b, (Lane & Half ? int(Lane) - Half + W : int(Lane))...);
  const Vec<T> high = __builtin_shufflevector(a, b, (Lane & Half ? int(Lane) + W : int(Lane) + Half)...);
  a = low, b = high;
}

template <class T, int Half = Simd<T>::width / 2>
static inline void transpose_tile(Vec<T> (&tile)[Simd<T>::width]) {
  constexpr int W = Simd<T>::width;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & Half)) exchange<T, Half>(tile[i], tile[i + Half], std::make_index_sequence<W>{});
  if constexpr (Half > 1) transpose_tile<T, Half / 2>(tile);
}

// 2^x of float: round to the nearest integer n, then a degree-6 minimax polynomial of x - n in [-1/2, 1/2] (relative error 1e-8, below one
// rounding). NaN stays NaN; below -126 the result is 0 or denormal, above 128 inf.
static inline Vec<float> exp2(Vec<float> x) {
  using V = Vec<float>;
#if defined(__AVX512F__)
  const __m512 n = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const V f = x - (V)n;
#else
  using I = typename Simd<float>::I;
  x = x < -127.0f ? broadcast(-127.0f) : x;  // in this order NaN passes
  x = x > 128.0f ? broadcast(128.0f) : x;
  const V magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const V shifted = x + magic;
  const V n = shifted - magic;
  const V f = x - n;
#endif
  V p = f * 1.5403530393381609e-4f + 1.3333558146428443e-3f;
  p = p * f + 9.618129107628477e-3f;
  p = p * f + 5.550410866482158e-2f;
  p = p * f + 2.402265069591007e-1f;
  p = p * f + 6.931471805599453e-1f;
  p = p * f + 1.0f;
#if defined(__AVX512F__)
  return (V)_mm512_scalef_ps((__m512)p, n);
#else
  const I exponent = ((I)shifted << 23) + 0x3f800000;  // at n = -127 this is 0, at 128 inf
  return p * (V)exponent;
#endif
}

// float64 serves gradcheck, not speed.
static inline Vec<double> exp2(Vec<double> x) {
  Vec<double> y;
  for (int i = 0; i < Simd<double>::width; ++i) y[i] = __builtin_exp2(x[i]);
  return y;
}

}  // namespace
}  // namespace PIX2REP_ISA
}  // namespace pix2rep
