// Math of single values that the CPU and the GPU share.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define PIX2REP_BOTH __host__ __device__ __forceinline__
#else
#define PIX2REP_BOTH static inline  // a copy of its own for every instruction set
#endif

namespace pix2rep {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// log(1 + x) for x in [0, 1] as 2 atanh(x / (2 + x)), to 1e-7 of its value.
PIX2REP_BOTH float log1p_of_unit(float x) {
  const float z = x / (2 + x), w = z * z;
  const float series = w * (1 / 9.0f + w * (1 / 11.0f + w * (1 / 13.0f + w * (1 / 15.0f))));
  return 2 * z * (1 + w * (1 / 3.0f + w * (1 / 5.0f + w * (1 / 7.0f + series))));
}

// 1 - exp(-x) for x >= 0, by its series where the difference would cancel.
PIX2REP_BOTH float one_minus_exp(float x) {
  if (x < 0.5f) return x * (1 - x / 2 * (1 - x / 3 * (1 - x / 4 * (1 - x / 5 * (1 - x / 6 * (1 - x / 7 * (1 - x / 8)))))));
  return 1 - exp2f(-x * kLog2E);
}

// log(1 + 2^x), accurate where it is near 0; NaN stays.
PIX2REP_BOTH float softplus2(float x) { return (x < 0 ? 0 : x) * kLn2 + log1p_of_unit(exp2f(-fabsf(x))); }

// Keys' cubic weights, a = -3/4, at distance d: near up to 1, far from 1 to 2.
template <class T>
PIX2REP_BOTH T near_weight(T d) {
  return (T(1.25) * d - T(2.25)) * d * d + T(1);
}
template <class T>
PIX2REP_BOTH T far_weight(T d) {
  return ((T(-0.75) * d + T(3.75)) * d - T(6)) * d + T(3);
}

}  // namespace pix2rep
