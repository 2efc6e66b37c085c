// joint on raw memory against loops over pixels and displacements in double: (joint.1-3), (joint.6-7) with and without a mask, logits, collapse, 2D and 3D.
#include "cpu/joint_core.h"
#include "harness.h"
#include "maps.h"

using namespace pix2rep;
using namespace sanitize;

namespace {

struct Shape {
  int64_t batch, clusters, size[3];  // slowest first, 1 in 2D
  bool solid;
  int64_t pixels() const { return size[0] * size[1] * size[2]; }
  int64_t count() const { return batch * clusters * pixels(); }
};

template <class T>
void compare(const Shape& s, int64_t radius, bool collapsed, bool logits, bool masked, bool last, uint64_t seed) {
  Random random(seed);
  const int64_t pixels = s.pixels(), K = s.clusters;
  Exact<T> maps[2] = {Exact<T>(s.count()), Exact<T>(s.count())};
  Exact<bool> mask(s.batch * pixels);
  for (const Exact<T>& map : maps)
    for (int64_t i = 0; i < s.count(); ++i) map[i] = T(logits ? random.eighths() : random.uniform(0, 1));
  for (int64_t i = 0; i < mask.size(); ++i) mask[i] = !masked || random.below(3) > 0;
  const int64_t side = 2 * radius + 1, places = collapsed ? 1 : side * side * (s.solid ? side : 1);
  Exact<T> upstream(places * K * K);
  for (int64_t i = 0; i < upstream.size(); ++i) upstream[i] = T(random.eighths());
  const Joint<T> problem{s.batch, K, radius, collapsed, logits, masked ? mask.get() : nullptr, JointLine(s.size, radius, radius > 0 && !collapsed), s.solid ? 0 : 1};
  struct Result {
    Exact<T> sums, da, db;
  };
  const auto solve = [&](Threads parallel) {
    Result out{Exact<T>(places * K * K), Exact<T>(s.count()), Exact<T>(s.count())};
    std::fill_n(out.sums.get(), out.sums.size(), T(0));
    const auto a = map_of<T, const char*>(maps[0], s, last), b = map_of<T, const char*>(maps[1], s, false);
    const auto da = map_of<T, char*>(out.da, s, last), db = map_of<T, char*>(out.db, s, false);
    problem.forward(a, b, parallel, out.sums.get());
    problem.backward(a, b, upstream.get(), parallel, &da, &db);
    return out;
  };
  const Result one = solve({1}), three = solve({3});
  const std::string name = "joint case " + std::to_string(seed);
  equal(name + ", sums by 3 threads", three.sums, one.sums);
  equal(name + ", da by 3 threads", three.da, one.da), equal(name + ", db by 3 threads", three.db, one.db);

  if (!kPlainLoops) return;
  const auto at = [&](bool is_last, int64_t b, int64_t p, int64_t k) { return b * K * pixels + (is_last ? p * K + k : k * pixels + p); };
  std::vector<double> probability[2], grad[2], sums(size_t(places * K * K));
  for (int m = 0; m < 2; ++m) {
    probability[m].resize(size_t(s.count())), grad[m].resize(size_t(s.count()));  // [b][p][k]
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t p = 0; p < pixels; ++p) {
        double* to = probability[m].data() + (b * pixels + p) * K;
        double total = 0;
        for (int64_t k = 0; k < K; ++k) to[k] = double(maps[m][at(m == 0 && last, b, p, k)]), to[k] = logits ? std::exp(to[k]) : to[k], total += to[k];
        for (int64_t k = 0; k < K && logits; ++k) to[k] /= total;
      }
  }
  const int64_t deep = s.solid ? radius : 0;
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t z = 0; z < s.size[0]; ++z)
      for (int64_t y = 0; y < s.size[1]; ++y)
        for (int64_t x = 0; x < s.size[2]; ++x)
          for (int64_t dz = -deep; dz <= deep; ++dz)
            for (int64_t dy = -radius; dy <= radius; ++dy)
              for (int64_t dx = -radius; dx <= radius; ++dx) {
                if (z + dz < 0 || z + dz >= s.size[0] || y + dy < 0 || y + dy >= s.size[1] || x + dx < 0 || x + dx >= s.size[2]) continue;
                const int64_t p = b * pixels + (z * s.size[1] + y) * s.size[2] + x, moved = p + (dz * s.size[1] + dy) * s.size[2] + dx;
                if (!mask[p] || !mask[moved]) continue;
                const int64_t place = collapsed ? 0 : ((dz + deep) * side + dy + radius) * side + dx + radius;
                for (int64_t k = 0; k < K; ++k)
                  for (int64_t l = 0; l < K; ++l) {
                    const double g = double(upstream[(place * K + k) * K + l]);
                    sums[size_t((place * K + k) * K + l)] += probability[0][size_t(moved * K + k)] * probability[1][size_t(p * K + l)];
                    grad[0][size_t(moved * K + k)] += g * probability[1][size_t(p * K + l)];
                    grad[1][size_t(p * K + l)] += g * probability[0][size_t(moved * K + k)];
                  }
              }
  const double eps = double(std::numeric_limits<T>::epsilon()), terms = double(s.batch * pixels * (collapsed ? side * side * side : 1));
  close(name + ", sums", one.sums, sums, 4 * eps * (terms + 16) * (logits ? 1 : 2));
  for (int m = 0; m < 2; ++m) {
    std::vector<double> want(size_t(s.count()));
    for (int64_t p = 0; p < s.batch * pixels; ++p) {
      const double *g = grad[m].data() + p * K, *from = probability[m].data() + p * K;
      double dot = 0;
      for (int64_t k = 0; k < K; ++k) dot += from[k] * g[k];
      for (int64_t k = 0; k < K; ++k) want[size_t(at(m == 0 && last, p / pixels, p % pixels, k))] = logits ? from[k] * (g[k] - dot) : g[k];
    }
    close(name + (m ? ", db" : ", da"), m ? one.db : one.da, want, 16 * eps * double(side * side * side) * double(K + 16));
  }
}

}  // namespace

PIX2REP_SANITIZE(joint) {
  uint64_t seed = 0;
  for (int64_t clusters : {1, 2, 7, 10, 33})
    for (int options = 0; options < 16; ++options)
      for (int64_t radius : {0, 1, 3}) {
        const bool solid = options & 8;
        const int64_t side = 2 * radius + 1;
        if (clusters * clusters * side * side * (solid ? side : 1) > 10000) continue;  // seconds of plain loops
        const Shape s{2, clusters, {solid ? 3 : 1, 5 + options % 3, clusters == 7 ? 67 : 9}, solid};
        compare<float>(s, radius, options & 1, options & 2, options & 4, options % 3 == 0, ++seed);
        if (options % 5 == 0) compare<double>(s, radius, options & 1, options & 2, options & 4, options % 3 == 0, ++seed);
      }
  compare<float>({1, 3, {1, 1, 1}, false}, 2, false, true, false, false, ++seed), compare<float>({1, 3, {1, 1, 1}, false}, 2, true, true, true, false, ++seed);
  compare<float>({3, 5, {1, 70, 130}, false}, 0, true, true, false, true, ++seed);  // several chunks
  compare<float>({1, 4, {1, 70, 90}, false}, 2, true, true, true, false, ++seed);
}
