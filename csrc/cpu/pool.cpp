// pix2rep_native::pool and pool_backward on the CPU: schemas, argument checks, layouts, storage types.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../common/pool_arguments.h"
#include "maps.h"
#include "parallel.h"
#include "pool_core.h"

namespace pix2rep {
namespace {

// f(PoolLabels) of labels [B, *S], copied in their own type when the pixels of an image do not lie side by side.
template <class F>
void with_labels(const Tensor& given, int64_t regions, const F& f) {
  const Tensor labels = together(given, 1, 1) ? given : torch::stable::contiguous(given);
  with_label_type(labels, [&](auto zero) {
    using L = decltype(zero);
    f(PoolLabels<L>{data<L>(labels), labels.stride(0), regions});
  });
}

std::tuple<Tensor, Tensor> forward(Tensor features, Tensor labels, int64_t regions) {
  const PoolArguments in(features, labels, regions);
  const Sizes& shape = in.shape;
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
  const PoolArguments in(grad_means, counts, labels, like, shape);
  grad_means = torch::stable::contiguous(grad_means), counts = torch::stable::contiguous(counts);
  const Tensor grad = new_gradient(like, shape, channels_last);
  if (grad.numel() > 0)
    with_storage(like.scalar_type(), "like", [&](auto zero) {
      using S = decltype(zero);
      const Map<S> map = map_of_gradient<S>(grad, shape, channels_last);
      with_labels(labels, in.regions, [&](const auto& l) { pool_backward<S>(data<Compute<S>>(grad_means), data<int64_t>(counts), l, TorchParallel{}, map); });
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
