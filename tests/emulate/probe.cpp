// What tests/test_cuda.py asks of the emulation and of csrc/common/math.h: a product by tiles, copies before and after their wait, votes, functions.
#include <vector>

#include <torch/headeronly/util/Half.h>

#include "../../csrc/common/math.h"
#include "emulate.h"

using namespace pix2rep::device;

template <class S, bool kTransposed>
static void product_kernel(const uint16_t* x, const uint16_t* y, float* out, float* early) {
  // x [16, 16]; y [8, 16], or [16, 8] when it is to be transposed; 32 lanes.
  uint16_t* shared = reinterpret_cast<uint16_t*>(shared_memory());
  const int lane = threadIdx.x;
  copy_async(shared + lane * 8, x + lane * 8);
  if (lane < 16) copy_async(shared + 256 + lane * 8, y + lane * 8);
  copy_commit();
  if (lane == 0) std::memcpy(early, shared, 4);
  copy_wait<0>();
  __syncthreads();
  uint32_t a[4], b[4];
  load_tiles<false>(a, shared_address(shared + (lane & 15) * 16 + (lane >> 4) * 8));
  if (kTransposed)
    load_tiles<true>(b, shared_address(shared + 256 + (lane & 15) * 8));
  else
    load_tiles<false>(b, shared_address(shared + 256 + (lane & 7) * 16 + (lane >> 3 & 1) * 8));
  float d[4] = {1, 1, 1, 1};
  multiply(d, a, {b[0], b[1]}, S());
  for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

static void vote_kernel(int* votes, float* sums) {
  const float mine = float(threadIdx.x);
  votes[threadIdx.x] = int(ballot(threadIdx.x % 3 == 0));
  float sum = mine;
  for (int step = 16; step > 0; step /= 2) sum += shuffle_xor(sum, step);
  __syncthreads();
  sums[threadIdx.x] = sum;
}

static void barrier_kernel() {
  if (threadIdx.x < 32) return;
  __syncthreads();
}

extern "C" {
__attribute__((visibility("default"))) void product(const uint16_t* x, const uint16_t* y, float* out, float* early, int half, int transposed) {
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  const auto kernel = half ? (transposed ? &product_kernel<Half, true> : &product_kernel<Half, false>)
                           : (transposed ? &product_kernel<BFloat16, true> : &product_kernel<BFloat16, false>);
  run(1, 32, 1024, [&] { kernel(x, y, out, early); });
}
__attribute__((visibility("default"))) void vote(int* votes, float* sums) {
  run(1, 64, 0, [&] { vote_kernel(votes, sums); });
}
__attribute__((visibility("default"))) void miss_a_barrier() {
  run(1, 64, 0, [&] { barrier_kernel(); });
}
__attribute__((visibility("default"))) void functions(const float* x, int count, float* out) {
  for (int i = 0; i < count; ++i) {
    out[i] = pix2rep::log1p_of_unit(x[i]);
    out[count + i] = pix2rep::one_minus_exp(x[i]);
    out[2 * count + i] = pix2rep::softplus2(x[i] * 40 - 20);
  }
}
}
