// What a kernel asks of the chip, in one place: CUDA's own on a GPU; tests/emulate/emulate.h offers the same on the CPU, so that kernels are tested where
// there is no GPU. Kernels take shared memory from shared_memory() alone.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#ifdef PIX2REP_EMULATE
#include "emulate.h"
#else
#include <cuda_runtime.h>

namespace pix2rep::device {

extern __shared__ __align__(128) unsigned char shared_bytes[];
__device__ __forceinline__ unsigned char* shared_memory() { return shared_bytes; }

// Where something lies in shared memory; a multiple of 128 plus less may be taken apart by bits.
using SharedAddress = uint32_t;
__device__ __forceinline__ SharedAddress shared_address(const void* shared) { return uint32_t(__cvta_generic_to_shared(shared)); }

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

__device__ __forceinline__ uint32_t ballot(bool vote) { return __ballot_sync(0xffffffffu, vote); }

__device__ __forceinline__ uint32_t pack_bfloat16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Two 16-bit values of a register: rounded from float, and x - y rounded once.
__device__ __forceinline__ uint32_t pack(float low, float high, torch::headeronly::BFloat16) { return pack_bfloat16(low, high); }
__device__ __forceinline__ uint32_t pack(float low, float high, torch::headeronly::Half) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ uint32_t subtract(uint32_t x, uint32_t y, torch::headeronly::BFloat16) {
  uint32_t difference;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(difference) : "r"(y), "r"(0xbf80bf80u), "r"(x));  // sub.bf16x2 needs Hopper
  return difference;
}
__device__ __forceinline__ uint32_t subtract(uint32_t x, uint32_t y, torch::headeronly::Half) {
  uint32_t difference;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(difference) : "r"(x), "r"(y));
  return difference;
}

// float32 rounded to the 11 digits that multiply() takes of it.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

__device__ __forceinline__ float exp2_fast(float x) {  // 2 ulp; results below 2^-126 are 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 16 bytes from global to shared memory; done after a commit and a wait.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 tiles of 16-bit values: lane l names row l % 8 of tile l / 8, and gets two neighbours of row l / 4 of each (of column l / 4 when transposed).
template <bool kTransposed>
__device__ __forceinline__ void load_tiles(uint32_t (&to)[4], SharedAddress from) {
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}

// d += a b of 16 x 16 and 16 x 8, fragments as the PTX manual lays out mma.m16n8k16.
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], torch::headeronly::Half) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], torch::headeronly::BFloat16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same of 16 x 8 and 8 x 8 in tf32, as mma.m16n8k8.
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// *to += value, four at once where the chip can (Hopper), in any order.
__device__ __forceinline__ void add_atomic(float* to, float4 value) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w) : "memory");
#else
  atomicAdd(to, value.x), atomicAdd(to + 1, value.y), atomicAdd(to + 2, value.z), atomicAdd(to + 3, value.w);
#endif
}
__device__ __forceinline__ void add_atomic(float* to, float value) { atomicAdd(to, value); }

// x, which the compiler must not know: what is computed from it is not kept in registers across a loop.
__device__ __forceinline__ int unknown(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// The emulation refuses other addresses, as the chip would.
__device__ __forceinline__ void expect_aligned(const void*, size_t) {}

// Marks code that tiles in the interior do not run, for benchmarks/cuda_static.py to leave out of its count.
__device__ __forceinline__ void rarely() {
#ifdef PIX2REP_STATIC
  asm volatile("pmevent 0;");
#endif
}

}  // namespace pix2rep::device
#endif
