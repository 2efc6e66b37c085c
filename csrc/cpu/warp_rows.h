// Rows of channels in any storage: read, written, summed, scaled and added with channels along the vectors.
// Included by `<op>_kernels.cpp` only, as simd.h is.
#pragma once

#include "convert.h"

namespace pix2rep {
namespace PIX2REP_ISA {
namespace {

template <class S>
static inline Vec<Compute<S>> read(const S* p) {
  if constexpr (sizeof(S) > 2) {
    return load(p);
  } else {
    constexpr int W = Simd<float>::width;
    float wide[W];
    for (int i = 0; i < W; ++i) wide[i] = widen(p[i]);
    return load(wide);
  }
}

// The first n < width values; the others are 0.
template <class S>
static inline Vec<Compute<S>> read_some(const S* p, int64_t n) {
  using T = Compute<S>;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<S, float>) return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
  if constexpr (std::is_same_v<S, double>) return (Vec<double>)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
#endif
  T some[Simd<T>::width] = {};
  for (int64_t i = 0; i < n; ++i) some[i] = widen(p[i]);
  return load(some);
}

template <class S>
static inline void write(S* p, Vec<Compute<S>> v) {
  if constexpr (sizeof(S) > 2) {
    store(p, v);
  } else {
    constexpr int W = Simd<float>::width;
    float wide[W];
    store(wide, v);
    for (int i = 0; i < W; ++i) narrow(wide[i], p[i]);
  }
}

template <class S>
static inline void write_some(S* p, Vec<Compute<S>> v, int64_t n) {
  using T = Compute<S>;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<S, float>) return _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
  if constexpr (std::is_same_v<S, double>) return _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
#endif
  T some[Simd<T>::width];
  store(some, v);
  for (int64_t i = 0; i < n; ++i) narrow(some[i], p[i]);
}

// f(c, vectors, partial): whole groups of 4, 2 and 1 vectors, then the last count - c < width values.
template <class T, class F>
static inline void sweep(int64_t count, const F& f) {
  constexpr int64_t W = Simd<T>::width;
  int64_t c = 0;
  for (; c + 4 * W <= count; c += 4 * W) f(c, std::integral_constant<int, 4>{}, std::false_type{});
  for (; c + 2 * W <= count; c += 2 * W) f(c, std::integral_constant<int, 2>{}, std::false_type{});
  for (; c + W <= count; c += W) f(c, std::integral_constant<int, 1>{}, std::false_type{});
  if (c < count) f(c, std::integral_constant<int, 1>{}, std::true_type{});
}

// out[c] = sum_k w[k] from[k][c]
template <class X, class T>
static inline void weighted_sum(const X* const* from, const T* w, int taps, int64_t channels, T* out) {
  constexpr int W = Simd<T>::width;
  sweep<T>(channels, [&](int64_t c, auto vectors, auto partial) {
    constexpr int N = decltype(vectors)::value;
    Vec<T> sum[N] = {};
    for (int k = 0; k < taps; ++k)
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) {
        const X* p = from[k] + c + v * W;
        sum[v] += broadcast(w[k]) * (partial ? read_some(p, channels - c) : read(p));
      }
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) partial ? write_some(out + c, sum[v], channels - c) : write(out + c + v * W, sum[v]);
  });
}

template <class X, class Y, class T>
static inline T inner(const X* x, const Y* y, int64_t count) {
  constexpr int W = Simd<T>::width;
  Vec<T> sum[4] = {};
  sweep<T>(count, [&](int64_t c, auto vectors, auto partial) {
#pragma GCC unroll 4
    for (int v = 0; v < decltype(vectors)::value; ++v)
      sum[v] += partial ? read_some(x + c, count - c) * read_some(y + c, count - c) : read(x + c + v * W) * read(y + c + v * W);
  });
  return horizontal_sum<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// to[c] += w from[c]
template <class T>
static inline void add_scaled(const T* from, T w, int64_t count, T* to) {
  constexpr int W = Simd<T>::width;
  sweep<T>(count, [&](int64_t c, auto vectors, auto partial) {
#pragma GCC unroll 4
    for (int v = 0; v < decltype(vectors)::value; ++v)
      if (partial)
        write_some(to + c, read_some(to + c, count - c) + w * read_some(from + c, count - c), count - c);
      else
        store(to + c + v * W, load(to + c + v * W) + w * load(from + c + v * W));
  });
}

template <class A, class T, class B>
static inline void scaled(const A* from, T scale, int64_t count, B* to) {
  constexpr int W = Simd<T>::width;
  sweep<T>(count, [&](int64_t c, auto vectors, auto partial) {
#pragma GCC unroll 4
    for (int v = 0; v < decltype(vectors)::value; ++v)
      if (partial)
        write_some(to + c, read_some(from + c, count - c) * scale, count - c);
      else
        write(to + c + v * W, read(from + c + v * W) * scale);
  });
}

}  // namespace
}  // namespace PIX2REP_ISA
}  // namespace pix2rep
