// Tensors as maps that the tiles of joint_core.h are read from and written to: any storage type, any strides.
#pragma once

#include <cstring>

#include "joint_core.h"
#include "maps.h"

namespace pix2rep {

template <class S, class T>
void read_planes(const char* at, int64_t channel_stride, int64_t, int64_t channels, int64_t count, T* planes, int64_t ld) {
  for (int64_t k = 0; k < channels; ++k, at += channel_stride, planes += ld) {
    if constexpr (std::is_same_v<S, T>)
      std::memcpy(planes, at, size_t(count) * sizeof(T));
    else
      for (int64_t i = 0; i < count; ++i) planes[i] = T(reinterpret_cast<const S*>(at)[i]);
  }
}

template <class S, class T>
void read_any(const char* at, int64_t channel_stride, int64_t pixel_stride, int64_t channels, int64_t count, T* planes, int64_t ld) {
  for (int64_t k = 0; k < channels; ++k)
    for (int64_t i = 0; i < count; ++i) planes[k * ld + i] = T(*reinterpret_cast<const S*>(at + k * channel_stride + i * pixel_stride));
}

template <class S, class T>
void read_last(const char* at, int64_t channel_stride, int64_t pixel_stride, int64_t channels, int64_t count, T* planes, int64_t ld) {
  using P = Stored<S>;
  if constexpr (std::is_same_v<Compute<P>, T>)
    warp_kernels<P>().transpose_in(reinterpret_cast<const P*>(at), pixel_stride / int64_t(sizeof(P)), count, channels, planes, ld);
  else
    read_any<S>(at, channel_stride, pixel_stride, channels, count, planes, ld);
}

template <class S, class T>
void write_planes(char* at, int64_t channel_stride, int64_t, int64_t channels, int64_t count, T* planes, int64_t ld) {
  for (int64_t k = 0; k < channels; ++k, at += channel_stride, planes += ld) {
    if constexpr (std::is_same_v<S, T>)
      std::memcpy(at, planes, size_t(count) * sizeof(T));
    else
      for (int64_t i = 0; i < count; ++i) reinterpret_cast<S*>(at)[i] = S(planes[i]);
  }
}

template <class S, class T>
void write_last(char* at, int64_t, int64_t pixel_stride, int64_t channels, int64_t count, T* planes, int64_t ld) {
  using P = Stored<S>;
  if constexpr (std::is_same_v<Compute<P>, T>)
    return warp_kernels<P>().transpose_out(planes, ld, channels, count, reinterpret_cast<P*>(at), pixel_stride / int64_t(sizeof(P)));
  for (int64_t i = 0; i < count; ++i)
    for (int64_t k = 0; k < channels; ++k) *reinterpret_cast<S*>(at + i * pixel_stride + k * int64_t(sizeof(S))) = S(planes[k * ld + i]);
}

// Strides in bytes; with `one` the spatial axes count as one, the last.
template <class Map>
void set_strides(Map& map, const Tensor& t, int64_t size, bool one) {
  map.batch_stride = t.stride(0) * size, map.channel_stride = t.stride(1) * size;
  for (int64_t& stride : map.stride) stride = 0;
  for (int64_t axis = t.dim() - 1; axis >= 2; --axis) map.stride[axis + 3 - t.dim()] = one ? 0 : t.stride(axis) * size;
  if (one) map.stride[2] = pixel_stride(t) * size;
}

template <class T>
JointSource<T> joint_source(const Tensor& t, const char* name, bool one) {
  return with_float_type(t.scalar_type(), name, [&](auto zero) {
    using S = decltype(zero);
    JointSource<T> map;
    map.data = reinterpret_cast<const char*>(data<S>(t));
    set_strides(map, t, sizeof(S), one);
    map.run = map.stride[2] == int64_t(sizeof(S)) ? read_planes<S, T> : map.channel_stride == int64_t(sizeof(S)) ? read_last<S, T> : read_any<S, T>;
    return map;
  });
}

struct JointGradient {
  Tensor result;

  JointGradient(const Tensor& like, bool channels_last) : result(in_place(new_gradient(like, shape_of(like), channels_last), channels_last)) {}
  template <class T>
  JointSink<T> sink(const char* name, bool channels_last, bool one) const {
    return with_float_type(result.scalar_type(), name, [&](auto zero) {
      using S = decltype(zero);
      JointSink<T> map;
      map.data = reinterpret_cast<char*>(mutable_data<S>(result));
      set_strides(map, result, sizeof(S), one);
      map.run = channels_last ? write_last<S, T> : write_planes<S, T>;
      return map;
    });
  }
};

}  // namespace pix2rep
