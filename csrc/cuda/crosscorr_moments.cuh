// Moments (crosscorr.1-5) of one range of rows and one tile of D1 x D2 a block, from one read of both views.
//
// Rows pass through shared memory as they are stored; the pivot is taken off what the tensor cores are given, two 16-bit values an instruction, and sums and
// squares are taken of the same numbers, each by the one warp that they belong to. Rows that take no part are replaced by the pivot on their way in.
// 16-bit products add up in the tensor cores, which cut digits off: 2^-24 of the sum a step. float32's start anew every kStepRows rows.
#pragma once

#include "crosscorr_sweeps.h"

namespace pix2rep::crosscorr {

// Warps of 16 kM features of x by 8 kN of y.
template <class T_, int kWarpsX_, int kWarpsY_, int kM_, int kN_, int kStages_, int kBlocks_>
struct Shape {
  using T = T_;
  static constexpr int kWarpsX = kWarpsX_, kWarpsY = kWarpsY_, kM = kM_, kN = kN_, kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;  // on a multiprocessor, by their registers
  static constexpr int kThreads = 32 * kWarpsX * kWarpsY;
  static constexpr int kFeaturesX = kWarpsX * kM * 16, kFeaturesY = kWarpsY * kN * 8;
  static constexpr int kPanelsX = kFeaturesX / kPanel<T>, kPanelsY = kFeaturesY / kPanel<T>;
  static constexpr int kPanelBytes = kStepRows * kRowBytes;
  static constexpr int kSlotBytes = (kPanelsX + kPanelsY) * kPanelBytes + kRowBytes;  // and the weights
  static constexpr int kSharedBytes = kStages * kSlotBytes;
  static constexpr int kSumsX = kM / kWarpsY, kSumsY = kN / kWarpsX;  // 16 and 8 features whose sums are a warp's
  static_assert(kM % kWarpsY == 0 && kN % (2 * kWarpsX) == 0);
};

// What a lane has of its warp's tile, and of sums and squares.
template <class S>
struct Totals {
  float product[S::kM][S::kN][4];
  float sum_x[S::kSumsX][2], square_x[S::kSumsX][2], sum_y[S::kSumsY], square_y[S::kSumsY];
};

// Which m and n a warp sums, -1 for none, and where its features begin.
struct Place {
  int x, y, share_x, share_y;
};

template <class S>
struct Pivots {  // of the lane's features: two of one 16-bit value, or float32
  using Value = std::conditional_t<sizeof(typename S::T) == 2, uint32_t, float>;
  Value x[S::kM][2], y[S::kN];

  __device__ __forceinline__ Pivots(const MomentsTask& task, int x_first, int y_first) {
    const int g = threadIdx.x % 32 / 4;
    const auto read = [](const void* from, int feature, int d) -> Value {
      if (feature >= d) return 0;
      if constexpr (sizeof(typename S::T) == 2)
        return static_cast<const uint16_t*>(from)[feature] * 0x10001u;
      else
        return static_cast<const float*>(from)[feature];
    };
#pragma unroll
    for (int m = 0; m < S::kM; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) x[m][h] = read(task.pivot_x, x_first + 16 * m + 8 * h + g, task.x.d);
#pragma unroll
    for (int n = 0; n < S::kN; ++n) y[n] = read(task.pivot_y, y_first + 8 * n + g, task.y.d);
  }
};

template <class T, bool kWeighted>
__device__ __forceinline__ void add_pair(float& sum, float& square, uint32_t pair, float2 w) {
  const float2 u = unpack<T>(pair);
  const float2 wu = kWeighted ? float2{u.x * w.x, u.y * w.y} : u;
  sum += wu.x, sum += wu.y;                    // (crosscorr.3)
  square += wu.x * u.x, square += wu.y * u.y;  // (crosscorr.4)
}

// One step of 16-bit rows.
template <class S, bool kWeighted>
__device__ __forceinline__ void add_step(Totals<S>& total, const Pivots<S>& pivots, const unsigned char* slot, const float* weights, const Place& place) {
  using T = typename S::T;
  const int lane = threadIdx.x % 32, row = lane & 7, tile = lane >> 3;
  const auto at = [&](int panel, int first, int rows, int chunk) {
    return device::shared_address(slot + (panel + first / kPanel<T>) * S::kPanelBytes + (rows * 8 + row) * kRowBytes +
                                  ((chunk ^ row ^ (first % kPanel<T> / 8)) << 4));
  };
  const auto a = at(0, place.x, tile >> 1, tile & 1), b = at(S::kPanelsX, place.y, tile & 1, tile >> 1);
  [[maybe_unused]] constexpr int kUnroll = kWeighted ? 1 : 2;  // its registers are few
#pragma unroll kUnroll
  for (int k = 0; k < kStepRows / 16; ++k) {
    uint32_t x[S::kM][4];
    float2 w[2] = {};
    if (kWeighted)
      for (int h = 0; h < 2; ++h) w[h] = *reinterpret_cast<const float2*>(weights + 16 * k + 8 * h + lane % 4 * 2);
#pragma unroll
    for (int m = 0; m < S::kM; ++m) {
      device::load_tiles<true>(x[m], (a ^ (m << 5)) + k * 16 * kRowBytes);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[m][i] = device::subtract(x[m][i], pivots.x[m][i % 2], T());  // (crosscorr.1)
    }
#pragma unroll
    for (int share = 0; share < S::kWarpsY; ++share)
      if (share == place.share_x) {
#pragma unroll
        for (int m = 0; m < S::kSumsX; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            add_pair<T, kWeighted>(total.sum_x[m][i % 2], total.square_x[m][i % 2], x[share * S::kSumsX + m][i], w[i / 2]);
      }
    if (kWeighted)
#pragma unroll
      for (int m = 0; m < S::kM; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 u = unpack<T>(x[m][i]);
          x[m][i] = device::pack(u.x * w[i / 2].x, u.y * w[i / 2].y, T());
        }
#pragma unroll
    for (int pair = 0; pair < S::kN / 2; ++pair) {
      uint32_t y[4];
      device::load_tiles<true>(y, (b ^ (pair << 5)) + k * 16 * kRowBytes);
#pragma unroll
      for (int i = 0; i < 4; ++i) y[i] = device::subtract(y[i], pivots.y[2 * pair + i / 2], T());
      if (2 * pair / S::kSumsY == place.share_y) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int n = (2 * pair + i / 2) % S::kSumsY;
          add_pair<T, kWeighted>(total.sum_y[n], total.square_y[n], y[i], w[i % 2]);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int m = 0; m < S::kM; ++m)
          device::multiply(total.product[m][2 * pair + half], x[m], {y[2 * half], y[2 * half + 1]}, T());  // (crosscorr.5)
    }
  }
}

// One step of float32 rows, by itself.
template <class S, bool kWeighted>
__device__ __forceinline__ void add_rows(Totals<S>& total, const Pivots<S>& pivots, const unsigned char* slot, const float* weights, const Place& place) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const unsigned char* const a = slot + place.x / kPanel<float> * S::kPanelBytes + t * kRowBytes;
  const unsigned char* const b = slot + (S::kPanelsX + place.y / kPanel<float>) * S::kPanelBytes + t * kRowBytes;
  const int way = (((g >> 2) ^ (t << 1)) << 4) + g % 4 * 4;
  // Of feature 8 k + g of the warp's, and row r + t.
  const auto value = [way](const unsigned char* from, int k, int r) {
    return *reinterpret_cast<const float*>(from + (way ^ (k % 4 << 5)) + k / 4 * S::kPanelBytes + r * kRowBytes);
  };
#pragma unroll 1
  for (int k = 0; k < kStepRows / 8; ++k) {
    Split x[S::kM][4];
    const float w[2] = {kWeighted ? weights[8 * k + t] : 1.0f, kWeighted ? weights[8 * k + 4 + t] : 1.0f};
#pragma unroll
    for (int m = 0; m < S::kM; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float u = value(a, 2 * m + i % 2, 8 * k + i / 2 * 4) - pivots.x[m][i % 2], wu = kWeighted ? u * w[i / 2] : u;
        x[m][i] = split(wu);
        if (m / S::kSumsX != place.share_x) continue;
        total.sum_x[m % S::kSumsX][i % 2] += wu, total.square_x[m % S::kSumsX][i % 2] += wu * u;
      }
#pragma unroll
    for (int n = 0; n < S::kN; ++n) {
      Split y[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float v = value(b, n, 8 * k + 4 * i) - pivots.y[n], wv = kWeighted ? v * w[i] : v;
        y[i] = split(v);
        if (n / S::kSumsY != place.share_y) continue;
        total.sum_y[n % S::kSumsY] += wv, total.square_y[n % S::kSumsY] += wv * v;
      }
#pragma unroll
      for (int m = 0; m < S::kM; ++m) multiply_split(total.product[m][n], x[m], y);
    }
  }
}

template <class S>
__device__ __forceinline__ void add(Totals<S>& total, const Totals<S>& part) {
  const auto each = [](auto& to, const auto& from) {
    float* t = reinterpret_cast<float*>(&to);
    const float* f = reinterpret_cast<const float*>(&from);
#pragma unroll
    for (int i = 0; i < int(sizeof(to) / 4); ++i) t[i] += f[i];
  };
  each(total, part);
}

// The weights of the next rows to come, read one step ahead, and the copies of those rows.
template <class S, bool kWeighted>
class Rows {
  using T = typename S::T;

 public:
  __device__ __forceinline__ Rows(const MomentsTask& task, int first, int last, int x, int y, float unit)
      : task_(task), next_(first), last_(last), x_(x), y_(y), per_unit_(1 / unit) {
    read_weight();
    for (int stage = 0; stage < S::kStages - 1; ++stage) issue();
  }

  // The next step's panels; its weights follow them.
  __device__ __forceinline__ const unsigned char* next() {
    device::copy_wait<S::kStages - 2>();
    __syncthreads();
    issue();
    return device::shared_memory() + offset_;  // which is free again by the next call
  }

 private:
  __device__ __forceinline__ int64_t row() const { return next_ * int64_t(kStepRows) + threadIdx.x % 32; }
  __device__ __forceinline__ void read_weight() {
    weight_ = 0;
    if (next_ < last_ && row() < task_.n) weight_ = kWeighted ? task_.weight[row() * task_.weight_stride] : 1;
  }

  __device__ __forceinline__ void issue() {
    if (next_ < last_) {
      unsigned char* to = device::shared_memory() + offset_;
      const uint32_t mask = device::ballot(weight_ != 0);
      const auto alive = [mask](int r) { return mask >> r & 1; };
      if (kWeighted && threadIdx.x < kStepRows)
        reinterpret_cast<float*>(to + S::kSlotBytes - kRowBytes)[threadIdx.x] = weight_ * per_unit_;
      const T *pivot_x = static_cast<const T*>(task_.pivot_x), *pivot_y = static_cast<const T*>(task_.pivot_y);
      const int64_t row = next_ * int64_t(kStepRows);
      const bool whole = mask == ~0u;
      copy_rows<T, true, S::kThreads>(to, task_.x, row, kStepRows, x_, S::kPanelsX, whole, alive, pivot_x);
      copy_rows<T, true, S::kThreads>(to + S::kPanelsX * S::kPanelBytes, task_.y, row, kStepRows, y_, S::kPanelsY, whole, alive, pivot_y);
      ++next_;
      read_weight();
    }
    device::copy_commit();
    offset_ = offset_ == (S::kStages - 1) * S::kSlotBytes ? 0 : offset_ + S::kSlotBytes;
  }

  const MomentsTask& task_;
  int next_, last_, x_, y_, offset_ = 0;
  float per_unit_, weight_;
};

template <class S, bool kWeighted>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) moments(MomentsTask task) {
  using T = typename S::T;
  const int tiles = task.tiles_x * task.tiles_y, tile_x = blockIdx.x % tiles / task.tiles_y, tile_y = blockIdx.x % task.tiles_y;
  const int split = blockIdx.x / tiles, all = int((task.n + kStepRows - 1) / kStepRows), first = split * task.steps;
  const int last = first + task.steps < all ? first + task.steps : all;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_x = warp / S::kWarpsY, warp_y = warp % S::kWarpsY;
  const Place place{warp_x * 16 * S::kM, warp_y * 8 * S::kN, tile_y == 0 ? warp_y : -1, tile_x == 0 ? warp_x : -1};
  const int x_first = tile_x * S::kFeaturesX, y_first = tile_y * S::kFeaturesY;
  // Times a weight, a shifted value must fit into 16 bits.
  const float unit = kWeighted && sizeof(T) == 2 ? power_of_two(task.largest) : 1.0f;

  const Pivots<S> pivots(task, x_first + place.x, y_first + place.y);
  Totals<S> total{};
  Rows<S, kWeighted> rows(task, first, last, x_first, y_first, unit);
  for (int step = first; step < last; ++step) {
    const unsigned char* slot = rows.next();
    const float* weights = reinterpret_cast<const float*>(slot + S::kSlotBytes - kRowBytes);
    if constexpr (sizeof(T) == 2) {
      add_step<S, kWeighted>(total, pivots, slot, weights, place);
    } else {
      Totals<S> part{};
      add_rows<S, kWeighted>(part, pivots, slot, weights, place);
      add(total, part);
    }
  }

  const int64_t d1 = task.x.d, d2 = task.y.d;
  float* const product = task.parts + int64_t(split) * (d1 * d2 + 2 * (d1 + d2));
  float *const sum_x = product + d1 * d2, *const sum_y = sum_x + d1, *const square_x = sum_y + d2, *const square_y = square_x + d1;
  const int64_t x = x_first + place.x + lane / 4, y = y_first + place.y + lane / 4;
#pragma unroll
  for (int m = 0; m < S::kM; ++m)
#pragma unroll
    for (int n = 0; n < S::kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = x + 16 * m + i / 2 * 8, column = y_first + place.y + 8 * n + lane % 4 * 2 + i % 2;
        if (row < d1 && column < d2) product[row * d2 + column] = total.product[m][n][i] * unit;
      }
  const auto store_sum = [&](float value, float* to, int64_t feature, int64_t d, int share) {
    value = sum_lanes(value, 4);
    if (share >= 0 && lane % 4 == 0 && feature < d) to[feature] = value * unit;
  };
#pragma unroll
  for (int m = 0; m < S::kSumsX; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t feature = x + 16 * (place.share_x * S::kSumsX + m) + 8 * h;
      store_sum(total.sum_x[m][h], sum_x, feature, d1, place.share_x), store_sum(total.square_x[m][h], square_x, feature, d1, place.share_x);
    }
#pragma unroll
  for (int n = 0; n < S::kSumsY; ++n) {
    const int64_t feature = y + 8 * (place.share_y * S::kSumsY + n);
    store_sum(total.sum_y[n], sum_y, feature, d2, place.share_y), store_sum(total.square_y[n], square_y, feature, d2, place.share_y);
  }
}

}  // namespace pix2rep::crosscorr
