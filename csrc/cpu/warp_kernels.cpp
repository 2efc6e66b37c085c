// Gathers, scatters and transposes of warp: channels run along the vectors, except from planes, where points do.
#include "warp_kernels.h"

#include <cstring>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace pix2rep {
namespace PIX2REP_ISA {

#include "simd.h"

namespace {

// Storage to float and back, by bits so that every loop over them vectorises; rounding is to nearest even.
static inline float widen(float x) { return x; }
static inline double widen(double x) { return x; }

static inline float widen(BF16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

static inline float widen(F16 x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
  float out;
  std::memcpy(&out, &magnitude, 4);
  out *= 0x1p112f;  // moves the exponent's bias, exact for denormals too
  uint32_t bits;
  std::memcpy(&bits, &out, 4);
  bits |= sign | ((x.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u);
  std::memcpy(&out, &bits, 4);
  return out;
}

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

// f(c, vectors, n): whole groups of 4 and 1 vectors with n = 0, then the last n < width values.
template <class T, class F>
static inline void sweep(int64_t count, const F& f) {
  constexpr int64_t W = Simd<T>::width;
  int64_t c = 0;
  for (; c + 4 * W <= count; c += 4 * W) f(c, std::integral_constant<int, 4>{}, std::false_type{});
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

// (warp.4)
template <class T, class S>
static inline void finish(const T* f, int64_t channels, S* row, T* norm) {
  T scale = 1;
  if (norm) {
    *norm = T(std::is_same_v<T, float> ? __builtin_sqrtf(float(inner<T, T, T>(f, f, channels))) : __builtin_sqrt(inner<T, T, T>(f, f, channels)));
    scale = 1 / (*norm < T(kEpsilon) ? T(kEpsilon) : *norm);
  }
  if (norm || static_cast<const void*>(f) != row) scaled(f, scale, channels, row);
}

template <class X, class S>
void gather(const Chunk<Compute<S>>& chunk, const X* image, int64_t stride, int64_t channels, S* rows, Compute<S>* norms, Compute<S>* buffer) {
  using T = Compute<S>;
  for (int i = 0; i < chunk.count; ++i) {
    const X* from[kMaxTaps];
    T w[kMaxTaps];
    int taps = 0;
    for (int k = 0; k < chunk.taps; ++k) {
      from[taps] = image + chunk.index[k * kChunk + i] * stride;
      w[taps] = chunk.weight[k * kChunk + i];
      taps += w[taps] != 0;
    }
    const int64_t r = chunk.row(i);
    S* row = rows + r * channels;
    T* f = buffer;
    if constexpr (std::is_same_v<S, T>) f = row;
    weighted_sum(from, w, taps, channels, f);
    finish(f, channels, row, norms ? norms + r : nullptr);
  }
}

// Tiles of width x width in registers: stage h exchanges the off-diagonal quarters of size h.
template <class T, int Half, size_t... Lane>
static inline void exchange(Vec<T>& a, Vec<T>& b, std::index_sequence<Lane...>) {
  constexpr int W = Simd<T>::width;
  const Vec<T> low = __builtin_shufflevector(a, b, (Lane & Half ? int(Lane) - Half + W : int(Lane))...);
  const Vec<T> high = __builtin_shufflevector(a, b, (Lane & Half ? int(Lane) + W : int(Lane) + Half)...);
  a = low, b = high;
}

template <class T, int Half>
static inline void transpose_stages(Vec<T> (&tile)[Simd<T>::width]) {
  constexpr int W = Simd<T>::width;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & Half)) exchange<T, Half>(tile[i], tile[i + Half], std::make_index_sequence<W>{});
  if constexpr (Half > 1) transpose_stages<T, Half / 2>(tile);
}

template <class A, class B>
void transpose(const A* from, int64_t from_stride, int64_t rows, int64_t columns, B* to, int64_t to_stride) {
  using T = Compute<A>;
  constexpr int W = Simd<T>::width;
  for (int64_t c = 0; c < columns; c += W)
    for (int64_t r = 0; r < rows; r += W) {
      const int64_t nr = rows - r < W ? rows - r : W, nc = columns - c < W ? columns - c : W;
      Vec<T> tile[W] = {};
      if (nr == W && nc == W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) tile[i] = read(from + (r + i) * from_stride + c);
        transpose_stages<T, W / 2>(tile);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) write(to + (c + i) * to_stride + r, tile[i]);
      } else {
        for (int64_t i = 0; i < nr; ++i) tile[i] = nc == W ? read(from + (r + i) * from_stride + c) : read_some(from + (r + i) * from_stride + c, nc);
        transpose_stages<T, W / 2>(tile);
        for (int64_t i = 0; i < nc; ++i) {
          B* p = to + (c + i) * to_stride + r;
          nr == W ? write(p, tile[i]) : write_some(p, tile[i], nr);
        }
      }
    }
}

template <class S>
void gather_planes(const Chunk<Compute<S>>& chunk, const S* image, int64_t channel_stride, int64_t pixel_stride, int64_t channels, S* rows,
                   Compute<S>* norms, Compute<S>* buffer) {
  using T = Compute<S>;
  T* by_point = buffer + kChunk * channels;
  for (int64_t c = 0; c < channels; ++c) {
    const S* plane = image + c * channel_stride;
    T sum[kChunk] = {};
    for (int k = 0; k < chunk.taps; ++k) {
      const int32_t* index = chunk.index + k * kChunk;
      const T* w = chunk.weight + k * kChunk;
      for (int i = 0; i < kChunk; ++i) {
        const T term = w[i] * widen(plane[index[i] * pixel_stride]);
        sum[i] += w[i] != 0 ? term : T(0);
      }
    }
    std::memcpy(buffer + c * kChunk, sum, sizeof(sum));
  }
  transpose(buffer, kChunk, channels, chunk.count, by_point, channels);
  for (int i = 0; i < chunk.count; ++i) {
    const int64_t r = chunk.row(i);
    finish(by_point + i * channels, channels, rows + r * channels, norms ? norms + r : nullptr);
  }
}

template <class S>
void dots(const Chunk<Compute<S>>& chunk, const S* rows, const S* grad_rows, int64_t channels, Compute<S>* dot) {
  for (int i = 0; i < chunk.count; ++i)
    dot[i] = inner<S, S, Compute<S>>(rows + chunk.row(i) * channels, grad_rows + chunk.row(i) * channels, channels);
}

constexpr int kAhead = 8;  // points whose rows are asked for early

// (warp.5) of `width` channels of one point.
template <class S, class T>
static inline void row_gradient(const S* y, const S* g, bool normalize, T norm, T dot, int64_t width, T* df) {
  if (!normalize) return scaled(g, T(1), width, df);
  constexpr int W = Simd<T>::width;
  const T scale = 1 / (norm < T(kEpsilon) ? T(kEpsilon) : norm), along = norm < T(kEpsilon) ? T(0) : dot;
  sweep<T>(width, [&](int64_t c, auto vectors, auto partial) {
#pragma GCC unroll 4
    for (int v = 0; v < decltype(vectors)::value; ++v)
      if (partial)
        write_some(df + c, (read_some(g + c, width - c) - along * read_some(y + c, width - c)) * scale, width - c);
      else
        write(df + c + v * W, (read(g + c + v * W) - along * read(y + c + v * W)) * scale);
  });
}

template <class S>
static inline void row_gradient(const Chunk<Compute<S>>& chunk, int i, const S* rows, const S* grad_rows, const Compute<S>* norms,
                                const Compute<S>* dot, int64_t channels, int64_t begin, int64_t width, Compute<S>* df) {
  const int64_t r = chunk.row(i), at = r * channels + begin;
  // A block of channels is a piece of each row, which hardware does not foresee.
  const int64_t later = chunk.row(i + kAhead < chunk.count ? i + kAhead : i) * channels + begin;
  for (int64_t c = 0; c < width; c += int64_t(64 / sizeof(S))) {
    __builtin_prefetch(grad_rows + later + c);
    if (norms) __builtin_prefetch(rows + later + c);
  }
  row_gradient(rows + at, grad_rows + at, norms != nullptr, norms ? norms[r] : 1, norms ? dot[i] : 0, width, df);
}

template <class S>
void scatter(const Chunk<Compute<S>>& chunk, const S* rows, const S* grad_rows, const Compute<S>* norms, const Compute<S>* dot, int64_t channels,
             int64_t begin, int64_t width, Compute<S>* image, int64_t stride, Compute<S>* df) {
  using T = Compute<S>;
  constexpr int W = Simd<T>::width;
  for (int i = 0; i < chunk.count; ++i) {
    row_gradient(chunk, i, rows, grad_rows, norms, dot, channels, begin, width, df);
    for (int k = 0; k < chunk.taps; ++k) {
      const T w = chunk.weight[k * kChunk + i];
      if (w == 0) continue;
      T* to = image + chunk.index[k * kChunk + i] * stride;
      sweep<T>(width, [&](int64_t c, auto vectors, auto partial) {
#pragma GCC unroll 4
        for (int v = 0; v < decltype(vectors)::value; ++v)
          if (partial)
            write_some(to + c, read_some(to + c, width - c) + w * read_some(df + c, width - c), width - c);
          else
            store(to + c + v * W, load(to + c + v * W) + w * load(df + c + v * W));
      });
    }
  }
}

template <class S>
void scatter_planes(const Chunk<Compute<S>>& chunk, const S* rows, const S* grad_rows, const Compute<S>* norms, const Compute<S>* dot,
                    int64_t channels, int64_t begin, int64_t width, Compute<S>* planes, int64_t stride, Compute<S>* df) {
  using T = Compute<S>;
  for (int i = 0; i < chunk.count; ++i) {
    row_gradient(chunk, i, rows, grad_rows, norms, dot, channels, begin, width, df);
    for (int64_t c = 0; c < width; ++c)
      for (int k = 0; k < chunk.taps; ++k) {
        const T w = chunk.weight[k * kChunk + i];
        if (w != 0) planes[c * stride + chunk.index[k * kChunk + i]] += w * df[c];
      }
  }
}

template <class S>
void convert(const Compute<S>* from, int64_t count, S* to) {
  scaled(from, Compute<S>(1), count, to);
}

template <class S>
constexpr WarpKernels<S> table() {
  using T = Compute<S>;
  return {gather<S, S>, gather<T, S>, gather_planes<S>, dots<S>, scatter<S>, scatter_planes<S>, transpose<S, T>, transpose<T, S>, convert<S>};
}

}  // namespace

extern const WarpKernels<float> warp_float = table<float>();
extern const WarpKernels<double> warp_double = table<double>();
extern const WarpKernels<F16> warp_f16 = table<F16>();
extern const WarpKernels<BF16> warp_bf16 = table<BF16>();

}  // namespace PIX2REP_ISA
}  // namespace pix2rep
