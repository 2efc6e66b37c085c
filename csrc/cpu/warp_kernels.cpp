// Gathers, scatters and transposes of warp: channels run along the vectors, except from planes, where points do.
#include "warp_kernels.h"

#include "warp_rows.h"

namespace pix2rep {
namespace PIX2REP_ISA {

namespace {

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

constexpr int kAhead = 8;  // points whose memory is asked for early

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
        transpose_tile<T>(tile);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) write(to + (c + i) * to_stride + r, tile[i]);
      } else {
        for (int64_t i = 0; i < nr; ++i) tile[i] = nc == W ? read(from + (r + i) * from_stride + c) : read_some(from + (r + i) * from_stride + c, nc);
        transpose_tile<T>(tile);
        for (int64_t i = 0; i < nc; ++i) {
          B* p = to + (c + i) * to_stride + r;
          nr == W ? write(p, tile[i]) : write_some(p, tile[i], nr);
        }
      }
    }
}

// A row that is read at once needs no storage type: S is the compute type of X here.
template <class X>
void gather_wide(const Chunk<Compute<X>>& chunk, const X* image, int64_t stride, int64_t channels, Compute<X>* rows) {
  gather<X, Compute<X>>(chunk, image, stride, channels, rows, nullptr, nullptr);
}

template <class S>
void gather_columns(const Chunk<Compute<S>>& chunk, const S* image, int64_t channel_stride, int64_t pixel_stride, int64_t channels, Compute<S>* columns) {
  using T = Compute<S>;
  constexpr int W = Simd<T>::width;
  for (int64_t c = 0; c < channels; ++c) {
    const S* plane = image + c * channel_stride;
    Vec<T> sum[kChunk / W] = {};
    for (int k = 0; k < chunk.taps; ++k) {
      T value[kChunk];
      for (int i = 0; i < kChunk; ++i) {
        const S* from = plane + chunk.index[k * kChunk + i] * pixel_stride;
        if (!(k & 1)) __builtin_prefetch(from + channel_stride);  // the next channel; its odd taps are neighbours
        value[i] = widen(*from);
      }
      for (int v = 0; v < kChunk / W; ++v) {
        const Vec<T> w = load(chunk.weight + k * kChunk + v * W), more = sum[v] + w * load(value + v * W);
        sum[v] = w != 0 ? more : sum[v];
      }
    }
    for (int v = 0; v < kChunk / W; ++v) store(columns + c * kChunk + v * W, sum[v]);
  }
}

template <class S>
void gather_planes(const Chunk<Compute<S>>& chunk, const S* image, int64_t channel_stride, int64_t pixel_stride, int64_t channels, S* rows,
                   Compute<S>* norms, Compute<S>* buffer) {
  using T = Compute<S>;
  T* by_point = buffer + kChunk * channels;
  gather_columns(chunk, image, channel_stride, pixel_stride, channels, buffer);
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
  for (int i = 0; i < chunk.count; ++i) {
    const T* from = df;
    if (std::is_same_v<S, T> && !norms)
      from = reinterpret_cast<const T*>(grad_rows + chunk.row(i) * channels + begin);
    else
      row_gradient(chunk, i, rows, grad_rows, norms, dot, channels, begin, width, df);
    for (int k = 0; k < chunk.taps; ++k) {
      const T w = chunk.weight[k * kChunk + i];
      if (w != 0) add_scaled(from, w, width, image + chunk.index[k * kChunk + i] * stride);
    }
  }
}

// Neighbouring points add to the same pixel, one after the other: a few channels at a time keep the processor busy meanwhile.
template <int Channels, class T>
static inline void scatter_some(const Chunk<T>& chunk, const T* columns, T* image, int64_t channel_stride, int64_t pixel_stride) {
  for (int i = 0; i < chunk.count; ++i) {
    const int later = i + kAhead < chunk.count ? i + kAhead : i;
    for (int k = 0; k < chunk.taps; ++k) {
      if (!(k & 1))
        for (int c = 0; c < Channels; ++c) __builtin_prefetch(image + chunk.index[k * kChunk + later] * pixel_stride + c * channel_stride);
      const T w = chunk.weight[k * kChunk + i];
      if (w == 0) continue;
      T* to = image + chunk.index[k * kChunk + i] * pixel_stride;
#pragma GCC unroll 4
      for (int c = 0; c < Channels; ++c) to[c * channel_stride] += w * columns[c * kChunk + i];
    }
  }
}

template <class T>
void scatter_columns(const Chunk<T>& chunk, const T* columns, int64_t width, T* image, int64_t channel_stride, int64_t pixel_stride) {
  int64_t c = 0;
  for (; c + 4 <= width; c += 4) scatter_some<4>(chunk, columns + c * kChunk, image + c * channel_stride, channel_stride, pixel_stride);
  for (; c < width; ++c) scatter_some<1>(chunk, columns + c * kChunk, image + c * channel_stride, channel_stride, pixel_stride);
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
  return {gather<S, S>,      gather<T, S>,    gather_wide<S>,     gather_planes<S>, gather_columns<S>, dots<S>, scatter<S>,
          scatter_planes<S>, scatter_columns<T>, transpose<S, T>, transpose<T, S>,  convert<S>};
}

}  // namespace

extern const WarpKernels<float> warp_float = table<float>();
extern const WarpKernels<double> warp_double = table<double>();
extern const WarpKernels<F16> warp_f16 = table<F16>();
extern const WarpKernels<BF16> warp_bf16 = table<BF16>();

}  // namespace PIX2REP_ISA
}  // namespace pix2rep
