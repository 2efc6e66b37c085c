// Maps of logits as joint and entropy read and write them, in either layout.
#pragma once

#include "cpu/joint_core.h"
#include "harness.h"

namespace sanitize {

using pix2rep::JointMap;

template <class T, class Pointer>
void copy(Pointer at, int64_t channel_stride, int64_t pixel_stride, int64_t channels, int64_t count, T* planes, int64_t ld) {
  for (int64_t k = 0; k < channels; ++k)
    for (int64_t i = 0; i < count; ++i) {
      if constexpr (std::is_same_v<Pointer, char*>)
        *reinterpret_cast<T*>(at + k * channel_stride + i * pixel_stride) = planes[k * ld + i];
      else
        planes[k * ld + i] = *reinterpret_cast<const T*>(at + k * channel_stride + i * pixel_stride);
    }
}

template <class T, class Pointer, class Shape>
JointMap<T, Pointer> map_of(const Exact<T>& values, const Shape& s, bool last) {
  const int64_t bytes = sizeof(T), pixel = (last ? s.clusters : 1) * bytes;
  return {reinterpret_cast<Pointer>(values.get()), s.clusters * s.pixels() * bytes, (last ? 1 : s.pixels()) * bytes,
          {s.size[1] * s.size[2] * pixel, s.size[2] * pixel, pixel}, copy<T, Pointer>};
}

}  // namespace sanitize
