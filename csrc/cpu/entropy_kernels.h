// The tile kernels of entropy, one table for each instruction set and type, on tiles as joint_kernels.h has them.
#pragma once

#include "joint_kernels.h"

namespace pix2rep {

template <class T>
struct EntropyKernels {
  // (entropy.2) of logits x [clusters][count], 0 wherever valid is 0.
  void (*entropy)(const T* x, int64_t ld, int64_t clusters, int64_t count, const T* valid, T* h);
  // (entropy.3) in place of the logits, g being the gradient of h; e holds clusters * kJointStep values.
  void (*gradient)(T* x, int64_t ld, int64_t clusters, int64_t count, const T* g, T* e);
};

PIX2REP_TABLES(
  extern const EntropyKernels<float> entropy_float;
  extern const EntropyKernels<double> entropy_double;)

}  // namespace pix2rep
