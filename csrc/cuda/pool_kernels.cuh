// Region means (pool.1-3) by sorted segments, without atomics: pixels come sorted by (image, region), stable, and are summed in that order in chunks of
// kPoolChunk. A segment inside one chunk is finished there; pieces of longer ones go to the chunk's two slots (its first and its last segment) and are
// added chunk after chunk. Sums are float64: a mean is one rounding away from the exact one.
#pragma once

#include "vector.cuh"

namespace pix2rep {

constexpr int kPoolThreads = 256;
constexpr int kPoolChunk = 256;  // sorted pixels

struct PoolProblem {
  int64_t batch, channels, pixels, regions;
  int64_t stride_batch, stride_channel, stride_pixel;  // of the features, whose spatial axes are one
};

// Sort key of every pixel: image * (R + 1) + region, R for none.
template <class L>
__global__ void __launch_bounds__(kPoolThreads) pool_keys(PoolProblem p, const L* labels, int64_t* keys) {
  const int64_t at = int64_t(blockIdx.x) * kPoolThreads + threadIdx.x;
  if (at >= p.batch * p.pixels) return;
  const int64_t label = int64_t(labels[at]);
  keys[at] = at / p.pixels * (p.regions + 1) + (label >= 0 && label < p.regions ? label : p.regions);
}

// starts [B (R + 1) + 1]: the first sorted pixel whose key is at least k; counts [B, R].
__global__ void __launch_bounds__(kPoolThreads) pool_starts(PoolProblem p, const int64_t* keys, int64_t* starts, int64_t* counts) {
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

// Where the sum of one run of equal keys in a chunk goes: to the means, done, or to a slot of the chunk.
struct PoolRun {
  bool whole, first;  // the segment lies inside the chunk; it is the first of the chunk

  __device__ PoolRun(const int64_t* starts, int64_t key, int64_t begin, int64_t end)
      : whole(starts[key] >= begin && starts[key + 1] <= end), first(starts[key] <= begin) {}
};

// Channels last: a warp a chunk and a block of 32 kVector channels, lanes along channels. means [B, R, C]; slots [chunks, 2, C].
template <class S, int kVector>
__global__ void __launch_bounds__(kPoolThreads, 3) pool_rows(PoolProblem p, int64_t channel_blocks, const S* features, const int64_t* keys, const int64_t* order,
                                                          const int64_t* starts, float* means, double* slots) {
  const int64_t total = p.batch * p.pixels, task = (int64_t(blockIdx.x) * kPoolThreads + threadIdx.x) / 32;
  const int64_t chunk = task / channel_blocks, begin = chunk * kPoolChunk, end = begin + kPoolChunk < total ? begin + kPoolChunk : total;
  const int64_t c = (task % channel_blocks * 32 + threadIdx.x % 32) * kVector;
  if (begin >= total || c >= p.channels) return;
  for (int64_t at = begin; at < end;) {
    const int64_t key = keys[at], stop = starts[key + 1] < end ? starts[key + 1] : end, image = key / (p.regions + 1), region = key - image * (p.regions + 1);
    if (region == p.regions) {
      at = stop;
      continue;
    }
    const S* first = features + image * (p.stride_batch - p.pixels * p.stride_pixel) + c;  // of a sorted pixel counted over the batch
    double sum[kVector] = {};
    for (; at < stop; ++at) {
      float value[kVector];
      load<S, kVector>(first + order[at] * p.stride_pixel, value);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum[i] += value[i];
    }
    const PoolRun run(starts, key, begin, end);
    const double count = double(starts[key + 1] - starts[key]);
    float* mean = means + (image * p.regions + region) * p.channels + c;
    double* slot = slots + (chunk * 2 + !run.first) * p.channels + c;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (run.whole) mean[i] = float(sum[i] / count);
      else slot[i] = sum[i];
    }
  }
}

// Channels in planes: a warp a chunk and a channel, lanes along sorted pixels, which are neighbours in a compact region.
template <class S>
__global__ void __launch_bounds__(kPoolThreads, 3) pool_planes(PoolProblem p, const S* features, const int64_t* keys, const int64_t* order,
                                                            const int64_t* starts, float* means, double* slots) {
  const int64_t total = p.batch * p.pixels, task = (int64_t(blockIdx.x) * kPoolThreads + threadIdx.x) / 32;
  const int64_t chunk = task / p.channels, c = task - chunk * p.channels, begin = chunk * kPoolChunk;
  const int64_t end = begin + kPoolChunk < total ? begin + kPoolChunk : total;
  const int lane = threadIdx.x % 32;
  if (begin >= total) return;
  for (int64_t at = begin; at < end;) {
    const int64_t key = keys[at], stop = starts[key + 1] < end ? starts[key + 1] : end, image = key / (p.regions + 1), region = key - image * (p.regions + 1);
    if (region == p.regions) {
      at = stop;
      continue;
    }
    const S* first = features + image * (p.stride_batch - p.pixels * p.stride_pixel) + c * p.stride_channel;
    double sum = 0;
    for (int64_t i = at + lane; i < stop; i += 32) sum += double(float(first[order[i] * p.stride_pixel]));
    sum = sum_lanes(sum, 32);
    at = stop;
    const PoolRun run(starts, key, begin, end);
    if (lane != 0) continue;
    if (run.whole)
      means[(image * p.regions + region) * p.channels + c] = float(sum / double(starts[key + 1] - starts[key]));
    else
      slots[(chunk * 2 + !run.first) * p.channels + c] = sum;
  }
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

// kVector neighbours of the result a thread; in planes they are pixels, else channels.
template <class S, class L, int kVector, bool kLast>
__global__ void __launch_bounds__(kPoolThreads) pool_spread(PoolProblem p, const L* labels, const S* table, S* grad) {
  const int64_t at = (int64_t(blockIdx.x) * kPoolThreads + threadIdx.x) * kVector;
  if (at >= p.batch * p.pixels * p.channels) return;
  Pack<S, kVector> out;
  if constexpr (kLast) {
    const int64_t place = at / p.channels, c = at - place * p.channels, label = int64_t(labels[place]);
    if (label >= 0 && label < p.regions)
      out = *reinterpret_cast<const Pack<S, kVector>*>(table + (place / p.pixels * p.regions + label) * p.channels + c);
    else
      for (int i = 0; i < kVector; ++i) out.value[i] = S(0.0f);
  } else {
    const int64_t plane = at / p.pixels, place = at - plane * p.pixels, image = plane / p.channels, c = plane - image * p.channels;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const int64_t label = int64_t(labels[image * p.pixels + place + i]);
      out.value[i] = label >= 0 && label < p.regions ? table[(image * p.regions + label) * p.channels + c] : S(0.0f);
    }
  }
  *reinterpret_cast<Pack<S, kVector>*>(grad + at) = out;
}

}  // namespace pix2rep
