// Region means (pool.1-3) by sorted segments, without atomics: pixels come sorted by (image, region), stable, and are summed in that order in chunks of
// kPoolChunk. A segment inside one chunk is finished there; pieces of longer ones go to the chunk's two slots (its first and its last segment) and are
// added chunk after chunk. Sums are float64: a mean is one rounding away from the exact one.
#pragma once

#include "vector.cuh"

namespace pix2rep {

constexpr int kPoolThreads = 256;
constexpr int kPoolChunk = 128;  // sorted pixels
constexpr int kPoolAhead = 8;    // pixels that a lane has under way
constexpr int kPoolPlanes = 4;   // channels that are read or written together where they are planes
constexpr int kPoolSpread = 4;   // pixels of a thread that writes rows

struct PoolProblem {
  int64_t batch, channels, pixels, regions;
  int64_t stride_batch, stride_channel, stride_pixel;  // of the features, whose spatial axes are one
};

// Sort keys, in the narrowest integers that hold them: PyTorch's radix sort takes a pass a byte.
struct PoolKeys {
  void* at;
  int bytes;  // 2, 4 or 8

  __device__ __forceinline__ int64_t operator[](int64_t i) const {
    return bytes == 2 ? static_cast<const int16_t*>(at)[i] : bytes == 4 ? static_cast<const int32_t*>(at)[i] : static_cast<const int64_t*>(at)[i];
  }
  __device__ __forceinline__ void set(int64_t i, int64_t key) const {
    if (bytes == 2) static_cast<int16_t*>(at)[i] = int16_t(key);
    else if (bytes == 4) static_cast<int32_t*>(at)[i] = int32_t(key);
    else static_cast<int64_t*>(at)[i] = key;
  }
};

// Sort key of every pixel: image * (R + 1) + region, R for none.
template <class L>
__global__ void __launch_bounds__(kPoolThreads) pool_keys(PoolProblem p, const L* labels, PoolKeys keys) {
  const int64_t at = int64_t(blockIdx.x) * kPoolThreads + threadIdx.x;
  if (at >= p.batch * p.pixels) return;
  const int64_t label = int64_t(labels[at]);
  keys.set(at, at / p.pixels * (p.regions + 1) + (label >= 0 && label < p.regions ? label : p.regions));
}

// starts [B (R + 1) + 1]: the first sorted pixel whose key is at least k; counts [B, R].
__global__ void __launch_bounds__(kPoolThreads) pool_starts(PoolProblem p, PoolKeys keys, int64_t* starts, int64_t* counts) {
  const int64_t k = int64_t(blockIdx.x) * kPoolThreads + threadIdx.x;
  if (k > p.batch * (p.regions + 1)) return;
  const auto first_of = [&](int64_t key) {
    int64_t low = 0, high = p.batch * p.pixels;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (keys[middle] < key) low = middle + 1; else high = middle;
    }
    return low;
  };
  const int64_t start = first_of(k);
  starts[k] = start;
  const int64_t image = k / (p.regions + 1), region = k - image * (p.regions + 1);
  if (image < p.batch && region < p.regions) counts[image * p.regions + region] = first_of(k + 1) - start;
}

// Sorted pixels, and where each lies in the batch.
struct PoolOrder {
  PoolKeys keys;
  const int64_t *order, *starts;
};

// The pixels [at, stop) of one key in a chunk.
struct PoolRun {
  int64_t stop, image, region;
  bool whole, first;  // the segment lies inside the chunk; it is the first of the chunk
  int64_t count;      // pixels of the segment

  __device__ __forceinline__ PoolRun(const PoolProblem& p, const PoolOrder& sorted, int64_t at, int64_t begin, int64_t end) {
    const int64_t key = sorted.keys[at], from = sorted.starts[key], to = sorted.starts[key + 1];
    stop = to < end ? to : end;
    image = key / (p.regions + 1), region = key - image * (p.regions + 1);
    whole = from >= begin && to <= end, first = from <= begin, count = to - from;
  }

  // Of a chunk's sum in channel c: to the means, done, or to a slot of the chunk.
  __device__ __forceinline__ void leave(const PoolProblem& p, int64_t chunk, int64_t c, double sum, double share, float* means, double* slots) const {
    if (whole)
      means[(image * p.regions + region) * p.channels + c] = float(sum * share);
    else
      slots[(chunk * 2 + !first) * p.channels + c] = sum;
  }
};

// f(first sorted pixel, run) of every region's run in a chunk.
template <class F>
__device__ __forceinline__ void each_run(const PoolProblem& p, const PoolOrder& sorted, int64_t begin, int64_t end, const F& f) {
  for (int64_t at = begin; at < end;) {
    const PoolRun run(p, sorted, at, begin, end);
    if (run.region < p.regions) f(at, run);
    at = run.stop;
  }
}

// Channels last: a warp a chunk and a block of channels, 2^log2_lanes lanes along channels, kVector each, and the rest of the lanes along pixels.
// means [B, R, C]; slots [chunks, 2, C].
template <class S, int kVector>
__global__ void __launch_bounds__(kPoolThreads, 2) pool_rows(PoolProblem p, int log2_lanes, int64_t channel_blocks, const S* features, PoolOrder sorted,
                                                             float* means, double* slots) {
  const int64_t total = p.batch * p.pixels, task = (int64_t(blockIdx.x) * kPoolThreads + threadIdx.x) / 32;
  const int64_t chunk = task / channel_blocks, begin = chunk * kPoolChunk, end = begin + kPoolChunk < total ? begin + kPoolChunk : total;
  const int lane = threadIdx.x % 32, lanes = 1 << log2_lanes, group = lane >> log2_lanes, groups = 32 >> log2_lanes;
  const int64_t c = (task % channel_blocks * lanes + (lane & (lanes - 1))) * kVector;
  const bool present = c < p.channels;
  if (begin >= total) return;
  each_run(p, sorted, begin, end, [&](int64_t at, const PoolRun& run) {
    const S* first = features + run.image * (p.stride_batch - p.pixels * p.stride_pixel) + c;  // of a sorted pixel counted over the batch
    double sum[kVector] = {};
    for (int64_t from = at + group; from < run.stop; from += kPoolAhead * groups) {
      Bits<S, kVector> bits[kPoolAhead];
#pragma unroll
      for (int u = 0; u < kPoolAhead; ++u) {
        bits[u] = {};
        if (present && from + u * groups < run.stop) bits[u] = load_bits<S, kVector>(first + sorted.order[from + u * groups] * p.stride_pixel);
      }
#pragma unroll
      for (int u = 0; u < kPoolAhead; ++u) {
        float value[kVector];
        unpack<S, kVector>(bits[u], value);
#pragma unroll
        for (int i = 0; i < kVector; ++i) sum[i] += value[i];
      }
    }
    for (int mask = lanes; mask < 32; mask *= 2)
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum[i] += device::shuffle_xor(sum[i], mask);
    const double share = 1.0 / double(run.count);
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (present && group == 0) run.leave(p, chunk, c + i, sum[i], share, means, slots);
  });
}

// Channels in planes: a warp a chunk and kPoolPlanes channels, lanes along sorted pixels, which are neighbours in a compact region.
template <class S>
__global__ void __launch_bounds__(kPoolThreads, 3) pool_planes(PoolProblem p, const S* features, PoolOrder sorted, float* means, double* slots) {
  const int64_t blocks = (p.channels + kPoolPlanes - 1) / kPoolPlanes, total = p.batch * p.pixels;
  const int64_t task = (int64_t(blockIdx.x) * kPoolThreads + threadIdx.x) / 32, chunk = task / blocks, c = (task - chunk * blocks) * kPoolPlanes;
  const int64_t begin = chunk * kPoolChunk, end = begin + kPoolChunk < total ? begin + kPoolChunk : total;
  const int lane = threadIdx.x % 32;
  if (begin >= total) return;
  each_run(p, sorted, begin, end, [&](int64_t at, const PoolRun& run) {
    const S* first = features + run.image * (p.stride_batch - p.pixels * p.stride_pixel) + c * p.stride_channel;
    double sum[kPoolPlanes] = {};
    for (int64_t i = at + lane; i < run.stop; i += 32) {
      const S* pixel = first + sorted.order[i] * p.stride_pixel;
      Bits<S, 1> bits[kPoolPlanes];
#pragma unroll
      for (int k = 0; k < kPoolPlanes; ++k) bits[k] = c + k < p.channels ? load_bits<S, 1>(pixel + k * p.stride_channel) : Bits<S, 1>{};
#pragma unroll
      for (int k = 0; k < kPoolPlanes; ++k) {
        float value[1];
        unpack<S, 1>(bits[k], value);
        sum[k] += value[0];
      }
    }
    const double share = 1.0 / double(run.count);
#pragma unroll
    for (int k = 0; k < kPoolPlanes; ++k) {
      const double all = sum_lanes(sum[k], 32);
      if (lane == k && c + k < p.channels) run.leave(p, chunk, c + k, all, share, means, slots);
    }
  });
}

// Segments that cross chunks, from their slots in order, in eight interleaved sums; 0 for empty regions.
__global__ void __launch_bounds__(kPoolThreads) pool_finish(PoolProblem p, const int64_t* starts, const double* slots, float* means) {
  const int64_t at = int64_t(blockIdx.x) * kPoolThreads + threadIdx.x;
  if (at >= p.batch * p.regions * p.channels) return;
  const int64_t row = at / p.channels, c = at - row * p.channels, image = row / p.regions, key = row + image;
  const int64_t begin = starts[key], end = starts[key + 1];
  if (begin == end) {
    means[at] = 0.0f;
    return;
  }
  const int64_t first = begin / kPoolChunk, last = (end - 1) / kPoolChunk;
  if (first == last) return;
  double sum[8] = {};
  for (int64_t chunk = first; chunk <= last; ++chunk) {
    const bool leads = begin <= chunk * kPoolChunk;  // the segment is the first of that chunk
    const double value = slots[(chunk * 2 + !leads) * p.channels + c];
#pragma unroll
    for (int k = 0; k < 8; ++k) sum[k] += (chunk & 7) == k ? value : 0.0;
  }
  means[at] = float((((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]))) / double(end - begin));
}

// Gradient a pixel (pool.3), from a table [B, R, C] of what each region's pixels get, in the dtype of the result.
template <class S>
__global__ void __launch_bounds__(kPoolThreads) pool_table(int64_t rows, int64_t channels, const float* grad_means, const int64_t* counts, S* table) {
  const int64_t at = int64_t(blockIdx.x) * kPoolThreads + threadIdx.x;
  if (at >= rows * channels) return;
  const int64_t count = counts[at / channels];
  table[at] = S(count > 0 ? __fdiv_rn(grad_means[at], float(count)) : 0.0f);
}

// kVector neighbouring channels of kPoolSpread pixels a thread. grad [B, *S, C], counted in vectors: else nvcc stores four bytes at a time.
template <class S, class L, int kVector>
__global__ void __launch_bounds__(kPoolThreads) pool_spread_rows(PoolProblem p, const L* labels, const S* table, Bits<S, kVector>* grad) {
  const int64_t at = int64_t(blockIdx.x) * kPoolThreads + threadIdx.x, vectors = p.channels / kVector, total = p.batch * p.pixels;
  const int64_t block = at / vectors, vector = at - block * vectors, place = block * kPoolSpread;
  if (place >= total) return;
  const int64_t image = place / p.pixels;
  Bits<S, kVector> out[kPoolSpread];
#pragma unroll
  for (int u = 0; u < kPoolSpread; ++u) {
    out[u] = {};
    if (place + u >= total) continue;
    const int64_t label = int64_t(labels[place + u]);
    int64_t row = image;
    while (place + u >= (row + 1) * p.pixels) ++row;
    if (label >= 0 && label < p.regions) out[u] = load_bits<S, kVector>(table + (row * p.regions + label) * p.channels + vector * kVector);
  }
#pragma unroll
  for (int u = 0; u < kPoolSpread; ++u)
    if (place + u < total) grad[(place + u) * vectors + vector] = out[u];
}

// kVector neighbouring pixels of kPoolPlanes channels a thread. grad [B, C, *S], counted in vectors.
template <class S, class L, int kVector>
__global__ void __launch_bounds__(kPoolThreads) pool_spread_planes(PoolProblem p, const L* labels, const S* table, Bits<S, kVector>* grad) {
  const int64_t at = int64_t(blockIdx.x) * kPoolThreads + threadIdx.x, vectors = p.pixels / kVector, blocks = (p.channels + kPoolPlanes - 1) / kPoolPlanes;
  const int64_t plane = at / vectors, vector = at - plane * vectors, image = plane / blocks, c = (plane - image * blocks) * kPoolPlanes;
  if (image >= p.batch) return;
  int64_t row[kVector];  // of the table; -1 for none
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const int64_t label = int64_t(labels[image * p.pixels + vector * kVector + i]);
    row[i] = label >= 0 && label < p.regions ? (image * p.regions + label) * p.channels + c : -1;
  }
#pragma unroll
  for (int k = 0; k < kPoolPlanes; ++k) {
    if (c + k >= p.channels) break;
    S out[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) out[i] = row[i] >= 0 ? table[row[i] + k] : S(0.0f);
    Bits<S, kVector> bits;
    __builtin_memcpy(&bits, out, sizeof(bits));
    grad[(image * p.channels + c + k) * vectors + vector] = bits;
  }
}

}  // namespace pix2rep
