// pix2rep_native::pool and pool_backward on the CPU: schemas, argument checks, layouts, storage types.
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <tuple>

#include "maps.h"
#include "parallel.h"
#include "pool_core.h"

namespace pix2rep {
namespace {

// f(PoolLabels) of labels [B, *S], copied in their own type when the pixels of an image do not lie side by side.
template <class F>
void with_labels(const Tensor& given, int64_t regions, const F& f) {
  const Tensor labels = together(given, 1, 1) ? given : torch::stable::contiguous(given);
  const auto run = [&](auto zero) {
    using L = decltype(zero);
    f(PoolLabels<L>{data<L>(labels), labels.stride(0), regions});
  };
  switch (labels.scalar_type()) {
    case ScalarType::Byte:
      return run(uint8_t{});
    case ScalarType::Char:
      return run(int8_t{});
    case ScalarType::Short:
      return run(int16_t{});
    case ScalarType::Int:
      return run(int32_t{});
    case ScalarType::Long:
      return run(int64_t{});
    default:
      STD_TORCH_CHECK(false, "`labels` must be uint8, int8, int16, int32 or int64, got scalar type ", int(labels.scalar_type()));
  }
}

void check_labels(const Tensor& labels, const Sizes& shape) {
  PIX2REP_EXPECT(shape_of(labels) == without_channels(shape), "labels", "have the shape [B, *S] of the features", labels.dim(),
                 " axes of which the first is ", labels.dim() ? labels.size(0) : 0);
}

std::tuple<Tensor, Tensor> forward(Tensor features, Tensor labels, int64_t regions) {
  const Sizes shape = shape_of(features);
  PIX2REP_EXPECT(shape.size() >= 3, "features", "have shape [B, C, *S]", shape.size(), " axes");
  PIX2REP_EXPECT(regions >= 0, "regions", "be >= 0", regions);
  check_labels(labels, shape);
  Tensor means = torch::stable::new_empty(features, {shape[0], regions, shape[1]}, compute_type(features));
  Tensor counts = torch::stable::new_empty(features, {shape[0], regions}, ScalarType::Long);
  if (counts.numel() == 0) return {means, counts};
  with_storage(features.scalar_type(), "features", [&](auto zero) {
    using S = decltype(zero);
    Tensor held;
    const Map<const S> map = map_of<S>(features, held);
    with_labels(labels, regions, [&](const auto& l) {
      pool_forward<S>(map, l, TorchParallel{}, mutable_data<Compute<S>>(means), mutable_data<int64_t>(counts));
    });
  });
  return {means, counts};
}

Tensor backward(Tensor grad_means, Tensor counts, Tensor labels, Tensor like, Sizes shape, bool channels_last) {
  PIX2REP_EXPECT(shape.size() >= 3, "shape", "be [B, C, *S]", shape.size(), " axes");
  check_labels(labels, shape);
  PIX2REP_EXPECT(counts.dim() == 2 && counts.size(0) == shape[0] && counts.scalar_type() == ScalarType::Long, "counts", "be int64 of shape [B, R]",
                 counts.dim(), " axes");
  const int64_t regions = counts.size(1);
  PIX2REP_EXPECT(grad_means.dim() == 3 && grad_means.size(0) == shape[0] && grad_means.size(1) == regions && grad_means.size(2) == shape[1], "grad_means",
                 "have shape [B, R, C]", grad_means.dim(), " axes");
  PIX2REP_EXPECT(grad_means.scalar_type() == compute_type(like), "grad_means", "have the dtype of the means", "scalar type ", int(grad_means.scalar_type()));
  grad_means = torch::stable::contiguous(grad_means), counts = torch::stable::contiguous(counts);
  const Tensor grad = new_gradient(like, shape, channels_last);
  if (grad.numel() > 0)
    with_storage(like.scalar_type(), "like", [&](auto zero) {
      using S = decltype(zero);
      const Map<S> map = map_of_gradient<S>(grad, shape, channels_last);
      with_labels(labels, regions, [&](const auto& l) { pool_backward<S>(data<Compute<S>>(grad_means), data<int64_t>(counts), l, TorchParallel{}, map); });
    });
  return in_place(grad, channels_last);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pix2rep_native, m) {
  m.def("pool(Tensor features, Tensor labels, SymInt regions) -> (Tensor means, Tensor counts)");
  m.def("pool_backward(Tensor grad_means, Tensor counts, Tensor labels, Tensor like, SymInt[] shape, bool channels_last) -> Tensor grad_features");
}

STABLE_TORCH_LIBRARY_IMPL(pix2rep_native, CPU, m) {
  m.impl("pool", TORCH_BOX(&forward));
  m.impl("pool_backward", TORCH_BOX(&backward));
}

}  // namespace pix2rep
