// Launch kernels on the current stream of the tensors' device; every launch is checked. No kernel can be launched before all tensors of a call are known
// to be on one device: an address that it cannot read would cost the process its GPU.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "../common/check.h"
#include "device.h"

#ifndef PIX2REP_EMULATE
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
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

// A tensor of a call and its name; nullptr where an optional one is left out.
struct Given {
  const torch::stable::Tensor* tensor;
  const char* name;

  Given(const torch::stable::Tensor& tensor, const char* name) : tensor(&tensor), name(name) {}
  Given(const std::optional<torch::stable::Tensor>& tensor, const char* name) : tensor(tensor ? &*tensor : nullptr), name(name) {}
};

// Every tensor of a call on the device of the first, which is where kernels run. Returns the index of the device.
inline int32_t expect_home(std::initializer_list<Given> all) {
  const Given& first = *all.begin();
  const auto text = [](const torch::stable::Tensor& t) {
    return t.is_cpu() ? std::string("cpu") : t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : std::string("another device");
  };
#ifdef PIX2REP_EMULATE
  PIX2REP_EXPECT(first.tensor->is_cpu(), first.name, "be on the CPU, where this build emulates CUDA", text(*first.tensor));
#else
  PIX2REP_EXPECT(first.tensor->is_cuda(), first.name, "be on a CUDA device", text(*first.tensor));
#endif
  const int32_t home = first.tensor->get_device_index();
  for (const Given& given : all)
    if (const auto* t = given.tensor)
      PIX2REP_EXPECT(t->is_cpu() == first.tensor->is_cpu() && t->is_cuda() == first.tensor->is_cuda() && t->get_device_index() == home, given.name,
                     "be on the device of `", first.name, "`, ", text(*first.tensor), text(*t));
  return home;
}

#ifdef PIX2REP_EMULATE

class Launch {
 public:
  explicit Launch(std::initializer_list<Given> all) { expect_home(all); }
  int multiprocessors() const { return 4; }
  int64_t shared_limit() const { return 232448 - 1024; }

  template <class... P, class... A>
  void operator()(const char*, void (*kernel)(P...), int64_t blocks, int threads, int64_t shared, A... arguments) const {
    if (blocks > 0) device::run(blocks, threads, shared, [&] { kernel(static_cast<P>(arguments)...); });
  }
};

#else

// libtorch_cuda's, by name: this object links what every torch has, and Python loads libtorch_cuda where the linker does not look for symbols.
inline auto current_stream_function() {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function found = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Function>(dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(found, "backend 'cuda' needs a torch with CUDA, got one without");
  return found;
}

class Launch {
 public:
  explicit Launch(std::initializer_list<Given> all) : device_(expect_home(all)), stream_of_(current_stream_function()), guard_(device_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(stream_of_(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    check(cudaSetDevice(device_), "cudaSetDevice");  // of this object's own runtime: torch's guard sets torch's
  }

  int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  int64_t shared_limit() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

  template <class... P, class... A>
  void operator()(const char* name, void (*kernel)(P...), int64_t blocks, int threads, int64_t shared, A... arguments) const {
    if (blocks <= 0) return;
    STD_TORCH_CHECK(blocks < (int64_t(1) << 31), name, ": `grid` must be below 2^31 blocks, got ", blocks);
    if (shared > 48 * 1024) allow(reinterpret_cast<const void*>(kernel), shared, name);
    kernel<<<unsigned(blocks), threads, size_t(shared), stream_>>>(static_cast<P>(arguments)...);
    check(cudaGetLastError(), name);
  }

 private:
  int attribute(cudaDeviceAttr what) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, what, device_), "cudaDeviceGetAttribute");
    return value;
  }

  // A kernel's shared memory above 48 KiB, asked for once a device and size.
  void allow(const void* kernel, int64_t shared, const char* name) const {
    static std::mutex mutex;
    static std::map<std::pair<const void*, int32_t>, int64_t> allowed;
    const std::lock_guard<std::mutex> lock(mutex);
    int64_t& most = allowed[{kernel, device_}];
    if (shared <= most) return;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), name);
    most = shared;
  }

  static void check(cudaError_t error, const char* name) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // else the next launch would report it again
    STD_TORCH_CHECK(false, name, ": ", cudaGetErrorString(error));
  }

  int32_t device_;
  AOTITorchError (*stream_of_)(int32_t, void**);
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

#endif

}  // namespace pix2rep
