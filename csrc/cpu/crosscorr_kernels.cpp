// Register tiles of crosscorr: both products keep 8 x 3 vectors of sums in registers (4 x 3 where there are 16), fed by one broadcast a row of the tile.
#include "crosscorr_kernels.h"

#include "convert.h"

namespace pix2rep {
namespace PIX2REP_ISA {

namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTile = 8;
#else
constexpr int kTile = 4;
#endif
constexpr int kGroup = 8;      // rows
constexpr int kFeatures = 16;  // a multiple of every tile and vector
constexpr int kVectors = 3;

// Vectors of the next panel of `left`: three, but two and two rather than three and one, whose sums are too few to hide the latency of an addition.
static inline int64_t panel_vectors(int64_t left) { return left == 4 ? 2 : left < kVectors ? left : kVectors; }

// f(constant<vectors>, first vector) over the panels of `vectors` vectors.
template <int C>
struct Constant {
  static constexpr int value = C;
};

template <class F>
static inline void for_panels(int64_t vectors, const F& f) {
  for (int64_t first = 0; first < vectors;) {
    const int64_t count = panel_vectors(vectors - first);
    if (count == 3)
      f(Constant<3>{}, first);
    else if (count == 2)
      f(Constant<2>{}, first);
    else
      f(Constant<1>{}, first);
    first += count;
  }
}

// One panel: `vectors` of each row of the group, at the address of its first.
template <class T, bool Weighted, bool Scaled>
static inline void pack(const T* const* rows, const T* weight, const T* pivot, int64_t first, int64_t vectors, T* __restrict out, T* sum, T* square) {
  constexpr int W = Simd<T>::width;
  for (int64_t f = 0; f < vectors; ++f) {
    const int64_t at = first + f * W;
    const Vec<T> c = load(pivot + at);
    Vec<T> s = {}, q = {};  // short chains of additions round less
#pragma GCC unroll 8
    for (int r = 0; r < kGroup; ++r) {
      const Vec<T> u = load(rows[r] + at) - c;
      const Vec<T> wu = Weighted ? u * weight[r] : u;
      s += wu;
      q += wu * u;
      store(out + (r * vectors + f) * W, Scaled ? wu : u);
    }
    store(sum + at, load(sum + at) + s), store(square + at, load(square + at) + q);
  }
}

template <class T>
void pack_x(const T* const* rows, const T* weight, const T* pivot, int64_t k, int64_t ld, T* panels, T* sum, T* square) {
  constexpr int vectors = kFeatures / Simd<T>::width;
  for (int64_t first = 0; first < ld; first += kFeatures) {
    T* out = panels + first * kChunkRows + k * kFeatures;
    weight ? pack<T, true, true>(rows, weight, pivot, first, vectors, out, sum, square)
           : pack<T, false, false>(rows, weight, pivot, first, vectors, out, sum, square);
  }
}

template <class T>
void pack_y(const T* const* rows, const T* weight, const T* pivot, int64_t k, int64_t ld, T* panels, T* sum, T* square) {
  constexpr int W = Simd<T>::width;
  for_panels(ld / W, [&](auto count, int64_t first) {
    constexpr int C = decltype(count)::value;
    T* out = panels + first * W * kChunkRows + k * C * W;
    weight ? pack<T, true, false>(rows, weight, pivot, first * W, C, out, sum, square)
           : pack<T, false, false>(rows, weight, pivot, first * W, C, out, sum, square);
  });
}

// sum[r][c] of kTile broadcasts from `left` and C vectors from `right`, over `depth` steps; `by_row`: left steps are contiguous within a row.
template <class T, int C>
struct Tile {
  static constexpr int W = Simd<T>::width;
  Vec<T> sum[kTile][C];

  template <class At>
  inline __attribute__((always_inline)) void run(int64_t depth, const T* __restrict right, const At& left) {
    for (int64_t k = 0; k < depth; ++k, right += C * W) {
      Vec<T> y[C];
#pragma GCC unroll 3
      for (int c = 0; c < C; ++c) y[c] = load(right + c * W);
#pragma GCC unroll 8
      for (int r = 0; r < kTile; ++r) {
        const Vec<T> x = broadcast(left(r, k));
#pragma GCC unroll 3
        for (int c = 0; c < C; ++c) sum[r][c] += x * y[c];
      }
    }
  }
};

template <class T, int C>
static inline void product_tile(const T* __restrict x, const T* __restrict y, int64_t depth, int64_t ld, bool add, T* __restrict out) {
  constexpr int W = Simd<T>::width;
  Tile<T, C> tile = {};
  tile.run(depth, y, [&](int r, int64_t k) { return x[k * kFeatures + r]; });
#pragma GCC unroll 8
  for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 3
    for (int c = 0; c < C; ++c) {
      T* to = out + r * ld + c * W;
      store(to, add ? load(to) + tile.sum[r][c] : tile.sum[r][c]);
    }
}

template <class T>
void product(const T* x, const T* y, int64_t depth, int64_t ld_x, int64_t ld_y, bool add, T* out) {
  constexpr int W = Simd<T>::width;
  for_panels(ld_y / W, [&](auto count, int64_t first) {
    for (int64_t i = 0; i < ld_x; i += kTile)
      product_tile<T, decltype(count)::value>(x + i / kFeatures * kFeatures * kChunkRows + i % kFeatures, y + first * W * kChunkRows, depth, ld_y,
                                              add, out + i * ld_y + first * W);
  });
}

template <class T>
void shift(const T* const* rows, const T* pivot, int64_t ld, T* to) {
  for (int r = 0; r < kGroup; ++r)
    for (int64_t i = 0; i < ld; i += Simd<T>::width) store(to + r * ld + i, load(rows[r] + i) - load(pivot + i));
}

template <class T>
void pack_gradient(const T* g, int64_t row_stride, int64_t column_stride, int64_t d, int64_t n, int64_t ld, T* panels) {
  constexpr int W = Simd<T>::width;
  for_panels(ld / W, [&](auto count, int64_t first) {
    constexpr int columns = decltype(count)::value * W;
    T* out = panels + first * W * d;
    for (int64_t k = 0; k < d; ++k)
      for (int c = 0; c < columns; ++c) {
        const int64_t j = first * W + c;
        out[k * columns + c] = j < n ? g[k * row_stride + j * column_stride] : T(0);
      }
  });
}

template <class T, int C>
static inline void gradient_tile(const T* __restrict own, const T* __restrict other, const T* __restrict panel, const T* constant, const T* slope,
                                 const T* weight, int64_t d, int64_t own_ld, int64_t other_ld, T* __restrict out) {
  constexpr int W = Simd<T>::width;
  Tile<T, C> tile;
#pragma GCC unroll 8
  for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 3
    for (int c = 0; c < C; ++c) tile.sum[r][c] = load(constant + c * W) + load(slope + c * W) * load(own + r * own_ld + c * W);
  tile.run(d, panel, [&](int r, int64_t k) { return other[r * other_ld + k]; });
#pragma GCC unroll 8
  for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 3
    for (int c = 0; c < C; ++c) {
      const Vec<T> g = tile.sum[r][c];
      store(out + r * own_ld + c * W, !weight ? g : weight[r] == 0 ? Vec<T>{} : g * weight[r]);
    }
}

template <class T>
void gradient(const T* own, const T* other, const T* panels, const T* constant, const T* slope, const T* weight, int64_t rows, int64_t d,
              int64_t own_ld, int64_t other_ld, T* out) {
  constexpr int W = Simd<T>::width;
  for_panels(own_ld / W, [&](auto count, int64_t first) {
    const int64_t at = first * W;
    for (int64_t r = 0; r < rows; r += kTile)
      gradient_tile<T, decltype(count)::value>(own + r * own_ld + at, other + r * other_ld, panels + at * d, constant + at, slope + at,
                                               weight ? weight + r : nullptr, d, own_ld, other_ld, out + r * own_ld + at);
  });
}

template <class T>
constexpr CrosscorrKernels<T> table() {
  return {lines<T>(), kGroup, kFeatures, pack_x<T>, pack_y<T>, product<T>, shift<T>, pack_gradient<T>, gradient<T>};
}

}  // namespace

extern const CrosscorrKernels<float> crosscorr_float = table<float>();
extern const CrosscorrKernels<double> crosscorr_double = table<double>();

}  // namespace PIX2REP_ISA
}  // namespace pix2rep
