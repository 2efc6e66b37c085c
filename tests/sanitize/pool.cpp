// pool on raw memory against one loop over the pixels in double: (pool.1-3) in both layouts, for every storage type and labels outside the regions.
#include "cpu/pool_core.h"
#include "harness.h"

using namespace pix2rep;
using namespace sanitize;

namespace {

template <class S, class L>
void compare(int64_t batch, int64_t channels, int64_t pixels, int64_t regions, bool last, bool runs, uint64_t seed) {
  using T = Compute<S>;
  Random random(seed);
  Values features(kStorage<S>, batch * channels * pixels);
  Exact<L> labels(batch * pixels);
  Exact<T> upstream(batch * regions * channels);
  for (int64_t i = 0; i < features.count; ++i) features.set(i, random.eighths());
  for (int64_t i = 0; i < labels.size(); ++i) labels[i] = runs && i && random.below(9) ? labels[i - 1] : L(random.below(regions + 3) - (std::is_signed_v<L> ? 2 : 0));
  for (int64_t i = 0; i < upstream.size(); ++i) upstream[i] = T(random.eighths());
  const int64_t stride = last ? channels : pixels;
  const PoolLabels<L> by{labels.get(), pixels, regions};
  struct Result {
    Exact<T> means;
    Exact<int64_t> counts;
    Values grad;
  };
  const auto solve = [&](Threads parallel) {
    Result out{Exact<T>(batch * regions * channels), Exact<int64_t>(batch * regions), Values(kStorage<S>, features.count)};
    const Map<const S> map{reinterpret_cast<const S*>(features.data()), batch, channels, pixels, channels * pixels, stride, last};
    const Map<S> grad{reinterpret_cast<S*>(out.grad.data()), batch, channels, pixels, channels * pixels, stride, last};
    pool_forward<S>(map, by, parallel, out.means.get(), out.counts.get());
    pool_backward<S>(upstream.get(), out.counts.get(), by, parallel, grad);
    return out;
  };
  const Result one = solve({1}), three = solve({3});
  const std::string name = "pool case " + std::to_string(seed);
  equal(name + ", means by 3 threads", three.means, one.means), equal(name + ", grad by 3 threads", three.grad, one.grad);
  if (!kPlainLoops) return;
  std::vector<double> means(size_t(batch * regions * channels)), counts(size_t(batch * regions)), grad(size_t(features.count));
  const auto at = [&](int64_t b, int64_t c, int64_t p) { return b * channels * pixels + (last ? p * channels + c : c * pixels + p); };
  const auto each = [&](const auto& f) {
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t p = 0; p < pixels; ++p) {
        const int64_t label = int64_t(labels[b * pixels + p]);
        if (label >= 0 && label < regions) f(b, p, b * regions + label);
      }
  };
  each([&](int64_t, int64_t, int64_t r) { ++counts[size_t(r)]; });
  each([&](int64_t b, int64_t p, int64_t r) {
    for (int64_t c = 0; c < channels; ++c) {
      means[size_t(r * channels + c)] += features[at(b, c, p)] / counts[size_t(r)];
      grad[size_t(at(b, c, p))] = double(upstream[r * channels + c]) / counts[size_t(r)];
    }
  });
  const double eps = 4 * double(std::numeric_limits<T>::epsilon());
  close(name + ", counts", one.counts, counts, 0), close(name + ", means", one.means, means, 2 * eps);
  close(name + ", grad", one.grad, grad, 2 * (eps + epsilon_of(kStorage<S>)));
}

}  // namespace

PIX2REP_SANITIZE(pool) {
  uint64_t seed = 0;
  for (bool last : {false, true})
    for (bool runs : {false, true}) {
      for (int64_t channels : {1, 3, 16, 17, 33, 70})
        for (int64_t pixels : {1, 31, 255, 257, 700}) {
          compare<float, int64_t>(2, channels, pixels, 5, last, runs, ++seed);
          compare<double, uint8_t>(1, channels, pixels, 9, last, runs, ++seed);
          if (pixels == 257) compare<F16, int32_t>(2, channels, pixels, 1, last, runs, ++seed), compare<BF16, int8_t>(2, channels, pixels, 40, last, runs, ++seed);
        }
      compare<float, int16_t>(2, 5, 9000, 600, last, runs, ++seed);  // chunks, regions without a pixel
      compare<float, int64_t>(0, 5, 9, 3, last, runs, ++seed), compare<float, int64_t>(1, 0, 9, 3, last, runs, ++seed);
      compare<float, int64_t>(1, 5, 9, 0, last, runs, ++seed);
    }
}
