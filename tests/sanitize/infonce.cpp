// infonce on raw memory against loops over every pair in double: (infonce.1-7) with masks, ids, positives, queue, all three kinds of negatives.
#include "cpu/infonce_solve.h"
#include "harness.h"

using namespace pix2rep;
using namespace sanitize;

namespace {

struct Sizes {
  Negatives negatives;
  int64_t n, m, d, q;
  bool masked, ids, permuted;
  double tau;
};

template <class T>
struct Problem {
  Sizes s;
  Exact<T> a, b, queue;
  Exact<int64_t> positive;
  Exact<bool> valid_a, valid_b;
  Exact<int32_t> id_a, id_b;
  int64_t anchors;

  Problem(const Sizes& sizes, Random& random)
      : s(sizes), a(s.n * s.d), b(s.m * s.d), queue(s.q * s.d), positive(s.n), valid_a(s.n), valid_b(s.m), id_a(s.n), id_b(s.m),
        anchors(s.negatives == Negatives::forward ? s.n : s.n + s.m) {
    for (const Exact<T>* rows : {&a, &b, &queue})
      for (int64_t i = 0; i * s.d < rows->size(); ++i) {
        double square = 1e-30;
        for (int64_t k = 0; k < s.d; ++k) (*rows)[i * s.d + k] = T(random.uniform(-1, 1)), square += double((*rows)[i * s.d + k]) * (*rows)[i * s.d + k];
        for (int64_t k = 0; k < s.d; ++k) (*rows)[i * s.d + k] = T((*rows)[i * s.d + k] / std::sqrt(square));
      }
    for (int64_t i = 0; i < s.n; ++i) positive[i] = s.negatives == Negatives::forward ? random.below(s.m) : i;
    if (s.negatives != Negatives::forward)
      for (int64_t i = s.n - 1; i > 0; --i) std::swap(positive[i], positive[random.below(i + 1)]);
    for (int64_t i = 0; i < s.n; ++i) valid_a[i] = random.below(3) > 0, id_a[i] = int32_t(random.below(1 + s.n / 2));
    for (int64_t j = 0; j < s.m; ++j) valid_b[j] = random.below(3) > 0, id_b[j] = int32_t(random.below(1 + s.n / 2));
  }

  static RowSource<T> source(const Exact<T>& rows, int64_t d) {
    if (rows.size() == 0) return {};
    return {reinterpret_cast<const char*>(rows.get()), int64_t(d * sizeof(T)), int64_t(sizeof(T)), [](const char* row, int64_t bytes, int64_t d, T* to) {
              for (int64_t c = 0; c < d; ++c) to[c] = *reinterpret_cast<const T*>(row + c * bytes);
            }};
  }
  InfonceInputs<T> inputs() const {
    RowSource<T> rows_a = source(a, s.d), rows_b = source(b, s.d);
    rows_a.read = rows_b.read = source(queue.size() ? queue : a.size() ? a : b, s.d).read;
    return {s.negatives, s.n, s.m, s.d, s.q, rows_a, rows_b, source(queue, s.d), s.permuted ? positive.get() : nullptr,
            s.masked ? valid_a.get() : nullptr, s.masked ? valid_b.get() : nullptr, s.ids ? id_a.get() : nullptr, s.ids ? id_b.get() : nullptr, s.tau};
  }

  // Rows are numbered a, b, queue.
  const T* row(int64_t i) const {
    return i < s.n ? a.get() + i * s.d : i < s.n + s.m ? b.get() + (i - s.n) * s.d : queue.get() + (i - s.n - s.m) * s.d;
  }
  bool valid(int64_t i) const { return !s.masked || i >= s.n + s.m || (i < s.n ? valid_a[i] : valid_b[i - s.n]); }
  int64_t match(int64_t i) const {
    if (i < s.n) return s.n + (s.permuted ? positive[i] : i);
    for (int64_t j = 0; j < s.n; ++j)
      if (match(j) == i) return j;
    return -1;
  }
  bool negative(int64_t i, int64_t j) const {
    if (j >= s.n + s.m) return s.negatives != Negatives::cross;
    if (j == i || !valid(j) || (s.negatives != Negatives::joint && (i < s.n) == (j < s.n))) return false;
    return !s.ids || (i < s.n ? id_a[i] : id_b[i - s.n]) != (j < s.n ? id_a[j] : id_b[j - s.n]);
  }
};

template <class T>
struct Result {
  Exact<T> losses, lse, grad_a, grad_b;
  double grad_tau = 0;

  explicit Result(const Problem<T>& p) : losses(p.anchors), lse(p.anchors), grad_a(p.a.size()), grad_b(p.b.size()) {
    std::fill_n(grad_a.get(), grad_a.size(), T(0)), std::fill_n(grad_b.get(), grad_b.size(), T(0));
  }
};

template <class T>
RowSink<T> sink(const Exact<T>& rows, int64_t d) {
  return {reinterpret_cast<char*>(rows.get()), int64_t(d * sizeof(T)), [](const T* from, int64_t d, char* row) { std::copy_n(from, d, reinterpret_cast<T*>(row)); }};
}

template <class T>
void naive(const Problem<T>& p, const Exact<T>& upstream, std::vector<double>& losses, std::vector<double>& da, std::vector<double>& db, double& dtau) {
  const int64_t total = p.s.n + p.s.m + p.s.q, d = p.s.d;
  std::vector<double> grad(size_t(total * d));
  losses.assign(size_t(p.anchors), 0), dtau = 0;
  for (int64_t i = 0; i < p.anchors; ++i) {
    const int64_t own = p.match(i);
    if (own < 0 || !p.valid(i) || !p.valid(own)) continue;
    std::vector<double> similarity(static_cast<size_t>(total));
    double largest = -1e300;
    for (int64_t j = 0; j < total; ++j) {
      for (int64_t k = 0; k < d; ++k) similarity[size_t(j)] += double(p.row(i)[k]) * p.row(j)[k] / p.s.tau;
      if (j == own || p.negative(i, j)) largest = std::max(largest, similarity[size_t(j)]);
    }
    double sum = 0;
    for (int64_t j = 0; j < total; ++j)
      if (j == own || p.negative(i, j)) sum += std::exp(similarity[size_t(j)] - largest);
    losses[size_t(i)] = largest + std::log(sum) - similarity[size_t(own)];
    for (int64_t j = 0; j < total; ++j) {
      if (j != own && !p.negative(i, j)) continue;
      const double g = upstream[i] * (std::exp(similarity[size_t(j)] - largest) / sum - (j == own ? 1 : 0));
      dtau -= g * similarity[size_t(j)] / p.s.tau;
      for (int64_t k = 0; k < d; ++k) {
        grad[size_t(i * d + k)] += g * p.row(j)[k] / p.s.tau;
        grad[size_t(j * d + k)] += g * p.row(i)[k] / p.s.tau;
      }
    }
  }
  da.assign(grad.begin(), grad.begin() + p.s.n * d), db.assign(grad.begin() + p.s.n * d, grad.begin() + (p.s.n + p.s.m) * d);
}

template <class T>
void solve(const Problem<T>& p, const Threads& parallel, const Exact<T>& upstream, Result<T>& out) {
  const InfonceInputs<T> in = p.inputs();
  infonce_forward<T>(in, parallel, out.losses.get(), out.lse.get());
  const InfonceGradients<T> gradients{sink(out.grad_a, p.s.d), sink(out.grad_b, p.s.d), &out.grad_tau};
  InfonceBackward<T, Threads>(in, parallel, upstream.get(), out.losses.get(), out.lse.get(), gradients).run();
}

template <class T>
void compare(const Sizes& s, uint64_t seed) {
  Random random(seed);
  const Problem<T> p(s, random);
  Exact<T> upstream(p.anchors);
  double weight = 1;
  for (int64_t i = 0; i < p.anchors; ++i) upstream[i] = T(random.uniform(-1, 1)), weight += std::abs(double(upstream[i]));
  Result<T> one(p), three(p);
  solve(p, Threads{1}, upstream, one), solve(p, Threads{3}, upstream, three);
  const std::string name = "infonce case " + std::to_string(seed) + (sizeof(T) == 4 ? " float" : " double");
  equal(name + ", losses by 3 threads", three.losses, one.losses), equal(name + ", lse by 3 threads", three.lse, one.lse);
  equal(name + ", grad a by 3 threads", three.grad_a, one.grad_a), equal(name + ", grad b by 3 threads", three.grad_b, one.grad_b);
  if (!kPlainLoops) return;
  std::vector<double> losses, da, db;
  double dtau;
  naive(p, upstream, losses, da, db, dtau);
  const double bound = std::numeric_limits<T>::epsilon() * (2 * double(s.d + 4) / s.tau + double(s.n + s.m + s.q + 16));  // tests/test_infonce_hypothesis.py
  close(name + ", losses", one.losses, losses, bound);
  close(name + ", grad a", one.grad_a, da, 4 * bound * weight / s.tau), close(name + ", grad b", one.grad_b, db, 4 * bound * weight / s.tau);
  close(name + ", grad tau", 1, [&](int64_t) { return one.grad_tau; }, [&](int64_t) { return dtau; }, 4 * bound * weight / s.tau / s.tau);
}

}  // namespace

PIX2REP_SANITIZE(infonce) {
  const Negatives kinds[] = {Negatives::joint, Negatives::cross, Negatives::forward};
  uint64_t seed = 0;
  // Register tiles end at 4, 8, 12, 24, 48 rows and columns, blocks at 192; 0.002 shifts by maxima.
  for (int64_t n : {0, 1, 24, 49})
    for (Negatives kind : kinds)
      for (int options = 0; options < 16; ++options) {
        const int64_t m = kind == Negatives::forward ? n + options % 3 * 7 + (n == 0) : n;
        const Sizes s{kind, n, m, n == 49 ? 17 : 1 + options % 9, kind != Negatives::cross && options & 8 ? 30 : 0,
                      bool(options & 1), bool(options & 2), kind == Negatives::forward || options & 4, ++seed % 4 ? 0.2 : 0.002};
        compare<float>(s, seed);
        if (options % 3 == 0) compare<double>(s, seed);
      }
  for (Negatives kind : kinds)
    for (double tau : {0.1, 0.003}) {
      compare<float>({kind, 430, kind == Negatives::forward ? 395 : 430, 33, kind == Negatives::cross ? 0 : 210, true, true, true, tau}, ++seed);
      compare<float>({kind, 200, 200, 64, 0, false, false, false, tau}, ++seed);
    }
}
