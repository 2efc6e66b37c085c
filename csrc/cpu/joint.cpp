// pix2rep_native::joint and joint_backward on the CPU: schemas, argument checks, layouts, storage types.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <tuple>

#include "joint_core.h"
#include "maps.h"
#include "parallel.h"

namespace pix2rep {
namespace {

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
JointSource<T> source(const Tensor& t, const char* name, bool one) {
  return with_float_type(t.scalar_type(), name, [&](auto zero) {
    using S = decltype(zero);
    JointSource<T> map;
    map.data = reinterpret_cast<const char*>(data<S>(t));
    set_strides(map, t, sizeof(S), one);
    map.run = map.stride[2] == int64_t(sizeof(S)) ? read_planes<S, T> : map.channel_stride == int64_t(sizeof(S)) ? read_last<S, T> : read_any<S, T>;
    return map;
  });
}

struct Gradient {
  Tensor result;

  Gradient(const Tensor& like, bool channels_last) : result(in_place(new_gradient(like, shape_of(like), channels_last), channels_last)) {}
  template <class T>
  JointSink<T> sink(bool channels_last, bool one) const {
    return with_float_type(result.scalar_type(), "a", [&](auto zero) {
      using S = decltype(zero);
      JointSink<T> map;
      map.data = reinterpret_cast<char*>(mutable_data<S>(result));
      set_strides(map, result, sizeof(S), one);
      map.run = channels_last ? write_last<S, T> : write_planes<S, T>;
      return map;
    });
  }
};

struct Arguments {
  Tensor a, b;
  std::optional<Tensor> mask;
  int64_t radius, dims;
  bool collapsed, logits;
  ScalarType type;  // of the arithmetic
  int64_t pixels = 1;

  Arguments(const Tensor& a, const Tensor& b, const std::optional<Tensor>& given, int64_t radius, bool collapsed, bool logits)
      : a(a), b(b), radius(radius), dims(a.dim() - 2), collapsed(collapsed), logits(logits), type(compute_type(a, b)) {
    PIX2REP_EXPECT(dims == 2 || dims == 3, "a", "have shape [B, K, H, W] or [B, K, D, H, W]", a.dim(), " axes");
    PIX2REP_EXPECT(shape_of(b) == shape_of(a), "b", "have the shape of a", b.dim(), " axes of which the first is ", b.dim() ? b.size(0) : 0);
    PIX2REP_EXPECT(radius >= 0 && (collapsed || radius < (int64_t(1) << 20)), "radius", "be >= 0, and below 2^20 unless collapsed", radius);
    for (int64_t axis = 2; axis < a.dim(); ++axis) pixels *= a.size(axis);
    if (!given) return;
    mask = torch::stable::contiguous(*given);
    PIX2REP_EXPECT(mask->scalar_type() == ScalarType::Bool, "mask", "be bool", "scalar type ", int(mask->scalar_type()));
    PIX2REP_EXPECT(shape_of(*mask) == without_channels(shape_of(a)), "mask", "have shape [B, *S]", mask->dim(), " axes");
  }

  int64_t clusters() const { return a.size(1); }
  bool is_empty() const { return a.size(0) * clusters() * pixels == 0; }
  // Displacements play no part and both maps are planes or channels-last: an image is one row.
  bool one_axis() const { return radius == 0 && together(a, 2, pixel_stride(a)) && together(b, 2, pixel_stride(b)); }
  int64_t count() const {
    int64_t out = 1;
    for (int64_t axis = 0; !collapsed && axis < dims; ++axis) out *= 2 * radius + 1;
    return out;
  }
  template <class T>
  Joint<T> joint() const {
    int64_t extent[3] = {1, 1, pixels};
    if (!one_axis())
      for (int64_t axis = 0; axis < 3; ++axis) extent[axis] = axis + dims < 3 ? 1 : a.size(axis + dims - 1);
    const JointLine line(extent, radius, radius > 0 && !collapsed);
    return {a.size(0), clusters(), radius, collapsed, logits, mask ? data<bool>(*mask) : nullptr, line, 3 - dims};
  }
};

Tensor forward(Tensor a, Tensor b, std::optional<Tensor> mask, int64_t radius, bool collapsed, bool logits) {
  const Arguments in(a, b, mask, radius, collapsed, logits);
  Tensor sums = torch::stable::new_zeros(a, {in.count(), in.clusters(), in.clusters()}, in.type);
  if (in.is_empty()) return sums;
  with_compute_type(in.type, [&](auto zero) {
    using T = decltype(zero);
    in.joint<T>().forward(source<T>(a, "a", in.one_axis()), source<T>(b, "b", in.one_axis()), TorchParallel{}, mutable_data<T>(sums));
  });
  return sums;
}

std::tuple<Tensor, Tensor> backward(Tensor grad_sums, Tensor a, Tensor b, std::optional<Tensor> mask, int64_t radius, bool collapsed, bool logits,
                                    bool need_a, bool need_b, bool channels_last_a, bool channels_last_b) {
  const Arguments in(a, b, mask, radius, collapsed, logits);
  PIX2REP_EXPECT(grad_sums.dim() == 3 && grad_sums.size(0) == in.count() && grad_sums.size(1) == in.clusters() && grad_sums.size(2) == in.clusters(),
                 "grad_sums", "have shape [displacements, K, K]", grad_sums.dim(), " axes");
  PIX2REP_EXPECT(grad_sums.scalar_type() == in.type, "grad_sums", "have the dtype of the sums", "scalar type ", int(grad_sums.scalar_type()));
  grad_sums = torch::stable::contiguous(grad_sums);
  std::optional<Gradient> grad_a, grad_b;
  if (need_a) grad_a.emplace(a, channels_last_a);
  if (need_b) grad_b.emplace(b, channels_last_b);
  if (!in.is_empty() && (need_a || need_b))
    with_compute_type(in.type, [&](auto zero) {
      using T = decltype(zero);
      std::optional<JointSink<T>> to_a, to_b;
      if (need_a) to_a = grad_a->template sink<T>(channels_last_a, in.one_axis());
      if (need_b) to_b = grad_b->template sink<T>(channels_last_b, in.one_axis());
      in.joint<T>().backward(source<T>(a, "a", in.one_axis()), source<T>(b, "b", in.one_axis()), data<T>(grad_sums), TorchParallel{},
                             to_a ? &*to_a : nullptr, to_b ? &*to_b : nullptr);
    });
  const auto none = [](const Tensor& like) { return torch::stable::new_empty(like, {0}); };
  return {need_a ? grad_a->result : none(a), need_b ? grad_b->result : none(b)};
}

}  // namespace

#define PIX2REP_JOINT_INPUTS "Tensor a, Tensor b, Tensor? mask, int radius, bool collapsed, bool logits"

STABLE_TORCH_LIBRARY_FRAGMENT(pix2rep_native, m) {
  m.def("joint(" PIX2REP_JOINT_INPUTS ") -> Tensor sums");
  m.def("joint_backward(Tensor grad_sums, " PIX2REP_JOINT_INPUTS
        ", bool need_a, bool need_b, bool channels_last_a, bool channels_last_b) -> (Tensor grad_a, Tensor grad_b)");
}

STABLE_TORCH_LIBRARY_IMPL(pix2rep_native, CPU, m) {
  m.impl("joint", TORCH_BOX(&forward));
  m.impl("joint_backward", TORCH_BOX(&backward));
}

}  // namespace pix2rep
