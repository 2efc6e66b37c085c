// infonce on raw memory, free of tensors: compaction of valid rows, the choice of shift, the sweeps, and the epilogues of (infonce.3-7).
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <optional>
#include <type_traits>
#include <vector>

#include "../common/negatives.h"
#include "infonce_kernels.h"
#include "isa.h"
#include "schedule.h"
#include "scratch.h"

namespace pix2rep {

// Strided rows of any storage type, read as T.
template <class T>
struct RowSource {
  const char* data = nullptr;
  int64_t row_bytes = 0, column_bytes = 0;
  void (*read)(const char* row, int64_t column_bytes, int64_t d, T* out) = nullptr;
};

// One group. Vectors are contiguous, nullptr where absent.
template <class T>
struct InfonceInputs {
  Negatives negatives;
  int64_t n, m, d, q;
  RowSource<T> a, b, queue;
  const int64_t* positive;
  const bool *valid_a, *valid_b;
  const int32_t *id_a, *id_b;
  double tau;
};

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

template <class T>
const InfonceKernels<T>& infonce_kernels() {
  if constexpr (std::is_same_v<T, float>)
    return PIX2REP_PICK(infonce_float);
  else
    return PIX2REP_PICK(infonce_double);
}

// Valid rows of one or two sources, row-major and, with a scale, as columns packed in panels times that.
template <class T>
struct RowSet {
  int64_t count = 0, ld = 0;
  Scratch<T> rows, panels;
  double largest_norm = 0;  // NaN when a row is not finite

  RowSet() = default;
  template <class Parallel, class Read>
  RowSet(const Parallel& parallel, int64_t count, int64_t d, bool keep_rows, std::optional<double> panel_scale, const Read& read) : count(count) {
    const auto& k = infonce_kernels<T>();
    ld = round_up(std::max<int64_t>(d, 1), k.width);
    if (keep_rows) rows = Scratch<T>(round_up(count, k.rows) * ld, T(0));
    if (panel_scale) panels = Scratch<T>(round_up(count, k.columns) * d, T(0));
    constexpr int64_t chunk = 256;
    std::vector<double> norms((count + chunk - 1) / chunk);
    parallel(int64_t(norms.size()), [&](int64_t c) {
      std::vector<T> row(ld);
      for (int64_t i = c * chunk; i < std::min(count, (c + 1) * chunk); ++i) {
        read(i, row.data());
        double square = 0;
        for (int64_t j = 0; j < d; ++j) square += double(row[j]) * row[j];
        norms[c] = square <= norms[c] || std::isnan(norms[c]) ? norms[c] : square;
        if (keep_rows) std::copy_n(row.data(), d, rows.get() + i * ld);
        if (panel_scale)
          for (int64_t j = 0; j < d; ++j) panels.get()[(i / k.columns * d + j) * k.columns + i % k.columns] = T(row[j] * *panel_scale);
      }
    });
    for (double norm : norms) largest_norm = norm <= largest_norm || std::isnan(largest_norm) ? largest_norm : norm;
    largest_norm = std::sqrt(largest_norm);
  }
  const T* row(int64_t i) const { return rows.get() + i * ld; }
};

// Who is anchor, who is candidate, and where each came from. With "joint" x and y are one set, [valid a; valid b].
template <class T>
struct InfonceProblem {
  static constexpr int64_t kLargestBlock = 2016;  // a multiple of every register tile, below the kernels' kMaxBlock

  const InfonceInputs<T>& in;
  bool joint, cross;
  std::vector<int64_t> from_a, from_b;        // compacted row -> source row
  std::vector<int64_t> positive_x, positive_y;  // row of x -> its positive in y, and back; -1: no anchor
  std::vector<int32_t> skip, id_x, id_y;
  RowSet<T> x, y, queue;
  double scale;  // log2(e) / tau
  bool shifted;  // some 2^s could overflow or vanish: shift by row and column maxima, two exponentials a pair

  template <class Parallel>
  InfonceProblem(const InfonceInputs<T>& in, const Parallel& parallel, bool backward)
      : in(in), joint(in.negatives == Negatives::joint), cross(in.negatives == Negatives::cross), scale(1 / (std::log(2.0) * in.tau)) {
    std::vector<int64_t> at_a(in.n, -1), at_b(in.m, -1);
    for (int64_t i = 0; i < in.n; ++i)
      if (!in.valid_a || in.valid_a[i]) at_a[i] = int64_t(from_a.size()), from_a.push_back(i);
    for (int64_t j = 0; j < in.m; ++j)
      if (!in.valid_b || in.valid_b[j]) at_b[j] = int64_t(from_b.size()), from_b.push_back(j);
    const int64_t na = int64_t(from_a.size()), nb = int64_t(from_b.size()), nx = joint ? na + nb : na, ny = joint ? nx : nb;
    positive_x.assign(nx, -1), positive_y.assign(ny, -1);
    for (int64_t i = 0; i < na; ++i) {
      const int64_t match = in.positive ? in.positive[from_a[i]] : from_a[i];
      const int64_t j = match < in.m ? at_b[match] : -1;
      if (j < 0) continue;
      positive_x[i] = joint ? na + j : j;
      positive_y[joint ? na + j : j] = i;
      if (joint) positive_x[na + j] = i, positive_y[i] = na + j;
    }
    skip.assign(2 * round_up(nx, 64), -1);
    for (int64_t i = 0; i < nx; ++i) {
      skip[2 * i] = int32_t(positive_x[i]);
      if (joint) skip[2 * i + 1] = int32_t(i);
    }
    if (in.id_a) {
      for (int64_t i : from_a) id_x.push_back(in.id_a[i]);
      for (int64_t j : from_b) (joint ? id_x : id_y).push_back(in.id_b[j]);
    }
    const auto read_a = [&](int64_t i, T* out) { read(in.a, from_a[i], out); };
    const auto read_b = [&](int64_t j, T* out) { read(in.b, from_b[j], out); };
    if (joint) {
      x = RowSet<T>(parallel, nx, in.d, true, scale, [&](int64_t i, T* out) { i < na ? read_a(i, out) : read_b(i - na, out); });
    } else {
      x = RowSet<T>(parallel, nx, in.d, true, std::nullopt, read_a);
      y = RowSet<T>(parallel, ny, in.d, backward, scale, read_b);
    }
    if (in.queue.data) queue = RowSet<T>(parallel, in.q, in.d, backward, scale, [&](int64_t i, T* out) { read(in.queue, i, out); });
    const double norm = std::max(columns().largest_norm, queue.largest_norm), unsure = columns().largest_norm + queue.largest_norm;
    const double reach = scale * x.largest_norm * norm + std::log2(double(nx + ny + in.q + 1));
    shifted = !(std::isfinite(unsure) && reach <= (std::is_same_v<T, float> ? 126.0 : 1022.0));
  }

  const RowSet<T>& columns() const { return joint ? x : y; }
  // log2 of exp(s) with the positive (infonce.1), from the operands that the tiles use.
  double similarity(int64_t i, int64_t j) const {
    const int64_t width = infonce_kernels<T>().columns;
    const T* panel = columns().panels.get() + j / width * width * in.d + j % width;
    double sum = 0;
    for (int64_t k = 0; k < in.d; ++k) sum += double(x.row(i)[k]) * panel[k * width];
    return sum;
  }

  // f(tile, writes_columns) over the pairs of the main product, or of the product with the queue.
  template <class Parallel, class F>
  void sweep(const Parallel& parallel, bool over_queue, Sweep kind, const F& f) const {
    const auto& k = infonce_kernels<T>();
    const RowSet<T>& other = over_queue ? queue : columns();
    const int64_t unit = std::lcm(k.rows, k.columns);
    const int64_t edge_x = block_edge(x.count, unit, kLargestBlock), edge_y = block_edge(other.count, unit, kLargestBlock);
    schedule(parallel, (x.count + edge_x - 1) / edge_x, (other.count + edge_y - 1) / edge_y, kind, [&](int64_t i, int64_t j, bool columns) {
      Tile<T> t{x.rows.get(), other.panels.get(), x.ld, in.d,
                i * edge_x, std::min(x.count, (i + 1) * edge_x), j * edge_y, std::min(other.count, (j + 1) * edge_y),
                over_queue ? nullptr : skip.data(), nullptr, nullptr};
      if (!over_queue && !id_x.empty()) t.id_x = id_x.data(), t.id_y = joint ? id_x.data() : id_y.data();
      f(t, columns);
    });
  }
  Sweep kind() const { return joint ? Sweep::symmetric : cross ? Sweep::both : Sweep::rows; }

 private:
  void read(const RowSource<T>& source, int64_t i, T* out) const {
    source.read(source.data + i * source.row_bytes, source.column_bytes, in.d, out);
  }
};

}  // namespace pix2rep
