// Gather and normalise, (warp.3-4): rows read along channels where those are last, else plane by plane and transposed in shared memory.
#pragma once

#include "vector.cuh"
#include "warp_points.cuh"

namespace pix2rep {

constexpr int kWarpThreads = 256;
constexpr float kWarpEpsilon = 1e-12f;

// Taps that a lane has under way before it uses the first, and blocks that share a multiprocessor: as many registers as those take and no more.
constexpr int in_flight(int taps) { return taps == 16 ? 4 : taps; }
constexpr int row_blocks(int taps) { return taps == 1 ? 6 : taps == 4 ? 3 : 2; }
// Vectors of a row that a lane keeps between its norm and its store.
constexpr int row_vectors(int taps) { return taps == 1 || taps == 16 ? 1 : 4; }

constexpr int kPlaneChannels = 256;  // at most that a block transposes at a time, of 32 points
constexpr int kPlanePitch = 33;

// Features of a point from `from` on.
template <class S, int kVector, int kTaps, int kDims>
__device__ __forceinline__ void gather_channels(const PointTaps<kTaps, kDims>& taps, const S* from, float (&f)[kVector]) {
  constexpr int count = PointTaps<kTaps, kDims>::kCount, step = in_flight(count);
#pragma unroll
  for (int i = 0; i < kVector; ++i) f[i] = 0.0f;
#pragma unroll
  for (int first = 0; first < count; first += step) {
    Bits<S, kVector> bits[step];
#pragma unroll
    for (int k = 0; k < step; ++k) {
      const WarpTap t = taps.at(first + k);
      bits[k] = {};
      if (t.weight != 0.0f) bits[k] = load_bits<S, kVector>(from + t.offset);  // a tap without weight passes no NaN
    }
#pragma unroll
    for (int k = 0; k < step; ++k) {
      const float weight = taps.at(first + k).weight;
      float value[kVector];
      unpack<S, kVector>(bits[k], value);
#pragma unroll
      for (int i = 0; i < kVector; ++i) f[i] = fmaf(weight, value[i], f[i]);
    }
  }
}

// What the lanes of a warp do that reads rows: `lanes` share a point, `batch` points are the warp's.
struct RowLanes {
  int lanes, batch, first, group;  // the lane's first channel; its point of those that are read together
  int64_t begin;                   // the warp's first point

  __device__ __forceinline__ RowLanes(int log2_lanes, int batch, int vector)
      : lanes(1 << log2_lanes),
        batch(batch),
        first((int(threadIdx.x) & (lanes - 1)) * vector),
        group(int(threadIdx.x) % 32 >> log2_lanes),
        begin((int64_t(blockIdx.x) * (kWarpThreads / 32) + threadIdx.x / 32) * batch) {}
};

// Channels last: kVector neighbouring channels a lane at a time.
template <class S, int kVector, int kTaps, int kDims>
__global__ void __launch_bounds__(kWarpThreads, row_blocks(PointTaps<kTaps, kDims>::kCount))
    warp_rows(WarpProblem w, int log2_lanes, int batch, const S* features, S* rows, bool* inside, float* norms) {
  constexpr int vectors = row_vectors(PointTaps<kTaps, kDims>::kCount);
  const RowLanes my(log2_lanes, batch, kVector);
  if (my.begin >= w.count) return;
  const auto table = share_points<kTaps, kDims>(w, my.begin, batch, inside, false);
  const int channels = int(w.channels), step = my.lanes * kVector, rest = my.first + vectors * step;
  for (int at = my.group; at < batch; at += 32 >> log2_lanes) {
    const PointTaps<kTaps, kDims> taps = table.read(at);
    const int64_t p = my.begin + at;
    const bool present = p < w.count;
    S* row = rows + p * channels;
    float held[vectors][kVector], squares = 0.0f;
#pragma unroll
    for (int h = 0; h < vectors; ++h) {
      const int c = my.first + h * step;
      if (c >= channels) break;
      gather_channels<S, kVector, kTaps, kDims>(taps, features + c, held[h]);
#pragma unroll
      for (int i = 0; i < kVector; ++i) squares = fmaf(held[h][i], held[h][i], squares);
    }
    float scale = 1.0f;
    if (norms) {
      for (int c = rest; c < channels; c += step) {
        float f[kVector];
        gather_channels<S, kVector, kTaps, kDims>(taps, features + c, f);
#pragma unroll
        for (int i = 0; i < kVector; ++i) squares = fmaf(f[i], f[i], squares);
      }
      const float norm = sqrtf(sum_lanes(squares, my.lanes));
      if (present && my.first == 0) norms[p] = norm;
      scale = 1.0f / (norm < kWarpEpsilon ? kWarpEpsilon : norm);  // NaN passes
    }
    if (!present) continue;
#pragma unroll
    for (int h = 0; h < vectors; ++h) {
      const int c = my.first + h * step;
      if (c >= channels) break;
#pragma unroll
      for (int i = 0; i < kVector; ++i) held[h][i] *= scale;
      store<S, kVector>(row + c, held[h]);
    }
    for (int c = rest; c < channels; c += step) {
      float f[kVector];
      gather_channels<S, kVector, kTaps, kDims>(taps, features + c, f);
#pragma unroll
      for (int i = 0; i < kVector; ++i) f[i] *= scale;
      store<S, kVector>(row + c, f);
    }
  }
}

// Shared memory of a block that reads planes: the taps of its 32 points, a tile of channels x points, a value a point of each warp and of all.
template <int kTaps, int kDims>
struct PlaneShared {
  using Table = TapTable<kTaps, kDims>;
  float* tile;     // [channels of a tile][kPlanePitch]
  float* partial;  // [kWarpThreads / 32][32]
  float* total;    // [32]

  static int64_t bytes(int tile) { return Table::kBytes + 4 * (int64_t(tile) * kPlanePitch + kWarpThreads + 32); }
  __device__ __forceinline__ explicit PlaneShared(int tile_channels)
      : tile(reinterpret_cast<float*>(device::shared_memory() + Table::kBytes)), partial(tile + tile_channels * kPlanePitch), total(partial + kWarpThreads) {}
};

// The taps of this lane's point of a block's 32, which the first warp finds.
template <int kTaps, int kDims>
__device__ __forceinline__ PointTaps<kTaps, kDims> block_taps(const WarpProblem& w, int64_t begin, bool* inside, bool named) {
  if (threadIdx.x < 32) share_points<kTaps, kDims>(w, begin, 32, inside, named);
  __syncthreads();
  return TapTable<kTaps, kDims>(device::shared_memory()).read(threadIdx.x % 32);
}

// f(point, channel) for kVector channels of a point at a time: 32 / kVector lanes along channels and kVector points, so that a tile's banks are all used.
template <int kVector, class F>
__device__ __forceinline__ void each_vector(int channels, const F& f) {
  constexpr int along = 32 / kVector;
  const int lane = threadIdx.x % 32;
  for (int block = threadIdx.x / 32; block < along * ((channels + 31) / 32); block += kWarpThreads / 32) {
    const int c = block / along * 32 + lane % along * kVector;
    if (c < channels) f(block % along * kVector + lane / along, c);
  }
}

// Rows of a tile into memory, kVector neighbours at a time.
template <class S, int kVector>
__device__ __forceinline__ void store_tile(const float* tile, const float* scale, int points, int channels, int64_t row_stride, S* rows) {
  each_vector<kVector>(channels, [&](int i, int c) {
    if (i >= points) return;
    float f[kVector];
#pragma unroll
    for (int j = 0; j < kVector; ++j) f[j] = tile[(c + j) * kPlanePitch + i] * scale[i];
    store<S, kVector>(rows + i * row_stride + c, f);
  });
}

// Channels in planes, or in any strides: a lane a point, a warp a channel. Maps of no more channels than a tile are read once.
template <class S, int kTaps, int kDims>
__global__ void __launch_bounds__(kWarpThreads, 3) warp_planes(WarpProblem w, int tile, const S* features, S* rows, bool* inside, float* norms) {
  constexpr int count = PointTaps<kTaps, kDims>::kCount, warps = kWarpThreads / 32, ahead = count <= 4 ? 4 : 16 / count, wide = 16 / sizeof(S);
  const PlaneShared<kTaps, kDims> shared(tile);
  const int64_t begin = int64_t(blockIdx.x) * 32;
  const PointTaps<kTaps, kDims> taps = block_taps<kTaps, kDims>(w, begin, inside, false);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, channels = int(w.channels);
  const int points = w.count - begin < 32 ? int(w.count - begin) : 32;
  float squares = 0.0f;
  // Channels [first, first + tile), `ahead` of a warp's on their way at once.
  const bool once = channels <= tile;
  const auto read = [&](int first, bool keep) {
    const int last = channels - first < tile ? channels - first : tile;
    for (int c = warp; c < last; c += warps * ahead) {
      Bits<S, 1> bits[ahead][count];
#pragma unroll
      for (int u = 0; u < ahead; ++u)
#pragma unroll
        for (int k = 0; k < count; ++k) {
          const WarpTap t = taps.at(k);
          bits[u][k] = {};
          if (t.weight != 0.0f && c + u * warps < last) bits[u][k] = load_bits<S, 1>(features + t.offset + (first + c + u * warps) * w.stride_channel);
        }
#pragma unroll
      for (int u = 0; u < ahead; ++u) {
        float f = 0.0f;
#pragma unroll
        for (int k = 0; k < count; ++k) {
          float value[1];
          unpack<S, 1>(bits[u][k], value);
          f = fmaf(taps.at(k).weight, value[0], f);
        }
        if (c + u * warps >= last) continue;
        if (once || !keep) squares = fmaf(f, f, squares);
        if (keep) shared.tile[(c + u * warps) * kPlanePitch + lane] = f;
      }
    }
  };
  for (int first = 0; first < channels && !once && norms; first += tile) read(first, false);
  for (int first = 0; first < channels; first += tile) {
    read(first, true);
    if (first == 0) {
      shared.partial[threadIdx.x] = squares;
      __syncthreads();
      if (warp == 0) {
        float total = 0.0f;
        for (int k = 0; k < warps; ++k) total += shared.partial[k * 32 + lane];
        const float norm = sqrtf(total);
        if (norms && lane < points) norms[begin + lane] = norm;
        shared.total[lane] = norms ? 1.0f / (norm < kWarpEpsilon ? kWarpEpsilon : norm) : 1.0f;
      }
    }
    __syncthreads();
    const int last = channels - first < tile ? channels - first : tile;
    S* to = rows + begin * channels + first;
    if (channels % wide == 0)
      store_tile<S, wide>(shared.tile, shared.total, points, last, channels, to);
    else
      store_tile<S, 1>(shared.tile, shared.total, points, last, channels, to);
    __syncthreads();
  }
}

}  // namespace pix2rep
