// Graph segmentation of Felzenszwalb and Huttenlocher (IJCV 2004) of a plane or a volume, on raw memory.
//
//     cost of an edge (u, v) of neighbours, 26 a voxel (8 in a plane):   w = |I(u) - I(v)|,   I blurred
//     edges by ascending cost; merge A and B when   w < min(Int(A) + k / |A|, Int(B) + k / |B|);   then Int(A u B) = w
//     edges once more; merge when |A| or |B| < least
//
// No list of edges with their costs: edges are counted by the leading bits of their cost, their numbers (4 bytes) put in that order, and each such
// bucket is sorted, with costs computed anew, when its turn comes. A plane is a volume of depth 1.
// Memory: 4 bytes an edge (13 a voxel, 4 a pixel), 28 a voxel beside image and labels.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "scratch.h"

namespace pix2rep {

constexpr int kForward = 13;        // neighbours of a voxel that come after it
constexpr int kBucketShift = 11;    // of the bits of a float32: sign, exponent and 12 bits of mantissa stay
constexpr int64_t kBuckets = (int64_t(1) << (32 - kBucketShift)) / 2;  // no sign

struct Grid {
  int64_t depth, height, width;

  int64_t voxels() const { return depth * height * width; }
};

// Blur of one axis, [outer][n][inner]: Gaussian of deviation `sigma` in voxels, cut at 4 deviations, the border mirrored (edge voxels twice).
inline void blur_axis(const double* from, int64_t outer, int64_t n, int64_t inner, double sigma, double* to) {
  const int64_t radius = int64_t(4 * sigma + 0.5);
  std::vector<double> weight(size_t(2 * radius + 1));
  double sum = 0;
  for (int64_t k = -radius; k <= radius; ++k) sum += weight[size_t(k + radius)] = std::exp(-0.5 * double(k * k) / (sigma * sigma));
  const auto mirrored = [&](int64_t i) {
    i = (i % (2 * n) + 2 * n) % (2 * n);
    return i < n ? i : 2 * n - 1 - i;
  };
  for (int64_t o = 0; o < outer; ++o)
    for (int64_t i = 0; i < n; ++i) {
      double* row = to + (o * n + i) * inner;
      std::fill_n(row, inner, 0.0);
      for (int64_t k = -radius; k <= radius; ++k) {
        const double w = weight[size_t(k + radius)] / sum;
        const double* source = from + (o * n + mirrored(i + k)) * inner;
        for (int64_t x = 0; x < inner; ++x) row[x] += w * source[x];
      }
    }
}

// Blurs `image` in place; an axis of one voxel or without a deviation stays as it is.
inline void blur(double* image, const Grid& grid, const std::array<double, 3>& sigma) {
  const Scratch<double> other(grid.voxels());
  const int64_t size[3] = {grid.depth, grid.height, grid.width};
  int64_t outer = 1, inner = grid.voxels();
  for (int axis = 0; axis < 3; ++axis) {
    inner /= size[axis];
    if (size[axis] > 1 && sigma[size_t(axis)] > 1e-15) {  // its square must not vanish
      blur_axis(image, outer, size[axis], inner, sigma[size_t(axis)], other.get());
      std::copy_n(other.get(), grid.voxels(), image);
    }
    outer *= size[axis];
  }
}

// Sets of voxels, each with its size and its threshold Int + k / size, which are those of its root.
class Forest {
 public:
  Forest(int64_t count, double k) : k_(k), parent_(count), size_(count, 1), threshold_(count, float(k)) {
    for (int64_t i = 0; i < count; ++i) parent_.get()[i] = int32_t(i);
  }
  int32_t root(int32_t i) const {
    int32_t* parent = parent_.get();
    while (parent[i] != i) i = parent[i] = parent[parent[i]];
    return i;
  }
  int32_t size(int32_t root) const { return size_.get()[root]; }
  float threshold(int32_t root) const { return threshold_.get()[root]; }  // float32, as scikit-image has it
  void merge(int32_t a, int32_t b, double cost) const {
    if (size(a) < size(b)) std::swap(a, b);
    parent_.get()[b] = a;
    size_.get()[a] += size_.get()[b];
    threshold_.get()[a] = float(cost + k_ / size(a));
  }

 private:
  double k_;
  Scratch<int32_t> parent_, size_;
  Scratch<float> threshold_;
};

struct Neighbour {
  int64_t z, y, x, step;
};

inline std::array<Neighbour, kForward> neighbours(const Grid& grid) {
  std::array<Neighbour, kForward> found;
  size_t count = 0;
  for (int64_t z = 0; z <= 1; ++z)
    for (int64_t y = -1; y <= 1; ++y)
      for (int64_t x = -1; x <= 1; ++x)
        if (const int64_t step = (z * grid.height + y) * grid.width + x; z > 0 || y > 0 || (y == 0 && x > 0)) found[count++] = {z, y, x, step};
  return found;
}

// f(voxel, direction) of every edge, voxels in order of memory.
template <class F>
void each_edge(const Grid& grid, const F& f) {
  const auto next = neighbours(grid);
  uint32_t voxel = 0;
  for (int64_t z = 0; z < grid.depth; ++z)
    for (int64_t y = 0; y < grid.height; ++y)
      for (int64_t x = 0; x < grid.width; ++x, ++voxel)
        for (int d = 0; d < kForward; ++d)
          if (z + next[size_t(d)].z < grid.depth && uint64_t(y + next[size_t(d)].y) < uint64_t(grid.height) && uint64_t(x + next[size_t(d)].x) < uint64_t(grid.width))
            f(voxel, d);
}

// labels [voxels]: components numbered from 0 in the order of their first voxels; returns how many. image: at most 2^32 / 13 voxels,
// differences finite.
// Edges of equal cost are taken in the order of their first voxel, then of their second.
inline int64_t felzenszwalb(const double* image, const Grid& grid, double k, int64_t least, int32_t* labels) {
  const auto next = neighbours(grid);
  const auto cost = [&](uint32_t voxel, int d) { return std::fabs(image[voxel] - image[int64_t(voxel) + next[size_t(d)].step]); };
  const auto bucket = [&](double w) {  // rounding to float32 keeps the order
    const float rounded = float(w);
    uint32_t bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    return bits >> kBucketShift;
  };
  const Scratch<uint32_t> ends(kBuckets, 0u);
  each_edge(grid, [&](uint32_t voxel, int d) { ++ends.get()[bucket(cost(voxel, d))]; });
  uint32_t edges = 0;
  for (int64_t b = 0; b < kBuckets; ++b) {
    const uint32_t count = ends.get()[b];
    ends.get()[b] = edges;
    edges += count;
  }
  const Scratch<uint32_t> order(edges);
  each_edge(grid, [&](uint32_t voxel, int d) { order.get()[ends.get()[bucket(cost(voxel, d))]++] = voxel * kForward + uint32_t(d); });

  struct Edge {
    double cost;
    uint32_t id;
    bool operator<(const Edge& other) const { return cost < other.cost || (cost == other.cost && id < other.id); }
  };
  const Forest forest(grid.voxels(), k);
  const auto roots = [&](uint32_t id) {
    const uint32_t voxel = id / kForward;
    return std::pair<int32_t, int32_t>(forest.root(int32_t(voxel)), forest.root(int32_t(voxel + next[id % kForward].step)));
  };
  std::vector<Edge> sorted;
  uint32_t begin = 0, kept = 0;
  for (int64_t b = 0; b < kBuckets; begin = ends.get()[b++]) {
    const uint32_t end = ends.get()[b];
    sorted.clear();
    for (uint32_t i = begin; i < end; ++i) {
      const uint32_t id = order.get()[i];
      if (const auto [a, c] = roots(id); a != c) sorted.push_back({cost(id / kForward, int(id % kForward)), id});
    }
    if (!std::is_sorted(sorted.begin(), sorted.end())) std::sort(sorted.begin(), sorted.end());
    for (const Edge& edge : sorted) {
      const auto [a, c] = roots(edge.id);
      if (a == c) continue;
      if (edge.cost < std::min(forest.threshold(a), forest.threshold(c)))
        forest.merge(a, c, edge.cost);
      else
        order.get()[kept++] = edge.id;  // for the second pass, in this order
    }
  }
  for (uint32_t i = 0; i < kept; ++i) {
    const auto [a, c] = roots(order.get()[i]);
    if (a != c && (forest.size(a) < least || forest.size(c) < least)) forest.merge(a, c, 0);
  }
  const Scratch<int32_t> number(grid.voxels(), -1);
  int32_t count = 0;
  for (int64_t i = 0; i < grid.voxels(); ++i) {
    int32_t& here = number.get()[forest.root(int32_t(i))];
    if (here < 0) here = count++;
    labels[i] = here;
  }
  return count;
}

}  // namespace pix2rep
