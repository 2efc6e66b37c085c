// Views of crosscorr on their way into shared memory, and what its kernels share.
//
// A panel holds 128 bytes of each of some rows; the 16-byte column c of row r lies at c ^ (r % 8), so that the eight rows that one instruction reads or one
// copy writes touch all banks. Of float32 that is read along the rows (the moments) it lies at c ^ 2 (r % 4).
#pragma once

#include <type_traits>

#include "vector.cuh"

namespace pix2rep::crosscorr {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

enum class Storage { float16, bfloat16, float32 };

// [N, d] in any strides, counted in values.
struct View {
  const void* data;
  int64_t row_stride, feature_stride;
  int d;
  Storage storage;
  bool direct;  // 16 bytes at once: contiguous features, rows of whole and aligned 16 bytes

  __device__ __forceinline__ float operator()(int64_t row, int feature) const {
    const int64_t at = row * row_stride + feature * feature_stride;
    if (storage == Storage::float32) return static_cast<const float*>(data)[at];
    if (storage == Storage::float16) return static_cast<const Half*>(data)[at];
    return static_cast<const BFloat16*>(data)[at];
  }
};

constexpr int kRowBytes = 128;
template <class T>
constexpr int kPanel = kRowBytes / int(sizeof(T));  // features

template <class T, bool kAcross>
__device__ __forceinline__ int swizzle(int row) {
  return kAcross && sizeof(T) == 4 ? (row & 3) << 1 : row & 7;
}

// `rows` rows (32, 64 or 128) from `row` on and features from `first` on into panels, those past the view's as 0. Rows where alive(r) is false are
// `dead` [d], or stay what they were where that is nullptr; whole: none is. kAcross: the panels are read along the rows. kThreads: 0 where the launch
// says. Copies are to be committed and awaited.
template <class T, bool kAcross, int kThreads, class Alive>
__device__ __forceinline__ void copy_rows(unsigned char* to, const View& view, int64_t row, int rows, int first, int panels, bool whole,
                                          const Alive& alive, const T* dead) {
  const int threads = kThreads ? kThreads : int(blockDim.x);
  const int chunk = threadIdx.x % 8, step = threads / 8, feature = first + chunk * (16 / int(sizeof(T)));
  const T* from = static_cast<const T*>(view.data) + row * view.row_stride + feature;
  if (view.direct && whole && first + panels * kPanel<T> <= view.d) {
#pragma unroll
    for (int base = 0; base < rows; base += step) {
      const int r = base + threadIdx.x / 8;
      unsigned char* const at = to + r * kRowBytes + ((chunk ^ swizzle<T, kAcross>(r)) << 4);
      const T* const values = from + r * view.row_stride;
#pragma unroll
      for (int panel = 0; panel < panels; ++panel) device::copy_async(at + panel * rows * kRowBytes, values + panel * kPanel<T>);
    }
    return;
  }
  device::rarely();
  if (view.direct) {
    for (int panel = 0; panel < panels; ++panel)
      for (int r = threadIdx.x / 8; r < rows; r += step) {
        uint4* const at = reinterpret_cast<uint4*>(to + (panel * rows + r) * kRowBytes + ((chunk ^ swizzle<T, kAcross>(r)) << 4));
        if (feature + panel * kPanel<T> >= view.d)
          *at = uint4{};
        else if (alive(r))
          device::copy_async(at, from + r * view.row_stride + panel * kPanel<T>);
        else if (dead)
          *at = *reinterpret_cast<const uint4*>(dead + feature + panel * kPanel<T>);
      }
    return;
  }
  // Lanes along what lies together; eight values a thread are under way at once, which divides a panel.
  constexpr int kBatch = 8;
  const bool planes = view.row_stride < view.feature_stride;
  const int log_rows = rows == 32 ? 5 : rows == 64 ? 6 : 7;
  for (int panel = 0; panel < panels; ++panel, to += rows * kRowBytes, first += kPanel<T>)
    for (int begin = threadIdx.x; begin < rows * kPanel<T>; begin += kBatch * threads) {
      T value[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int at = begin + k * threads, r = planes ? at & (rows - 1) : at / kPanel<T>, f = first + (planes ? at >> log_rows : at % kPanel<T>);
        value[k] = T(0.0f);
        if (f >= view.d) continue;
        if (!alive(r)) {
          if (dead) value[k] = dead[f];
        } else if constexpr (sizeof(T) == 2) {
          value[k] = static_cast<const T*>(view.data)[(row + r) * view.row_stride + f * view.feature_stride];
        } else {
          value[k] = view(row + r, f);
        }
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int at = begin + k * threads, r = planes ? at & (rows - 1) : at / kPanel<T>, f = planes ? at >> log_rows : at % kPanel<T>;
        constexpr int kChunk = 16 / int(sizeof(T));
        reinterpret_cast<T*>(to + r * kRowBytes + ((f / kChunk ^ swizzle<T, kAcross>(r)) << 4))[f % kChunk] = value[k];
      }
    }
}

// Of the two 16-bit values in a register.
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return {__int_as_float(int(pair << 16)), __int_as_float(int(pair & 0xffff0000u))};
  else
    return {float(Half(uint16_t(pair), Half::from_bits())), float(Half(uint16_t(pair >> 16), Half::from_bits()))};
}

// float32 as the sum of two tf32 parts, 22 digits.
struct Split {
  uint32_t high, low;
};
__device__ __forceinline__ Split split(float x) {
  const uint32_t high = device::to_tf32(x);
  return {high, device::to_tf32(x - __int_as_float(int(high)))};
}

// d += a b to float32's digits: the products of the high parts last, for the sum to be small until then. low by low is below them.
__device__ __forceinline__ void multiply_split(float (&d)[4], const Split (&a)[4], const Split (&b)[2]) {
  const uint32_t high[4] = {a[0].high, a[1].high, a[2].high, a[3].high}, low[4] = {a[0].low, a[1].low, a[2].low, a[3].low};
  device::multiply(d, low, {b[0].high, b[1].high}, float());
  device::multiply(d, high, {b[0].low, b[1].low}, float());
  device::multiply(d, high, {b[0].high, b[1].high}, float());
}

constexpr int kParts = 128;  // partial sums and maxima of the weights, and maxima of the gradient

// The power of two at or below the largest of kParts numbers, within 2^-100 and 2^100; 1 where it is none. By every warp that asks.
__device__ __forceinline__ float power_of_two(const float* largest) {
  float found = 0;
  for (int part = threadIdx.x % 32; part < kParts; part += 32) found = fmaxf(found, largest[part]);
  for (int step = 16; step > 0; step /= 2) found = fmaxf(found, device::shuffle_xor(found, step));
  const int bits = __float_as_int(found) & 0x7f800000, least = 27 << 23, most = 227 << 23;
  return bits == 0x7f800000 ? 1.0f : __int_as_float(bits < least ? least : bits > most ? most : bits);
}

}  // namespace pix2rep::crosscorr
