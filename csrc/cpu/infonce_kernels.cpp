// Register tiles of infonce: similarities, their exponentials and their sums never leave the registers in the forward pass; the backward pass writes
// the weights of one cache-sized tile and multiplies it into both gradients.
#include "infonce_kernels.h"

#include "simd.h"

namespace pix2rep {
namespace PIX2REP_ISA {

namespace {

// 32 registers hold 8 x 3 sums beside 3 columns and a row; 16 hold 4 x 3.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 8, kVectors = 3, kProductSums = 24, kProductVectors = 4;
#else
constexpr int kRows = 4, kVectors = 3, kProductSums = 12, kProductVectors = 2;
#endif

template <class T>
constexpr int kColumns = kVectors * Simd<T>::width;

template <class T>
struct Registers {
  Vec<T> s[kRows][kVectors];
};

template <class T>
static inline Registers<T> similarities(const T* __restrict x, int64_t ld, const T* __restrict panel, int64_t d) {
  Registers<T> out;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) out.s[r][v] = Vec<T>{};
  for (int64_t k = 0; k < d; ++k, panel += kColumns<T>) {
    Vec<T> y[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) y[v] = load(panel + v * Simd<T>::width);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> xr = broadcast(x[r * ld + k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) out.s[r][v] += xr * y[v];
    }
  }
  return out;
}

// Whether a pair of this register tile must be left out: a ragged edge, a positive, the anchor itself, ids.
template <class T>
static inline bool special(const Tile<T>& t, int64_t i, int64_t j) {
  if (i + kRows > t.row_end || j + kColumns<T> > t.col_end || t.id_x) return true;
  if (!t.skip) return false;
  bool any = false;
  for (int r = 0; r < 2 * kRows; ++r) any |= uint64_t(t.skip[2 * i + r] - j) < uint64_t(kColumns<T>);
  return any;
}

template <class T>
static __attribute__((noinline)) void leave_out(const Tile<T>& t, int64_t i, int64_t j, Registers<T>& e, T neutral) {
  T buffer[kRows][kColumns<T>];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) store(&buffer[r][v * Simd<T>::width], e.s[r][v]);
  const int columns = t.col_end - j < kColumns<T> ? int(t.col_end - j) : kColumns<T>;
  for (int r = 0; r < kRows; ++r) {
    if (i + r >= t.row_end) {
      for (int c = 0; c < kColumns<T>; ++c) buffer[r][c] = neutral;
      continue;
    }
    for (int c = columns; c < kColumns<T>; ++c) buffer[r][c] = neutral;
    if (t.id_x)
      for (int c = 0; c < columns; ++c) buffer[r][c] = t.id_x[i + r] == t.id_y[j + c] ? neutral : buffer[r][c];
    if (t.skip)
      for (int k = 0; k < 2; ++k) {
        const int64_t c = t.skip[2 * (i + r) + k] - j;
        if (c >= 0 && c < kColumns<T>) buffer[r][c] = neutral;
      }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) e.s[r][v] = load(&buffer[r][v * Simd<T>::width]);
}

// map turns similarities into values in place, sink takes them; pairs left out hold `neutral` by then.
template <class T, class Map, class Sink>
static inline void sweep(const Tile<T>& t, T neutral, const Map& map, const Sink& sink) {
  for (int64_t j = t.col_begin; j < t.col_end; j += kColumns<T>)
    for (int64_t i = t.row_begin; i < t.row_end; i += kRows) {
      Registers<T> e = similarities(t.x + i * t.ld, t.ld, t.panels + j * t.d, t.d);
      map(e, i, j);
      if (special(t, i, j)) leave_out(t, i, j, e, neutral);
      sink(e, i, j);
    }
}

template <class T>
static inline Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

// Sums of a register tile into per-row vectors and per-column vectors, both in cache; flushed to double once a tile.
template <class T>
struct Sums {
  Vec<T>* row;  // [row - row_begin]
  T* col;       // [column - col_begin], nullptr: not wanted

  void add(const Tile<T>& t, const Registers<T>& e, int64_t i, int64_t j) const {
    add_rows(t, e, i);
    if (col) add_columns(t, e, j);
  }
  void add_rows(const Tile<T>& t, const Registers<T>& e, int64_t i) const {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      Vec<T> sum = e.s[r][0];
#pragma GCC unroll 4
      for (int v = 1; v < kVectors; ++v) sum += e.s[r][v];
      row[i - t.row_begin + r] += sum;
    }
  }
  void add_columns(const Tile<T>& t, const Registers<T>& e, int64_t j) const {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Vec<T> sum = e.s[0][v];
#pragma GCC unroll 8
      for (int r = 1; r < kRows; ++r) sum += e.s[r][v];
      T* to = col + j - t.col_begin + v * Simd<T>::width;
      store(to, load(to) + sum);
    }
  }
};

constexpr int64_t kMaxBlock = 2048;  // rows or columns of one tile; the driver cuts larger ones

template <class T, class Fill>
static void flushed(const Tile<T>& t, double* row_sum, double* col_sum, const Fill& fill) {
  static thread_local Vec<T> row[kMaxBlock + kRows];
  static thread_local T col[kMaxBlock + kColumns<T>];
  const int64_t rows = t.row_end - t.row_begin, columns = t.col_end - t.col_begin;
  for (int64_t i = 0; i < rows + kRows; ++i) row[i] = Vec<T>{};
  for (int64_t j = 0; j < columns + kColumns<T>; ++j) col[j] = 0;
  fill(Sums<T>{row, col_sum ? col : nullptr});
  for (int64_t i = 0; i < rows; ++i) row_sum[t.row_begin + i] += horizontal_sum<T>(row[i]);
  if (col_sum)
    for (int64_t j = 0; j < columns; ++j) col_sum[t.col_begin + j] += col[j];
}

template <class T>
static inline void exponentials(Registers<T>& e) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) e.s[r][v] = exp2(e.s[r][v]);
}

template <class T>
void sums(const Tile<T>& t, double* row_sum, double* col_sum) {
  flushed(t, row_sum, col_sum, [&](const Sums<T>& into) {
    sweep(t, T(0), [](Registers<T>& e, int64_t, int64_t) { exponentials(e); },
          [&](const Registers<T>& e, int64_t i, int64_t j) { into.add(t, e, i, j); });
  });
}

template <class T>
void maxima(const Tile<T>& t, T* row_max, T* col_max) {
  sweep(t, -T(__builtin_inf()), [](Registers<T>&, int64_t, int64_t) {},
        [&](const Registers<T>& e, int64_t i, int64_t j) {
          for (int r = 0; r < kRows && i + r < t.row_end; ++r) {
            Vec<T> m = e.s[r][0];
            for (int v = 1; v < kVectors; ++v) m = maximum<T>(m, e.s[r][v]);
            for (int c = 0; c < Simd<T>::width; ++c) row_max[i + r] = m[c] > row_max[i + r] ? m[c] : row_max[i + r];
          }
          if (!col_max) return;
          for (int v = 0; v < kVectors; ++v) {
            Vec<T> m = e.s[0][v];
            for (int r = 1; r < kRows; ++r) m = maximum<T>(m, e.s[r][v]);
            for (int c = 0; c < Simd<T>::width; ++c) {
              const int64_t column = j + v * Simd<T>::width + c;
              if (column < t.col_end && m[c] > col_max[column]) col_max[column] = m[c];
            }
          }
        });
}

// A value per column of one register tile, 0 past the end.
template <class T>
static inline void columns_of(const Tile<T>& t, const T* from, int64_t j, Vec<T> (&out)[kVectors]) {
  if (j + kColumns<T> <= t.col_end) {
    for (int v = 0; v < kVectors; ++v) out[v] = load(from + j + v * Simd<T>::width);
    return;
  }
  for (int v = 0; v < kVectors; ++v)
    for (int c = 0; c < Simd<T>::width; ++c) {
      const int64_t column = j + v * Simd<T>::width + c;
      out[v][c] = column < t.col_end ? from[column] : T(0);
    }
}

template <class T>
static inline T row_of(const Tile<T>& t, const T* from, int64_t i) {
  return i < t.row_end ? from[i] : T(0);
}

template <class T>
void shifted_sums(const Tile<T>& t, const T* row_max, const T* col_max, double* row_sum, double* col_sum) {
  flushed(t, row_sum, col_sum, [&](const Sums<T>& into) {
    sweep(t, -T(__builtin_inf()), [](Registers<T>&, int64_t, int64_t) {},
          [&](const Registers<T>& s, int64_t i, int64_t j) {
            // A pair left out is -inf, and so may be the maximum: then their difference is NaN, and the term is 0.
            const auto term = [](Vec<T> x, Vec<T> m) { return x == -T(__builtin_inf()) ? Vec<T>{} : exp2(x - m); };
            Registers<T> e;
            for (int r = 0; r < kRows; ++r)
              for (int v = 0; v < kVectors; ++v) e.s[r][v] = term(s.s[r][v], broadcast(row_of(t, row_max, i + r)));
            into.add_rows(t, e, i);
            if (!col_sum) return;
            Vec<T> m[kVectors];
            columns_of(t, col_max, j, m);
            for (int r = 0; r < kRows; ++r)
              for (int v = 0; v < kVectors; ++v) e.s[r][v] = term(s.s[r][v], m[v]);
            into.add_columns(t, e, j);
          });
  });
}

template <class T>
static inline void store_tile(const Tile<T>& t, const Registers<T>& e, int64_t i, int64_t j, T* g, int64_t ldg) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(g + (i - t.row_begin + r) * ldg + j - t.col_begin + v * Simd<T>::width, e.s[r][v]);
}

template <class T>
void weights(const Tile<T>& t, const T* u, const T* v, T* g, int64_t ldg) {
  sweep(t, T(0),
        [&](Registers<T>& e, int64_t i, int64_t j) {
          Vec<T> column[kVectors] = {};
          if (v) columns_of(t, v, j, column);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            const Vec<T> row = broadcast(row_of(t, u, i + r));
#pragma GCC unroll 4
            for (int c = 0; c < kVectors; ++c) e.s[r][c] = exp2(e.s[r][c]) * (row + column[c]);
          }
        },
        [&](const Registers<T>& e, int64_t i, int64_t j) { store_tile(t, e, i, j, g, ldg); });
}

template <class T>
void shifted_weights(const Tile<T>& t, const T* u, const T* v, const T* row_lse, const T* col_lse, T* g, int64_t ldg) {
  sweep(t, T(0),
        [&](Registers<T>& e, int64_t i, int64_t j) {
          Vec<T> column[kVectors] = {}, lse[kVectors] = {};
          if (v) columns_of(t, v, j, column), columns_of(t, col_lse, j, lse);
          for (int r = 0; r < kRows; ++r) {
            const Vec<T> row = broadcast(row_of(t, u, i + r)), shift = broadcast(row_of(t, row_lse, i + r));
            for (int c = 0; c < kVectors; ++c) {
              const Vec<T> s = e.s[r][c];
              e.s[r][c] = exp2(s - shift) * row;
              if (v) e.s[r][c] += exp2(s - lse[c]) * column[c];
            }
          }
        },
        [&](const Registers<T>& e, int64_t i, int64_t j) { store_tile(t, e, i, j, g, ldg); });
}

template <class T, int R, int C, bool Transposed>
static inline void product_tile(const T* __restrict g, int64_t ldg, int64_t depth, const T* __restrict y, T* __restrict out, int64_t ld) {
  constexpr int W = Simd<T>::width;
  Vec<T> sum[R][C];
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[r][c] = load(out + r * ld + c * W);
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> yk[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) yk[c] = load(y + k * ld + c * W);
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r) {
      const Vec<T> weight = broadcast(Transposed ? g[k * ldg + r] : g[r * ldg + k]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[r][c] += weight * yk[c];
    }
  }
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(out + r * ld + c * W, sum[r][c]);
}

template <class T, int C, bool Transposed>
static void product_panel(const T* g, int64_t ldg, int64_t rows, int64_t depth, const T* y, T* out, int64_t ld) {
  constexpr int R = kProductSums / C;
  const int64_t step = Transposed ? 1 : ldg;
  int64_t r = 0;
  for (; r + R <= rows; r += R) product_tile<T, R, C, Transposed>(g + r * step, ldg, depth, y, out + r * ld, ld);
  if constexpr (R > 4)
    for (; r + 4 <= rows; r += 4) product_tile<T, 4, C, Transposed>(g + r * step, ldg, depth, y, out + r * ld, ld);
  for (; r < rows; ++r) product_tile<T, 1, C, Transposed>(g + r * step, ldg, depth, y, out + r * ld, ld);
}

template <class T, bool Transposed>
static void product_of(const T* g, int64_t ldg, int64_t rows, int64_t depth, const T* y, T* out, int64_t ld) {
  constexpr int W = Simd<T>::width;
  int64_t left = ld / W;
  for (; left >= kProductVectors; left -= kProductVectors, y += kProductVectors * W, out += kProductVectors * W)
    product_panel<T, kProductVectors, Transposed>(g, ldg, rows, depth, y, out, ld);
  if constexpr (kProductVectors > 2) {
    if (left == 3) product_panel<T, 3, Transposed>(g, ldg, rows, depth, y, out, ld);
    if (left == 2) product_panel<T, 2, Transposed>(g, ldg, rows, depth, y, out, ld);
  }
  if (left == 1) product_panel<T, 1, Transposed>(g, ldg, rows, depth, y, out, ld);
}

template <class T>
void product(const T* g, int64_t ldg, bool transposed, int64_t rows, int64_t depth, const T* y, T* out, int64_t ld) {
  if (transposed)
    product_of<T, true>(g, ldg, rows, depth, y, out, ld);
  else
    product_of<T, false>(g, ldg, rows, depth, y, out, ld);
}

template <class T>
constexpr InfonceKernels<T> table() {
  return {kRows, kColumns<T>, Simd<T>::width, sums<T>, maxima<T>, shifted_sums<T>, weights<T>, shifted_weights<T>, product<T>};
}

}  // namespace

extern const InfonceKernels<float> infonce_float = table<float>();
extern const InfonceKernels<double> infonce_double = table<double>();

}  // namespace PIX2REP_ISA
}  // namespace pix2rep
