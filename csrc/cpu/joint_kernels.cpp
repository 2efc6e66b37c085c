// Softmax, K x K products and box sums of joint on planes of pixels in cache.
#include "joint_kernels.h"

#include <cstring>
#include <utility>

#include "simd.h"

namespace pix2rep {
namespace PIX2REP_ISA {

namespace {

// Register tiles: 32 registers hold 5 x 5 or 6 x 4 sums beside their operands, 16 hold 3 x 4.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kGramRows = 5, kGramColumns = 5, kMixRows = 6;
#else
constexpr int kGramRows = 3, kGramColumns = 4, kMixRows = 3;
#endif
constexpr int kMixVectors = 4;

template <class T>
constexpr int W = Simd<T>::width;

template <class T>
void softmax(T* x, int64_t ld, int64_t clusters, int64_t count) {
  constexpr int U = 2;  // vectors side by side
  for (int64_t p = 0; p < count; p += U * W<T>) {
    Vec<T> most[U], sum[U] = {};
    for (int u = 0; u < U; ++u) most[u] = broadcast(-T(__builtin_inf()));
    for (int64_t k = 0; k < clusters; ++k)
#pragma GCC unroll 2
      for (int u = 0; u < U; ++u) {
        const Vec<T> v = load(x + k * ld + p + u * W<T>);
        most[u] = v > most[u] ? v : most[u];
      }
    for (int64_t k = 0; k < clusters; ++k)
#pragma GCC unroll 2
      for (int u = 0; u < U; ++u) {
        T* at = x + k * ld + p + u * W<T>;
        Vec<T> t = (load(at) - most[u]) * T(1.4426950408889634);
        t = t < T(-2000) ? broadcast(T(-2000)) : t;  // in this order NaN passes, and -inf gives 0
        const Vec<T> e = exp2(t);
        store(at, e);
        sum[u] += e;
      }
    for (int u = 0; u < U; ++u) sum[u] = T(1) / sum[u];
    for (int64_t k = 0; k < clusters; ++k)
#pragma GCC unroll 2
      for (int u = 0; u < U; ++u) {
        T* at = x + k * ld + p + u * W<T>;
        store(at, load(at) * sum[u]);
      }
  }
}

template <class T>
void keep(T* x, int64_t ld, int64_t clusters, int64_t count, const T* valid) {
  for (int64_t k = 0; k < clusters; ++k)
    for (int64_t p = 0; p < count; p += W<T>) {
      T* at = x + k * ld + p;
      store(at, load(valid + p) != T(0) ? load(at) : Vec<T>{});
    }
}

// Adds a vector to 16 bytes of sums.
template <class T>
static inline void fold(Vec<T> v, T* sums) {
  typedef T Lanes __attribute__((vector_size(16)));
  Lanes part[sizeof(v) / 16], total;
  std::memcpy(part, &v, sizeof(v));
  std::memcpy(&total, sums, 16);
  for (const Lanes& lanes : part) total += lanes;
  std::memcpy(sums, &total, 16);
}

template <class T, int R, int C>
static void gram_tile(const T* __restrict a, int64_t lda, const T* __restrict b, int64_t ldb, int64_t count, T* __restrict sums, int64_t row) {
  Vec<T> sum[R][C] = {};
  for (int64_t p = 0; p < count; p += W<T>) {
    Vec<T> y[C];
#pragma GCC unroll 5
    for (int c = 0; c < C; ++c) y[c] = load(b + c * ldb + p);
#pragma GCC unroll 5
    for (int r = 0; r < R; ++r) {
      const Vec<T> x = load(a + r * lda + p);
#pragma GCC unroll 5
      for (int c = 0; c < C; ++c) sum[r][c] += x * y[c];
    }
  }
  constexpr int lanes = 16 / sizeof(T);
#pragma GCC unroll 5
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 5
    for (int c = 0; c < C; ++c) fold<T>(sum[r][c], sums + r * row + c * lanes);
}

template <class T>
using GramTile = void (*)(const T*, int64_t, const T*, int64_t, int64_t, T*, int64_t);

template <class T, int... I>
static GramTile<T> gram_tile_of(int rows, int columns, std::integer_sequence<int, I...>) {
  static constexpr GramTile<T> table[] = {gram_tile<T, I / kGramColumns + 1, I % kGramColumns + 1>...};
  return table[(rows - 1) * kGramColumns + columns - 1];
}

template <class T>
void gram(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t clusters, int64_t count, T* sums) {
  constexpr int64_t lanes = 16 / sizeof(T);
  for (int64_t k = 0; k < clusters; k += kGramRows)
    for (int64_t l = 0; l < clusters; l += kGramColumns) {
      const int rows = int(clusters - k < kGramRows ? clusters - k : kGramRows), columns = int(clusters - l < kGramColumns ? clusters - l : kGramColumns);
      const auto tile = gram_tile_of<T>(rows, columns, std::make_integer_sequence<int, kGramRows * kGramColumns>{});
      tile(a + k * lda, lda, b + l * ldb, ldb, count, sums + (k * clusters + l) * lanes, clusters * lanes);
    }
}

template <class T, int R>
static void mix_tile(const T* __restrict g, const T* __restrict x, int64_t ldx, int64_t clusters, T* __restrict out, int64_t ldo, bool add) {
  Vec<T> sum[R][kMixVectors] = {};
  for (int64_t l = 0; l < clusters; ++l) {
    Vec<T> y[kMixVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kMixVectors; ++v) y[v] = load(x + l * ldx + v * W<T>);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const Vec<T> weight = broadcast(g[r * clusters + l]);
#pragma GCC unroll 4
      for (int v = 0; v < kMixVectors; ++v) sum[r][v] += weight * y[v];
    }
  }
  if (add)  // at the end: over many displacements one chain of sums would lose digits
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kMixVectors; ++v) sum[r][v] += load(out + r * ldo + v * W<T>);
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kMixVectors; ++v) store(out + r * ldo + v * W<T>, sum[r][v]);
}

template <class T>
using MixTile = void (*)(const T*, const T*, int64_t, int64_t, T*, int64_t, bool);

template <class T, int... I>
static MixTile<T> mix_tile_of(int64_t rows, std::integer_sequence<int, I...>) {
  static constexpr MixTile<T> table[] = {mix_tile<T, I + 1>...};
  return table[rows - 1];
}

template <class T>
void mix(const T* g, const T* x, int64_t ldx, int64_t clusters, int64_t count, T* out, int64_t ldo, bool add) {
  for (int64_t p = 0; p < count; p += kMixVectors * W<T>)
    for (int64_t k = 0; k < clusters; k += kMixRows) {
      const auto tile = mix_tile_of<T>(clusters - k < kMixRows ? clusters - k : kMixRows, std::make_integer_sequence<int, kMixRows>{});
      tile(g + k * clusters, x + p, ldx, clusters, out + k * ldo + p, ldo, add);
    }
}

template <class T>
void softmax_gradient(const T* p, int64_t ldp, T* g, int64_t ldg, int64_t clusters, int64_t count) {
  constexpr int U = 2;
  for (int64_t i = 0; i < count; i += U * W<T>) {
    Vec<T> dot[U] = {};
    for (int64_t k = 0; k < clusters; ++k)
#pragma GCC unroll 2
      for (int u = 0; u < U; ++u) dot[u] += load(p + k * ldp + i + u * W<T>) * load(g + k * ldg + i + u * W<T>);
    for (int64_t k = 0; k < clusters; ++k)
#pragma GCC unroll 2
      for (int u = 0; u < U; ++u) {
        T* at = g + k * ldg + i + u * W<T>;
        store(at, load(p + k * ldp + i + u * W<T>) * (load(at) - dot[u]));
      }
  }
}

template <class T>
void window_sums(T* x, int64_t count, int64_t step, int64_t width, T* out) {
  bool first = true;
  int64_t offset = 0;
  for (int64_t m = 1; m <= width; m *= 2) {  // x[j] is the sum of m entries
    if (width & m) {
      const T* from = x + offset * step;
      for (int64_t j = 0; j < count; j += W<T>) store(out + j, first ? load(from + j) : load(out + j) + load(from + j));
      first = false, offset += m;
    }
    for (int64_t j = 0; j < count + (width - 2 * m) * step; j += W<T>) store(x + j, load(x + j) + load(x + j + m * step));
  }
}

template <class T>
constexpr JointKernels<T> table() {
  static_assert(kJointStep % (kMixVectors * W<T>) == 0);
  return {softmax<T>, keep<T>, gram<T>, mix<T>, softmax_gradient<T>, window_sums<T>};
}

}  // namespace

extern const JointKernels<float> joint_float = table<float>();
extern const JointKernels<double> joint_double = table<double>();

}  // namespace PIX2REP_ISA
}  // namespace pix2rep
