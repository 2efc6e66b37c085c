// Typed, strided views of stable tensors: what a kernel body needs to know of a tensor.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <optional>

#include "check.h"

namespace pix2rep {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls f with a value of the C++ type that `type` stands for; the four types the ops accept.
template <class F>
auto with_float_type(ScalarType type, const char* argument, F&& f) {
  switch (type) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Half:
      return f(torch::headeronly::Half{});
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16{});
    default:
      STD_TORCH_CHECK(false, "`", argument, "` must be float16, bfloat16, float32 or float64, got scalar type ", int(type));
  }
}

// Refuses a tensor of another type than those.
inline void expect_float(const Tensor& tensor, const char* argument) { with_float_type(tensor.scalar_type(), argument, [](auto) {}); }

// Of sums and norms: float32, or float64 where a tensor is.
template <class... Tensors>
ScalarType compute_type(const Tensors&... tensors) {
  return (... || (tensors.scalar_type() == ScalarType::Double)) ? ScalarType::Double : ScalarType::Float;
}

template <class F>
auto with_compute_type(ScalarType type, F&& f) {
  return type == ScalarType::Double ? f(double{}) : f(float{});
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

}  // namespace pix2rep
