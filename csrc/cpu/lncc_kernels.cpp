// Lines of lncc: columns run along the vectors, windows are summed tap by tap.
#include "lncc_kernels.h"

#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace pix2rep {
namespace PIX2REP_ISA {

#include "simd.h"

namespace {

// 16-bit storage by its bits; rounding is to nearest even.
struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};

template <class To, class From>
static inline To as(From x) {
  To out;
  std::memcpy(&out, &x, sizeof(out));
  return out;
}

static inline double value(double x) { return x; }
static inline float value(float x) { return x; }
static inline float value(BF16 x) { return as<float>(uint32_t(x.bits) << 16); }
static inline float value(F16 x) {
  // Scaling moves the exponent's bias, exactly for denormals too; inf and NaN keep all exponent bits.
  const float scaled = as<float>(uint32_t(x.bits & 0x7fff) << 13) * 0x1p112f;
  const uint32_t special = (x.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  return as<float>(as<uint32_t>(scaled) | special | uint32_t(x.bits & 0x8000) << 16);
}

static inline void set(double& to, double x) { to = x; }
static inline void set(float& to, double x) { to = float(x); }
static inline void set(BF16& to, float x) {
  const uint32_t bits = as<uint32_t>(x);
  to.bits = x == x ? uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : 0x7fc0;
}
static inline void set(F16& to, float x) {
  const uint32_t bits = as<uint32_t>(x), size = bits & 0x7fffffffu;
  // Below 2^-14 the sum with 1/2 ends at a half's last bit, so that the addition rounds.
  const uint32_t small = as<uint32_t>(as<float>(size) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (size - 0x38000000u + 0xfff + (size >> 13 & 1)) >> 13;
  const uint32_t finite = size < 0x38800000u ? small : normal;
  const uint32_t half = size > 0x7f800000u ? 0x7e00u : size >= 0x47800000u ? 0x7c00u : finite;
  to.bits = uint16_t(half | (bits >> 16 & 0x8000u));
}

template <class S, class T>
void load_line(const void* from, int64_t stride, int64_t n, T* to) {
  const S* p = static_cast<const S*>(from);
  if (stride == 1)
    for (int64_t x = 0; x < n; ++x) to[x] = T(value(p[x]));
  else
    for (int64_t x = 0; x < n; ++x) to[x] = T(value(p[x * stride]));
}

template <class S, class T>
void store_line(const T* from, int64_t n, void* to) {
  S* p = static_cast<S*>(to);
  for (int64_t x = 0; x < n; ++x) set(p[x], from[x]);
}

template <class T>
struct Parts {
  Vec<T> mean_i, mean_j, ii, jj, ij;
};

// (lncc.8). part(tap, quantity) reads; the middle part is the pivot, so that a flat window has no variance at all.
template <bool Pixels, class T, class Part>
static inline Parts<T> merged(const LnccAxis<T>& axis, Part part) {
  using V = Vec<T>;
  const V zero = broadcast(T(0)), i0 = part(axis.taps / 2, 0), j0 = part(axis.taps / 2, 1);
  V di = -axis.rest * i0, dj = -axis.rest * j0;
  V dii = -di * i0, djj = -dj * j0, dij = -di * j0, ii = zero, jj = zero, ij = zero;
  for (int64_t t = 0; t < axis.taps; ++t) {
    const V i = part(t, 0) - i0, j = part(t, 1) - j0;
    di += i, dj += j, dii += i * i, djj += j * j, dij += i * j;
    if (!Pixels) ii += part(t, 2), jj += part(t, 3), ij += part(t, 4);
  }
  const T n = axis.inverse, c = axis.count;
  return {i0 + di * n, j0 + dj * n, ii + c * (dii - di * di * n), jj + c * (djj - dj * dj * n), ij + c * (dij - di * dj * n)};
}

template <bool Pixels, class T>
void merge_slots(const T* const* slots, const LnccAxis<T>& axis, int64_t n, int64_t line, T* parts) {
  for (int64_t x = 0; x < n; x += Simd<T>::width) {
    const Parts<T> p = merged<Pixels, T>(axis, [&](int64_t t, int q) { return load(slots[t] + q * line + x); });
    store(parts + x, p.mean_i), store(parts + line + x, p.mean_j), store(parts + 2 * line + x, p.ii), store(parts + 3 * line + x, p.jj);
    store(parts + 4 * line + x, p.ij);
  }
}

template <class T>
static inline Parts<T> window(const T* parts, const LnccAxis<T>& axis, int64_t line) {
  return merged<false, T>(axis, [&](int64_t t, int q) { return load(parts + q * line + t); });
}

// max(x, e); NaN stays.
template <class T>
static inline Vec<T> clamped(Vec<T> x, Vec<T> e) {
  return x <= e ? e : x;
}

template <class T>
void score(const T* parts, const LnccAxis<T>& axis, T eps, int64_t n, int64_t line, T* cc) {
  const Vec<T> e = broadcast(eps);
  for (int64_t x = 0; x < n; x += Simd<T>::width) {
    const Parts<T> p = window(parts + x, axis, line);
    const Vec<T> c = clamped<T>(p.ij, e);
    store(cc + x, (c / clamped<T>(p.ii, e)) * (c / clamped<T>(p.jj, e)));  // (lncc.4)
  }
}

template <bool Both, class T>
static inline void weigh_line(const T* parts, const LnccAxis<T>& axis, T eps, const T* grad_cc, int64_t n, int64_t line, T* weights) {
  using V = Vec<T>;
  const V e = broadcast(eps), zero = broadcast(T(0));
  for (int64_t x = 0; x < n; x += Simd<T>::width) {
    const Parts<T> p = window(parts + x, axis, line);
    const V c = clamped<T>(p.ij, e), by_v = T(1) / clamped<T>(p.ii, e), by_w = T(1) / clamped<T>(p.jj, e);
    const V g = T(2) * load(grad_cc + x) * ((c * by_v) * (c * by_w));  // (lncc.5)
    store(weights + x, p.ij <= e ? zero : g / c);
    store(weights + line + x, p.ii <= e ? zero : -g * by_v);
    if (Both) store(weights + 2 * line + x, p.jj <= e ? zero : -g * by_w);
    store(weights + 3 * line + x, p.mean_i), store(weights + 4 * line + x, p.mean_j);
  }
}

template <class T>
void weigh(const T* parts, const LnccAxis<T>& axis, T eps, const T* grad_cc, bool both, int64_t n, int64_t line, T* weights) {
  both ? weigh_line<true>(parts, axis, eps, grad_cc, n, line, weights) : weigh_line<false>(parts, axis, eps, grad_cc, n, line, weights);
}

// Sums over windows as they are seen from the pixels (i0, j0).
template <bool Both, class T>
struct Sums {
  Vec<T> a, b, b_j, di, dj;

  // A window, or a sum over windows that is seen from the pixels (i, j), has the weights `a`, `b`, `b_j` and sees (i0, j0) this far off.
  void add(Vec<T> more_a, Vec<T> more_b, Vec<T> more_b_j, Vec<T> i, Vec<T> j) {
    a += more_a, b += more_b;
    di += more_a * j, di += more_b * i;
    if (Both) b_j += more_b_j, dj += more_a * i, dj += more_b_j * j;
  }
};

template <bool Both, class T>
static inline void spread_line(const T* weights, int64_t taps, const T* pixels, int64_t n, int64_t line, T* sums) {
  using V = Vec<T>;
  const V zero = broadcast(T(0));
  for (int64_t x = 0; x < n; x += Simd<T>::width) {
    const V i = load(pixels + x), j = load(pixels + line + x);
    Sums<Both, T> s{zero, zero, zero, zero, zero};
    for (int64_t t = 0; t < taps; ++t) {
      const T* w = weights + x + t;
      s.add(load(w), load(w + line), Both ? load(w + 2 * line) : zero, i - load(w + 3 * line), j - load(w + 4 * line));
    }
    store(sums + x, s.a), store(sums + line + x, s.b), store(sums + 3 * line + x, s.di);
    if (Both) store(sums + 2 * line + x, s.b_j), store(sums + 4 * line + x, s.dj);
  }
}

template <class T>
void spread(const T* weights, int64_t taps, const T* pixels, bool both, int64_t n, int64_t line, T* sums) {
  both ? spread_line<true>(weights, taps, pixels, n, line, sums) : spread_line<false>(weights, taps, pixels, n, line, sums);
}

template <bool Both, class T>
static inline void gather_line(const T* const* sums, const T* const* pixels, int64_t taps, bool last, int64_t n, int64_t line, T* out) {
  using V = Vec<T>;
  const V zero = broadcast(T(0));
  const T* middle = pixels[taps / 2];
  for (int64_t x = 0; x < n; x += Simd<T>::width) {
    const V i = load(middle + x), j = load(middle + line + x);
    Sums<Both, T> s{zero, zero, zero, zero, zero};
    for (int64_t t = 0; t < taps; ++t) {
      const T *from = sums[t] + x, *seen = pixels[t] + x;
      s.add(load(from), load(from + line), Both ? load(from + 2 * line) : zero, i - load(seen), j - load(seen + line));
      s.di += load(from + 3 * line);
      if (Both) s.dj += load(from + 4 * line);
    }
    store(out + 3 * line + x, s.di);
    if (Both) store(out + 4 * line + x, s.dj);
    if (last) continue;
    store(out + x, s.a), store(out + line + x, s.b);
    if (Both) store(out + 2 * line + x, s.b_j);
  }
}

template <class T>
void gather(const T* const* sums, const T* const* pixels, int64_t taps, bool both, bool last, int64_t n, int64_t line, T* out) {
  both ? gather_line<true>(sums, pixels, taps, last, n, line, out) : gather_line<false>(sums, pixels, taps, last, n, line, out);
}

template <class T>
constexpr LnccKernels<T> table() {
  return {{load_line<F16, T>, load_line<BF16, T>, load_line<float, T>, load_line<double, T>},
          {store_line<F16, T>, store_line<BF16, T>, store_line<float, T>, store_line<double, T>},
          merge_slots<true, T>, merge_slots<false, T>, score<T>, weigh<T>, spread<T>, gather<T>};
}

}  // namespace

extern const LnccKernels<float> lncc_float = table<float>();
extern const LnccKernels<double> lncc_double = table<double>();

}  // namespace PIX2REP_ISA
}  // namespace pix2rep
