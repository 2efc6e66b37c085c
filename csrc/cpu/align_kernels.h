// The kernels of align, one table for each instruction set, on rows that warp's kernels gathered and will scatter. A pair is the same point in both maps.
#pragma once

#include "warp_kernels.h"

namespace pix2rep {

template <class T>
struct AlignKernels {
  // (align.2) of rows [count][channels], and of columns [channels][kChunk]; sums: dot, sq1, sq2, [count] each.
  void (*products)(const T* q, const T* z, int count, int64_t channels, T* const* sums);
  void (*products_columns)(const T* q, const T* z, int count, int64_t channels, T* const* sums);
  // (align.3) in place, of rows [count][width] and of columns [width][kChunk]; upstream: gdot, gsq1, gsq2, [count] each.
  void (*mix)(T* q, T* z, int count, int64_t width, const T* const* upstream);
  void (*mix_columns)(T* q, T* z, int count, int64_t width, const T* const* upstream);
};

PIX2REP_TABLES(
  extern const AlignKernels<float> align_float;
  extern const AlignKernels<double> align_double;)

}  // namespace pix2rep
