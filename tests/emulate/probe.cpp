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

// x [16, 8] and y [8, 8], both in tf32, and what to_tf32 leaves of x; 32 lanes.
static void tf32_kernel(const float* x, const float* y, float* out, float* rounded) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) {
    const int at = (g + i % 2 * 8) * 8 + t + i / 2 * 4;
    a[i] = to_tf32(x[at]), rounded[at] = __int_as_float(int(a[i]));
  }
  for (int i = 0; i < 2; ++i) b[i] = uint32_t(__float_as_int(y[(t + 4 * i) * 8 + g]));  // cut off, not rounded
  float d[4] = {1, 1, 1, 1};
  multiply(d, a, b, float());
  for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = d[i];
}

// x less y, two values at once, and x and y packed.
template <class S>
static void pairs_kernel(const float* x, const float* y, uint32_t* difference, uint32_t* packed) {
  const int k = threadIdx.x;
  packed[k] = pack(x[2 * k], x[2 * k + 1], S());
  difference[k] = subtract(packed[k], pack(y[2 * k], y[2 * k + 1], S()), S());
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
__attribute__((visibility("default"))) void tf32(const float* x, const float* y, float* out, float* rounded) {
  run(1, 32, 0, [&] { tf32_kernel(x, y, out, rounded); });
}
__attribute__((visibility("default"))) void pairs(const float* x, const float* y, uint32_t* difference, uint32_t* packed, int half) {
  const auto kernel = half ? &pairs_kernel<torch::headeronly::Half> : &pairs_kernel<torch::headeronly::BFloat16>;
  run(1, 32, 0, [&] { kernel(x, y, difference, packed); });
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
