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

// Rows [0, kRows) of a panel into shared memory, but for features from `width` on; `from` is this thread's first value, `stride` bytes a row.
template <int kThreads, int kRows>
__device__ __forceinline__ void copy_panel(unsigned char* to, const unsigned char* from, int stride, int width) {
  static_assert(kThreads % 64 == 0 && kRows * 8 % kThreads == 0);
  constexpr int kStep = kThreads / 8;  // rows, a multiple of 8: the swizzle is the same in each
  const int row = threadIdx.x / 8, chunk = threadIdx.x % 8;
  if (chunk * 8 >= width) return;
  to += row * kRowBytes + ((chunk ^ (row & 7)) << 4);
#pragma unroll
  for (int k = 0; k < kRows / kStep; ++k) {
    device::copy_async(to + k * kStep * kRowBytes, from);
    from += kStep * int64_t(stride);
  }
}

// Where a thread's first value of a panel is, in bytes from the panel's.
__device__ __forceinline__ int lane_bytes(int stride) { return int(threadIdx.x) / 8 * stride + int(threadIdx.x) % 8 * 16; }

// s += x y^T over 16 features, or s = x y^T when kFirst: rows of x from its lane's place `a`, columns of y from `b`.
template <bool kFirst, int kM>
__device__ __forceinline__ void add_step(Product<kM>& s, device::SharedAddress a, device::SharedAddress b) {
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
      for (int m = 0; m < kM; ++m) {
        float(&to)[4] = s[m][2 * n + half];
        if (kFirst) to[0] = to[1] = to[2] = to[3] = 0;
        device::multiply(to, x[m], {y[2 * half], y[2 * half + 1]}, torch::headeronly::Half());
      }
  }
}

// The same over a panel of `width` features; x and y are the warp's first row and column.
template <bool kFirst, int kM>
__device__ __forceinline__ void add_panel(Product<kM>& s, const unsigned char* x, const unsigned char* y, int width) {
  const int lane = threadIdx.x % 32;
  const auto a = device::shared_address(x + (lane & 15) * kRowBytes + (((lane >> 4) ^ (lane & 7)) << 4));
  const auto b = device::shared_address(y + ((lane & 7) + ((lane >> 4) << 3)) * kRowBytes + ((((lane >> 3) & 1) ^ (lane & 7)) << 4));
  if (width >= kPanel) {
    add_step<kFirst, kM>(s, a, b);
#pragma unroll
    for (int k = 1; k < kPanel / 16; ++k) add_step<false, kM>(s, a ^ (k << 5), b ^ (k << 5));
  } else {
    device::rarely();
    if (kFirst) clear<kM>(s);
#pragma unroll 1
    for (int k = 0; 16 * k < width; ++k) add_step<false, kM>(s, a ^ (k << 5), b ^ (k << 5));
  }
}

// What a block walks through, in shared memory: in registers it would take the place of products.
struct Walk {
  const unsigned char *own, *stream, *plain;  // first rows of the block and of the stream; the gradient's features of the stream
  const float* vector;                        // a value of each streamed row
  float* out;                                 // where sums of the streamed rows, or products of the own ones, belong
  int own_first, stream_group, group;
  float shift;  // that exp2 takes off; with `online` a row's own lse
  int online;
  int first, last;             // tiles of the stream
  int last_block, fresh;       // of the own rows, where the kernel takes several; whether this is the first
  int kept_bytes;              // of panels that stay
  int d, stride, plain_stride; // features; bytes of a row
  int panels, steps;           // of a row, and those that a tile's similarities take
  int extra_bytes, extra_features, out_width;  // from one panel of the gradient to the next; features of a block's gradient

  __device__ Walk(const Operand& own, const Operand& stream, int group, int own_first, int first, int last, bool resident)
      : own(reinterpret_cast<const unsigned char*>(own.scaled + (group * own.padded + own_first) * own.scaled_width())),
        stream(reinterpret_cast<const unsigned char*>(stream.scaled + group % stream.groups * stream.padded * stream.scaled_width())),
        plain(nullptr),
        vector(nullptr),
        out(nullptr),
        own_first(own_first),
        stream_group(int(group % stream.groups)),
        group(group),
        shift(0),
        online(0),
        first(first),
        last(last),
        last_block(0),
        fresh(1),
        kept_bytes(int(resident_bytes(own, resident))),
        d(own.d),
        stride(2 * own.scaled_width()),
        plain_stride(2 * own.plain_width()),
        panels((own.d + kPanel - 1) / kPanel),
        steps(own.split ? 3 * panels : panels),
        extra_bytes(kRowBytes),
        extra_features(kPanel),
        out_width(0) {}

  __host__ __device__ static int64_t resident_bytes(const Operand& own, bool resident) {
    return resident ? (own.scaled_width() + kPanel - 1) / kPanel * kTile * int64_t(kRowBytes) : 0;
  }
};
constexpr int kWalkBytes = 256;
static_assert(sizeof(Walk) <= kWalkBytes);

// The kept rows, and the panels of the streamed ones in turn: of every tile those that the similarities need, then kExtra of the gradient.
// Kept rows stay in shared memory, or when kWide, for more than 256 features or split ones, their panels come with the streamed ones.
// Shared memory: the walk, kFloats values of the kernel's own, kept panels that stay, kStages slots, all but one of them under way while that one
// is multiplied.
template <int kThreads, int kStreamed, int kStages, int kExtra, int kFloats, bool kWide>
class Ring {
  static constexpr int kStart = kWalkBytes + kFloats * 4;
  static constexpr int kSlotBytes = (kStreamed + (kWide ? kTile : 0)) * kRowBytes + kStreamed * 4;
  static_assert(kStart % 128 == 0);

 public:
  static int64_t shared_bytes(const Operand& own) { return kStart + Walk::resident_bytes(own, !kWide) + kStages * kSlotBytes; }
  __device__ static __forceinline__ float* floats() { return reinterpret_cast<float*>(device::shared_memory() + kWalkBytes); }
  __device__ static __forceinline__ Walk& walk() { return *reinterpret_cast<Walk*>(device::shared_memory()); }

  // Of a walk that the block's threads have met to see.
  __device__ __forceinline__ Ring() : tile_(walk().first) {
    const Walk& w = walk();
    if (!kWide)
      for (int panel = 0; panel < w.panels; ++panel)
        copy_panel<kThreads, kTile>(kept_panel(panel), w.own + panel * kRowBytes + lane_bytes(w.stride), w.stride, w.d - panel * kPanel);
    for (int stage = 0; stage < kStages - 1; ++stage) issue();
  }

  // The next panel of the stream, and the copy of the one that takes the slot of the one before.
  __device__ __forceinline__ const unsigned char* next() {
    device::copy_wait<kStages - 2>();
    __syncthreads();
    issue();
    return slot();  // which is free again by the next call
  }

  // The kept panel that goes with a slot in step `step`, and the features that both have.
  __device__ __forceinline__ const unsigned char* kept(const unsigned char* slot, int step) const {
    return kWide ? slot + kStreamed * kRowBytes : kept_panel(step);
  }
  __device__ __forceinline__ int width(int step) const {
    const Walk& w = walk();
    if (kWide)
      while (step >= w.panels) step -= w.panels;
    return w.d - step * kPanel;
  }
  // kStreamed values of the tile's vector, in the slot of its last panel of similarities.
  __device__ __forceinline__ float* vector(const unsigned char* slot) const {
    return reinterpret_cast<float*>(const_cast<unsigned char*>(slot) + kSlotBytes - kStreamed * 4);
  }

 private:
  __device__ __forceinline__ static unsigned char* kept_panel(int panel) { return device::shared_memory() + kStart + panel * kTile * kRowBytes; }
  __device__ __forceinline__ unsigned char* slot() const { return device::shared_memory() + kStart + (kWide ? 0 : walk().kept_bytes) + offset_; }

  __device__ __forceinline__ void issue() {
    const Walk& w = walk();
    if (tile_ < w.last) {
      unsigned char* to = slot();
      if (kExtra == 0 || step_ < w.steps) {
        // Split rows: high by low parts, low by high, and last, for the sum to be small until then, high by high.
        const int split = w.steps > w.panels ? step_ / w.panels : 2, chunk = step_ - (w.steps > w.panels ? split * w.panels : 0);
        const int panel = !kWide ? step_ : chunk + (split == 0 ? w.panels : 0), kept = chunk + (split == 1 ? w.panels : 0);
        const int width = kWide ? this->width(step_) : w.d - step_ * kPanel, lane = lane_bytes(w.stride);
        const uint64_t from = uint32_t(tile_) * uint64_t(uint32_t(kStreamed * w.stride)) + uint32_t(panel * kRowBytes + lane);
        copy_panel<kThreads, kStreamed>(to, w.stream + from, w.stride, width);
        if (kWide) copy_panel<kThreads, kTile>(to + kStreamed * kRowBytes, w.own + (kept * kRowBytes + lane), w.stride, width);
        if (threadIdx.x < kStreamed / 4 && step_ == w.steps - 1)
          device::copy_async(vector(to) + 4 * threadIdx.x, w.vector + (uint32_t(tile_) * uint64_t(kStreamed) + 4 * threadIdx.x));
      } else {
        const int panel = step_ - w.steps, lane = lane_bytes(w.plain_stride);
        const uint64_t from = uint32_t(tile_) * uint64_t(uint32_t(kStreamed * w.plain_stride)) + uint32_t(panel * w.extra_bytes + lane);
        copy_panel<kThreads, kStreamed>(to, w.plain + from, w.plain_stride, w.out_width - panel * w.extra_features);
      }
      ++step_;
      if (step_ == w.steps + kExtra) step_ = 0, ++tile_;
    }
    device::copy_commit();
    offset_ = offset_ == (kStages - 1) * kSlotBytes ? 0 : offset_ + kSlotBytes;
  }

  int tile_, step_ = 0, offset_ = 0;
};

}  // namespace pix2rep::infonce
