// Forward and backward of one group on raw memory.
#pragma once

#include <array>

#include "infonce_core.h"

namespace pix2rep {

constexpr double kLog2e = 1.4426950408889634;

// f(i) for i in [0, count), a few hundred a task.
template <class Parallel, class F>
void in_chunks(const Parallel& parallel, int64_t count, const F& f) {
  constexpr int64_t chunk = 256;
  parallel((count + chunk - 1) / chunk, [&](int64_t c) {
    for (int64_t i = c * chunk; i < std::min(count, (c + 1) * chunk); ++i) f(i);
  });
}

// f(side, row, anchor): every row that is an anchor, side 0 for x and 1 for y, and its place among the losses.
template <class T, class Parallel, class F>
void for_anchors(const InfonceProblem<T>& p, const Parallel& parallel, const F& f) {
  const int64_t na = int64_t(p.from_a.size());
  in_chunks(parallel, p.x.count, [&](int64_t i) {
    if (p.positive_x[i] >= 0) f(0, i, i < na ? p.from_a[i] : p.in.n + p.from_b[i - na]);
  });
  if (!p.cross) return;
  in_chunks(parallel, p.y.count, [&](int64_t j) {
    if (p.positive_y[j] >= 0) f(1, j, p.in.n + p.from_b[j]);
  });
}

template <class T>
double positive_similarity(const InfonceProblem<T>& p, int side, int64_t row) {
  return side == 0 ? p.similarity(row, p.positive_x[row]) : p.similarity(p.positive_y[row], row);
}

// losses and lse [anchors]; an anchor that is none has loss 0 and lse inf.
template <class T, class Parallel>
void infonce_forward(const InfonceInputs<T>& in, const Parallel& parallel, T* losses, T* lse) {
  const InfonceProblem<T> p(in, parallel, false);
  const auto& k = infonce_kernels<T>();
  const int64_t anchors = in.negatives == Negatives::forward ? in.n : in.n + in.m;
  std::fill_n(losses, anchors, T(0));
  std::fill_n(lse, anchors, std::numeric_limits<T>::infinity());

  std::array<std::vector<double>, 2> sum{std::vector<double>(p.x.count), std::vector<double>(p.cross ? p.y.count : 0)};
  std::array<std::vector<T>, 2> max;
  double *row_sum = sum[0].data(), *col_sum = p.joint ? row_sum : sum[1].data();
  T *row_max = nullptr, *col_max = nullptr;
  const auto over_all = [&](const auto& f) {
    p.sweep(parallel, false, p.kind(), f);
    if (in.queue.data) p.sweep(parallel, true, Sweep::rows, f);
  };
  if (p.shifted) {
    for (int side : {0, 1}) max[side].assign(sum[side].size(), -std::numeric_limits<T>::infinity());
    row_max = max[0].data(), col_max = p.joint ? row_max : max[1].data();
    over_all([&](const Tile<T>& t, bool columns) { k.maxima(t, row_max, columns ? col_max : nullptr); });
    over_all([&](const Tile<T>& t, bool columns) { k.shifted_sums(t, row_max, col_max, row_sum, columns ? col_sum : nullptr); });
  } else {
    over_all([&](const Tile<T>& t, bool columns) { k.sums(t, row_sum, columns ? col_sum : nullptr); });
  }
  for_anchors(p, parallel, [&](int side, int64_t row, int64_t anchor) {
    const double positive = positive_similarity(p, side, row);
    const double shift = p.shifted && sum[side][row] > 0 ? double(max[side][row]) : 0;
    const double t = (std::log2(sum[side][row]) + shift - positive) / kLog2e;
    const double loss = t > 0 ? t + std::log1p(std::exp(-t)) : std::log1p(std::exp(t));  // (infonce.3)
    losses[anchor] = T(loss);
    lse[anchor] = T(positive / kLog2e + loss);  // (infonce.4)
  });
}

// Writes row i of a gradient from values in T.
template <class T>
struct RowSink {
  char* data = nullptr;
  int64_t row_bytes = 0;
  void (*write)(const T* values, int64_t d, char* row) = nullptr;
};

template <class T>
struct InfonceGradients {
  RowSink<T> a, b;  // zero-filled by the caller; data nullptr: not needed
  double* temperature = nullptr;
};

template <class T, class Parallel>
class InfonceBackward {
 public:
  InfonceBackward(const InfonceInputs<T>& in, const Parallel& parallel, const T* grad_losses, const T* losses, const T* lse, const InfonceGradients<T>& out)
      : p(in, parallel, true), parallel(parallel), out(out), ld(p.x.ld) {
    const int64_t anchors = in.negatives == Negatives::forward ? in.n : in.n + in.m;
    // Weights are kept relative to the largest |g|: 1/(2N) of a mean times 1/R may underflow float.
    for (int64_t i = 0; i < anchors; ++i)
      if (std::isfinite(grad_losses[i])) unit = std::max(unit, std::abs(double(grad_losses[i])));
    if (unit == 0) unit = 1;
    for (int side : {0, 1}) {
      const int64_t count = side == 0 ? p.x.count : p.cross ? p.y.count : 0;
      u[side].assign(count, T(0)), pull[side].assign(count, T(0)), log2_lse[side].assign(p.shifted ? count : 0, T(1e30));
    }
    for_anchors(p, parallel, [&](int side, int64_t row, int64_t anchor) {
      const double g = double(grad_losses[anchor]) / unit, l = double(lse[anchor]) * kLog2e;
      u[side][row] = T(p.shifted ? g : g * std::exp2(-l));
      if (p.shifted) log2_lse[side][row] = T(l);
      pull[side][row] = T(g * std::expm1(-double(losses[anchor])));  // (infonce.5), the positive's weight
    });
  }

  void run() {
    const bool temperature = out.temperature != nullptr;
    const bool want_x = p.joint || out.a.data || temperature, want_y = !p.joint && out.b.data;
    if (want_x) dx = Scratch<T>(p.x.count * ld, T(0));
    if (want_y) dy = Scratch<T>(p.y.count * ld, T(0));
    T* column_grad = p.joint ? dx.get() : dy.get();
    const Sweep kind = p.joint ? Sweep::symmetric : p.cross || want_y ? Sweep::both : Sweep::rows;
    p.sweep(parallel, false, kind, [&](const Tile<T>& t, bool columns) { accumulate(t, false, columns ? column_grad : nullptr); });
    double dot = temperature ? dot_x() : 0;
    double total = p.joint ? dot / 2 : dot;  // the symmetric product holds every pair twice
    if (p.in.queue.data && want_x) {
      p.sweep(parallel, true, Sweep::rows, [&](const Tile<T>& t, bool) { accumulate(t, true, nullptr); });
      if (temperature) total += dot_x() - dot;
    }
    if (temperature) *out.temperature = -(total + dot_positive()) * unit / (p.in.tau * p.in.tau);  // (infonce.7)
    add_positives();
    write();
  }

 private:
  // The weights of cache-sized pieces of the tile, each multiplied into the rows' gradient and, unless nullptr, the columns'.
  void accumulate(const Tile<T>& t, bool over_queue, T* column_grad) {
    const auto& k = infonce_kernels<T>();
    const int64_t height = 64, width = 4 * k.columns;
    static thread_local Scratch<T> g(height * width, T(0));
    const RowSet<T>& columns = over_queue ? p.queue : p.columns();
    const T* v = over_queue ? nullptr : p.joint ? u[0].data() : p.cross ? u[1].data() : nullptr;
    for (int64_t j = t.col_begin; j < t.col_end; j += width)
      for (int64_t i = t.row_begin; i < t.row_end; i += height) {
        Tile<T> piece = t;
        piece.row_begin = i, piece.row_end = std::min(t.row_end, i + height);
        piece.col_begin = j, piece.col_end = std::min(t.col_end, j + width);
        if (p.shifted)
          k.shifted_weights(piece, u[0].data(), v, log2_lse[0].data(), log2_lse[p.joint ? 0 : 1].data(), g.get(), width);
        else
          k.weights(piece, u[0].data(), v, g.get(), width);
        const int64_t rows = piece.row_end - i, depth = piece.col_end - j;
        if (dx.get()) k.product(g.get(), width, false, rows, depth, columns.row(j), dx.get() + i * ld, ld);
        if (column_grad) k.product(g.get(), width, true, depth, rows, p.x.row(i), column_grad + j * ld, ld);
      }
  }

  double dot_x() const {
    double sum = 0;
    for (int64_t i = 0; i < p.x.count; ++i)
      for (int64_t c = 0; c < p.in.d; ++c) sum += double(dx.get()[i * ld + c]) * p.x.row(i)[c];
    return sum;
  }

  double dot_positive() const {
    double sum = 0;
    for (int side : {0, 1})
      for (int64_t r = 0; r < int64_t(pull[side].size()); ++r)
        if ((side == 0 ? p.positive_x : p.positive_y)[r] >= 0) sum += pull[side][r] * positive_similarity(p, side, r) / p.scale;
    return sum;
  }

  void add_positives() {
    const auto add = [&](T* to, T weight, const T* row) {
      for (int64_t c = 0; c < p.in.d; ++c) to[c] += weight * row[c];
    };
    const auto& partner = p.joint ? pull[0] : pull[1];  // of the positive, where that is an anchor too
    if (dx.get())
      in_chunks(parallel, p.x.count, [&](int64_t i) {
        const int64_t j = p.positive_x[i];
        if (j >= 0) add(dx.get() + i * ld, pull[0][i] + (partner.empty() ? T(0) : partner[j]), p.columns().row(j));
      });
    if (!dy.get()) return;
    if (p.cross)
      in_chunks(parallel, p.y.count, [&](int64_t j) {
        const int64_t i = p.positive_y[j];
        if (i >= 0) add(dy.get() + j * ld, pull[1][j] + pull[0][i], p.x.row(i));
      });
    else  // "forward": several anchors may share a positive
      for (int64_t i = 0; i < p.x.count; ++i)
        if (p.positive_x[i] >= 0) add(dy.get() + p.positive_x[i] * ld, pull[0][i], p.x.row(i));
  }

  void write() {
    const T factor = T(unit / p.in.tau);  // (infonce.6)
    const int64_t na = int64_t(p.from_a.size());
    const auto put = [&](const RowSink<T>& sink, T* row, int64_t to) {
      if (!sink.data) return;
      for (int64_t c = 0; c < p.in.d; ++c) row[c] *= factor;
      sink.write(row, p.in.d, sink.data + to * sink.row_bytes);
    };
    if (dx.get())
      in_chunks(parallel, p.x.count, [&](int64_t i) { i < na ? put(out.a, dx.get() + i * ld, p.from_a[i]) : put(out.b, dx.get() + i * ld, p.from_b[i - na]); });
    if (dy.get()) in_chunks(parallel, p.y.count, [&](int64_t j) { put(out.b, dy.get() + j * ld, p.from_b[j]); });
  }

  const InfonceProblem<T> p;
  const Parallel& parallel;
  const InfonceGradients<T>& out;
  const int64_t ld;
  double unit = 0;
  std::array<std::vector<T>, 2> u, pull, log2_lse;  // of x and, with "cross", of y
  Scratch<T> dx, dy;
};

}  // namespace pix2rep
