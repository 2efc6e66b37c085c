// What the drivers of tests/sanitize share: threads without torch, memory of exactly the size asked for, random numbers, comparisons.
// A driver <op>.cpp holds PIX2REP_SANITIZE(<op>) { ... }, which runs the bodies of csrc/cpu/<op>_core.h with every Parallel and compares with plain loops.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/storage.h"

namespace sanitize {

// Under ThreadSanitizer 3 threads are compared with 1 and the plain loops, which take most of the time there, are left to the other two.
#if defined(__SANITIZE_THREAD__)
constexpr bool kPlainLoops = false;
#else
constexpr bool kPlainLoops = true;
#endif

// f(task) for every task in [0, count), spread over `threads` as TorchParallel spreads it over PyTorch's.
struct Threads {
  int64_t threads;

  int64_t workers() const { return threads; }

  template <class F>
  void operator()(int64_t count, const F& f) const {
    const int64_t used = std::max<int64_t>(1, std::min(threads, count));
    std::exception_ptr error;
    std::mutex guard;
    const auto share = [&](int64_t thread) {
      try {
        for (int64_t task = count * thread / used; task < count * (thread + 1) / used; ++task) f(task);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(guard);
        error = std::current_exception();
      }
    };
    std::vector<std::thread> others;
    for (int64_t thread = 1; thread < used; ++thread) others.emplace_back(share, thread);
    share(0);
    for (std::thread& other : others) other.join();
    if (error) std::rethrow_exception(error);
  }
};

// `count` values and not a byte more. Outputs hold NaN (0xff bytes) before they are written.
template <class T>
class Exact {
 public:
  explicit Exact(int64_t count) : count_(count), memory_(static_cast<T*>(std::malloc(std::max<size_t>(size_t(count) * sizeof(T), 1)))) {
    std::memset(static_cast<void*>(memory_.get()), 0xff, size_t(count) * sizeof(T));
  }
  T* get() const { return memory_.get(); }
  T& operator[](int64_t i) const { return memory_.get()[i]; }
  int64_t size() const { return count_; }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  int64_t count_;
  std::unique_ptr<T[], Free> memory_;
};

// The same numbers on every run.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2654435761u + 88172645463325252u) {}
  uint64_t next() {
    state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;
    return state_;
  }
  int64_t below(int64_t count) { return int64_t(next() % uint64_t(count)); }
  double uniform(double low, double high) { return low + (high - low) * (double(next() >> 11) / 9007199254740992.0); }
  double eighths() { return double(below(33) - 16) / 8; }  // in [-2, 2], exact in every storage type

 private:
  uint64_t state_;
};

// Bits of float16 and bfloat16, for storage types that hold `uint16_t bits`.
inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint16_t to_bf16(float x) { return uint16_t(bits_of(x) >> 16); }
inline float from_bf16(uint16_t x) { return float_of(uint32_t(x) << 16); }
// Normal numbers and zero only, which is all that `eighths` makes.
inline uint16_t to_f16(float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000;
  return x == 0 ? uint16_t(sign) : uint16_t(sign | ((((bits >> 23 & 0xff) - 112) << 10) | (bits >> 13 & 0x3ff)));
}
inline float from_f16(uint16_t x) {
  const int exponent = x >> 10 & 31, mantissa = x & 0x3ff;
  const float size = exponent == 31 ? (mantissa ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity())
                     : exponent     ? std::ldexp(float(1024 + mantissa), exponent - 25)
                                    : std::ldexp(float(mantissa), -24);
  return x & 0x8000 ? -size : size;
}

using pix2rep::Storage;
inline int64_t bytes_of(Storage type) { return pix2rep::kBytes[int(type)]; }
inline double epsilon_of(Storage type) {
  return type == Storage::f16 ? 1.0 / 1024 : type == Storage::bf16 ? 1.0 / 128 : double(type == Storage::f32 ? std::numeric_limits<float>::epsilon() : std::numeric_limits<double>::epsilon());
}

// `count` values of a storage type that is known at run time.
class Values {
 public:
  Values(Storage type, int64_t count) : type(type), count(count), bytes(count * bytes_of(type)) {}
  double operator[](int64_t i) const {
    const char* at = bytes.get() + i * bytes_of(type);
    if (type == Storage::f64) return read<double>(at);
    if (type == Storage::f32) return double(read<float>(at));
    return double(type == Storage::f16 ? from_f16(read<uint16_t>(at)) : from_bf16(read<uint16_t>(at)));
  }
  void set(int64_t i, double x) {
    char* at = bytes.get() + i * bytes_of(type);
    if (type == Storage::f64) return write(at, x);
    if (type == Storage::f32) return write(at, float(x));
    write(at, std::isnan(x) ? uint16_t(0x7fff) : type == Storage::f16 ? to_f16(float(x)) : to_bf16(float(x)));
  }
  char* data() const { return bytes.get(); }

  const Storage type;
  const int64_t count;

 private:
  template <class T>
  static T read(const char* at) {
    T x;
    std::memcpy(&x, at, sizeof(T));
    return x;
  }
  template <class T>
  static void write(char* at, T x) {
    std::memcpy(at, &x, sizeof(T));
  }
  Exact<char> bytes;
};

struct Case {
  const char* op;
  void (*run)();
};
inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}
struct Registered {
  Registered(const char* op, void (*run)()) { cases().push_back({op, run}); }
};

inline int64_t& comparisons() {
  static int64_t count = 0;
  return count;
}
inline int64_t& failures() {
  static int64_t count = 0;
  return count;
}

// |got - want| <= bound for every value; a NaN is equal to a NaN alone.
template <class G, class W>
void close(const std::string& what, int64_t count, const G& got, const W& want, double bound) {
  ++comparisons();
  for (int64_t i = 0; i < count; ++i) {
    const double g = double(got(i)), w = double(want(i));
    if (g == w || (std::isnan(g) && std::isnan(w)) || std::abs(g - w) <= bound) continue;
    std::fprintf(stderr, "%s: value %lld of %lld is %.9g, must be %.9g within %.2g\n", what.c_str(), (long long)i, (long long)count, g, w, bound);
    ++failures();
    return;
  }
}
template <class T, class W>
void close(const std::string& what, const Exact<T>& got, const std::vector<W>& want, double bound) {
  close(what, got.size(), [&](int64_t i) { return got[i]; }, [&](int64_t i) { return want[size_t(i)]; }, bound);
}
inline void close(const std::string& what, const Values& got, const std::vector<double>& want, double bound) {
  close(what, got.count, [&](int64_t i) { return got[i]; }, [&](int64_t i) { return want[size_t(i)]; }, bound);
}
// The same bits.
template <class T>
void equal(const std::string& what, const Exact<T>& got, const Exact<T>& want) {
  ++comparisons();
  if (got.size() == want.size() && std::memcmp(got.get(), want.get(), size_t(got.size()) * sizeof(T)) == 0) return;
  std::fprintf(stderr, "%s: not the same bits\n", what.c_str());
  ++failures();
}

inline void equal(const std::string& what, const Values& got, const Values& want) {
  ++comparisons();
  if (got.count == want.count && std::memcmp(got.data(), want.data(), size_t(got.count * bytes_of(got.type))) == 0) return;
  std::fprintf(stderr, "%s: not the same bits\n", what.c_str());
  ++failures();
}

}  // namespace sanitize

#define PIX2REP_SANITIZE(op)                                   \
  static void run_##op();                                      \
  static const sanitize::Registered registered_##op(#op, run_##op); \
  static void run_##op()
