// A GPU on the CPU, for tests: blocks run one after the other, the threads of a block as fibers that hand over at every barrier and warp-wide operation.
// Shared memory starts as NaN, asynchronous copies land only when they are waited for, a barrier that some threads miss is an error.
#pragma once

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

namespace pix2rep::device {

constexpr int kWarp = 32;

struct Barrier {
  int waiting = 0;
  int64_t round = 0;
};

struct Copy {
  void* to;
  unsigned char bytes[16];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
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
  ucontext_t home;
  int current = 0, finished = 0;
  const std::function<void()>* body = nullptr;
};

inline Block block;

inline void yield() {
  const int self = block.current;
  swapcontext(&block.fibers[self].context, &block.home);
  threadIdx.x = unsigned(self);
}

inline void arrive(Barrier& barrier, int count) {
  const int64_t round = barrier.round;
  if (++barrier.waiting == count) {
    barrier.waiting = 0, ++barrier.round;
    return;
  }
  while (barrier.round == round) {
    if (block.finished > 0 && count > kWarp) {
      std::fputs("emulate: a thread left before a barrier that others wait at\n", stderr);
      std::abort();  // no exception leaves a fiber
    }
    yield();
  }
}

inline void entry() {
  (*block.body)();
  block.fibers[block.current].done = true;
  ++block.finished;
  swapcontext(&block.fibers[block.current].context, &block.home);
}

inline void run(int64_t blocks, int threads, int64_t shared, const std::function<void()>& body) {
  block.fibers = std::vector<Fiber>(threads);
  block.warps = std::vector<Warp>((threads + kWarp - 1) / kWarp);
  block.body = &body;
  gridDim.x = unsigned(blocks), blockDim.x = unsigned(threads);
  for (Fiber& fiber : block.fibers) fiber.stack.reset(new char[128 * 1024]);
  for (int64_t b = 0; b < blocks; ++b) {
    blockIdx.x = unsigned(b);
    block.shared.assign(size_t(shared) + 128, 0xff);
    block.barrier = {};
    block.finished = 0;
    for (Fiber& fiber : block.fibers) {
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = 128 * 1024, fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, entry, 0);
      fiber.done = false, fiber.committed.clear(), fiber.open.clear();
    }
    while (block.finished < threads)
      for (int t = 0; t < threads; ++t)
        if (!block.fibers[t].done) {
          block.current = t, threadIdx.x = unsigned(t);
          swapcontext(&block.home, &block.fibers[t].context);
        }
  }
}

inline unsigned char* shared_memory() {
  const auto at = reinterpret_cast<uintptr_t>(block.shared.data());
  return reinterpret_cast<unsigned char*>((at + 127) / 128 * 128);
}

// Every lane shows `mine` to the warp; f(all) runs once all have. 64 bytes a lane at most.
template <class T, class R, class F>
R exchange(const T& mine, const F& f) {
  static_assert(sizeof(T) <= 64 && sizeof(R) <= 64);
  const int lane = block.current % kWarp;
  Warp& warp = block.warps[block.current / kWarp];
  std::memcpy(warp.in[lane], &mine, sizeof(T));
  arrive(warp.barrier, kWarp);
  const auto get = [&](int from) {
    T value;
    std::memcpy(&value, warp.in[from], sizeof(T));
    return value;
  };
  R result = f(get, lane);
  arrive(warp.barrier, kWarp);
  return result;
}

template <class T>
T shuffle_xor(T value, int mask) {
  return exchange<T, T>(value, [&](const auto& get, int lane) { return get(lane ^ mask); });
}

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}

inline void copy_async(void* shared, const void* global, bool present) {
  Copy copy{shared, {}};
  if (present) std::memcpy(copy.bytes, global, 16);
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
void load_tiles(uint32_t (&to)[4], const void* row) {
  struct Out {
    uint32_t r[4];
  };
  const Out out = exchange<const void*, Out>(row, [&](const auto& get, int lane) {
    Out found;
    for (int tile = 0; tile < 4; ++tile) {
      uint16_t pair[2];
      for (int k = 0; k < 2; ++k) {
        const int r = kTransposed ? lane % 4 * 2 + k : lane / 4, c = kTransposed ? lane / 4 : lane % 4 * 2 + k;
        pair[k] = static_cast<const uint16_t*>(get(tile * 8 + r))[c];
      }
      found.r[tile] = uint32_t(pair[0]) | uint32_t(pair[1]) << 16;
    }
    return found;
  });
  std::memcpy(to, out.r, sizeof(out.r));
}

template <class S>
void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], S) {
  struct In {
    uint32_t a[4], b[2];
  } mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  struct Out {
    float d[4];
  };
  const auto half = [](uint32_t pair, int k) {
    const uint16_t bits = uint16_t(pair >> (16 * k));
    S value;
    std::memcpy(&value, &bits, 2);
    return float(value);
  };
  const Out sum = exchange<In, Out>(mine, [&](const auto& get, int lane) {
    Out out{};
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
      for (int k = 0; k < 16; ++k) {
        const int ra = (row % 8) * 4 + (k % 8) / 2, rb = column * 4 + (k % 8) / 2;
        out.d[i] += half(get(ra).a[row / 8 + 2 * (k / 8)], k % 2) * half(get(rb).b[k / 8], k % 2);
      }
    }
    return out;
  });
  for (int i = 0; i < 4; ++i) d[i] += sum.d[i];
}

inline void add_atomic(float* to, float4 value) { to[0] += value.x, to[1] += value.y, to[2] += value.z, to[3] += value.w; }
inline void add_atomic(float* to, float value) { *to += value; }

}  // namespace pix2rep::device

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
using std::fabs;

inline void __syncthreads() { pix2rep::device::arrive(pix2rep::device::block.barrier, int(blockDim.x)); }
inline void __syncwarp(unsigned = 0) { pix2rep::device::arrive(pix2rep::device::block.warps[threadIdx.x / 32].barrier, 32); }
