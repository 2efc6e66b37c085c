// A GPU on the CPU, for tests: blocks run one after the other, the threads of a block as fibers that hand over at every barrier and warp-wide operation.
// Shared memory starts as NaN, asynchronous copies poison what they replace at once and land when they are waited for; a barrier
// that some threads miss is an error, and so is an address that a vector access cannot take.
// PIX2REP_EMULATE_ORDER=<number> takes threads and blocks in another order each round and lets warps rest: what depends on it lacks a barrier.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline Dim3 blockIdx, gridDim, blockDim, threadIdx;

inline int __float_as_int(float value) {
  int bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

namespace pix2rep::device {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 * 1024;

struct Barrier {
  int waiting = 0;
  int64_t round = 0;
};

struct Copy {
  void* to;
  unsigned char bytes[16];
};

struct Fiber {
  void* place[5];  // of __builtin_setjmp: the C library's keeps a signal mask, a system call each time
  ucontext_t start;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool fresh = true, done = false;
  std::deque<std::vector<Copy>> committed;
  std::vector<Copy> open;
};

struct Warp {
  Barrier barrier;
  unsigned char in[kWarp][64], out[kWarp][64];
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
  Barrier barrier;
  void* home[5];
  int threads = 0, current = 0, finished = 0;
  const std::function<void()>* body = nullptr;
};

inline Block block;

// Leave for `to`; returns when somebody comes back to `from`.
__attribute__((noinline)) inline void jump(void** to) { __builtin_longjmp(to, 1); }
__attribute__((noinline)) inline void change(void** from, void** to) {
  if (__builtin_setjmp(from) == 0) jump(to);
}

inline void yield() { change(block.fibers[block.current].place, block.home); }

// True for the last of `count` to arrive, who lets the others go with release().
inline bool arrive(Barrier& barrier, int count) {
  const int64_t round = barrier.round;
  if (++barrier.waiting == count) return true;
  while (barrier.round == round) {
    if (block.finished > 0 && count > kWarp) {
      std::fputs("emulate: a thread left before a barrier that others wait at\n", stderr);
      std::abort();  // no exception leaves a fiber
    }
    yield();
  }
  return false;
}
inline void release(Barrier& barrier) { barrier.waiting = 0, ++barrier.round; }
inline void meet(Barrier& barrier, int count) {
  if (arrive(barrier, count)) release(barrier);
}

inline void entry() {
  (*block.body)();
  block.fibers[block.current].done = true;
  ++block.finished;
  jump(block.home);
}

__attribute__((noinline)) inline void resume(Fiber& fiber) {
  if (!fiber.fresh) return change(block.home, fiber.place);
  fiber.fresh = false;
  if (__builtin_setjmp(block.home) == 0) setcontext(&fiber.start);
}

// The k-th of `count` in a round.
inline int64_t turn(int64_t k, int64_t count, uint64_t order, uint64_t round) {
  if (order == 0) return k;
  const uint64_t mixed = (order + round) * 0x9e3779b97f4a7c15u;
  const int64_t turned = (k + int64_t((mixed >> 33) % uint64_t(count))) % count;
  return mixed >> 63 ? count - 1 - turned : turned;
}

// Whether a warp rests this round: for 64 rounds at a time, so that others get ahead of it by as many steps.
inline bool rests(int warp, uint64_t order, uint64_t round) {
  return order != 0 && ((order + round / 64) * 0x9e3779b97f4a7c15u * uint64_t(2 * warp + 1) >> 61) < 4;
}

inline void run(int64_t blocks, int threads, int64_t shared, const std::function<void()>& body) {
  if (int(block.fibers.size()) < threads) block.fibers = std::vector<Fiber>(threads);
  block.warps = std::vector<Warp>((threads + kWarp - 1) / kWarp);
  block.body = &body, block.threads = threads;
  gridDim.x = unsigned(blocks), blockDim.x = unsigned(threads);
  const char* given = std::getenv("PIX2REP_EMULATE_ORDER");
  const uint64_t order = given ? std::strtoull(given, nullptr, 10) : 0;
  for (int64_t b = 0; b < blocks; ++b) {
    blockIdx.x = unsigned(turn(b, blocks, order, 0));
    block.shared.assign(size_t(shared) + 128, 0xff);
    block.barrier = {};
    block.finished = 0;
    for (int t = 0; t < threads; ++t) {
      Fiber& fiber = block.fibers[t];
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = fiber.stack.get(), fiber.start.uc_stack.ss_size = kStack, fiber.start.uc_link = nullptr;
      makecontext(&fiber.start, entry, 0);
      fiber.fresh = true, fiber.done = false, fiber.committed.clear(), fiber.open.clear();
    }
    for (uint64_t round = 1; block.finished < threads; ++round)
      for (int k = 0; k < threads; ++k)
        if (const int t = int(turn(k, threads, order, round)); !block.fibers[t].done && !rests(t / kWarp, order, round)) {
          block.current = t, threadIdx.x = unsigned(t);
          resume(block.fibers[t]);
        }
  }
}

inline unsigned char* shared_memory() {
  const auto at = reinterpret_cast<uintptr_t>(block.shared.data());
  return reinterpret_cast<unsigned char*>((at + 127) / 128 * 128);
}

using SharedAddress = uintptr_t;
inline SharedAddress shared_address(const void* shared) { return reinterpret_cast<SharedAddress>(shared); }

// Every lane shows `mine` to its warp; the last one in finds what each gets: f(all, results), arrays of 32. 64 bytes a lane at most.
template <class R, class T, class F>
R exchange(const T& mine, const F& f) {
  static_assert(sizeof(T) <= 64 && sizeof(R) <= 64);
  const int lane = block.current % kWarp;
  Warp& warp = block.warps[block.current / kWarp];
  std::memcpy(warp.in[lane], &mine, sizeof(T));
  if (arrive(warp.barrier, kWarp)) {
    T all[kWarp];
    R results[kWarp];
    for (int l = 0; l < kWarp; ++l) std::memcpy(&all[l], warp.in[l], sizeof(T));
    f(all, results);
    for (int l = 0; l < kWarp; ++l) std::memcpy(warp.out[l], &results[l], sizeof(R));
    release(warp.barrier);
  }
  R result;
  std::memcpy(&result, warp.out[lane], sizeof(R));
  return result;
}

template <class T>
T shuffle_xor(T value, int mask) {
  return exchange<T>(value, [&](const T* all, T* results) {
    for (int lane = 0; lane < kWarp; ++lane) results[lane] = all[lane ^ mask];
  });
}

inline uint32_t ballot(bool vote) {
  return exchange<uint32_t>(vote, [](const bool* all, uint32_t* results) {
    uint32_t votes = 0;
    for (int lane = 0; lane < kWarp; ++lane) votes |= uint32_t(all[lane]) << lane;
    for (int lane = 0; lane < kWarp; ++lane) results[lane] = votes;
  });
}

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}

inline uint32_t pack_bfloat16(float low, float high) {
  const torch::headeronly::BFloat16 l(low), h(high);
  return uint32_t(l.x) | uint32_t(h.x) << 16;
}

inline void expect_aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
  std::fprintf(stderr, "emulate: an access of %zu bytes at an address that is no multiple of them\n", bytes);
  std::abort();
}

template <class S>
uint32_t pack(float low, float high, S) {
  const S pair[2] = {S(low), S(high)};
  uint32_t bits;
  std::memcpy(&bits, pair, 4);
  return bits;
}
template <class S>
uint32_t subtract(uint32_t x, uint32_t y, S) {
  S a[2], b[2];
  std::memcpy(a, &x, 4), std::memcpy(b, &y, 4);
  return pack(float(a[0]) - float(b[0]), float(a[1]) - float(b[1]), S());
}

inline uint32_t to_tf32(float x) {
  const uint32_t bits = uint32_t(__float_as_int(x));
  return (bits & 0x7f800000) == 0x7f800000 ? bits : (bits + 0x1000) & ~0x1fffu;
}

inline void copy_async(void* shared, const void* global) {
  expect_aligned(shared, 16), expect_aligned(global, 16);
  Copy copy{shared, {}};
  std::memcpy(copy.bytes, global, 16);
  std::memset(shared, 0xff, 16);  // from here on it may land at any time
  block.fibers[block.current].open.push_back(copy);
}
inline void copy_commit() {
  Fiber& fiber = block.fibers[block.current];
  fiber.committed.push_back(std::move(fiber.open));
  fiber.open.clear();
}
template <int kPending>
void copy_wait() {
  auto& groups = block.fibers[block.current].committed;
  for (; int(groups.size()) > kPending; groups.pop_front())
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.bytes, 16);
}

template <bool kTransposed>
void load_tiles(uint32_t (&to)[4], SharedAddress row) {
  struct Out {
    uint16_t pair[4][2];
  };
  expect_aligned(reinterpret_cast<const void*>(row), 16);
  const Out out = exchange<Out>(row, [](const SharedAddress* all, Out* results) {
    for (int lane = 0; lane < kWarp; ++lane)
      for (int tile = 0; tile < 4; ++tile)
        for (int k = 0; k < 2; ++k) {
          const int r = kTransposed ? lane % 4 * 2 + k : lane / 4, c = kTransposed ? lane / 4 : lane % 4 * 2 + k;
          results[lane].pair[tile][k] = reinterpret_cast<const uint16_t*>(all[tile * 8 + r])[c];
        }
  });
  std::memcpy(to, out.pair, sizeof(out.pair));
}

// The 32 lanes' parts of a product x y, as mma's accumulators are laid out.
struct Product {
  float d[4];
};
template <int kDepth>
void multiply_tiles(const float (&x)[16][kDepth], const float (&y)[kDepth][8], Product* results) {
  float product[16][8] = {};
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < kDepth; ++k)
      for (int j = 0; j < 8; ++j) product[i][j] += x[i][k] * y[k][j];
  for (int lane = 0; lane < kWarp; ++lane)
    for (int i = 0; i < 4; ++i) results[lane].d[i] = product[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

// Fragments of m16n8k16: lane l has row l / 4 and l / 4 + 8 of a, column l / 4 of b, each at k = 2 (l % 4), one more, and 8 more.
template <class S>
void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], S) {
  struct In {
    uint16_t a[4][2], b[2][2];
  } mine;
  std::memcpy(mine.a, a, sizeof(mine.a)), std::memcpy(mine.b, b, sizeof(mine.b));
  const Product sum = exchange<Product>(mine, [](const In* all, Product* results) {
    const auto wide = [](uint16_t bits) {
      S value;
      std::memcpy(&value, &bits, 2);
      return float(value);
    };
    float x[16][16], y[16][8];
    for (int lane = 0; lane < kWarp; ++lane)
      for (int k = 0; k < 2; ++k) {
        for (int i = 0; i < 4; ++i) x[lane / 4 + i % 2 * 8][lane % 4 * 2 + k + i / 2 * 8] = wide(all[lane].a[i][k]);
        for (int i = 0; i < 2; ++i) y[lane % 4 * 2 + k + i * 8][lane / 4] = wide(all[lane].b[i][k]);
      }
    multiply_tiles(x, y, results);
  });
  for (int i = 0; i < 4; ++i) d[i] += sum.d[i];
}

// Fragments of m16n8k8 in tf32, whose last 13 bits count for nothing: lane l has row l / 4 and l / 4 + 8 of a, column l / 4 of b, each at k = l % 4
// and 4 more.
inline void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float) {
  struct In {
    uint32_t a[4], b[2];
  } mine;
  std::memcpy(mine.a, a, sizeof(mine.a)), std::memcpy(mine.b, b, sizeof(mine.b));
  const Product sum = exchange<Product>(mine, [](const In* all, Product* results) {
    const auto wide = [](uint32_t bits) { return __int_as_float(int(bits & ~0x1fffu)); };
    float x[16][8], y[8][8];
    for (int lane = 0; lane < kWarp; ++lane) {
      for (int i = 0; i < 4; ++i) x[lane / 4 + i % 2 * 8][lane % 4 + i / 2 * 4] = wide(all[lane].a[i]);
      for (int i = 0; i < 2; ++i) y[lane % 4 + i * 4][lane / 4] = wide(all[lane].b[i]);
    }
    multiply_tiles(x, y, results);
  });
  for (int i = 0; i < 4; ++i) d[i] += sum.d[i];
}

inline int unknown(int x) { return x; }
inline void rarely() {}
inline void add_atomic(float* to, float4 value) { expect_aligned(to, 16), to[0] += value.x, to[1] += value.y, to[2] += value.z, to[3] += value.w; }
inline void add_atomic(float* to, float value) { *to += value; }

}  // namespace pix2rep::device

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
using std::fabs;

inline void __syncthreads() { pix2rep::device::meet(pix2rep::device::block.barrier, int(blockDim.x)); }
inline void __syncwarp(unsigned = 0) { pix2rep::device::meet(pix2rep::device::block.warps[threadIdx.x / 32].barrier, 32); }
inline int __ffs(int x) { return __builtin_ffs(x); }
