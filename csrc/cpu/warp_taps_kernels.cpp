// Coordinates and taps of warp, (warp.1-3), operation for operation as in reference/warp.py: no multiply-add is fused in this file, so that a tie of
// "nearest" falls the same way for every instruction set.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include "../common/math.h"
#include "warp_kernels.h"

namespace pix2rep {
namespace PIX2REP_ISA {
namespace {

template <class G>
struct Axis {
  int32_t index[4][kChunk];
  G weight[4][kChunk];
};

static inline float round_of(float x) { return __builtin_rintf(x); }
static inline double round_of(double x) { return __builtin_rint(x); }

// Compilers make a vector of this, not of floor itself.
template <class G>
static inline G floor_of(G x) {
  const G r = round_of(x);
  return r > x ? r - 1 : r;
}

// Output indices (x, y, z) of points of one image: points[i], or first + i.
template <class G>
static void decode(const WarpGrid<G>& w, const int64_t* points, int64_t first, int count, int32_t (&out)[3][kChunk]) {
  const int64_t height = w.size[1], width = w.size[2];
  if (points) {
    for (int i = 0; i < count; ++i) {
      const int64_t line = points[i] / width;
      out[0][i] = int32_t(points[i] - line * width), out[2][i] = int32_t(line / height), out[1][i] = int32_t(line - out[2][i] * height);
    }
    return;
  }
  int64_t x = first % width, y = first / width % height, z = first / width / height;
  for (int i = 0; i < count; ++i) {
    out[0][i] = int32_t(x), out[1][i] = int32_t(y), out[2][i] = int32_t(z);
    if (++x == width) {
      x = 0;
      if (++y == height) y = 0, ++z;
    }
  }
}

// (warp.1); what stands past `count` is of no meaning, but taps are made of it.
template <class G>
static void coordinates(const WarpGrid<G>& w, int64_t image, const int64_t* points, int64_t first, int count, G (&g)[3][kChunk]) {
  if (!w.affine) {
    const G* from = w.grid + image * w.size[0] * w.size[1] * w.size[2] * w.dims;
    for (int i = 0; i < count; ++i)
      for (int axis = 0; axis < w.dims; ++axis) g[axis][i] = from[(points ? points[i] : first + i) * w.dims + axis];
    for (int axis = 0; axis < w.dims; ++axis)
      for (int i = count; i < kChunk; ++i) g[axis][i] = 0;
    return;
  }
  int32_t at[3][kChunk];
  decode(w, points, first, count, at);
  G output[3][kChunk];
  for (int axis = 0; axis < w.dims; ++axis) {
    for (int i = 0; i < count; ++i) output[axis][i] = w.output[axis][at[axis][i]];
    for (int i = count; i < kChunk; ++i) output[axis][i] = 0;
  }
  for (int row = 0; row < w.dims; ++row) {
    const G* from = w.grid + image * w.batch_stride + row * w.row_stride;
    const G x = from[0], y = from[w.column_stride], z = from[2 * w.column_stride], shift = from[w.dims * w.column_stride];
    for (int i = 0; i < kChunk; ++i) {
      G sum = x * output[0][i] + y * output[1][i];
      if (w.dims == 3) sum = sum + z * output[2][i];
      g[row][i] = sum + shift;
    }
  }
}

// One tap of each point along one axis: the nearest index inside the map, and the weight, 0 outside when padding is "zeros".
template <class G>
static inline void place(const G (&centre)[kChunk], G last, bool border, int32_t (&index)[kChunk], G (&weight)[kChunk]) {
  for (int i = 0; i < kChunk; ++i) {
    const bool outside = (centre[i] < 0) | (centre[i] > last);
    weight[i] = outside & !border ? G(0) : weight[i];
    G x = centre[i] > 0 ? centre[i] : G(0);  // NaN becomes 0
    x = x < last ? x : last;
    index[i] = int32_t(x);
  }
}

// (warp.2) and the taps of one axis.
template <class G>
static void axis_taps(const WarpGrid<G>& w, const G (&g)[kChunk], int64_t extent, Axis<G>& out) {
  const G last = G(extent - 1), size = G(extent);
  G x[kChunk], centre[kChunk];
  if (w.align_corners)
    for (int i = 0; i < kChunk; ++i) x[i] = (g[i] + 1) / 2 * last;
  else
    for (int i = 0; i < kChunk; ++i) x[i] = ((g[i] + 1) * size - 1) / 2;
  if (w.border && w.mode != Mode::bicubic)
    for (int i = 0; i < kChunk; ++i) {
      x[i] = x[i] < 0 ? G(0) : x[i];
      x[i] = x[i] > last ? last : x[i];
    }
  if (w.mode == Mode::nearest) {
    for (int i = 0; i < kChunk; ++i) centre[i] = round_of(x[i]), out.weight[0][i] = G(1);
    place(centre, last, w.border, out.index[0], out.weight[0]);
    return;
  }
  G base[kChunk], t[kChunk];
  for (int i = 0; i < kChunk; ++i) base[i] = floor_of(x[i]), t[i] = x[i] - base[i];
  const int taps = int(w.mode), before = w.mode == Mode::bicubic ? 1 : 0;
  for (int k = 0; k < taps; ++k) {
    G(&weight)[kChunk] = out.weight[k];
    if (w.mode == Mode::linear)
      for (int i = 0; i < kChunk; ++i) weight[i] = k ? t[i] : 1 - t[i];
    else if (k == 0)
      for (int i = 0; i < kChunk; ++i) weight[i] = far_weight(t[i] + 1);
    else if (k == 1)
      for (int i = 0; i < kChunk; ++i) weight[i] = near_weight(t[i]);
    else if (k == 2)
      for (int i = 0; i < kChunk; ++i) weight[i] = near_weight(1 - t[i]);
    else
      for (int i = 0; i < kChunk; ++i) weight[i] = far_weight(2 - t[i]);
    for (int i = 0; i < kChunk; ++i) centre[i] = base[i] + G(k - before);
    place(centre, last, w.border, out.index[k], weight);
  }
}

// One tap of every point from its taps along the axes, z when Volume. The arrays are apart, which lets the loop become vectors.
template <bool Volume, class G, class T>
static inline void combine(const Axis<G> (&axes)[3], int kz, int ky, int kx, int32_t height, int32_t width, const int32_t* __restrict known,
                           int32_t* __restrict index, T* __restrict weight) {
  for (int i = 0; i < kChunk; ++i) {
    int32_t line = axes[1].index[ky][i];
    G product = axes[1].weight[ky][i];
    if (Volume) line += axes[0].index[kz][i] * height, product = axes[0].weight[kz][i] * product;
    product = product * axes[2].weight[kx][i];
    index[i] = line * width + axes[2].index[kx][i];
    // A NaN coordinate may lose its weight to a zero on another axis.
    weight[i] = known[i] ? T(product) : T(__builtin_nan(""));
  }
}

template <class G, class T>
void taps(const WarpGrid<G>& w, int64_t image, const int64_t* points, int64_t first, int count, int32_t* index, T* weight, bool* inside) {
  G g[3][kChunk];
  coordinates(w, image, points, first, count, g);
  int32_t known[kChunk], within[kChunk];
  for (int i = 0; i < kChunk; ++i) known[i] = within[i] = 1;
  for (int axis = 0; axis < w.dims; ++axis)
    for (int i = 0; i < kChunk; ++i) known[i] &= g[axis][i] == g[axis][i], within[i] &= __builtin_fabs(g[axis][i]) <= 1;
  for (int i = 0; i < count; ++i) inside[i] = within[i];
  Axis<G> axes[3];  // slowest first, as the sizes
  for (int axis = 3 - w.dims; axis < 3; ++axis) axis_taps(w, g[2 - axis], w.extent[axis], axes[axis]);
  const int per_axis = int(w.mode), dims = w.dims;
  const int32_t height = int32_t(w.extent[1]), width = int32_t(w.extent[2]);
  for (int kz = 0; kz < (dims == 3 ? per_axis : 1); ++kz)
    for (int ky = 0; ky < per_axis; ++ky)
      for (int kx = 0; kx < per_axis; ++kx, index += kChunk, weight += kChunk)
        (dims == 3 ? combine<true, G, T> : combine<false, G, T>)(axes, kz, ky, kx, height, width, known, index, weight);
}

}  // namespace

extern const WarpTaps<float, float> warp_taps_ff = taps<float, float>;
extern const WarpTaps<float, double> warp_taps_fd = taps<float, double>;
extern const WarpTaps<double, float> warp_taps_df = taps<double, float>;
extern const WarpTaps<double, double> warp_taps_dd = taps<double, double>;

}  // namespace PIX2REP_ISA
}  // namespace pix2rep
