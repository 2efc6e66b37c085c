// align on raw memory against loops over the points in double: (align.1-4) in every layout of both maps, storage types, modes, paddings, 2D and 3D.
#include <optional>

#include "cpu/align_core.h"
#include "harness.h"

using namespace pix2rep;
using namespace sanitize;

namespace {

struct Sizes {
  int64_t batch, channels, size[3], extent[2][3];  // slowest first, 1 in 2D
  int dims;
  bool nearest, align_corners, border, affine, last[2], need[2];

  int64_t pixels(int s) const { return extent[s][0] * extent[s][1] * extent[s][2]; }
  int64_t per_image() const { return size[0] * size[1] * size[2]; }
};

// The taps of one point, as (pixel, weight).
std::vector<std::pair<int64_t, double>> taps(const Sizes& s, const int64_t* extents, const double* g) {
  std::vector<std::pair<int64_t, double>> out{{0, 1}};
  for (int axis = 3 - s.dims; axis < 3; ++axis) {
    const double extent = double(extents[axis]), at = g[2 - axis];
    double x = s.align_corners ? (at + 1) / 2 * (extent - 1) : ((at + 1) * extent - 1) / 2;
    if (s.border) x = std::min(std::max(x, 0.0), extent - 1);
    std::vector<std::pair<int64_t, double>> next;
    const int64_t first = int64_t(s.nearest ? std::nearbyint(x) : std::floor(x));
    for (int64_t k = first; k <= first + !s.nearest; ++k)
      for (const auto& [pixel, weight] : out)
        if (k >= 0 && k < extents[axis]) next.push_back({pixel * extents[axis] + k, weight * (s.nearest ? 1 : 1 - std::abs(x - double(k)))});
    out = next;
  }
  return out;
}

template <class S, class G>
void compare(const Sizes& s, uint64_t seed) {
  using T = Compute<S>;
  Random random(seed);
  const int64_t count = s.batch * s.per_image(), C = s.channels, columns = s.dims + 1, entries = s.affine ? s.dims * columns : s.per_image() * s.dims;
  std::vector<Values> maps;
  std::vector<Exact<G>> grids;
  std::vector<WarpGrid<G>> where;
  std::vector<std::vector<G>> outputs;
  for (int m = 0; m < 2; ++m) {
    maps.emplace_back(kStorage<S>, s.batch * C * s.pixels(m));
    for (int64_t i = 0; i < maps[m].count; ++i) maps[m].set(i, random.eighths());
    grids.emplace_back(s.batch * entries);
    for (int64_t i = 0; i < grids[m].size(); ++i) grids[m][i] = G(random.uniform(-1.3, 1.3) * (s.affine ? 0.6 : 1));
    where.push_back({grids[m].get(), entries, columns, 1, {}, s.affine, s.align_corners, s.border, s.nearest ? Mode::nearest : Mode::linear, s.dims, {}, {}});
    for (int axis = 0; axis < 3; ++axis) where[m].size[axis] = s.size[axis], where[m].extent[axis] = s.extent[m][axis];
    outputs.push_back(s.affine ? output_coordinates(where[m]) : std::vector<G>());
  }
  const Exact<T> upstream[3] = {Exact<T>(count), Exact<T>(count), Exact<T>(count)};
  for (const Exact<T>& g : upstream)
    for (int64_t i = 0; i < count; ++i) g[i] = T(random.eighths());

  const Points points(true, nullptr, count, s.batch, s.per_image());
  const Warp<S, G> warps[2] = {{where[0], points}, {where[1], points}};
  Side<S> sides[2];
  const auto map_of = [&](int m, auto* data) {
    return Map<std::remove_pointer_t<decltype(data)>>{data, s.batch, C, s.pixels(m), C * s.pixels(m), s.last[m] ? C : s.pixels(m), s.last[m]};
  };
  for (int m = 0; m < 2; ++m)
    sides[m] = {map_of(m, reinterpret_cast<const S*>(maps[m].data())), [&warps, m](const Points::Range& range, int32_t* index, T* weight, bool* inside) {
                  return warps[m].chunk(range, index, weight, inside);
                }};
  struct Result {
    Exact<T> dot, sq1, sq2;
    Exact<bool> valid;
    Values grad[2];
  };
  const auto solve = [&](Threads parallel) {
    Result out{Exact<T>(count), Exact<T>(count), Exact<T>(count), Exact<bool>(count), {Values(kStorage<S>, maps[0].count), Values(kStorage<S>, maps[1].count)}};
    T* const sums[3] = {out.dot.get(), out.sq1.get(), out.sq2.get()};
    align_forward(sides, points, parallel, sums, out.valid.get());
    const T* const from[3] = {upstream[0].get(), upstream[1].get(), upstream[2].get()};
    const Map<S> gradients[2] = {map_of(0, reinterpret_cast<S*>(out.grad[0].data())), map_of(1, reinterpret_cast<S*>(out.grad[1].data()))};
    align_backward(sides, points, parallel, from, gradients, s.need);
    return out;
  };
  const Result one = solve({1}), three = solve({3});
  const std::string name = "align case " + std::to_string(seed);
  equal(name + ", dot by 3 threads", three.dot, one.dot);
  for (int m = 0; m < 2; ++m)
    if (s.need[m]) equal(name + ", grad by 3 threads", three.grad[m], one.grad[m]);

  if (!kPlainLoops) return;
  std::vector<double> dot(static_cast<size_t>(count)), square[2], grad[2], valid(static_cast<size_t>(count), 1.0);
  for (int m = 0; m < 2; ++m) square[m].resize(size_t(count)), grad[m].resize(size_t(maps[m].count));
  const auto at = [&](int m, int64_t b, int64_t pixel, int64_t c) { return b * C * s.pixels(m) + (s.last[m] ? pixel * C + c : c * s.pixels(m) + pixel); };
  for (int64_t p = 0; p < count; ++p) {
    const int64_t b = p / s.per_image(), local = p % s.per_image();
    const int64_t index[3] = {local % s.size[2], local / s.size[2] % s.size[1], local / s.size[2] / s.size[1]};  // x first
    std::vector<std::pair<int64_t, double>> found[2];
    for (int m = 0; m < 2; ++m) {
      double g[3] = {};
      for (int row = 0; row < s.dims; ++row) {
        if (!s.affine) {
          g[row] = double(grids[m][b * entries + local * s.dims + row]);
        } else {
          const G* theta = grids[m].get() + b * entries + row * columns;
          g[row] = double(theta[s.dims]);
          for (int axis = 0; axis < s.dims; ++axis) g[row] += double(theta[axis]) * double(where[m].output[axis][index[axis]]);
        }
        if (std::abs(g[row]) > 1) valid[size_t(p)] = 0;
      }
      found[m] = taps(s, s.extent[m], g);
    }
    for (int64_t c = 0; c < C; ++c) {
      double f[2] = {};
      for (int m = 0; m < 2; ++m)
        for (const auto& [pixel, weight] : found[m]) f[m] += weight * maps[m][at(m, b, pixel, c)];
      dot[size_t(p)] += f[0] * f[1], square[0][size_t(p)] += f[0] * f[0], square[1][size_t(p)] += f[1] * f[1];
      for (int m = 0; m < 2; ++m)
        for (const auto& [pixel, weight] : found[m])
          grad[m][size_t(at(m, b, pixel, c))] += weight * (double(upstream[0][p]) * f[1 - m] + 2 * double(upstream[1 + m][p]) * f[m]);
    }
  }
  int64_t longest = 1;
  for (int m = 0; m < 2; ++m)
    for (int axis = 0; axis < 3; ++axis) longest = std::max(longest, s.extent[m][axis]);
  // |f| <= 2, and a coordinate's error moves it by 2 dims times that: tests/sanitize/warp.cpp
  const double eps = double(std::numeric_limits<T>::epsilon());
  const double f_error = 2 * 8 * (8 * double(longest) * double(std::numeric_limits<G>::epsilon()) + 8 * eps);
  const double bound = double(C) * (4 * f_error + 4 * eps * double(C));
  close(name + ", dot", one.dot, dot, bound), close(name + ", sq1", one.sq1, square[0], bound), close(name + ", sq2", one.sq2, square[1], bound);
  close(name + ", valid", one.valid, valid, 0);
  for (int m = 0; m < 2; ++m) {
    double largest = 1;
    for (double x : grad[m]) largest = std::max(largest, std::abs(x));
    if (s.need[m]) close(name + ", grad", one.grad[m], grad[m], 24 * f_error * double(count) + largest * (2 * epsilon_of(kStorage<S>) + eps * double(count)));
  }
}

}  // namespace

PIX2REP_SANITIZE(align) {
  uint64_t seed = 0;
  for (int64_t channels : {1, 7, 8, 37, 70})
    for (int options = 0; options < 32; ++options) {
      const bool solid = options & 1;
      ++seed;
      const Sizes s{2, channels, {solid ? 3 : 1, 1 + options % 5, 9}, {{solid ? 4 : 1, 1 + options / 4, 7}, {solid ? 2 : 1, 6, 1 + options % 7}}, solid ? 3 : 2,
                    seed % 3 == 0, bool(options & 4), bool(options & 8), bool(options & 16), {bool(options & 2), seed % 5 > 2}, {seed % 4 != 1, seed % 4 != 2}};
      compare<float, float>(s, seed), compare<double, double>(s, seed);
      if (options % 4 == 0) compare<F16, float>(s, seed), compare<BF16, double>(s, seed);
    }
  for (bool last : {false, true}) {  // several chunks and blocks; few points of large maps
    compare<float, float>({2, 20, {1, 40, 40}, {{1, 31, 33}, {1, 50, 20}}, 2, false, true, true, true, {last, !last}, {true, true}}, ++seed);
    compare<float, float>({2, 20, {1, 4, 4}, {{1, 60, 60}, {1, 50, 50}}, 2, false, false, true, true, {last, last}, {true, true}}, ++seed);
    compare<float, float>({1, 1, {1, 1, 1}, {{1, 1, 1}, {1, 1, 1}}, 2, false, true, false, true, {last, last}, {true, true}}, ++seed);
  }
}
