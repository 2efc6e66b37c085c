// Lines of lncc: columns run along the vectors, windows are summed tap by tap.
#include "lncc_kernels.h"

#include "convert.h"

namespace pix2rep {
namespace PIX2REP_ISA {

namespace {

template <class T>
struct Parts {
  Vec<T> mean_i, mean_j, ii, jj, ij;
};

// (lncc.8), where part(tap, quantity) reads.
template <bool Pixels, class T, class Part>
static inline Parts<T> merged(const LnccAxis<T>& axis, Part part) {
  using V = Vec<T>;
  V i = broadcast(T(0)), j = i, ii = i, jj = i, ij = i;
  for (int64_t t = 0; t < axis.taps; ++t) {
    const V di = part(t, 0) - i, dj = part(t, 1) - j;
    i += axis.step[t] * di, j += axis.step[t] * dj;
    ii += axis.weight[t] * (di * di), jj += axis.weight[t] * (dj * dj), ij += axis.weight[t] * (di * dj);
    if (!Pixels) ii += part(t, 2), jj += part(t, 3), ij += part(t, 4);
  }
  if (axis.outside > 0) {
    ii += axis.outside * (i * i), jj += axis.outside * (j * j), ij += axis.outside * (i * j);
    i *= axis.inside, j *= axis.inside;
  }
  return {i, j, ii, jj, ij};
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
  Parts<T> p = merged<false, T>(axis, [&](int64_t t, int q) { return load(parts + q * line + t); });
  // An infinite sum, of infinite pixels or of squares beyond the type, is lost: NaN, as the difference in (lncc.3) would be.
  const Vec<T> lost_i = p.ii - p.ii, lost_j = p.jj - p.jj;
  p.ii += lost_i, p.jj += lost_j, p.ij += lost_i + lost_j;
  return p;
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
    store(weights + 2 * line + x, p.mean_i), store(weights + 3 * line + x, p.mean_j);
    if (Both) store(weights + 4 * line + x, p.jj <= e ? zero : -g * by_w);
  }
}

template <class T>
void weigh(const T* parts, const LnccAxis<T>& axis, T eps, const T* grad_cc, bool both, int64_t n, int64_t line, T* weights) {
  both ? weigh_line<true>(parts, axis, eps, grad_cc, n, line, weights) : weigh_line<false>(parts, axis, eps, grad_cc, n, line, weights);
}

// Sums over windows, seen from (i0, j0).
template <bool Both, class T>
struct Sums {
  Vec<T> a, b, di, b_j, dj;

  // A window, or a sum of windows, with these weights, seen from where (i0, j0) is (i, j) away.
  void add(Vec<T> more_a, Vec<T> more_b, Vec<T> more_b_j, Vec<T> i, Vec<T> j) {
    a += more_a, b += more_b;
    di += more_a * j, di += more_b * i;
    if (Both) b_j += more_b_j, dj += more_a * i, dj += more_b_j * j;
  }
};

template <bool Both, class T>
static inline void spread_line(const T* weights, int64_t taps, int64_t n, int64_t line, T* sums) {
  using V = Vec<T>;
  const V zero = broadcast(T(0));
  for (int64_t x = 0; x < n; x += Simd<T>::width) {
    const T* middle = weights + x + taps / 2;
    const V i = load(middle + 2 * line), j = load(middle + 3 * line);
    Sums<Both, T> s{zero, zero, zero, zero, zero};
    for (int64_t t = 0; t < taps; ++t) {
      const T* w = weights + x + t;
      s.add(load(w), load(w + line), Both ? load(w + 4 * line) : zero, i - load(w + 2 * line), j - load(w + 3 * line));
    }
    store(sums + x, s.a), store(sums + line + x, s.b), store(sums + 2 * line + x, s.di), store(sums + 3 * line + x, i), store(sums + 4 * line + x, j);
    if (Both) store(sums + 5 * line + x, s.b_j), store(sums + 6 * line + x, s.dj);
  }
}

template <class T>
void spread(const T* weights, int64_t taps, bool both, int64_t n, int64_t line, T* sums) {
  both ? spread_line<true>(weights, taps, n, line, sums) : spread_line<false>(weights, taps, n, line, sums);
}

template <bool Both, class T>
static inline void gather_line(const T* const* sums, int64_t taps, const T* pixels, int64_t n, int64_t line, T* out) {
  using V = Vec<T>;
  const V zero = broadcast(T(0));
  const T* from = pixels ? pixels : sums[taps / 2] + 3 * line;
  for (int64_t x = 0; x < n; x += Simd<T>::width) {
    const V i = load(from + x), j = load(from + line + x);
    Sums<Both, T> s{zero, zero, zero, zero, zero};
    for (int64_t t = 0; t < taps; ++t) {
      const T* w = sums[t] + x;
      s.add(load(w), load(w + line), Both ? load(w + 5 * line) : zero, i - load(w + 3 * line), j - load(w + 4 * line));
      s.di += load(w + 2 * line);
      if (Both) s.dj += load(w + 6 * line);
    }
    store(out + 2 * line + x, s.di);
    if (Both) store(out + 6 * line + x, s.dj);
    if (pixels) continue;
    store(out + x, s.a), store(out + line + x, s.b), store(out + 3 * line + x, i), store(out + 4 * line + x, j);
    if (Both) store(out + 5 * line + x, s.b_j);
  }
}

template <class T>
void gather(const T* const* sums, int64_t taps, const T* pixels, bool both, int64_t n, int64_t line, T* out) {
  both ? gather_line<true>(sums, taps, pixels, n, line, out) : gather_line<false>(sums, taps, pixels, n, line, out);
}

template <class T>
constexpr LnccKernels<T> table() {
  return {lines<T>(), merge_slots<true, T>, merge_slots<false, T>, score<T>, weigh<T>, spread<T>, gather<T>};
}

}  // namespace

extern const LnccKernels<float> lncc_float = table<float>();
extern const LnccKernels<double> lncc_double = table<double>();

}  // namespace PIX2REP_ISA
}  // namespace pix2rep
