// lncc on raw memory against loops over every window in double: (lncc.1-7) in 2D and 3D, for several windows, storage types, strides and gradients.
#include "cpu/lncc_core.h"
#include "harness.h"

using namespace pix2rep;
using namespace sanitize;

namespace {

struct Shape {
  int64_t size[5];
  bool solid;
  int64_t count() const { return size[0] * size[1] * size[2] * size[3] * size[4]; }
};

LnccMap map_of(const Values& values, const Shape& s, bool channels_last) {
  LnccMap map{values.data(), values.type, {}};
  int64_t step = 1;
  for (int axis : channels_last ? std::vector<int>{1, 4, 3, 2, 0} : std::vector<int>{4, 3, 2, 1, 0}) map.stride[axis] = step, step *= s.size[axis];
  return map;
}

template <class T>
void compare(const Shape& s, int64_t window, Storage type, bool last, int wanted, uint64_t seed) {
  constexpr double kEps = 1e-3;
  const Storage compute = sizeof(T) == 8 ? Storage::f64 : Storage::f32;
  Random random(seed);
  Values i(type, s.count()), j(type, s.count()), upstream(compute, s.count());
  for (int64_t p = 0; p < s.count(); ++p) i.set(p, random.eighths()), j.set(p, random.below(2) ? i[p] : random.eighths()), upstream.set(p, random.eighths());
  struct Result {
    Values cc, di, dj;
  };
  LnccProblem problem{map_of(i, s, last), map_of(j, s, last), map_of(upstream, s, false), {}, s.solid, window, kEps};
  std::copy(s.size, s.size + 5, problem.size);
  const auto solve = [&](Threads parallel) {
    Result out{Values(compute, s.count()), Values(type, wanted & 1 ? s.count() : 0), Values(type, wanted & 2 ? s.count() : 0)};
    lncc_forward<T>(problem, map_of(out.cc, s, false), parallel);
    lncc_backward<T>(problem, wanted & 1 ? map_of(out.di, s, false) : LnccMap{}, wanted & 2 ? map_of(out.dj, s, false) : LnccMap{}, parallel);
    return out;
  };
  const Result one = solve({1}), three = solve({3});
  const std::string name = "lncc case " + std::to_string(seed);
  equal(name + ", cc by 3 threads", three.cc, one.cc), equal(name + ", di by 3 threads", three.di, one.di), equal(name + ", dj by 3 threads", three.dj, one.dj);

  if (!kPlainLoops) return;
  const LnccMap plain = map_of(upstream, s, false);
  std::vector<double> cc(size_t(s.count())), di(cc.size()), dj(cc.size());
  const double n = std::pow(double(window), s.solid ? 3 : 2);
  const int64_t radius = window / 2, deep = s.solid ? radius : 0;
  for (int64_t b = 0; b < s.size[0]; ++b)
    for (int64_t c = 0; c < s.size[1]; ++c)
      for (int64_t z = 0; z < s.size[2]; ++z)
        for (int64_t y = 0; y < s.size[3]; ++y)
          for (int64_t x = 0; x < s.size[4]; ++x) {
            const auto each = [&](const auto& f) {
              for (int64_t zz = std::max<int64_t>(z - deep, 0); zz <= std::min(z + deep, s.size[2] - 1); ++zz)
                for (int64_t yy = std::max<int64_t>(y - radius, 0); yy <= std::min(y + radius, s.size[3] - 1); ++yy)
                  for (int64_t xx = std::max<int64_t>(x - radius, 0); xx <= std::min(x + radius, s.size[4] - 1); ++xx) {
                    const auto at = [&](const LnccMap& m) { return b * m.stride[0] + c * m.stride[1] + zz * m.stride[2] + yy * m.stride[3] + xx * m.stride[4]; };
                    f(i[at(problem.i)], j[at(problem.j)], size_t(at(plain)));
                  }
            };
            double si = 0, sj = 0, sii = 0, sjj = 0, sij = 0;
            each([&](double p, double q, size_t) { si += p, sj += q, sii += p * p, sjj += q * q, sij += p * q; });
            const double covariance = sij - si * sj / n, first = sii - si * si / n, second = sjj - sj * sj / n;
            const double cov = std::max(covariance, kEps), v = std::max(first, kEps), w = std::max(second, kEps);
            const size_t here = size_t(b * plain.stride[0] + c * plain.stride[1] + z * plain.stride[2] + y * plain.stride[3] + x);
            cc[here] = cov * cov / (v * w);
            const double g = upstream[int64_t(here)];
            const double a = covariance > kEps ? 2 * g * cov / (v * w) : 0;
            const double bi = first > kEps ? -g * cov * cov / (v * v * w) : 0, bj = second > kEps ? -g * cov * cov / (v * w * w) : 0;
            each([&](double p, double q, size_t at) {
              di[at] += a * (q - sj / n) + 2 * bi * (p - si / n);
              dj[at] += a * (p - si / n) + 2 * bj * (q - sj / n);
            });
          }
  double largest = 1;
  for (size_t p = 0; p < di.size(); ++p) largest = std::max({largest, std::abs(di[p]), std::abs(dj[p])});
  const double eps = 1000 * double(std::numeric_limits<T>::epsilon());  // sums of up to 729 terms, over variances of a tenth
  close(name + ", cc", one.cc, cc, eps);
  if (wanted & 1) close(name + ", di", one.di, di, largest * (eps + epsilon_of(type)));
  if (wanted & 2) close(name + ", dj", one.dj, dj, largest * (eps + epsilon_of(type)));
}

}  // namespace

PIX2REP_SANITIZE(lncc) {
  uint64_t seed = 0;
  for (int64_t window : {1, 3, 5, 9})
    for (int wanted : {1, 2, 3}) {
      for (int64_t width : {1, 7, 16, 33}) {
        compare<float>({{2, 1, 1, 9, width}, false}, window, Storage::f32, false, wanted, ++seed);
        compare<double>({{1, 2, 1, width, 20}, false}, window, Storage::f64, true, wanted, ++seed);
      }
      compare<float>({{1, 2, 5, 6, 7}, true}, window, Storage::f32, wanted == 2, wanted, ++seed);
      compare<float>({{1, 2, 1, 20, 30}, false}, window, wanted == 1 ? Storage::f16 : Storage::bf16, true, wanted, ++seed);
    }
  compare<float>({{1, 1, 1, 40, 530}, false}, 3, Storage::f32, false, 3, ++seed);  // boxes beside and below each other
  compare<float>({{1, 1, 1, 1, 1}, true}, 5, Storage::f32, false, 3, ++seed);
}
