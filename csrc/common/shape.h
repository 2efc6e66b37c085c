// Shapes of tensors, and maps [B, C, *S] in memory that has their channels last.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "view.h"

namespace pix2rep {

using Sizes = std::vector<int64_t>;

inline int64_t product(const int64_t* begin, const int64_t* end) {
  int64_t out = 1;
  for (; begin != end; ++begin) out *= *begin;
  return out;
}

inline Sizes shape_of(const Tensor& tensor) {
  Sizes shape;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) shape.push_back(tensor.size(axis));
  return shape;
}

// [B, *S] of [B, C, *S].
inline Sizes without_channels(Sizes shape) {
  shape.erase(shape.begin() + 1);
  return shape;
}

// What a gradient of that shape is allocated as: [B, *S, C] when channels_last.
inline Sizes memory_of(const Sizes& shape, bool channels_last) {
  Sizes memory = channels_last ? without_channels(shape) : shape;
  if (channels_last) memory.push_back(shape[1]);
  return memory;
}

// Such memory seen as [B, C, *S].
inline Tensor in_place(Tensor gradient, bool channels_last) {
  for (int64_t axis = gradient.dim() - 1; channels_last && axis > 1; --axis) gradient = torch::stable::transpose(gradient, axis - 1, axis);
  return gradient;
}

}  // namespace pix2rep
