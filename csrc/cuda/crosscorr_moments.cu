#include "crosscorr_moments.cuh"

namespace pix2rep::crosscorr {
namespace {

constexpr int64_t kMultiprocessors = 132;  // of an H100 or H200; a constant, so that every device adds in one order

// Tiles by the widths: for 256 by 128 features a view is read twice from L2 at D = 256 and once to D = 128; two blocks of 128 by 128 would read it twice there.
template <class T, class F>
auto with_shape(int64_t d1, int64_t d2, const F& f) {
  if constexpr (sizeof(T) == 4) {
    if (d1 <= 64) return f(Shape<T, 2, 2, 2, 4, 4, 2>());
    return f(Shape<T, 2, 2, 4, 4, 3, 2>());
  } else {
    if (d1 <= 64 && d2 <= 64) return f(Shape<T, 2, 2, 2, 4, 4, 3>());
    if (d1 <= 128) return f(Shape<T, 2, 2, 4, 8, 4, 2>());
    return f(Shape<T, 4, 2, 4, 8, 4, 1>());
  }
}

template <class F>
auto with_form(Form form, const F& f) {
  if (form == Form::float16) return f(Half());
  if (form == Form::bfloat16) return f(BFloat16());
  return f(float());
}

}  // namespace

Tiling moments_tiling(Form form, int64_t d1, int64_t d2) {
  return with_form(form, [&](auto zero) {
    return with_shape<decltype(zero)>(d1, d2, [&](auto shape) {
      using S = decltype(shape);
      const auto tiles = [](int64_t d, int features) { return d > features ? (d + features - 1) / features : 1; };
      // More than two blocks hide no more latency, and each adds a partial sum.
      return Tiling{tiles(d1, S::kFeaturesX), tiles(d2, S::kFeaturesY), kMultiprocessors * (S::kBlocks < 2 ? S::kBlocks : 2)};
    });
  });
}

void launch_moments(const Launch& launch, Form form, const MomentsTask& task) {
  with_form(form, [&](auto zero) {
    with_shape<decltype(zero)>(task.x.d, task.y.d, [&](auto shape) {
      using S = decltype(shape);
      const int64_t blocks = int64_t(task.splits) * task.tiles_x * task.tiles_y;
      const auto kernel = task.weight ? &moments<S, true> : &moments<S, false>;
      launch("crosscorr moments", kernel, blocks, S::kThreads, S::kSharedBytes, task);
    });
  });
}

}  // namespace pix2rep::crosscorr
