// warp on raw memory, free of tensors: points in chunks of one image, then one of three ways through the features.
//
//   channels last            gather and scatter rows in place
//   sparse or few channels   gather and scatter plane by plane
//   channels first           through a transposed copy of a few images (forward) or of a block of channels (backward)
//
// Every sum runs over the points in the order given, inside one task: the same bits for any number of threads.
#pragma once

#include <algorithm>
#include <vector>

#include "isa.h"
#include "scratch.h"
#include "warp_kernels.h"

namespace pix2rep {

constexpr int64_t kFew = 8;                          // channels below which vectors along them would be mostly empty
constexpr int64_t kCopyBytes = int64_t(4) << 20;     // of images copied at a time, one at least: in cache, and its pages stay mapped
constexpr int64_t kBlockBytes = int64_t(512) << 10;  // of gradient that one task holds, half of a usual L2 cache
constexpr int64_t kLine = 16;                        // channels of a block are a multiple, a cache line of float

// Points grouped by image, in their own order inside it, and cut in chunks.
struct Points {
  struct Range {
    int64_t image, begin, count;  // positions in `order`, or rows where it is empty
  };
  std::vector<int64_t> order, local;  // row and index into prod(S_out) of each position; empty: every point, in order
  std::vector<Range> chunks;
  std::vector<int64_t> first_chunk;  // [B + 1]
  int64_t per_image;

  // `points` have been checked; unread when `all`.
  Points(bool all, const int64_t* points, int64_t count, int64_t batch, int64_t per_image) : per_image(per_image) {
    std::vector<int64_t> starts(batch + 1);
    if (!all) {
      for (int64_t p = 0; p < count; ++p) ++starts[points[p] / per_image + 1];
      for (int64_t b = 0; b < batch; ++b) starts[b + 1] += starts[b];
      order.resize(count), local.resize(count);
      std::vector<int64_t> next(starts);
      for (int64_t p = 0; p < count; ++p) {
        const int64_t b = points[p] / per_image, at = next[b]++;
        order[at] = p, local[at] = points[p] - b * per_image;
      }
    } else {
      for (int64_t b = 0; b <= batch; ++b) starts[b] = b * per_image;
    }
    for (int64_t b = 0; b < batch; ++b) {
      first_chunk.push_back(int64_t(chunks.size()));
      for (int64_t at = starts[b]; at < starts[b + 1]; at += kChunk) chunks.push_back({b, at, std::min<int64_t>(kChunk, starts[b + 1] - at)});
    }
    first_chunk.push_back(int64_t(chunks.size()));
  }
};

// Below one point in 16 pixels a transposed copy costs more than it saves.
inline bool sparse(const Points& points, int64_t batch, int64_t pixels) { return int64_t(points.chunks.size()) * kChunk * 16 < batch * pixels; }

template <class S>
const WarpKernels<S>& warp_kernels() {
  if constexpr (std::is_same_v<S, float>) return PIX2REP_PICK(warp_float);
  if constexpr (std::is_same_v<S, double>) return PIX2REP_PICK(warp_double);
  if constexpr (std::is_same_v<S, F16>) return PIX2REP_PICK(warp_f16);
  if constexpr (std::is_same_v<S, BF16>) return PIX2REP_PICK(warp_bf16);
}

template <class G, class T>
WarpTaps<G, T> warp_taps() {
  if constexpr (std::is_same_v<G, float> && std::is_same_v<T, float>) return PIX2REP_PICK(warp_taps_ff);
  if constexpr (std::is_same_v<G, float> && std::is_same_v<T, double>) return PIX2REP_PICK(warp_taps_fd);
  if constexpr (std::is_same_v<G, double> && std::is_same_v<T, float>) return PIX2REP_PICK(warp_taps_df);
  if constexpr (std::is_same_v<G, double> && std::is_same_v<T, double>) return PIX2REP_PICK(warp_taps_dd);
}

// The normalised output coordinates of an affine grid, as F.affine_grid has them; fills w.output.
template <class G>
std::vector<G> output_coordinates(WarpGrid<G>& w) {
  std::vector<G> all(w.size[0] + w.size[1] + w.size[2]);
  G* out = all.data();
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t size = w.size[2 - axis];
    const G span = G(w.align_corners ? std::max<int64_t>(size - 1, 1) : size);
    w.output[axis] = out;
    for (int64_t i = 0; i < size; ++i) *out++ = (2 * G(i) - G(size - 1)) / span;
  }
  return all;
}

inline int taps_of(Mode mode, int dims) {
  const int k = int(mode);
  return dims == 3 ? k * k * k : k * k;
}

// The gradient of channels [begin, begin + width) of image b, which one task adds to: in place where that is the memory to add to, else in a copy.
// Rows need their channels side by side; columns (`planes`) take any strides.
template <class S>
class Block {
 public:
  using T = Compute<S>;
  T* data;
  int64_t channel_stride, pixel_stride;

  static bool in_place(const Map<S>& map, bool planes) { return std::is_same_v<S, T> && (planes || map.channels_last); }

  Block(const Map<S>& map, int64_t b, int64_t begin, int64_t width, bool planes)
      : map_(map), to_(map.image(b) + begin * (map.channels_last ? 1 : map.stride)), width_(width), in_place_(in_place(map, planes)),
        copy_(in_place_ ? 0 : map.pixels * width) {
    const bool last = map.channels_last || !planes;
    if (in_place_) {
      if constexpr (std::is_same_v<S, T>) data = to_;
      channel_stride = last ? 1 : map.stride, pixel_stride = last ? map.stride : 1;
    } else {
      data = copy_.get(), channel_stride = last ? 1 : map.pixels, pixel_stride = last ? width : 1;
    }
    const int64_t outer = last ? map.pixels : width, inner = last ? width : map.pixels, stride = last ? pixel_stride : channel_stride;
    for (int64_t i = 0; i < outer; ++i) std::fill_n(data + i * stride, inner, T(0));
  }

  void finish() const {
    if (in_place_) return;
    const auto& kernels = warp_kernels<S>();
    if (map_.channels_last)
      for (int64_t p = 0; p < map_.pixels; ++p) kernels.convert(data + p * width_, width_, to_ + p * map_.stride);
    else if (channel_stride == 1)
      kernels.transpose_out(data, width_, map_.pixels, width_, to_, map_.stride);
    else
      for (int64_t c = 0; c < width_; ++c) kernels.convert(data + c * channel_stride, map_.pixels, to_ + c * map_.stride);
  }

 private:
  const Map<S>& map_;
  S* const to_;
  const int64_t width_;
  const bool in_place_;
  const Scratch<T> copy_;
};

// Channels of a block: as many as fit half of the second-level cache.
inline int64_t block_width(int64_t pixel_bytes) { return std::max(kLine, kBlockBytes / pixel_bytes / kLine * kLine); }

// Where the points are and the kernels that know; what both passes share.
template <class S, class G>
struct Warp {
  using T = Compute<S>;
  const WarpGrid<G>& grid;
  const Points& points;
  const int taps = taps_of(grid.mode, grid.dims);
  const WarpKernels<S>& kernels = warp_kernels<S>();
  const WarpTaps<G, T> fill = warp_taps<G, T>();

  // Taps of a chunk into index and weight, [taps][kChunk] each.
  Chunk<T> chunk(const Points::Range& range, int32_t* index, T* weight, bool* inside) const {
    const bool all = points.order.empty();
    const int64_t first = all ? range.begin - range.image * points.per_image : 0;
    fill(grid, range.image, all ? nullptr : points.local.data() + range.begin, first, int(range.count), index, weight, inside);
    return {taps, int(range.count), index, weight, all ? nullptr : points.order.data() + range.begin, range.begin};
  }
};

// rows [P, C], inside [P], norms [P] or nullptr: not normalised.
template <class S, class G, class Parallel>
void warp_forward(const Map<const S>& map, const WarpGrid<G>& grid, const Points& points, const Parallel& parallel, S* rows, bool* inside,
                  Compute<S>* norms) {
  using T = Compute<S>;
  const Warp<S, G> warp{grid, points};
  const auto& kernels = warp.kernels;
  const bool planes = map.channels < kFew || (!map.channels_last && sparse(points, map.batch, map.pixels));
  // Runs f(chunk, image, buffer) over the chunks of images [begin, end).
  const auto over = [&](int64_t begin, int64_t end, int64_t buffer_size, const auto& f) {
    const int64_t first = points.first_chunk[begin];
    parallel(points.first_chunk[end] - first, [&](int64_t task) {
      const Points::Range& range = points.chunks[first + task];
      int32_t index[kMaxTaps * kChunk];
      T weight[kMaxTaps * kChunk];
      bool lies_inside[kChunk];
      const Chunk<T> chunk = warp.chunk(range, index, weight, lies_inside);
      for (int i = 0; i < chunk.count; ++i) inside[chunk.row(i)] = lies_inside[i];
      const Scratch<T> buffer(buffer_size);
      f(chunk, range.image, buffer.get());
    });
  };
  if (planes) {
    const int64_t channel_stride = map.channels_last ? 1 : map.stride, pixel_stride = map.channels_last ? map.stride : 1;
    return over(0, map.batch, 2 * kChunk * map.channels, [&](const Chunk<T>& chunk, int64_t b, T* buffer) {
      kernels.gather_planes(chunk, map.image(b), channel_stride, pixel_stride, map.channels, rows, norms, buffer);
    });
  }
  if (map.channels_last)
    return over(0, map.batch, map.channels, [&](const Chunk<T>& chunk, int64_t b, T* buffer) {
      kernels.gather(chunk, map.image(b), map.stride, map.channels, rows, norms, buffer);
    });
  const int64_t size = map.pixels * map.channels, tile = 1024, tiles = (map.pixels + tile - 1) / tile;
  const int64_t group = std::clamp<int64_t>(kCopyBytes / std::max<int64_t>(size * int64_t(sizeof(T)), 1), 1, std::max<int64_t>(map.batch, 1));
  const Scratch<T> copy(group * size);
  for (int64_t begin = 0; begin < map.batch; begin += group) {
    const int64_t end = std::min(begin + group, map.batch);
    parallel((end - begin) * tiles, [&](int64_t task) {
      const int64_t b = task / tiles, at = task % tiles * tile;
      kernels.transpose_in(map.image(begin + b) + at, map.stride, map.channels, std::min(tile, map.pixels - at), copy.get() + b * size + at * map.channels,
                           map.channels);
    });
    over(begin, end, map.channels, [&](const Chunk<T>& chunk, int64_t b, T* buffer) {
      kernels.gather_copy(chunk, copy.get() + (b - begin) * size, map.channels, map.channels, rows, norms, buffer);
    });
  }
}

// Every element of `map` is written.
template <class S, class G, class Parallel>
void warp_backward(const S* grad_rows, const S* rows, const Compute<S>* norms, const WarpGrid<G>& grid, const Points& points, const Parallel& parallel,
                   const Map<S>& map) {
  using T = Compute<S>;
  const Warp<S, G> warp{grid, points};
  const auto& kernels = warp.kernels;
  const int64_t chunks = int64_t(points.chunks.size()), entries = int64_t(warp.taps) * kChunk;
  const Scratch<int32_t> index(chunks * entries);
  const Scratch<T> weight(chunks * entries), dot(norms ? chunks * kChunk : 0);
  std::vector<Chunk<T>> all(chunks);
  parallel(chunks, [&](int64_t c) {
    bool inside[kChunk];
    all[c] = warp.chunk(points.chunks[c], index.get() + c * entries, weight.get() + c * entries, inside);
    if (norms) kernels.dots(all[c], rows, grad_rows, map.channels, dot.get() + c * kChunk);
  });

  const bool planes = std::is_same_v<S, T> && !map.channels_last && (map.channels < kFew || sparse(points, map.batch, map.pixels));
  const int64_t width = map.channels_last && Block<S>::in_place(map, planes) ? 4 * kLine : block_width(map.pixels * int64_t(sizeof(T)));
  const int64_t blocks = (map.channels + width - 1) / width;
  parallel(map.batch * blocks, [&](int64_t task) {
    const int64_t b = task / blocks, begin = task % blocks * width, count = std::min(width, map.channels - begin);
    const Scratch<T> df(count);
    const Block<S> block(map, b, begin, count, planes);
    for (int64_t c = points.first_chunk[b]; c < points.first_chunk[b + 1]; ++c)
      (planes ? kernels.scatter_planes : kernels.scatter)(all[c], rows, grad_rows, norms, dot.get() + c * kChunk, map.channels, begin, count, block.data,
                                                          planes ? block.channel_stride : block.pixel_stride, df.get());
    block.finish();
  });
}

}  // namespace pix2rep
