// Gradients of both views (crosscorr.6) from one read of each, for 16-bit views of up to 256 features: gP stays in shared memory, for x as it is and for y
// transposed on its way to the tensor cores, while rows of both views stream past. A row of the result depends on that row alone, so that rows left out
// need no care until they are stored; the pivots are in `constant`.
#pragma once

#include "crosscorr_sweeps.h"

namespace pix2rep::crosscorr {

constexpr int kJobRows = 32;  // by kGradientFeatures of one gradient: a warp's share
constexpr int kGradientStages = 3;

// The warps' shares: kGradientFeatures of x or of y each, of as many rows as threads are left for.
struct Jobs {
  int of_x, of_y, threads, groups;

  __host__ __device__ explicit Jobs(const GradientsTask& task)
      : of_x(task.x.grad ? task.x.padded / kGradientFeatures : 0),
        of_y(task.y.grad ? task.y.padded / kGradientFeatures : 0),
        threads(count() <= 4 ? 128 : 256),
        groups(threads / 32 / count()) {}
  __host__ __device__ int count() const { return of_x + of_y; }
  __host__ __device__ int rows() const { return groups * kJobRows; }
};

struct Shared {  // bytes
  int operand, slot, all;

  __host__ __device__ Shared(const GradientsTask& task, int rows)
      : operand(task.x.padded * task.y.padded * 2), slot(rows * (task.x.padded + task.y.padded) * 2), all(operand + kGradientStages * slot) {}
};

using Product = float[2][kGradientFeatures / 8][4];

// total = t g^T of 32 rows and 64 own features over `panels` panels of t. g lies as [own][other], or kTransposed as [other][own].
template <class T, bool kTransposed>
__device__ __forceinline__ void multiply_rows(Product& total, const unsigned char* t, int t_panel_bytes, int panels, const unsigned char* g,
                                              int g_panel_bytes) {
  const int lane = threadIdx.x % 32;
  auto a = device::shared_address(t + (lane & 15) * kRowBytes + (((lane >> 4) ^ (lane & 7)) << 4));
  auto b = kTransposed ? device::shared_address(g + (lane & 15) * kRowBytes + (((lane >> 4) ^ (lane & 7)) << 4))
                       : device::shared_address(g + ((lane & 7) + ((lane >> 4) << 3)) * kRowBytes + ((((lane >> 3) & 1) ^ (lane & 7)) << 4));
#pragma unroll 1
  for (int panel = 0; panel < panels; ++panel, a += t_panel_bytes, b += g_panel_bytes)
#pragma unroll
    for (int k = 0; k < kPanel<T> / 16; ++k) {
      uint32_t x[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) device::load_tiles<false>(x[m], (a ^ (k << 5)) + m * 16 * kRowBytes);
#pragma unroll
      for (int pair = 0; pair < kGradientFeatures / 16; ++pair) {
        uint32_t y[4];
        device::load_tiles<kTransposed>(y, kTransposed ? (b ^ (pair << 5)) + k * 16 * kRowBytes : (b ^ (k << 5)) + pair * 16 * kRowBytes);
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int m = 0; m < 2; ++m) device::multiply(total[m][2 * pair + half], x[m], {y[2 * half], y[2 * half + 1]}, T());
      }
    }
}

// w (constant + slope t + unit total), where w is not 0.
__device__ __forceinline__ float affine(float constant, float slope, float value, float unit, float total, float weight) {
  return weight * (constant + slope * value + unit * total);
}

// Where one gradient goes.
struct Result {
  const float *constant, *slope;  // of the first feature
  void* grad;                     // of that
  int d, left;                    // features of a row; from the first on
};

using Own = uint32_t[4][kGradientFeatures / 8];

// What a lane has of its view's values where it has the product: of row 8 r + lane / 4, two neighbours.
__device__ __forceinline__ void load_own(Own& own, const unsigned char* from) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 4; ++r)
#pragma unroll
    for (int n = 0; n < kGradientFeatures / 8; ++n)
      own[r][n] = *reinterpret_cast<const uint32_t*>(from + (8 * r + lane / 4) * kRowBytes + ((n ^ (lane / 4)) << 4) + lane % 4 * 4);
}

// Rows from `row` on, the lane's first; none from n on. Two lanes exchange what makes four neighbours of each, so that rows are written in whole 32 bytes.
template <class T, bool kWeighted>
__device__ __forceinline__ void store_rows(const GradientsTask& task, const Result& to, const Product& total, const Own& own, int64_t row, float unit) {
  const int t = threadIdx.x % 4;
  const bool odd = t % 2;
  float weight[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) weight[r] = !kWeighted ? 1.0f : row + 8 * r < task.n ? task.weight[(row + 8 * r) * task.weight_stride] : 0.0f;
#pragma unroll
  for (int pair = 0; pair < kGradientFeatures / 16; ++pair) {
    float2 c[2], s[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int feature = 16 * pair + 8 * half + 2 * t;
      c[half] = *reinterpret_cast<const float2*>(to.constant + feature), s[half] = *reinterpret_cast<const float2*>(to.slope + feature);
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {  // row 8 r + lane / 4
      uint32_t out[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* sum = &total[r / 2][2 * pair + half][r % 2 * 2];
        const float2 value = unpack<T>(own[r][2 * pair + half]);
        out[half] = device::pack(affine(c[half].x, s[half].x, value.x, unit, sum[0], weight[r]),
                                 affine(c[half].y, s[half].y, value.y, unit, sum[1], weight[r]), T());
        if (kWeighted && weight[r] == 0) out[half] = 0;
      }
      const bool present = row + 8 * r < task.n;
      uint16_t* const first = static_cast<uint16_t*>(to.grad) + (row + 8 * r) * to.d;
      const uint32_t theirs = device::shuffle_xor(odd ? out[0] : out[1], 1), mine = odd ? out[1] : out[0];
      if (to.d % 4 == 0) {
        const int feature = 16 * pair + (odd ? 8 + 2 * (t - 1) : 2 * t);
        if (present && feature < to.left) *reinterpret_cast<uint2*>(first + feature) = odd ? uint2{theirs, mine} : uint2{mine, theirs};
      } else {
        device::rarely();
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (const int feature = 16 * pair + k / 2 * 8 + 2 * t + k % 2; present && feature < to.left) first[feature] = uint16_t(out[k / 2] >> k % 2 * 16);
      }
    }
  }
}

template <class T, bool kWeighted>
__global__ void __launch_bounds__(256, 1) gradients(GradientsTask task) {
  const Jobs jobs(task);
  const int rows = jobs.rows(), panel_bytes = rows * kRowBytes, panels_x = task.x.padded / kPanel<T>, panels_y = task.y.padded / kPanel<T>;
  const Shared shared(task, rows);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, job = warp % jobs.count();
  const bool idle = warp / jobs.count() >= jobs.groups;  // it does what another does and stores nothing
  const int group = idle ? 0 : warp / jobs.count();
  const bool for_x = device::ballot(job < jobs.of_x) != 0;  // by vote, which the compiler knows to be one for the warp
  // Of the two warps that share a scheduler one stores its rows a tile late, while the other multiplies.
  const bool late = device::ballot(jobs.threads == 256 && warp < 4) != 0;
  const int block = for_x ? job : job - jobs.of_x;  // of own features
  unsigned char *const operand = device::shared_memory(), *const ring = operand + shared.operand;
  const float unit = power_of_two(task.largest) / task.top;
  const int first_feature = block * kGradientFeatures, d = for_x ? task.x.view.d : task.y.view.d;
  const Result result{(for_x ? task.x.constant : task.y.constant) + first_feature, (for_x ? task.x.slope : task.y.slope) + first_feature,
                      static_cast<T*>(for_x ? task.x.grad : task.y.grad) + first_feature, d, d - first_feature};

  // gP [D1][D2] in panels of D2.
  for (int at = threadIdx.x; at < panels_y * task.x.padded * 8; at += blockDim.x) {
    const int chunk = at % 8, row = at / 8 % task.x.padded, panel = at / 8 / task.x.padded;
    device::copy_async(operand + (panel * task.x.padded + row) * kRowBytes + ((chunk ^ (row & 7)) << 4),
                       static_cast<const T*>(task.x.g) + row * task.y.padded + panel * kPanel<T> + chunk * 8);
  }

  int64_t next = blockIdx.x;
  int slot = 0;
  const auto issue = [&] {
    if (next * rows < task.n) {
      const int64_t first = next * rows, left = task.n - first;
      const auto alive = [left](int r) { return r < left; };
      unsigned char* to = ring + slot * shared.slot;
      copy_rows<T, false, 0>(to, task.x.view, first, rows, 0, panels_x, left >= rows, alive, static_cast<const T*>(nullptr));
      copy_rows<T, false, 0>(to + panels_x * panel_bytes, task.y.view, first, rows, 0, panels_y, left >= rows, alive, static_cast<const T*>(nullptr));
    }
    device::copy_commit();
    next += gridDim.x, slot = slot == kGradientStages - 1 ? 0 : slot + 1;
  };
  for (int stage = 0; stage < kGradientStages - 1; ++stage) issue();
  Product total = {};
  Own own = {};
  int64_t row = task.n;
  for (int64_t tile = blockIdx.x; tile * rows < task.n; tile += gridDim.x) {
    device::copy_wait<kGradientStages - 2>();
    __syncthreads();
    issue();
    if (late) store_rows<T, kWeighted>(task, result, total, own, row, unit);
#pragma unroll
    for (int i = 0; i < int(sizeof(total) / 4); ++i) (&total[0][0][0])[i] = 0;
    const unsigned char* x = ring + slot * shared.slot + group * kJobRows * kRowBytes;
    const unsigned char* y = x + panels_x * panel_bytes;
    row = idle ? task.n : tile * rows + group * kJobRows + lane / 4;
    if (for_x)
      multiply_rows<T, false>(total, y, panel_bytes, panels_y, operand + block * kGradientFeatures * kRowBytes, task.x.padded * kRowBytes);
    else
      multiply_rows<T, true>(total, x, panel_bytes, panels_x, operand + block * task.x.padded * kRowBytes, kPanel<T> * kRowBytes);
    load_own(own, (for_x ? x : y) + block * panel_bytes);
    if (!late) store_rows<T, kWeighted>(task, result, total, own, row, unit);
  }
  if (late) store_rows<T, kWeighted>(task, result, total, own, row, unit);
}

}  // namespace pix2rep::crosscorr
