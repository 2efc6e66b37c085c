// Tiles of operands on their way through shared memory, and their products on the tensor cores.
//
// A panel is 64 features of some rows, 128 bytes a row; the 16-byte column c of row r lies at c ^ (r % 8), so that the eight rows that one
// instruction reads or one copy writes touch all banks. A warp multiplies 16 kM rows by 64 columns.
#pragma once

#include "infonce_operands.cuh"

namespace pix2rep::infonce {

constexpr int kColumns = 64;
constexpr int kRowBytes = 2 * kPanel;

template <int kM>
using Product = float[kM][kColumns / 8][4];

template <int kM>
__device__ __forceinline__ void clear(Product<kM>& s, float value = 0) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[m][n][i] = value;
}

// f(element, row, column) for what this lane holds of a product.
template <int kM, class F>
__device__ __forceinline__ void each(Product<kM>& s, int row, int column, const F& f) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) f(s[m][n][i], row + m * 16 + i / 2 * 8, column + n * 8 + i % 2);
}

// Rows [0, kRows) of a panel into shared memory; features from `width` on are 0. `from` is the panel's first value.
template <int kThreads, int kRows>
__device__ __forceinline__ void copy_panel(unsigned char* to, const uint16_t* from, int64_t stride, int width) {
  static_assert(kThreads % 64 == 0 && kRows * 8 % kThreads == 0);
  constexpr int kStep = kThreads / 8;  // rows, a multiple of 8: the swizzle is the same in each
  const int row = threadIdx.x / 8, chunk = threadIdx.x % 8;
  to += row * kRowBytes + ((chunk ^ (row & 7)) << 4);
  from += row * stride + chunk * 8;
#pragma unroll
  for (int k = 0; k < kRows / kStep; ++k) {
    device::copy_async(to + k * kStep * kRowBytes, from, chunk * 8 < width);
    from += kStep * stride;
  }
}

// s += x y^T over 16 features: rows of x from its lane's place `a`, columns of y from `b`.
template <int kM>
__device__ __forceinline__ void add_step(Product<kM>& s, const unsigned char* a, const unsigned char* b) {
  uint32_t x[kM][4];
#pragma unroll
  for (int m = 0; m < kM; ++m) device::load_tiles<false>(x[m], a + m * 16 * kRowBytes);
#pragma unroll
  for (int n = 0; n < kColumns / 16; ++n) {
    uint32_t y[4];
    device::load_tiles<false>(y, b + n * 16 * kRowBytes);
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int m = 0; m < kM; ++m) device::multiply(s[m][2 * n + half], x[m], {y[2 * half], y[2 * half + 1]}, torch::headeronly::Half());
  }
}

// s += x y^T over a panel of `width` features; x and y are the warp's first row and column.
template <int kM>
__device__ __forceinline__ void add_panel(Product<kM>& s, const unsigned char* x, const unsigned char* y, int width) {
  const int lane = threadIdx.x % 32;
  const int a = (lane & 15) * kRowBytes + (((lane >> 4) ^ (lane & 7)) << 4);
  const int b = ((lane & 7) + ((lane >> 4) << 3)) * kRowBytes + ((((lane >> 3) & 1) ^ (lane & 7)) << 4);
  if (width >= kPanel) {
#pragma unroll
    for (int k = 0; k < kPanel / 16; ++k) add_step<kM>(s, x + (a ^ (k << 5)), y + (b ^ (k << 5)));
  } else {
#pragma unroll 1
    for (int k = 0; 16 * k < width; ++k) add_step<kM>(s, x + (a ^ (k << 5)), y + (b ^ (k << 5)));
  }
}

// What a block walks through, in shared memory: in registers it would take the place of products.
struct Walk {
  const uint16_t *own, *stream, *plain;  // first rows of the block and of the stream; the gradient's features of the stream
  const float* vector;                   // a value of each streamed row, or nullptr
  float* out;                            // where sums of the streamed rows, or products of the own ones, belong
  int own_first, stream_group, group;
  float shift;  // that exp2 takes off; with `online` a row's own lse
  int online;
  int last, resident, kept_bytes;        // tile to stop at; whether kept panels stay, and their bytes
  int d, width, plain_width, panels, steps;  // steps: panels that a tile's similarities take
  int extra, extra_stride, extra_width;      // panels of the gradient
  int out_width;

  __device__ Walk(const Operand& own, const Operand& stream, int group, int own_first, int last, bool resident)
      : own(own.scaled + (group * own.padded + own_first) * own.scaled_width()),
        stream(stream.scaled + group % stream.groups * stream.padded * stream.scaled_width()),
        plain(nullptr),
        vector(nullptr),
        out(nullptr),
        own_first(own_first),
        stream_group(int(group % stream.groups)),
        group(group),
        shift(0),
        online(0),
        last(last),
        resident(resident),
        kept_bytes(int(resident_bytes(own, resident))),
        d(own.d),
        width(own.scaled_width()),
        plain_width(own.plain_width()),
        panels((own.d + kPanel - 1) / kPanel),
        steps(own.split ? 3 * panels : panels),
        extra(0),
        extra_stride(0),
        extra_width(0),
        out_width(0) {}

  __host__ __device__ static int64_t resident_bytes(const Operand& own, bool resident) {
    return resident ? (own.scaled_width() + kPanel - 1) / kPanel * kTile * int64_t(kRowBytes) : 0;
  }
};
constexpr int kWalkBytes = 256;
static_assert(sizeof(Walk) <= kWalkBytes);

// The kept rows, and the panels of the streamed ones in turn: of every tile those that the similarities need, then those of the gradient.
// Shared memory: the walk, kFloats values of the kernel's own, kept panels that stay, kStages slots, all but one of them under way while that one is multiplied.
template <int kThreads, int kStreamed, int kStages, int kFloats>
class Ring {
  static constexpr int kStart = kWalkBytes + kFloats * 4;
  static_assert(kStart % 128 == 0);

 public:
  __host__ __device__ static constexpr int slot_bytes(bool resident) { return (kStreamed + (resident ? 0 : kTile)) * kRowBytes + kStreamed * 4; }
  __host__ __device__ static int64_t shared_bytes(const Operand& own, bool resident) {
    return kStart + Walk::resident_bytes(own, resident) + kStages * slot_bytes(resident);
  }
  __device__ static __forceinline__ float* floats() { return reinterpret_cast<float*>(device::shared_memory() + kWalkBytes); }
  __device__ static __forceinline__ Walk& walk() { return *reinterpret_cast<Walk*>(device::shared_memory()); }

  // Of a walk that the block's threads have met to see.
  __device__ __forceinline__ explicit Ring(int first) : tile_(first) {
    const Walk& w = walk();
    if (w.resident)
      for (int panel = 0; panel * kPanel < w.width; ++panel)
        copy_panel<kThreads, kTile>(kept_panel(panel), w.own + panel * kPanel, w.width, w.width - panel * kPanel);
    for (int stage = 0; stage < kStages - 1; ++stage) issue();
  }

  // The next panel of the stream, and the copy of the one that takes the slot of the one before.
  __device__ __forceinline__ const unsigned char* next() {
    device::copy_wait<kStages - 2>();
    __syncthreads();
    issue();
    return slot(free_);  // which is free again by the next call
  }

  // The kept panel that goes with a slot in step `step`, and the features that both have.
  __device__ __forceinline__ const unsigned char* kept(const unsigned char* slot, int step) const {
    return walk().resident ? kept_panel(own_panel(step)) : slot + kStreamed * kRowBytes;
  }
  __device__ __forceinline__ int width(int step) const {
    const Walk& w = walk();
    while (step >= w.panels) step -= w.panels;
    return w.d - step * kPanel;
  }
  // kStreamed values of the tile's vector, in the slot of its last panel of similarities.
  __device__ __forceinline__ float* vector(const unsigned char* slot) const {
    return reinterpret_cast<float*>(const_cast<unsigned char*>(slot) + slot_bytes(walk().resident) - kStreamed * 4);
  }

 private:
  __device__ __forceinline__ static unsigned char* kept_panel(int panel) { return device::shared_memory() + kStart + panel * kTile * kRowBytes; }
  __device__ __forceinline__ static unsigned char* slot(int index) {
    return device::shared_memory() + kStart + walk().kept_bytes + index * slot_bytes(walk().resident);
  }
  // Split rows: high by high parts, high by low, low by high.
  __device__ __forceinline__ static int own_panel(int step) { return step < walk().panels ? step : step - walk().panels; }
  __device__ __forceinline__ static int stream_panel(int step) { return step < 2 * walk().panels ? step : step - 2 * walk().panels; }

  __device__ __forceinline__ void issue() {
    const Walk& w = walk();
    if (tile_ < w.last) {
      unsigned char* to = slot(free_);
      const int64_t row = int64_t(tile_) * kStreamed;
      if (step_ < w.steps) {
        const int from = stream_panel(step_) * kPanel;
        copy_panel<kThreads, kStreamed>(to, w.stream + row * w.width + from, w.width, w.width - from);
        if (!w.resident) {
          const int kept_from = own_panel(step_) * kPanel;
          copy_panel<kThreads, kTile>(to + kStreamed * kRowBytes, w.own + kept_from, w.width, w.width - kept_from);
        }
        if (step_ == w.steps - 1 && threadIdx.x < kStreamed / 4)
          device::copy_async(vector(to) + 4 * threadIdx.x, w.vector + row + 4 * threadIdx.x, w.vector != nullptr);
      } else {
        const int panel = step_ - w.steps;
        copy_panel<kThreads, kStreamed>(to, w.plain + row * w.plain_width + panel * w.extra_stride, w.plain_width, w.extra_width - panel * kPanel);
      }
      if (++step_ == w.steps + w.extra) step_ = 0, ++tile_;
    }
    device::copy_commit();
    free_ = free_ == kStages - 1 ? 0 : free_ + 1;
  }

  int tile_, step_ = 0, free_ = 0;
};

}  // namespace pix2rep::infonce
