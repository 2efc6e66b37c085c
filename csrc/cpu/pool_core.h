// pool on raw memory, free of tensors: an image is cut in chunks of pixels and blocks of channels, each task adds one of them to sums of its own, and
// the sums of the chunks are added in order. Chunks and blocks depend on sizes alone: the same bits for any number of threads.
#pragma once

#include <algorithm>

#include "isa.h"
#include "pool_kernels.h"
#include "scratch.h"

namespace pix2rep {

constexpr int64_t kTasks = 16;                      // wanted of a call, where its size allows
constexpr int64_t kLeast = 4096;                    // pixels of a chunk, and this many a region: what the chunk's own sums cost is small beside it
constexpr int64_t kPerRegion = 32;
constexpr int64_t kSumBytes = int64_t(512) << 10;   // of sums that one task adds to, half of a usual L2 cache

template <class L>
struct PoolLabels {
  const L* data;  // [B][pixels]
  int64_t batch_stride, regions;

  // Runs of the tile that begins at pixel p of image b. Pixels of no region make no run, or one of region `none` where that is not negative.
  int runs(int64_t b, int64_t p, int count, int64_t none, Run* runs) const {
    const L* labels = data + b * batch_stride + p;
    int begin[kTile + 1] = {0}, many = 1;
    for (int i = 1; i < count; ++i) begin[many] = i, many += labels[i] != labels[i - 1];  // branches here would be guessed wrong
    begin[many] = count;
    int made = 0;
    for (int k = 0; k < many; ++k) {
      const int64_t label = labels[begin[k]];
      const bool known = label >= 0 && label < regions;
      runs[made] = {known ? label : none, begin[k], begin[k + 1] - begin[k]};
      made += known || none >= 0;
    }
    return made;
  }
};

template <class S>
const PoolKernels<S>& pool_kernels() {
  if constexpr (std::is_same_v<S, float>) return PIX2REP_PICK(pool_float);
  if constexpr (std::is_same_v<S, double>) return PIX2REP_PICK(pool_double);
  if constexpr (std::is_same_v<S, F16>) return PIX2REP_PICK(pool_f16);
  if constexpr (std::is_same_v<S, BF16>) return PIX2REP_PICK(pool_bf16);
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Pieces [begin, begin + size) of [0, total), at least one.
struct Pieces {
  int64_t total, size, count;
  Pieces(int64_t total, int64_t size) : total(total), size(std::max<int64_t>(size, 1)), count(std::max<int64_t>(divide_up(total, this->size), 1)) {}
  int64_t begin(int64_t i) const { return i * size; }
  int64_t length(int64_t i) const { return std::min(size, total - i * size); }
};

// Chunks of an image, whole tiles.
inline Pieces chunks_of(int64_t batch, int64_t pixels, int64_t least) {
  const int64_t wanted = divide_up(pixels, divide_up(kTasks, std::max<int64_t>(batch, 1)));
  return Pieces(pixels, divide_up(std::max(wanted, least), kTile) * kTile);
}

// means [B, R, C], counts [B, R].
template <class S, class L, class Parallel>
void pool_forward(const Map<const S>& map, const PoolLabels<L>& labels, const Parallel& parallel, Compute<S>* means, int64_t* counts) {
  const auto& kernels = pool_kernels<S>();
  const int64_t regions = labels.regions;
  const Pieces chunks = chunks_of(map.batch, map.pixels, std::max(kLeast, kPerRegion * regions));
  const int64_t cached = std::max<int64_t>(kSumBytes / (std::max<int64_t>(regions, 1) * int64_t(sizeof(double))) / kPlanes * kPlanes, kPlanes);
  const Pieces blocks(map.channels, std::min(std::max<int64_t>(map.channels, 1), map.channels_last ? std::max<int64_t>(cached, 4 * kPlanes) : cached));
  const int64_t size = regions * blocks.size, parts = map.batch * chunks.count;
  const Scratch<double> sums(parts * blocks.count * size);   // [B][chunk][block][R][channel of the block]
  const Scratch<int64_t> sizes(parts * regions);             // [B][chunk][R]
  parallel(parts * blocks.count, [&](int64_t task) {
    const int64_t part = task / blocks.count, block = task % blocks.count, b = part / chunks.count, chunk = part % chunks.count;
    const int64_t c = blocks.begin(block), channels = blocks.length(block), stop = chunks.begin(chunk) + chunks.length(chunk);
    double* sum = sums.get() + task * size;
    int64_t* here = sizes.get() + part * regions;
    std::fill_n(sum, size, 0.0);
    if (block == 0) std::fill_n(here, regions, 0);
    Run runs[kTile];
    for (int64_t p = chunks.begin(chunk); p < stop; p += kTile) {
      const int pixels = int(std::min<int64_t>(kTile, stop - p)), count = labels.runs(b, p, pixels, -1, runs);
      if (block == 0)
        for (int k = 0; k < count; ++k) here[runs[k].region] += runs[k].count;  // (pool.1)
      if (map.channels_last)
        kernels.add_rows(map.at(b, c, p), map.stride, runs, count, channels, sum, blocks.size);
      else
        kernels.add_planes(map.at(b, c, p), map.stride, pixels, runs, count, channels, sum, blocks.size);
    }
  });
  const Pieces rows(regions, std::max<int64_t>(divide_up(kLeast, std::max<int64_t>(map.channels, 1)), 1));
  parallel(map.batch * rows.count, [&](int64_t task) {
    const int64_t b = task / rows.count, first = rows.begin(task % rows.count), stop = first + rows.length(task % rows.count);
    for (int64_t r = first; r < stop; ++r) {
      int64_t count = 0;
      for (int64_t k = 0; k < chunks.count; ++k) count += sizes.get()[(b * chunks.count + k) * regions + r];
      counts[b * regions + r] = count;
      for (int64_t block = 0; block < blocks.count; ++block)
        kernels.mean(sums.get() + (b * chunks.count * blocks.count + block) * size + r * blocks.size, blocks.count * size, chunks.count, count,
                     blocks.length(block), means + (b * regions + r) * map.channels + blocks.begin(block));
    }
  });
}

// Every element of `map` is written.
template <class S, class L, class Parallel>
void pool_backward(const Compute<S>* grad, const int64_t* counts, const PoolLabels<L>& labels, const Parallel& parallel, const Map<S>& map) {
  const auto& kernels = pool_kernels<S>();
  const int64_t regions = labels.regions, channels = map.channels, size = (regions + 1) * channels;
  const Scratch<S> table(map.batch * size);  // the last row is that of no region
  const Pieces rows(regions + 1, std::max<int64_t>(divide_up(kLeast, std::max<int64_t>(channels, 1)), 1));
  parallel(map.batch * rows.count, [&](int64_t task) {
    const int64_t b = task / rows.count, first = rows.begin(task % rows.count), stop = first + rows.length(task % rows.count);
    for (int64_t r = first; r < stop; ++r)
      kernels.share(grad + (b * regions + r) * channels, r < regions ? counts[b * regions + r] : 0, channels, table.get() + b * size + r * channels);
  });
  const Pieces chunks = chunks_of(map.batch, map.pixels, kLeast);
  parallel(map.batch * chunks.count, [&](int64_t task) {
    const int64_t b = task / chunks.count, chunk = task % chunks.count, stop = chunks.begin(chunk) + chunks.length(chunk);
    Run runs[kTile];
    for (int64_t p = chunks.begin(chunk); p < stop; p += kTile) {
      const int count = labels.runs(b, p, int(std::min<int64_t>(kTile, stop - p)), regions, runs);
      const auto put = map.channels_last ? kernels.put_rows : kernels.put_planes;
      put(table.get() + b * size, channels, runs, count, channels, map.at(b, 0, p), map.stride);
    }
  });
}

}  // namespace pix2rep
