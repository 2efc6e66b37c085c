// Memory of a call or a task, from a cache line on; written by nobody yet unless a value is given.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace pix2rep {

// std::aligned_alloc of glibc before 2.38 would take a fresh piece each time, however many it freed.
template <class T>
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t count) : memory_(std::malloc(size_t(std::max<int64_t>(count, 1)) * sizeof(T) + 63)) {
    if (!memory_) throw std::bad_alloc();
  }
  Scratch(int64_t count, T value) : Scratch(count) { std::fill_n(get(), count, value); }
  T* get() const { return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) / 64 * 64); }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
};

}  // namespace pix2rep
