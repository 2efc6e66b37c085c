// crosscorr on raw memory against loops over the rows in double: (crosscorr.1-6) about the pivots that come back, for every storage type, with and without
// weights; rows of weight 0 hold NaN.
#include "cpu/crosscorr_core.h"
#include "harness.h"

using namespace pix2rep;
using namespace sanitize;

namespace {

// [n, d] row by row, or column by column.
CrosscorrView view_of(const Values& values, int64_t n, int64_t d, bool columns) {
  const int64_t bytes = bytes_of(values.type);
  return {values.data(), d, columns ? bytes : d * bytes, columns ? n : 1, values.type};
}

template <class T>
void compare(int64_t n, int64_t d1, int64_t d2, Storage type_x, Storage type_y, bool weighted, bool columns, uint64_t seed) {
  Random random(seed);
  Values x(type_x, n * d1), y(type_y, n * d2);
  Exact<T> weight(n);
  const auto at_x = [&](int64_t i, int64_t k) { return columns ? k * n + i : i * d1 + k; };
  for (int64_t i = 0; i < n; ++i) {
    weight[i] = weighted ? T(random.below(3)) / 2 : T(1);
    for (int64_t k = 0; k < d1; ++k) x.set(at_x(i, k), weight[i] == 0 ? NAN : random.eighths());
    for (int64_t k = 0; k < d2; ++k) y.set(i * d2 + k, weight[i] == 0 ? NAN : random.eighths());
  }
  // gradients of sum_x, sum_y, square_x, square_y, product
  std::vector<Exact<T>> up;
  for (int64_t size : {d1, d2, d1, d2, d1 * d2}) {
    up.emplace_back(size);
    for (int64_t i = 0; i < size; ++i) up.back()[i] = T(random.eighths());
  }
  const CrosscorrView in_x = view_of(x, n, d1, columns), in_y = view_of(y, n, d2, false);
  struct Result {
    std::vector<Exact<T>> moments;
    Values grad_x, grad_y;
  };
  const auto solve = [&](Threads parallel) {
    Result out{{}, Values(type_x, n * d1), Values(type_y, n * d2)};
    for (int64_t size : {int64_t(1), d1, d2, d1, d2, d1, d2, d1 * d2}) out.moments.emplace_back(size);
    const auto& m = out.moments;
    const T* weights = weighted ? weight.get() : nullptr;
    crosscorr_forward<T>(in_x, in_y, weights, n, parallel, {m[0].get(), m[1].get(), m[2].get(), m[3].get(), m[4].get(), m[5].get(), m[6].get(), m[7].get()});
    if (n > 0)
      crosscorr_backward<T>(in_x, in_y, weights, n, parallel, {up[0].get(), up[1].get(), up[2].get(), up[3].get(), up[4].get(), m[1].get(), m[2].get(),
                                                               view_of(out.grad_x, n, d1, false), view_of(out.grad_y, n, d2, false)});
    return out;
  };
  const Result one = solve({1}), three = solve({3});
  const std::string name = "crosscorr case " + std::to_string(seed);
  for (size_t i = 0; i < 8; ++i) equal(name + ", moments by 3 threads", three.moments[i], one.moments[i]);
  equal(name + ", grad x by 3 threads", three.grad_x, one.grad_x), equal(name + ", grad y by 3 threads", three.grad_y, one.grad_y);

  if (!kPlainLoops) return;
  const auto& m = one.moments;
  std::vector<std::vector<double>> want;
  for (size_t i = 0; i < 8; ++i) want.emplace_back(size_t(m[i].size()));
  std::vector<double> dx(size_t(n * d1)), dy(size_t(n * d2)), u(static_cast<size_t>(d1)), v(static_cast<size_t>(d2));
  for (int64_t i = 0; i < n; ++i) {
    const double w = double(weight[i]);
    want[0][0] += w;
    for (int64_t k = 0; k < d1; ++k) u[size_t(k)] = w == 0 ? 0 : x[at_x(i, k)] - double(m[1][k]);
    for (int64_t k = 0; k < d2; ++k) v[size_t(k)] = w == 0 ? 0 : y[i * d2 + k] - double(m[2][k]);
    for (int64_t k = 0; k < d1; ++k) {
      want[3][size_t(k)] += w * u[size_t(k)], want[5][size_t(k)] += w * u[size_t(k)] * u[size_t(k)];
      double sum = double(up[0][k]) + 2 * double(up[2][k]) * u[size_t(k)];
      for (int64_t l = 0; l < d2; ++l) sum += double(up[4][k * d2 + l]) * v[size_t(l)], want[7][size_t(k * d2 + l)] += w * u[size_t(k)] * v[size_t(l)];
      dx[size_t(i * d1 + k)] = w * sum;
    }
    for (int64_t l = 0; l < d2; ++l) {
      want[4][size_t(l)] += w * v[size_t(l)], want[6][size_t(l)] += w * v[size_t(l)] * v[size_t(l)];
      double sum = double(up[1][l]) + 2 * double(up[3][l]) * v[size_t(l)];
      for (int64_t k = 0; k < d1; ++k) sum += double(up[4][k * d2 + l]) * u[size_t(k)];
      dy[size_t(i * d2 + l)] = w * sum;
    }
  }
  // |u|, |v| <= 4 and |g| <= 2: each sum has that many terms of at most 16.
  const double eps = double(std::numeric_limits<T>::epsilon());
  for (size_t i : {0, 3, 4, 5, 6, 7}) close(name + ", moment " + std::to_string(i), m[i], want[i], 16 * eps * double(n + 4));
  const double bound_x = 8 * double(d2 + 4), bound_y = 8 * double(d1 + 4);
  close(name + ", grad x", one.grad_x, dx, bound_x * (eps * double(d2 + 8) + epsilon_of(type_x)));
  close(name + ", grad y", one.grad_y, dy, bound_y * (eps * double(d1 + 8) + epsilon_of(type_y)));
}

}  // namespace

PIX2REP_SANITIZE(crosscorr) {
  uint64_t seed = 0;
  for (bool weighted : {false, true})
    for (bool columns : {false, true}) {
      for (int64_t n : {0, 1, 2, 7, 64, 65, 130})
        for (int64_t d : {1, 15, 16, 33, 64}) {
          compare<float>(n, d, d, Storage::f32, Storage::f32, weighted, columns, ++seed);
          compare<double>(n, d, d % 32 + 1, Storage::f64, Storage::f64, weighted, columns, ++seed);
        }
      compare<float>(700, 32, 48, Storage::f16, Storage::bf16, weighted, columns, ++seed);
      compare<float>(3000, 20, 16, Storage::bf16, Storage::f32, weighted, columns, ++seed);
      compare<double>(300, 16, 20, Storage::f16, Storage::f64, weighted, columns, ++seed);
    }
}
