// Launch kernels on the current stream of a tensor's device; every launch is checked.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <utility>

#include "../common/check.h"
#include "device.h"

#ifndef PIX2REP_EMULATE
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

// Weak: a torch without CUDA lacks it, and the object must load there all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

// PIX2REP_CUDA_LIBRARY(m) { m.impl(...); } registers the kernels of a file; PIX2REP_CUDA_FRAGMENT(m) { m.def(...); } an op that CUDA alone has.
#ifdef PIX2REP_EMULATE
#define PIX2REP_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(pix2rep_emulated, CPU, m)
#define PIX2REP_CUDA_FRAGMENT(m) STABLE_TORCH_LIBRARY_FRAGMENT(pix2rep_emulated, m)
#else
#define PIX2REP_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(pix2rep_native, CUDA, m)
#define PIX2REP_CUDA_FRAGMENT(m) STABLE_TORCH_LIBRARY_FRAGMENT(pix2rep_native, m)
#endif

namespace pix2rep {

#ifdef PIX2REP_EMULATE

class Launch {
 public:
  explicit Launch(const torch::stable::Tensor&) {}
  int multiprocessors() const { return 4; }
  int64_t shared_limit() const { return 232448 - 1024; }

  template <class... P, class... A>
  void operator()(const char*, void (*kernel)(P...), int64_t blocks, int threads, int64_t shared, A... arguments) const {
    if (blocks > 0) device::run(blocks, threads, shared, [&] { kernel(static_cast<P>(arguments)...); });
  }
};

#else

class Launch {
 public:
  explicit Launch(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()), device_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  int64_t shared_limit() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

  template <class... P, class... A>
  void operator()(const char* name, void (*kernel)(P...), int64_t blocks, int threads, int64_t shared, A... arguments) const {
    if (blocks <= 0) return;
    STD_TORCH_CHECK(blocks < (int64_t(1) << 31), name, ": `grid` must be below 2^31 blocks, got ", blocks);
    if (shared > 48 * 1024) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), name);
    kernel<<<unsigned(blocks), threads, size_t(shared), stream_>>>(static_cast<P>(arguments)...);
    check(cudaGetLastError(), name);
  }

 private:
  int attribute(cudaDeviceAttr what) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, what, device_), "cudaDeviceGetAttribute");
    return value;
  }
  static void check(cudaError_t error, const char* name) { STD_TORCH_CHECK(error == cudaSuccess, name, ": ", cudaGetErrorString(error)); }

  torch::stable::accelerator::DeviceGuard guard_;
  int32_t device_;
  cudaStream_t stream_;
};

#endif

}  // namespace pix2rep
