// How maps and rows are stored: 16-bit types whose arithmetic is float, and two layouts.
#pragma once

#include <cstdint>
#include <type_traits>

namespace pix2rep {

struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};
template <class S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

// The same where a type is known at run time alone.
enum class Storage { f16, bf16, f32, f64 };

inline constexpr int64_t kBytes[] = {2, 2, 4, 8};  // by Storage

template <class S>
constexpr Storage kStorage = std::is_same_v<S, double>  ? Storage::f64
                             : std::is_same_v<S, float> ? Storage::f32
                             : std::is_same_v<S, F16>   ? Storage::f16
                                                        : Storage::bf16;

// Lines of `n` values as T and back, by Storage; the stride is in values.
template <class T>
struct Lines {
  void (*load[4])(const void* from, int64_t stride, int64_t n, T* to);
  void (*store[4])(const T* from, int64_t n, void* to);
};

// [B, C, prod(S)] in one of two layouts: channels last (pixel stride, channel stride 1) or planes (channel stride, pixel stride 1).
template <class S>
struct Map {
  S* data;
  int64_t batch, channels, pixels;
  int64_t batch_stride, stride;
  bool channels_last;

  S* image(int64_t b) const { return data + b * batch_stride; }
  S* at(int64_t b, int64_t c, int64_t p) const { return image(b) + (channels_last ? p * stride + c : c * stride + p); }
};

}  // namespace pix2rep
