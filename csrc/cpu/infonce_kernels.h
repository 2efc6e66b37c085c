// The tile kernels of infonce, one table for each instruction set and type. Everything is raw memory: rows are row-major with a padded leading
// dimension, columns are packed in panels; similarities come in units of log2, scaled by log2(e)/tau when the panels are packed.
#pragma once

#include <cstdint>

#include "tables.h"

namespace pix2rep {

// Rows [row_begin, row_end) of x against columns [col_begin, col_end) of y. Begins are multiples of the kernels' `rows` and `columns`; ends may be ragged.
template <class T>
struct Tile {
  const T* x;           // [.., ld]
  const T* panels;      // y scaled, [panel][d][columns]
  int64_t ld, d;
  int64_t row_begin, row_end, col_begin, col_end;
  const int32_t* skip;  // [row][2]: columns of y that a row leaves out (its positive, itself), -1: none; nullptr: no row leaves out any
  const int32_t* id_x;  // [row], nullptr without ids
  const int32_t* id_y;  // [column]
};

template <class T>
struct InfonceKernels {
  int64_t rows, columns, width;  // of one register tile; vector width

  // (infonce.2) without shift: row_sum[i] += sum_j 2^s_ij; col_sum[j] likewise unless nullptr.
  void (*sums)(const Tile<T>&, double* row_sum, double* col_sum);
  // Largest s_ij of each row and column, and the sums shifted by them, for temperatures at which 2^s overflows.
  void (*maxima)(const Tile<T>&, T* row_max, T* col_max);
  void (*shifted_sums)(const Tile<T>&, const T* row_max, const T* col_max, double* row_sum, double* col_sum);
  // (infonce.5) into g [row_end - row_begin][ldg]: 2^s (u_i + v_j); v nullptr stands for 0. The shifted form is 2^(s - lse_i) u_i + 2^(s - lse_j) v_j.
  void (*weights)(const Tile<T>&, const T* u, const T* v, T* g, int64_t ldg);
  void (*shifted_weights)(const Tile<T>&, const T* u, const T* v, const T* row_lse, const T* col_lse, T* g, int64_t ldg);
  // (infonce.6) out[r, :] += sum_k g[r, k] y[k, :], or g[k, r] when transposed; all row-major with leading dimension ld, a multiple of width.
  void (*product)(const T* g, int64_t ldg, bool transposed, int64_t rows, int64_t depth, const T* y, T* out, int64_t ld);
};

PIX2REP_TABLES(
  extern const InfonceKernels<float> infonce_float;
  extern const InfonceKernels<double> infonce_double;)

}  // namespace pix2rep
