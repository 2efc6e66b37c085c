// The three types that CUDA kernels read and write; float64 has no kernels here.
#pragma once

#include "../common/view.h"

namespace pix2rep {

template <class F>
void with_storage(ScalarType type, const char* argument, const F& f) {
  with_float_type(type, argument, [&](auto zero) {
    if constexpr (sizeof(zero) == 8) {
      STD_TORCH_CHECK(false, "`", argument, "` must be float16, bfloat16 or float32 on CUDA, got float64");
    } else {
      f(zero);
    }
  });
}

inline void expect_storage(const Tensor& tensor, const char* argument) { with_storage(tensor.scalar_type(), argument, [](auto) {}); }

}  // namespace pix2rep
