// Maps [B, C, *S] among tensors: storage types, shapes, layouts, the memory of gradients.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <fstream>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../common/shape.h"
#include "storage.h"

namespace pix2rep {

// PyTorch's types as the kernels know them.
template <class S>
using Stored = std::conditional_t<std::is_same_v<S, torch::headeronly::Half>, F16, std::conditional_t<std::is_same_v<S, torch::headeronly::BFloat16>, BF16, S>>;

template <class F>
auto with_storage(ScalarType type, const char* argument, const F& f) {
  return with_float_type(type, argument, [&](auto zero) { return f(Stored<decltype(zero)>{}); });
}

inline Storage storage_of(const Tensor& tensor, const char* argument) {
  return with_storage(tensor.scalar_type(), argument, [](auto zero) { return kStorage<decltype(zero)>; });
}

// Whether axes [first, dim) are one axis of that stride.
inline bool together(const Tensor& t, int64_t first, int64_t stride) {
  for (int64_t axis = t.dim() - 1; axis >= first; --axis) {
    if (t.size(axis) > 1 && t.stride(axis) != stride) return false;
    stride *= t.size(axis);
  }
  return true;
}

// From one pixel of a row to the next.
inline int64_t pixel_stride(const Tensor& t) {
  for (int64_t axis = t.dim() - 1; axis >= 2; --axis)
    if (t.size(axis) > 1) return t.stride(axis);
  return 1;
}

// A tensor as a map, copied when it is in neither layout: `held` keeps the copy.
template <class S>
Map<const S> map_of(const Tensor& features, Tensor& held) {
  held = features;
  const bool planes = together(features, 2, 1), one = features.size(1) == 1;
  const bool last = (one ? !planes : features.stride(1) == 1 && features.size(1) > 0) && together(features, 2, pixel_stride(features));
  if (!last && !planes) held = torch::stable::contiguous(features);
  const Sizes shape = shape_of(held);
  return {static_cast<const S*>(held.data_ptr()), shape[0], shape[1], product(shape.data() + 2, shape.data() + shape.size()), held.stride(0),
          last ? pixel_stride(held) : held.stride(1), last};
}

// Pages of 2 MiB that the kernel has at hand, as /proc/buddyinfo counts them: blocks of 4 KiB << order for orders 0, 1, ... of each zone.
inline int64_t free_huge_pages() {
  std::ifstream zones("/proc/buddyinfo");
  int64_t pages = 0;
  for (std::string line; std::getline(zones, line);) {
    std::istringstream fields(line);
    std::string node, number, zone, name;
    fields >> node >> number >> zone >> name;
    int64_t count = 0;
    for (int order = 0; fields >> count; ++order)
      if (order >= 9) pages += count << (order - 9);
  }
  return pages;
}

// Asks for huge pages under a large gradient that is about to be written: fresh memory costs its page faults, several times what writing it does. Not
// where few are left: the kernel would move memory about to make some, which takes longer still.
inline Tensor prepared(Tensor gradient) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t(2) << 20;
  const uintptr_t memory = uintptr_t(gradient.data_ptr()), bytes = uintptr_t(gradient.numel()) * gradient.element_size();
  const uintptr_t begin = (memory + page - 1) / page * page, end = (memory + bytes) / page * page;
  // A hint: what comes of it does not matter.
  if (begin < end && free_huge_pages() > int64_t(2 * (end - begin) / page)) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return gradient;
}

// A gradient of that shape and the dtype of `like`. Channels-last memory is allocated as [B, *S, C]: `in_place` puts the axes in place at the end.
inline Tensor new_gradient(const Tensor& like, const Sizes& shape, bool channels_last) {
  return prepared(torch::stable::new_empty(like, memory_of(shape, channels_last)));
}

template <class S>
Map<S> map_of_gradient(const Tensor& gradient, const Sizes& shape, bool channels_last) {
  const int64_t channels = shape[1], pixels = product(shape.data() + 2, shape.data() + shape.size());
  return {static_cast<S*>(gradient.data_ptr()), shape[0], channels, pixels, channels * pixels, channels_last ? channels : pixels, channels_last};
}

}  // namespace pix2rep
