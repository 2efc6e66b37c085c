// Entropy of softmax and its gradient on planes of pixels in cache; the gradient keeps what it needs twice of a few vectors of pixels.
#include "entropy_kernels.h"

#include "simd.h"

namespace pix2rep {
namespace PIX2REP_ISA {

namespace {

template <class T>
constexpr int W = Simd<T>::width;
// Vectors side by side: 32 registers hold what 4 share, 16 what 2 do.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int U = 4;
#else
constexpr int U = 2;
#endif
constexpr double kLogOf2 = 0.6931471805599453;

// log(x) of normal x > 0 as n log 2 + 2 atanh((m - 1) / (m + 1)), m in [2^-1/2, 2^1/2): the series ends 5e-11 below, and near 1 no digit is lost.
static inline Vec<float> logarithm(Vec<float> x) {
  using I = typename Simd<float>::I;
  const I bits = (I)x, n = (bits - 0x3f3504f3) >> 23;
  const Vec<float> m = (Vec<float>)(bits - (n << 23)), f = m - 1.0f, z = f / (m + 1.0f), w = z * z;
  const Vec<float> series = w * (1 / 3.0f + w * (1 / 5.0f + w * (1 / 7.0f + w * (1 / 9.0f + w * (1 / 11.0f)))));
  return __builtin_convertvector(n, Vec<float>) * float(kLogOf2) + 2.0f * (z + z * series);
}

static inline Vec<double> logarithm(Vec<double> x) {
  for (int i = 0; i < W<double>; ++i) x[i] = __builtin_log(x[i]);
  return x;
}

// log2 of a probability, up to the pixel's constant. It ends where 2^t has long been 0, so that a forbidden cluster has 0 t = 0; NaN passes.
template <class T>
static inline Vec<T> exponent(const T* x, Vec<T> most) {
  const Vec<T> t = (load(x) - most) * T(1.4426950408889634);
  return t < T(-2000) ? broadcast(T(-2000)) : t;
}

// What the clusters of U vectors of pixels share: Z = sum 2^t and <2^t, t>. With `kept` each t takes its logit's place and 2^t goes to e [clusters][U W].
template <class T>
struct Sums {
  Vec<T> z[U] = {}, dot[U] = {};

  template <bool kept, class X>
  static Sums of(X* x, int64_t ld, int64_t clusters, T* e) {
    Sums s;
    Vec<T> most[U];
    for (int u = 0; u < U; ++u) most[u] = broadcast(-T(__builtin_inf()));
    for (int64_t k = 0; k < clusters; ++k)
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) {
        const Vec<T> v = load(x + k * ld + u * W<T>);
        most[u] = v > most[u] ? v : most[u];
      }
    for (int64_t k = 0; k < clusters; ++k)
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) {
        const Vec<T> t = exponent(x + k * ld + u * W<T>, most[u]), power = exp2(t);
        s.z[u] += power, s.dot[u] += power * t;
        if constexpr (kept) store(x + k * ld + u * W<T>, t), store(e + (k * U + u) * W<T>, power);
      }
    return s;
  }
};

template <class T>
void entropy(const T* x, int64_t ld, int64_t clusters, int64_t count, const T* valid, T* h) {
  for (int64_t p = 0; p < count; p += U * W<T>) {
    const Sums<T> s = Sums<T>::template of<false>(x + p, ld, clusters, nullptr);
    for (int u = 0; u < U; ++u) {
      const Vec<T> found = logarithm(s.z[u]) - T(kLogOf2) * s.dot[u] / s.z[u];
      store(h + p + u * W<T>, load(valid + p + u * W<T>) != T(0) ? found : Vec<T>{});
    }
  }
}

template <class T>
void gradient(T* x, int64_t ld, int64_t clusters, int64_t count, const T* g, T* e) {
  for (int64_t p = 0; p < count; p += U * W<T>) {
    const Sums<T> s = Sums<T>::template of<true>(x + p, ld, clusters, e);
    Vec<T> scale[U], mean[U];
    for (int u = 0; u < U; ++u) scale[u] = -T(kLogOf2) * load(g + p + u * W<T>) / s.z[u], mean[u] = s.dot[u] / s.z[u];
    for (int64_t k = 0; k < clusters; ++k)
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) {
        T* at = x + k * ld + p + u * W<T>;
        store(at, scale[u] * load(e + (k * U + u) * W<T>) * (load(at) - mean[u]));
      }
  }
}

template <class T>
constexpr EntropyKernels<T> table() {
  static_assert(kJointStep % (U * W<T>) == 0);
  return {entropy<T>, gradient<T>};
}

}  // namespace

extern const EntropyKernels<float> entropy_float = table<float>();
extern const EntropyKernels<double> entropy_double = table<double>();

}  // namespace PIX2REP_ISA
}  // namespace pix2rep
