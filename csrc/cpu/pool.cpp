// pix2rep_native::pool and pool_backward on the CPU: schemas, argument checks, layouts, storage types.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../common/check.h"
#include "../common/view.h"
#include "parallel.h"
#include "pool_core.h"

namespace pix2rep {
namespace {

using Sizes = std::vector<int64_t>;

template <class F>
void with_storage(ScalarType type, const F& f) {
  if (type == ScalarType::Half) return f(F16{});
  if (type == ScalarType::BFloat16) return f(BF16{});
  with_float_type(type, "features", [&](auto zero) {
    if constexpr (sizeof(zero) > 2) f(zero);
  });
}

// Whether axes [first, dim) are one axis of that stride.
bool together(const Tensor& t, int64_t first, int64_t stride) {
  for (int64_t axis = t.dim() - 1; axis >= first; --axis) {
    if (t.size(axis) > 1 && t.stride(axis) != stride) return false;
    stride *= t.size(axis);
  }
  return true;
}

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
  bool fits = labels.dim() + 1 == int64_t(shape.size()) && labels.size(0) == shape[0];
  for (int64_t axis = 1; fits && axis < labels.dim(); ++axis) fits = labels.size(axis) == shape[axis + 1];
  PIX2REP_EXPECT(fits, "labels", "have the shape [B, *S] of the features", labels.dim(), " axes of which the first is ", labels.dim() ? labels.size(0) : 0);
}

// The features as a map, copied when they are in neither layout: `held` keeps the copy.
template <class S>
PoolMap<const S> map_of(const Tensor& features, Tensor& held) {
  held = features;
  int64_t pixel_stride = 1;
  for (int64_t axis = features.dim() - 1; axis >= 2; --axis)
    if (features.size(axis) > 1) {
      pixel_stride = features.stride(axis);
      break;
    }
  const bool planes = together(features, 2, 1);
  const bool last = !planes && (features.stride(1) == 1 || features.size(1) == 1) && together(features, 2, pixel_stride);
  if (!last && !planes) held = torch::stable::contiguous(features);
  PoolMap<const S> map{static_cast<const S*>(held.data_ptr()), held.size(0), held.size(1), 1, held.stride(0), last ? pixel_stride : held.stride(1), last};
  for (int64_t axis = 2; axis < held.dim(); ++axis) map.pixels *= held.size(axis);
  return map;
}

// Asks for huge pages under a large map that is about to be written: fresh memory costs its page faults, several times what writing it does.
void prepare_to_write([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t(2) << 20;
  const uintptr_t begin = (uintptr_t(memory) + page - 1) / page * page, end = (uintptr_t(memory) + uintptr_t(bytes)) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: what comes of it does not matter
#endif
}

std::tuple<Tensor, Tensor> forward(Tensor features, Tensor labels, int64_t regions) {
  Sizes shape;
  for (int64_t axis = 0; axis < features.dim(); ++axis) shape.push_back(features.size(axis));
  PIX2REP_EXPECT(shape.size() >= 3, "features", "have shape [B, C, *S]", shape.size(), " axes");
  PIX2REP_EXPECT(regions >= 0, "regions", "be >= 0", regions);
  check_labels(labels, shape);
  const auto type = features.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor means = torch::stable::new_empty(features, {shape[0], regions, shape[1]}, type);
  Tensor counts = torch::stable::new_empty(features, {shape[0], regions}, ScalarType::Long);
  if (counts.numel() == 0) return {means, counts};
  with_storage(features.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    Tensor held;
    const PoolMap<const S> map = map_of<S>(features, held);
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
  const int64_t regions = counts.size(1), channels = shape[1];
  PIX2REP_EXPECT(grad_means.dim() == 3 && grad_means.size(0) == shape[0] && grad_means.size(1) == regions && grad_means.size(2) == channels, "grad_means",
                 "have shape [B, R, C]", grad_means.dim(), " axes");
  const auto type = like.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  PIX2REP_EXPECT(grad_means.scalar_type() == type, "grad_means", "have the dtype of the means", "scalar type ", int(grad_means.scalar_type()));
  grad_means = torch::stable::contiguous(grad_means), counts = torch::stable::contiguous(counts);
  // Channels-last memory is allocated as [B, *S, C]; the axes are put in place at the end.
  Sizes memory = shape;
  if (channels_last) memory.erase(memory.begin() + 1), memory.push_back(channels);
  Tensor grad = torch::stable::new_empty(like, memory);
  if (grad.numel() > 0)
    with_storage(like.scalar_type(), [&](auto zero) {
      using S = decltype(zero);
      const int64_t pixels = grad.numel() / shape[0] / channels;
      prepare_to_write(grad.data_ptr(), grad.numel() * int64_t(sizeof(S)));
      const PoolMap<S> map{static_cast<S*>(grad.data_ptr()), shape[0], channels, pixels, channels * pixels, channels_last ? channels : pixels, channels_last};
      with_labels(labels, regions, [&](const auto& l) { pool_backward<S>(data<Compute<S>>(grad_means), data<int64_t>(counts), l, TorchParallel{}, map); });
    });
  if (!channels_last) return grad;
  for (int64_t axis = grad.dim() - 1; axis > 1; --axis) grad = torch::stable::transpose(grad, axis - 1, axis);
  return grad;
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
