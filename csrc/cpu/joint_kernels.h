// The tile kernels of joint, one table for each instruction set and type. A tile is K planes of `count` pixels, `count` a multiple of kJointStep, each
// plane `ld` entries after the one before: pixels run along the vectors.
#pragma once

#include <cstdint>

#include "tables.h"

namespace pix2rep {

constexpr int64_t kJointStep = 64;

template <class T>
struct JointKernels {
  // (joint.1) in place.
  void (*softmax)(T* x, int64_t ld, int64_t clusters, int64_t count);
  // 0 wherever valid is 0, whatever x holds there.
  void (*keep)(T* x, int64_t ld, int64_t clusters, int64_t count, const T* valid);
  // (joint.2) sums[k][l][:] += sum_p a[k][p] b[l][p], spread over the lanes of 16 bytes.
  void (*gram)(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t clusters, int64_t count, T* sums);
  // (joint.6) out[k][p] = sum_l g[k][l] x[l][p], added to what is there when `add`.
  void (*mix)(const T* g, const T* x, int64_t ldx, int64_t clusters, int64_t count, T* out, int64_t ldo, bool add);
  // (joint.7) g = p (g - <p, g>).
  void (*softmax_gradient)(const T* p, int64_t ldp, T* g, int64_t ldg, int64_t clusters, int64_t count);
  // out[j] = sum of x[j + i step] over i < width, by doubling. x is destroyed; it holds count + width * step + kJointStep entries, out count + kJointStep.
  void (*window_sums)(T* x, int64_t count, int64_t step, int64_t width, T* out);
};

PIX2REP_TABLES(
  extern const JointKernels<float> joint_float;
  extern const JointKernels<double> joint_double;)

}  // namespace pix2rep
