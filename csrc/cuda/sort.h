// PyTorch's sort, through the dispatcher.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace pix2rep {

// torch.sort(keys, stable=True): keys in order, and where each came from.
inline std::tuple<torch::stable::Tensor, torch::stable::Tensor> sort_stable(const torch::stable::Tensor& keys) {
  using namespace torch::stable;
  std::array<StableIValue, 4> stack{detail::from(keys), detail::from(std::optional<bool>(true)), detail::from(int64_t(0)), detail::from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {detail::to<Tensor>(stack[0]), detail::to<Tensor>(stack[1])};
}

}  // namespace pix2rep
