// The kernels of warp, one table for each instruction set: points come in chunks of one image, channels are contiguous where a row is meant.
#pragma once

#include "storage.h"
#include "tables.h"

namespace pix2rep {

constexpr int kChunk = 64;     // points
constexpr int kMaxTaps = 16;   // of a point
constexpr double kEpsilon = 1e-12;

enum class Mode { nearest = 1, linear = 2, bicubic = 4 };  // taps an axis

// The output points. Sizes are slowest first, with a leading 1 in 2D; coordinates are x first.
template <class G>
struct WarpGrid {
  const G* grid;                       // affine [B, dims, dims + 1], or dense [B, points, dims]
  int64_t batch_stride, row_stride, column_stride;  // of an affine grid
  const G* output[3];                  // affine: normalised coordinate of every output index, x first
  bool affine, align_corners, border;
  Mode mode;
  int dims;
  int64_t size[3], extent[3];          // S_out, S
};

// Taps of one chunk, [tap][point]; a weight of 0 marks a tap that is not read, the index is always inside the map.
template <class T>
struct Chunk {
  int taps, count;          // count <= kChunk points; the entries past it are valid taps of no meaning
  const int32_t* index;     // into prod(S)
  const T* weight;
  const int64_t* order;     // row of point i: order[i], or first + i when nullptr
  int64_t first;

  int64_t row(int i) const { return order ? order[i] : first + i; }
};

template <class G, class T>
using WarpTaps = void (*)(const WarpGrid<G>&, int64_t image, const int64_t* points, int64_t first, int count, int32_t* index, T* weight, bool* inside);

template <class S>
struct WarpKernels {
  using T = Compute<S>;

  // (warp.3-4). `image` is [prod(S)][stride]; norms nullptr: not normalised; buffer holds `channels` values.
  void (*gather)(const Chunk<T>&, const S* image, int64_t stride, int64_t channels, S* rows, T* norms, T* buffer);
  void (*gather_copy)(const Chunk<T>&, const T* image, int64_t stride, int64_t channels, S* rows, T* norms, T* buffer);
  // The same, not normalised and not rounded to S.
  void (*gather_wide)(const Chunk<T>&, const S* image, int64_t stride, int64_t channels, T* rows);
  // The same with points along the vectors, from any strides; buffer holds 2 * kChunk * channels values.
  void (*gather_planes)(const Chunk<T>&, const S* image, int64_t channel_stride, int64_t pixel_stride, int64_t channels, S* rows, T* norms, T* buffer);
  // (warp.3) as columns [channels][kChunk], not rounded to S.
  void (*gather_columns)(const Chunk<T>&, const S* image, int64_t channel_stride, int64_t pixel_stride, int64_t channels, T* columns);
  // <row, drow> of (warp.5), [count].
  void (*dots)(const Chunk<T>&, const S* rows, const S* grad_rows, int64_t channels, T* dot);
  // (warp.5-6) of channels [begin, begin + width) into [prod(S)][stride]; norms nullptr: not normalised; buffer holds `width` values.
  void (*scatter)(const Chunk<T>&, const S* rows, const S* grad_rows, const T* norms, const T* dot, int64_t channels, int64_t begin, int64_t width,
                  T* image, int64_t stride, T* buffer);
  // The same into planes [width][stride].
  void (*scatter_planes)(const Chunk<T>&, const S* rows, const S* grad_rows, const T* norms, const T* dot, int64_t channels, int64_t begin,
                         int64_t width, T* planes, int64_t stride, T* buffer);
  // (warp.6) from columns [width][kChunk], into any strides.
  void (*scatter_columns)(const Chunk<T>&, const T* columns, int64_t width, T* image, int64_t channel_stride, int64_t pixel_stride);
  // to[c][r] = from[r][c]
  void (*transpose_in)(const S* from, int64_t from_stride, int64_t rows, int64_t columns, T* to, int64_t to_stride);
  void (*transpose_out)(const T* from, int64_t from_stride, int64_t rows, int64_t columns, S* to, int64_t to_stride);
  void (*convert)(const T* from, int64_t count, S* to);
};

PIX2REP_TABLES(
  extern const WarpKernels<float> warp_float;
  extern const WarpKernels<double> warp_double;
  extern const WarpKernels<F16> warp_f16;
  extern const WarpKernels<BF16> warp_bf16;
  extern const WarpTaps<float, float> warp_taps_ff;
  extern const WarpTaps<float, double> warp_taps_fd;
  extern const WarpTaps<double, float> warp_taps_df;
  extern const WarpTaps<double, double> warp_taps_dd;)

}  // namespace pix2rep
