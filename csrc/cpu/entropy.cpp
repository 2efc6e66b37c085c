// pix2rep_native::entropy and entropy_backward on the CPU: schemas, argument checks, layouts, storage types.
#include <torch/csrc/stable/library.h>

#include "entropy_core.h"
#include "joint_maps.h"
#include "parallel.h"

namespace pix2rep {
namespace {

struct Arguments {
  Tensor logits;
  std::optional<Tensor> mask;
  ScalarType type;  // of the arithmetic
  int64_t dims, pixels = 1;

  Arguments(const Tensor& logits, const std::optional<Tensor>& given) : logits(logits), type(compute_type(logits, logits)), dims(logits.dim() - 2) {
    PIX2REP_EXPECT(dims == 2 || dims == 3, "logits", "have shape [B, K, H, W] or [B, K, D, H, W]", logits.dim(), " axes");
    PIX2REP_EXPECT(logits.size(1) > 0, "logits", "have at least one cluster", logits.size(1));
    for (int64_t axis = 2; axis < logits.dim(); ++axis) pixels *= logits.size(axis);
    if (!given) return;
    mask = torch::stable::contiguous(*given);
    PIX2REP_EXPECT(mask->scalar_type() == ScalarType::Bool, "mask", "be bool", "scalar type ", int(mask->scalar_type()));
    PIX2REP_EXPECT(shape_of(*mask) == without_channels(shape_of(logits)), "mask", "have shape [B, *S]", mask->dim(), " axes");
  }

  Sizes result() const {
    Sizes shape = shape_of(logits);
    shape[1] = 1;
    return shape;
  }
  bool is_empty() const { return logits.size(0) * pixels == 0; }
  bool one_axis() const { return together(logits, 2, pixel_stride(logits)); }
  template <class T>
  Entropy<T> entropy() const {
    int64_t extent[3] = {1, 1, pixels};
    if (!one_axis())
      for (int64_t axis = 0; axis < 3; ++axis) extent[axis] = axis + dims < 3 ? 1 : logits.size(axis + dims - 1);
    return {{logits.size(0), logits.size(1), 0, true, false, mask ? data<bool>(*mask) : nullptr, JointLine(extent, 0, false), 3 - dims}};
  }
};

Tensor forward(Tensor logits, std::optional<Tensor> mask) {
  const Arguments in(logits, mask);
  const Tensor h = torch::stable::new_empty(logits, in.result(), in.type);
  if (in.is_empty()) return h;
  with_compute_type(in.type, [&](auto zero) {
    using T = decltype(zero);
    in.entropy<T>().forward(joint_source<T>(logits, "logits", in.one_axis()), TorchParallel{}, mutable_data<T>(h));
  });
  return h;
}

Tensor backward(Tensor grad_h, Tensor logits, std::optional<Tensor> mask, bool channels_last) {
  const Arguments in(logits, mask);
  PIX2REP_EXPECT(shape_of(grad_h) == in.result(), "grad_h", "have shape [B, 1, *S]", grad_h.dim(), " axes");
  PIX2REP_EXPECT(grad_h.scalar_type() == in.type, "grad_h", "have the dtype of h", "scalar type ", int(grad_h.scalar_type()));
  grad_h = torch::stable::contiguous(grad_h);
  const JointGradient gradient(logits, channels_last);
  if (in.is_empty()) return gradient.result;
  with_compute_type(in.type, [&](auto zero) {
    using T = decltype(zero);
    in.entropy<T>().backward(joint_source<T>(logits, "logits", in.one_axis()), data<T>(grad_h), TorchParallel{},
                             gradient.sink<T>("logits", channels_last, in.one_axis()));
  });
  return gradient.result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pix2rep_native, m) {
  m.def("entropy(Tensor logits, Tensor? mask) -> Tensor h");
  m.def("entropy_backward(Tensor grad_h, Tensor logits, Tensor? mask, bool channels_last) -> Tensor grad_logits");
}

STABLE_TORCH_LIBRARY_IMPL(pix2rep_native, CPU, m) {
  m.impl("entropy", TORCH_BOX(&forward));
  m.impl("entropy_backward", TORCH_BOX(&backward));
}

}  // namespace pix2rep
