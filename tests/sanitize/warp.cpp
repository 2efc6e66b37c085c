// warp on raw memory against one loop a point in double: (warp.1-6) with every mode, padding, layout and storage type, affine and dense, all and given points.
#include "cpu/warp_core.h"
#include "harness.h"

using namespace pix2rep;
using namespace sanitize;

namespace {

template <class S>
double value(S x) {
  if constexpr (std::is_same_v<S, F16>) return from_f16(x.bits);
  else if constexpr (std::is_same_v<S, BF16>) return from_bf16(x.bits);
  else return double(x);
}
template <class S>
S storage(double x) {
  if constexpr (std::is_same_v<S, F16>) return {to_f16(float(x))};
  else if constexpr (std::is_same_v<S, BF16>) return {to_bf16(float(x))};
  else return S(x);
}
template <class S>
double epsilon() {
  return std::is_same_v<S, F16> ? 1.0 / 1024 : std::is_same_v<S, BF16> ? 1.0 / 128 : double(std::numeric_limits<Compute<S>>::epsilon());
}

struct Sizes {
  int64_t batch, channels, size[3], extent[3];  // slowest first
  int dims;
  Mode mode;
  bool affine, align_corners, border, normalize, channels_last;
  int64_t given;  // points; -1: every point

  int64_t pixels() const { return extent[0] * extent[1] * extent[2]; }
  int64_t per_image() const { return size[0] * size[1] * size[2]; }
};

double weight_of(Mode mode, double distance) {
  const double d = std::abs(distance);
  if (mode != Mode::bicubic) return std::max(0.0, 1 - d);
  return d <= 1 ? (1.25 * d - 2.25) * d * d + 1 : d < 2 ? ((-0.75 * d + 3.75) * d - 6) * d + 3 : 0;
}

// The taps of one point, as (pixel, weight).
std::vector<std::pair<int64_t, double>> taps(const Sizes& s, const double (&g)[3]) {
  std::vector<std::pair<int64_t, double>> out{{0, 1}};
  for (int axis = 3 - s.dims; axis < 3; ++axis) {
    const double extent = double(s.extent[axis]), at = g[2 - axis];
    double x = s.align_corners ? (at + 1) / 2 * (extent - 1) : ((at + 1) * extent - 1) / 2;
    if (s.border && s.mode != Mode::bicubic) x = std::min(std::max(x, 0.0), extent - 1);
    std::vector<std::pair<int64_t, double>> next;
    const int64_t base = int64_t(s.mode == Mode::nearest ? std::nearbyint(x) : std::floor(x));
    const int64_t first = s.mode == Mode::bicubic ? base - 1 : base, last = s.mode == Mode::nearest ? base : s.mode == Mode::linear ? base + 1 : base + 2;
    for (int64_t k = first; k <= last; ++k) {
      const double weight = s.mode == Mode::nearest ? 1 : weight_of(s.mode, x - double(k));
      if (!s.border && (k < 0 || k >= s.extent[axis])) continue;
      for (const auto& [pixel, before] : out) next.push_back({pixel * s.extent[axis] + std::min(std::max<int64_t>(k, 0), s.extent[axis] - 1), before * weight});
    }
    out = next;
  }
  return out;
}

template <class S, class G>
struct Result {
  Exact<S> rows, grad;
  Exact<bool> inside;
  Exact<Compute<S>> norms;

  Result(const Sizes& s, int64_t count) : rows(count * s.channels), grad(s.batch * s.channels * s.pixels()), inside(count), norms(s.normalize ? count : 0) {}
};

template <class S, class G>
void compare(const Sizes& s, uint64_t seed) {
  using T = Compute<S>;
  Random random(seed);
  const int64_t total = s.batch * s.per_image(), count = s.given < 0 ? total : s.given, channels = s.channels, pixels = s.pixels();
  Exact<S> features(s.batch * channels * pixels), upstream(count * channels);
  for (int64_t i = 0; i < features.size(); ++i) features[i] = storage<S>(random.eighths());
  for (int64_t i = 0; i < upstream.size(); ++i) upstream[i] = storage<S>(random.eighths());
  const int64_t columns = s.dims + 1, entries = s.affine ? s.dims * columns : s.per_image() * s.dims;
  Exact<G> grid(s.batch * entries);
  for (int64_t i = 0; i < grid.size(); ++i) grid[i] = G(random.uniform(-1.3, 1.3) * (s.affine ? 0.6 : 1));
  Exact<int64_t> points(std::max<int64_t>(s.given, 0));
  for (int64_t i = 0; i < points.size(); ++i) points[i] = random.below(total);

  WarpGrid<G> w{grid.get(), entries, columns, 1, {}, s.affine, s.align_corners, s.border, s.mode, s.dims, {}, {}};
  for (int axis = 0; axis < 3; ++axis) w.size[axis] = s.size[axis], w.extent[axis] = s.extent[axis];
  const std::vector<G> output = s.affine ? output_coordinates(w) : std::vector<G>();
  const Points where(s.given < 0, points.get(), count, s.batch, s.per_image());
  const int64_t stride = s.channels_last ? channels : pixels;
  const auto solve = [&](const Threads& parallel, Result<S, G>& out) {
    const Map<const S> map{features.get(), s.batch, channels, pixels, channels * pixels, stride, s.channels_last};
    const Map<S> grad{out.grad.get(), s.batch, channels, pixels, channels * pixels, stride, s.channels_last};
    T* norms = s.normalize ? out.norms.get() : nullptr;
    warp_forward<S>(map, w, where, parallel, out.rows.get(), out.inside.get(), norms);
    warp_backward<S>(upstream.get(), out.rows.get(), norms, w, where, parallel, grad);
  };
  Result<S, G> one(s, count), three(s, count);
  solve(Threads{1}, one), solve(Threads{3}, three);
  const std::string name = "warp case " + std::to_string(seed);
  equal(name + ", rows by 3 threads", three.rows, one.rows), equal(name + ", norms by 3 threads", three.norms, one.norms);
  equal(name + ", grad by 3 threads", three.grad, one.grad);

  if (!kPlainLoops) return;
  const auto at = [&](int64_t b, int64_t pixel, int64_t c) { return b * channels * pixels + (s.channels_last ? pixel * channels + c : c * pixels + pixel); };
  std::vector<double> rows(size_t(count * channels)), norms(one.norms.size()), grad(size_t(features.size()));
  std::vector<bool> inside(static_cast<size_t>(count));
  const double tap = 8 * double(std::max({s.extent[0], s.extent[1], s.extent[2]})) * double(std::numeric_limits<G>::epsilon()) +
                     8 * double(std::numeric_limits<T>::epsilon());
  const double f_error = 16 * tap * 2 * std::sqrt(double(channels));  // tests/test_warp_hypothesis.py
  double row_bound = f_error + 2 * epsilon<S>() * 4, grad_bound = 0;
  for (int64_t p = 0; p < count; ++p) {
    const int64_t point = s.given < 0 ? p : points[p], b = point / s.per_image(), local = point % s.per_image();
    const int64_t index[3] = {local % s.size[2], local / s.size[2] % s.size[1], local / s.size[2] / s.size[1]};  // x first
    double g[3] = {};
    for (int row = 0; row < s.dims; ++row)
      if (s.affine) {
        const G* theta = grid.get() + b * entries + row * columns;
        g[row] = double(theta[s.dims]);
        for (int axis = 0; axis < s.dims; ++axis) g[row] += double(theta[axis]) * double(w.output[axis][index[axis]]);
      } else {
        g[row] = double(grid[b * entries + local * s.dims + row]);
      }
    inside[size_t(p)] = std::max({std::abs(g[0]), std::abs(g[1]), std::abs(g[2])}) <= 1;
    const auto found = taps(s, g);
    double* row = rows.data() + p * channels;
    double square = 0, dot = 0, up = 0;
    for (int64_t c = 0; c < channels; ++c) {
      for (const auto& [pixel, weight] : found) row[c] += weight * value(features[at(b, pixel, c)]);
      square += row[c] * row[c];
    }
    const double norm = std::sqrt(square), length = std::max(norm, kEpsilon);
    if (s.normalize) {
      norms[size_t(p)] = norm;
      for (int64_t c = 0; c < channels; ++c) row[c] /= length;
    }
    for (int64_t c = 0; c < channels; ++c) dot += row[c] * value(upstream[p * channels + c]), up += value(upstream[p * channels + c]) * value(upstream[p * channels + c]);
    up = std::sqrt(up);
    for (int64_t c = 0; c < channels; ++c) {
      double d = value(upstream[p * channels + c]);
      if (s.normalize) d = norm < kEpsilon ? d / kEpsilon : (d - row[c] * dot) / norm;
      for (const auto& [pixel, weight] : found) grad[size_t(at(b, pixel, c))] += weight * d;
    }
    const double slack = epsilon<S>() + double(channels) * double(std::numeric_limits<T>::epsilon());
    if (s.normalize) row_bound = std::max(row_bound, f_error / length + 4 * slack);
    if (s.normalize && norm == 0) continue;  // no tap inside: exactly 0
    grad_bound += s.normalize ? up / length * (3 * (f_error / length + 4 * slack) + 2 * f_error / length + slack + 16 * tap) : 16 * up * tap;
  }
  double largest = 0;
  for (double x : grad) largest = std::max(largest, std::abs(x));
  grad_bound += (2 * epsilon<S>() + double(count) * double(std::numeric_limits<T>::epsilon())) * (largest + 1);
  close(name + ", rows", one.rows.size(), [&](int64_t i) { return value(one.rows[i]); }, [&](int64_t i) { return rows[size_t(i)]; }, row_bound);
  close(name + ", norms", one.norms, norms, f_error);
  close(name + ", inside", one.inside, inside, 0);
  close(name + ", grad", one.grad.size(), [&](int64_t i) { return value(one.grad[i]); }, [&](int64_t i) { return grad[size_t(i)]; }, grad_bound);
}

}  // namespace

PIX2REP_SANITIZE(warp) {
  uint64_t seed = 0;
  const Mode modes[] = {Mode::linear, Mode::nearest, Mode::bicubic};
  for (int64_t channels : {1, 7, 8, 37, 70})  // planes below 8, tails of every vector
    for (int options = 0; options < 32; ++options) {
      const int dims = options & 1 ? 3 : 2;
      const bool last = options & 2;
      const Sizes s{2, channels, {dims == 3 ? 3 : 1, 1 + options % 5, 9}, {dims == 3 ? 4 : 1, 1 + options / 4, 7}, dims, modes[++seed % (5 - dims)],
                    bool(options & 4), bool(options & 8), bool(options & 16), bool(seed / 3 % 2), last, options % 3 ? -1 : int64_t(options) * 5};
      compare<float, float>(s, seed), compare<double, double>(s, seed);
      if (options % 4 == 0) compare<F16, float>(s, seed), compare<BF16, double>(s, seed);
    }
  // One of everything, no point, no image, few points of a large map, several chunks a task.
  compare<float, float>({1, 1, {1, 1, 1}, {1, 1, 1}, 2, Mode::linear, true, true, false, true, true, -1}, ++seed);
  compare<float, float>({2, 9, {1, 4, 4}, {1, 5, 5}, 2, Mode::linear, true, true, false, true, true, 0}, ++seed);
  compare<float, float>({0, 9, {1, 4, 4}, {1, 5, 5}, 2, Mode::linear, true, true, false, true, true, -1}, ++seed);
  for (bool last : {false, true}) {
    compare<float, float>({2, 20, {1, 40, 40}, {1, 50, 50}, 2, Mode::bicubic, true, true, false, true, last, 30}, ++seed);
    compare<float, float>({3, 20, {1, 40, 40}, {1, 31, 33}, 2, Mode::linear, true, false, true, true, last, 3000}, ++seed);
  }
}
