// felzenszwalb on raw memory against a sorted list of edges and labels that are painted over, in the same order of ties; blur against the sum written out.
#include "cpu/felzenszwalb_core.h"

#include <tuple>

#include "harness.h"

using namespace pix2rep;
using namespace sanitize;

namespace {

std::vector<int32_t> plainly(const Exact<double>& image, const Grid& grid, double k, int64_t least) {
  std::vector<std::tuple<double, int64_t, int64_t>> edges;
  const auto at = [&](int64_t i) { return std::array<int64_t, 3>{i / (grid.height * grid.width), i / grid.width % grid.height, i % grid.width}; };
  for (int64_t i = 0; i < grid.voxels(); ++i)
    for (int64_t j = i + 1; j < grid.voxels(); ++j) {
      const auto a = at(i), b = at(j);
      if (std::abs(a[0] - b[0]) <= 1 && std::abs(a[1] - b[1]) <= 1 && std::abs(a[2] - b[2]) <= 1) edges.emplace_back(std::fabs(image[i] - image[j]), i, j);
    }
  std::sort(edges.begin(), edges.end());
  std::vector<int32_t> label(size_t(grid.voxels()));
  std::vector<double> inner(label.size(), 0.0);
  for (size_t i = 0; i < label.size(); ++i) label[i] = int32_t(i);
  for (const bool second : {false, true})
    for (const auto& [cost, i, j] : edges) {
      const int32_t a = std::min(label[size_t(i)], label[size_t(j)]), b = std::max(label[size_t(i)], label[size_t(j)]);
      if (a == b) continue;
      const int64_t in_a = std::count(label.begin(), label.end(), a), in_b = std::count(label.begin(), label.end(), b);
      const float bound = std::min(float(inner[size_t(a)] + k / double(in_a)), float(inner[size_t(b)] + k / double(in_b)));
      if (second ? std::min(in_a, in_b) >= least : cost >= double(bound)) continue;
      std::replace(label.begin(), label.end(), b, a), inner[size_t(a)] = cost;
    }
  std::vector<int32_t> known;  // first voxels, ascending: a component is named by its least voxel
  for (size_t i = 0; i < label.size(); ++i)
    if (label[i] == int32_t(i)) known.push_back(label[i]);
  for (int32_t& one : label) one = int32_t(std::lower_bound(known.begin(), known.end(), one) - known.begin());
  return label;
}

void compare(const Grid& grid, int levels, double k, int64_t least, double sigma, uint64_t seed) {
  Random random(seed);
  Exact<double> image(grid.voxels());
  for (int64_t i = 0; i < image.size(); ++i) image[i] = levels ? double(random.below(levels)) / levels : random.uniform(0, 1);
  const std::string name = "felzenszwalb case " + std::to_string(seed);
  if (sigma > 0) {
    Exact<double> along_x(grid.voxels());
    const int64_t n = grid.width, radius = int64_t(4 * sigma + 0.5);
    std::vector<double> want(size_t(grid.voxels()));
    for (int64_t i = 0; i < grid.voxels(); ++i) {
      double sum = 0, all = 0;
      for (int64_t d = -radius; d <= radius; ++d) {
        int64_t x = i % n + d;
        while (x < 0 || x >= n) x = x < 0 ? -1 - x : 2 * n - 1 - x;
        const double w = std::exp(-0.5 * double(d * d) / (sigma * sigma));
        sum += w * image[i / n * n + x], all += w;
      }
      want[size_t(i)] = sum / all;
    }
    blur_axis(image.get(), grid.depth * grid.height, n, 1, sigma, along_x.get());
    close(name + ", blur", along_x, want, 1e-14);
    blur(image.get(), grid, {sigma, 0.5 * sigma, 2 * sigma});
  }
  Exact<int32_t> labels(grid.voxels());
  felzenszwalb(image.get(), grid, k, least, labels.get());
  if (kPlainLoops) close(name, labels, plainly(image, grid, k, least), 0);
}

}  // namespace

PIX2REP_SANITIZE(felzenszwalb) {
  uint64_t seed = 0;
  for (const Grid& grid : {Grid{1, 1, 1}, Grid{1, 1, 7}, Grid{1, 9, 1}, Grid{5, 1, 1}, Grid{1, 8, 11}, Grid{2, 2, 2}, Grid{3, 5, 4}, Grid{4, 1, 9}, Grid{5, 6, 2}})
    for (int levels : {0, 1, 3, 40})
      for (double k : {0.0, 0.1, 0.5, 3.0})
        for (int64_t least : {0, 4}) compare(grid, levels, k, least, least ? 0.9 : 0.0, ++seed);
}
