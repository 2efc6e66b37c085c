// align on raw memory, free of tensors: the points of a chunk are gathered from both maps into a buffer that stays in cache, and reduced there.
//
//   rows      channels along the vectors: in place where they are last, else from a transposed copy (of a few images forward, of a block of channels backward)
//   columns   points along the vectors, from any strides: few channels, or few points in maps of planes
//
// Every sum runs over channels or points in one order, inside one task: the same bits for any number of threads.
#pragma once

#include <functional>
#include <optional>

#include "align_kernels.h"
#include "warp_core.h"

namespace pix2rep {

constexpr int64_t kRowBytes = int64_t(8) << 10;  // of one map's rows gathered at a time, one at least: in the first-level cache with those of the other

// One map, and the taps of a chunk of points in it: index and weight [taps][kChunk], inside [kChunk].
template <class S>
struct Side {
  using T = Compute<S>;
  Map<const S> map;
  std::function<Chunk<T>(const Points::Range&, int32_t* index, T* weight, bool* inside)> locate;
};

// A chunk in both maps.
template <class S>
struct Located {
  using T = Compute<S>;
  static constexpr int kTaps = 8;
  int32_t index[2][kTaps * kChunk];
  T weight[2][kTaps * kChunk];
  bool inside[2][kChunk];
  Chunk<T> chunk[2];

  Located(const Side<S>* sides, const Points::Range& range) {
    for (int s = 0; s < 2; ++s) {
      chunk[s] = sides[s].locate(range, index[s], weight[s], inside[s]);
      chunk[s].order = nullptr, chunk[s].first = 0;  // rows of the buffer
    }
  }
  Chunk<T> part(int s, int at, int count) const { return {chunk[s].taps, count, index[s] + at, weight[s] + at, nullptr, 0}; }
};

// Rows of channels to gather from: a map's own, or a transposed copy.
template <class S>
struct Rows {
  using T = Compute<S>;
  const S* own;
  const T* copy;
  int64_t stride;

  void gather(const Chunk<T>& chunk, int64_t channels, T* rows) const {
    copy ? warp_kernels<T>().gather_wide(chunk, copy, stride, channels, rows) : warp_kernels<S>().gather_wide(chunk, own, stride, channels, rows);
  }
};

template <class S>
void gather_columns(const Chunk<Compute<S>>& chunk, const Map<const S>& map, int64_t b, int64_t begin, int64_t channels, Compute<S>* columns) {
  const int64_t channel_stride = map.channels_last ? 1 : map.stride, pixel_stride = map.channels_last ? map.stride : 1;
  warp_kernels<S>().gather_columns(chunk, map.image(b) + begin * channel_stride, channel_stride, pixel_stride, channels, columns);
}

template <class T>
const AlignKernels<T>& align_kernels() {
  if constexpr (std::is_same_v<T, float>)
    return PIX2REP_PICK(align_float);
  else
    return PIX2REP_PICK(align_double);
}

template <class S>
bool by_columns(const Side<S>* sides, const Points& points) {
  const auto thin = [&](const Map<const S>& map) { return !map.channels_last && sparse(points, map.batch, map.pixels); };
  return sides[0].map.channels < kFew || thin(sides[0].map) || thin(sides[1].map);
}

template <class T>
int rows_at_once(int64_t channels) {
  return int(std::clamp<int64_t>(kRowBytes / (std::max<int64_t>(channels, 1) * int64_t(sizeof(T))), 1, kChunk));
}

// sums: dot, sq1, sq2 [B * M] each; valid [B * M].
template <class S, class Parallel>
void align_forward(const Side<S>* sides, const Points& points, const Parallel& parallel, Compute<S>* const* sums, bool* valid) {
  using T = Compute<S>;
  const auto& kernels = align_kernels<T>();
  const int64_t batch = sides[0].map.batch, channels = sides[0].map.channels;
  // Runs f(located, image, first, count) over the chunks of images [begin, end).
  const auto over = [&](int64_t begin, int64_t end, const auto& f) {
    const int64_t first = points.first_chunk[begin];
    parallel(points.first_chunk[end] - first, [&](int64_t task) {
      const Points::Range& range = points.chunks[first + task];
      const Located<S> located(sides, range);
      for (int i = 0; i < range.count; ++i) valid[range.begin + i] = located.inside[0][i] & located.inside[1][i];
      f(located, range.image, range.begin, int(range.count));
    });
  };
  if (by_columns(sides, points))
    return over(0, batch, [&](const Located<S>& located, int64_t b, int64_t first, int count) {
      const Scratch<T> buffer(2 * kChunk * channels);
      T* const column[2] = {buffer.get(), buffer.get() + kChunk * channels};
      for (int s = 0; s < 2; ++s) gather_columns(located.chunk[s], sides[s].map, b, 0, channels, column[s]);
      T* const to[3] = {sums[0] + first, sums[1] + first, sums[2] + first};
      kernels.products_columns(column[0], column[1], count, channels, to);
    });

  constexpr int64_t kTile = 1024;
  int64_t size[2], tiles[2];  // of an image's copy
  for (int s = 0; s < 2; ++s) {
    const bool copied = !sides[s].map.channels_last;
    size[s] = copied ? sides[s].map.pixels * channels : 0, tiles[s] = copied ? (sides[s].map.pixels + kTile - 1) / kTile : 0;
  }
  const int64_t copied = size[0] + size[1];
  const int64_t group = copied ? std::clamp<int64_t>(kCopyBytes / (copied * int64_t(sizeof(T))), 1, std::max<int64_t>(batch, 1)) : batch;
  const Scratch<T> copies(group * copied);
  const auto copy_of = [&](int s, int64_t i) { return copies.get() + i * copied + s * size[0]; };  // of image i of the group
  const int step = rows_at_once<T>(channels);
  for (int64_t begin = 0; begin < batch; begin += group) {
    const int64_t end = std::min(begin + group, batch);
    parallel((end - begin) * (tiles[0] + tiles[1]), [&](int64_t task) {
      const int64_t i = task / (tiles[0] + tiles[1]), tile = task % (tiles[0] + tiles[1]);
      const int s = tile >= tiles[0];
      const Map<const S>& map = sides[s].map;
      const int64_t at = (tile - s * tiles[0]) * kTile;
      warp_kernels<S>().transpose_in(map.image(begin + i) + at, map.stride, channels, std::min(kTile, map.pixels - at), copy_of(s, i) + at * channels,
                                     channels);
    });
    over(begin, end, [&](const Located<S>& located, int64_t b, int64_t first, int count) {
      Rows<S> rows[2];
      for (int s = 0; s < 2; ++s) {
        const Map<const S>& map = sides[s].map;
        rows[s] = size[s] ? Rows<S>{nullptr, copy_of(s, b - begin), channels} : Rows<S>{map.image(b), nullptr, map.stride};
      }
      const Scratch<T> buffer(2 * step * channels);
      T* const row[2] = {buffer.get(), buffer.get() + step * channels};
      for (int at = 0; at < count; at += step) {
        const int n = std::min(step, count - at);
        for (int s = 0; s < 2; ++s) rows[s].gather(located.part(s, at, n), channels, row[s]);
        T* const to[3] = {sums[0] + first + at, sums[1] + first + at, sums[2] + first + at};
        kernels.products(row[0], row[1], n, channels, to);
      }
    });
  }
}

// upstream: gdot, gsq1, gsq2 [B * M] each. Every element of the gradients that are wanted is written.
template <class S, class Parallel>
void align_backward(const Side<S>* sides, const Points& points, const Parallel& parallel, const Compute<S>* const* upstream, const Map<S>* gradients,
                    const bool* need) {
  using T = Compute<S>;
  const auto& kernels = align_kernels<T>();
  const int64_t batch = sides[0].map.batch, channels = sides[0].map.channels;
  const bool columns = by_columns(sides, points);
  bool copies = columns;
  int64_t pixels = 1;
  for (int s = 0; s < 2; ++s) {
    const Map<const S>& map = sides[s].map;
    copies = copies || !map.channels_last || (need[s] && !Block<S>::in_place(gradients[s], columns));
    pixels = std::max(pixels, map.pixels);
  }
  const int64_t width = copies ? block_width(pixels * int64_t(sizeof(T))) : 4 * kLine;
  const int64_t blocks = (channels + width - 1) / width;
  parallel(batch * blocks, [&](int64_t task) {
    const int64_t b = task / blocks, begin = task % blocks * width, count = std::min(width, channels - begin);
    Rows<S> rows[2];
    std::optional<Scratch<T>> copy[2];
    std::optional<Block<S>> block[2];
    for (int s = 0; s < 2; ++s) {
      const Map<const S>& map = sides[s].map;
      if (!columns && map.channels_last) rows[s] = {map.image(b) + begin, nullptr, map.stride};
      if (!columns && !map.channels_last) {
        copy[s].emplace(map.pixels * count);
        warp_kernels<S>().transpose_in(map.image(b) + begin * map.stride, map.stride, count, map.pixels, copy[s]->get(), count);
        rows[s] = {nullptr, copy[s]->get(), count};
      }
      if (need[s]) block[s].emplace(gradients[s], b, begin, count, columns);
    }
    const int step = columns ? kChunk : rows_at_once<T>(count);
    const Scratch<T> buffer(2 * step * count);
    T* const row[2] = {buffer.get(), buffer.get() + step * count};
    for (int64_t c = points.first_chunk[b]; c < points.first_chunk[b + 1]; ++c) {
      const Points::Range& range = points.chunks[c];
      const Located<S> located(sides, range);
      for (int at = 0; at < range.count; at += step) {
        const int n = std::min<int>(step, int(range.count) - at);
        const int64_t first = range.begin + at;
        const T* const from[3] = {upstream[0] + first, upstream[1] + first, upstream[2] + first};
        for (int s = 0; s < 2; ++s)
          columns ? gather_columns(located.chunk[s], sides[s].map, b, begin, count, row[s]) : rows[s].gather(located.part(s, at, n), count, row[s]);
        (columns ? kernels.mix_columns : kernels.mix)(row[0], row[1], n, count, from);
        for (int s = 0; s < 2; ++s) {
          if (!need[s]) continue;
          const Block<S>& to = *block[s];
          const auto& scatters = warp_kernels<T>();
          columns ? scatters.scatter_columns(located.chunk[s], row[s], count, to.data, to.channel_stride, to.pixel_stride)
                  : scatters.scatter(located.part(s, at, n), nullptr, row[s], nullptr, nullptr, count, 0, count, to.data, to.pixel_stride, nullptr);
        }
      }
    }
    for (int s = 0; s < 2; ++s)
      if (need[s]) block[s]->finish();
  });
}

}  // namespace pix2rep
