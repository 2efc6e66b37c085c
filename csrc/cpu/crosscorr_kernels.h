// The vector kernels of crosscorr, one table for each instruction set and type. Rows come in chunks that stay in cache: packed into panels for the
// product over rows (forward), row-major for the product over features (backward).
#pragma once

#include "storage.h"
#include "tables.h"

namespace pix2rep {

template <class T>
struct CrosscorrKernels : Lines<T> {
  int64_t group, features;  // rows packed at once; every leading dimension is a multiple of `features`

  // (crosscorr.1, 3-4) of `group` rows, their row k of the chunk first: u into [panel][kChunkRows][panel width], times w when `scaled`; sums added.
  // Panels hold `features` of x; of y the vectors of one register tile. weight nullptr: all 1.
  void (*pack_x)(const T* const* rows, const T* weight, const T* pivot, int64_t k, int64_t ld, T* panels, T* sum, T* square);
  void (*pack_y)(const T* const* rows, const T* weight, const T* pivot, int64_t k, int64_t ld, T* panels, T* sum, T* square);
  // (crosscorr.5) of one chunk: product[i, j] = or += sum_k x[k, i] y[k, j] for i < ld_x, j < ld_y.
  void (*product)(const T* x, const T* y, int64_t depth, int64_t ld_x, int64_t ld_y, bool add, T* product);

  // to[r, :] = rows[r] - pivot
  void (*shift)(const T* const* rows, const T* pivot, int64_t ld, T* to);
  // g [d, n] by its strides into the panels that `gradient` multiplies with, 0 from n to ld.
  void (*pack_gradient)(const T* g, int64_t row_stride, int64_t column_stride, int64_t d, int64_t n, int64_t ld, T* panels);
  // (crosscorr.6) of `rows` rows, a multiple of group: out = w (constant + slope own + other @ g), 0 where w is 0.
  void (*gradient)(const T* own, const T* other, const T* panels, const T* constant, const T* slope, const T* weight, int64_t rows, int64_t d,
                   int64_t own_ld, int64_t other_ld, T* out);
};

constexpr int64_t kChunkRows = 128;  // a panel of three AVX-512 vectors is 24 KiB then: it stays in L1

PIX2REP_TABLES(
  extern const CrosscorrKernels<float> crosscorr_float;
  extern const CrosscorrKernels<double> crosscorr_double;)

}  // namespace pix2rep
