// The kernels of lncc, one table for each instruction set. A line is a row of one quantity; the quantities of a slot are `line` values apart:
//
//   pixels   I, J
//   parts    mean I, mean J, centred sums II, JJ, IJ            of one part of a window                        (lncc.8)
//   weights  A, 2 B, mean I, mean J, 2 B'                       of one window, 0 where there is none           (lncc.5)
//   sums     of A and 2 B, partial dI, mean I, mean J, sum of 2 B', partial dJ   over windows, seen from those means   (lncc.9)
//
// Every kernel makes n values a line and may write up to a vector more; with `both` off nothing of B' and dJ is made.
#pragma once

#include "storage.h"
#include "tables.h"

namespace pix2rep {

// One axis of a window of k parts: `taps` side by side, merged one after the other, and the others outside the image wherever the window is.
template <class T>
struct LnccAxis {
  int64_t taps;
  const T *step, *weight;  // [taps]: 1 / (t + 1) and c t / (t + 1) of (lncc.8), c being the pixels of a part
  T inside, outside;       // taps / k, and c taps (k - taps) / k
};

template <class T>
struct LnccKernels : Lines<T> {
  // Parts of pixels, or of smaller parts, one below the other: a slot a tap.
  void (*pixels)(const T* const* slots, const LnccAxis<T>&, int64_t n, int64_t line, T* parts);
  void (*merge)(const T* const* slots, const LnccAxis<T>&, int64_t n, int64_t line, T* parts);
  // Windows of parts side by side, from `parts` on: cc, or the weights.
  void (*score)(const T* parts, const LnccAxis<T>&, T eps, int64_t n, int64_t line, T* cc);
  void (*weigh)(const T* parts, const LnccAxis<T>&, T eps, const T* grad_cc, bool both, int64_t n, int64_t line, T* weights);
  // Sums over windows side by side, seen from the mean of the one in the middle.
  void (*spread)(const T* weights, int64_t taps, bool both, int64_t n, int64_t line, T* sums);
  // Sums of sums one below the other, seen from the means of the middle; or from the pixels, and then dI and dJ alone.
  void (*gather)(const T* const* sums, int64_t taps, const T* pixels, bool both, int64_t n, int64_t line, T* out);
};

PIX2REP_TABLES(
  extern const LnccKernels<float> lncc_float;
  extern const LnccKernels<double> lncc_double;)

}  // namespace pix2rep
