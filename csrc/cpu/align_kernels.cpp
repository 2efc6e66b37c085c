// Sums over pairs of rows and the gradients of those sums: channels run along the vectors of rows, points along those of columns.
#include "align_kernels.h"

#include <cstring>
#include <utility>

#include "warp_rows.h"

namespace pix2rep {
namespace PIX2REP_ISA {

namespace {

template <class T, int Half, size_t... Lane>
static inline Vec<T> fold(Vec<T> v, std::index_sequence<Lane...> lanes) {
  v += __builtin_shufflevector(v, v, (int(Lane) ^ Half)...);
  if constexpr (Half > 1) return fold<T, Half / 2>(v, lanes);
  return v;
}

// Sum of the lanes, in pairs.
template <class T>
static inline T total(Vec<T> v) {
  constexpr int W = Simd<T>::width;
  return fold<T, W / 2>(v, std::make_index_sequence<W>{})[0];
}

template <class T>
void products(const T* q, const T* z, int count, int64_t channels, T* const* sums) {
  constexpr int W = Simd<T>::width;
  for (int i = 0; i < count; ++i, q += channels, z += channels) {
    Vec<T> dot[4] = {}, sq1[4] = {}, sq2[4] = {};
    sweep<T>(channels, [&](int64_t c, auto vectors, auto partial) {
#pragma GCC unroll 4
      for (int v = 0; v < decltype(vectors)::value; ++v) {
        const Vec<T> x = partial ? read_some(q + c, channels - c) : load(q + c + v * W);
        const Vec<T> y = partial ? read_some(z + c, channels - c) : load(z + c + v * W);
        dot[v] += x * y, sq1[v] += x * x, sq2[v] += y * y;
      }
    });
    sums[0][i] = total<T>((dot[0] + dot[1]) + (dot[2] + dot[3]));
    sums[1][i] = total<T>((sq1[0] + sq1[1]) + (sq1[2] + sq1[3]));
    sums[2][i] = total<T>((sq2[0] + sq2[1]) + (sq2[2] + sq2[3]));
  }
}

template <class T>
void products_columns(const T* q, const T* z, int count, int64_t channels, T* const* sums) {
  T dot[kChunk] = {}, sq1[kChunk] = {}, sq2[kChunk] = {};
  for (int64_t c = 0; c < channels; ++c, q += kChunk, z += kChunk)
    for (int i = 0; i < kChunk; ++i) dot[i] += q[i] * z[i], sq1[i] += q[i] * q[i], sq2[i] += z[i] * z[i];
  std::memcpy(sums[0], dot, count * sizeof(T)), std::memcpy(sums[1], sq1, count * sizeof(T)), std::memcpy(sums[2], sq2, count * sizeof(T));
}

template <class T>
void mix(T* q, T* z, int count, int64_t width, const T* const* upstream) {
  constexpr int W = Simd<T>::width;
  for (int i = 0; i < count; ++i, q += width, z += width) {
    const T across = upstream[0][i], own1 = 2 * upstream[1][i], own2 = 2 * upstream[2][i];
    sweep<T>(width, [&](int64_t c, auto vectors, auto partial) {
#pragma GCC unroll 4
      for (int v = 0; v < decltype(vectors)::value; ++v) {
        const Vec<T> x = partial ? read_some(q + c, width - c) : load(q + c + v * W);
        const Vec<T> y = partial ? read_some(z + c, width - c) : load(z + c + v * W);
        const Vec<T> dx = y * across + x * own1, dy = x * across + y * own2;
        if (partial)
          write_some(q + c, dx, width - c), write_some(z + c, dy, width - c);
        else
          store(q + c + v * W, dx), store(z + c + v * W, dy);
      }
    });
  }
}

template <class T>
void mix_columns(T* q, T* z, int count, int64_t width, const T* const* upstream) {
  T across[kChunk] = {}, own1[kChunk] = {}, own2[kChunk] = {};
  for (int i = 0; i < count; ++i) across[i] = upstream[0][i], own1[i] = 2 * upstream[1][i], own2[i] = 2 * upstream[2][i];
  for (int64_t c = 0; c < width; ++c, q += kChunk, z += kChunk)
    for (int i = 0; i < kChunk; ++i) {
      const T x = q[i], y = z[i];
      q[i] = y * across[i] + x * own1[i], z[i] = x * across[i] + y * own2[i];
    }
}

template <class T>
constexpr AlignKernels<T> table() {
  return {products<T>, products_columns<T>, mix<T>, mix_columns<T>};
}

}  // namespace

extern const AlignKernels<float> align_float = table<float>();
extern const AlignKernels<double> align_double = table<double>();

}  // namespace PIX2REP_ISA
}  // namespace pix2rep
