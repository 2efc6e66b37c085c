// entropy on raw memory against loops over pixels in double: (entropy.1-3), with and without a mask, in both layouts, 2D and 3D, axes apart and as one.
#include "cpu/entropy_core.h"
#include "harness.h"
#include "maps.h"

using namespace pix2rep;
using namespace sanitize;

namespace {

struct Shape {
  int64_t batch, clusters, size[3];  // slowest first, 1 in 2D
  int64_t pixels() const { return size[0] * size[1] * size[2]; }
  int64_t count() const { return batch * clusters * pixels(); }
};

template <class T>
void compare(const Shape& s, bool masked, bool last, bool one_axis, uint64_t seed) {
  Random random(seed);
  const int64_t pixels = s.pixels(), K = s.clusters;
  Exact<T> logits(s.count()), upstream(s.batch * pixels);
  Exact<bool> mask(s.batch * pixels);
  for (int64_t i = 0; i < s.count(); ++i) logits[i] = T(4 * random.eighths());
  for (int64_t i = 0; i < upstream.size(); ++i) upstream[i] = T(random.eighths()), mask[i] = !masked || random.below(3) > 0;
  const int64_t line[3] = {1, 1, pixels};
  const Entropy<T> problem{{s.batch, K, 0, true, false, masked ? mask.get() : nullptr, JointLine(one_axis ? line : s.size, 0, false), 0}};
  struct Result {
    Exact<T> h, dl;
  };
  const auto solve = [&](Threads parallel) {
    Result out{Exact<T>(s.batch * pixels), Exact<T>(s.count())};
    const auto from = map_of<T, const char*>(logits, s, last);
    problem.forward(from, parallel, out.h.get());
    problem.backward(from, upstream.get(), parallel, map_of<T, char*>(out.dl, s, last));
    return out;
  };
  const Result one = solve({1}), three = solve({3});
  const std::string name = "entropy case " + std::to_string(seed);
  equal(name + ", h by 3 threads", three.h, one.h), equal(name + ", dl by 3 threads", three.dl, one.dl);

  if (!kPlainLoops) return;
  std::vector<double> h(size_t(upstream.size())), dl(size_t(s.count()));
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t p = 0; p < pixels; ++p) {
      const int64_t pixel = b * pixels + p;
      if (!mask[pixel]) continue;
      const auto at = [&](int64_t k) { return b * K * pixels + (last ? p * K + k : k * pixels + p); };
      double z = 0;
      for (int64_t k = 0; k < K; ++k) z += std::exp(double(logits[at(k)]));
      const auto log_c = [&](int64_t k) { return double(logits[at(k)]) - std::log(z); };
      for (int64_t k = 0; k < K; ++k) h[size_t(pixel)] -= std::exp(log_c(k)) * log_c(k);
      for (int64_t k = 0; k < K; ++k) dl[size_t(at(k))] = -double(upstream[pixel]) * std::exp(log_c(k)) * (log_c(k) + h[size_t(pixel)]);
    }
  // Logits within 16 of each other: K roundings of each sum, of terms up to 16.
  const double eps = double(std::numeric_limits<T>::epsilon()) * 16 * double(K + 16);
  close(name + ", h", one.h, h, eps), close(name + ", dl", one.dl, dl, 2 * eps);
}

}  // namespace

PIX2REP_SANITIZE(entropy) {
  uint64_t seed = 0;
  for (int64_t clusters : {1, 2, 7, 16, 40})
    for (int options = 0; options < 8; ++options) {
      const Shape s{2, clusters, {options % 3 + 1, 5, clusters == 7 ? 67 : 9}};
      compare<float>(s, options & 1, options & 2, options & 4, ++seed);
      if (options % 3 == 0) compare<double>(s, options & 1, options & 2, options & 4, ++seed);
    }
  compare<float>({1, 3, {1, 1, 1}}, false, false, true, ++seed);
  compare<float>({3, 40, {1, 70, 130}}, true, true, true, ++seed);  // several chunks
}
