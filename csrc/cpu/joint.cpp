// pix2rep_native::joint and joint_backward on the CPU: schemas, argument checks, layouts, storage types.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "joint_maps.h"
#include "parallel.h"

namespace pix2rep {
namespace {

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
    in.joint<T>().forward(joint_source<T>(a, "a", in.one_axis()), joint_source<T>(b, "b", in.one_axis()), TorchParallel{}, mutable_data<T>(sums));
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
  std::optional<JointGradient> grad_a, grad_b;
  if (need_a) grad_a.emplace(a, channels_last_a);
  if (need_b) grad_b.emplace(b, channels_last_b);
  if (!in.is_empty() && (need_a || need_b))
    with_compute_type(in.type, [&](auto zero) {
      using T = decltype(zero);
      std::optional<JointSink<T>> to_a, to_b;
      if (need_a) to_a = grad_a->template sink<T>("a", channels_last_a, in.one_axis());
      if (need_b) to_b = grad_b->template sink<T>("b", channels_last_b, in.one_axis());
      in.joint<T>().backward(joint_source<T>(a, "a", in.one_axis()), joint_source<T>(b, "b", in.one_axis()), data<T>(grad_sums), TorchParallel{},
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
