// entropy on raw memory, free of tensors: tiles of pixels, each read once, by those of joint.
#pragma once

#include "entropy_kernels.h"
#include "joint_core.h"

namespace pix2rep {

template <class T>
const EntropyKernels<T>& entropy_kernels() {
  if constexpr (std::is_same_v<T, float>)
    return PIX2REP_PICK(entropy_float);
  else
    return PIX2REP_PICK(entropy_double);
}

// `maps` reads and masks, without a radius; softmax is of the kernels here, so its maps are no logits.
template <class T>
struct Entropy {
  Joint<T> maps;
  const EntropyKernels<T>& kernels = entropy_kernels<T>();

  // (entropy.2): h [B, prod(S)], every element is written.
  template <class Parallel>
  void forward(const JointSource<T>& logits, const Parallel& parallel, T* h) const {
    each(parallel, [&](int64_t image, int64_t at, int64_t pixels, int64_t inside, T* x, T* valid, T* line, T*) {
      maps.tile(logits, image, at, pixels, true, x, maps.ld(), valid);
      kernels.entropy(x, maps.ld(), maps.clusters, pixels, valid, line);
      std::copy_n(line, inside, h + image * maps.line.pixels() + at);
    });
  }

  // (entropy.3) from grad_h [B, prod(S)]; every element is written.
  template <class Parallel>
  void backward(const JointSource<T>& logits, const T* grad_h, const Parallel& parallel, const JointSink<T>& out) const {
    each(parallel, [&](int64_t image, int64_t at, int64_t pixels, int64_t inside, T* x, T* valid, T* line, T* powers) {
      const bool all = maps.tile(logits, image, at, pixels, true, x, maps.ld(), valid);
      std::copy_n(grad_h + image * maps.line.pixels() + at, inside, line);
      kernels.gradient(x, maps.ld(), maps.clusters, pixels, line, powers);
      maps.write(x, valid, all, image, at, pixels, out);
    });
  }

 private:
  // f(image, first pixel, pixels of the tile, those inside the image, and scratch of a tile, two lines and kJointStep pixels) for every tile.
  template <class Parallel, class F>
  void each(const Parallel& parallel, const F& f) const {
    maps.over(maps.batch * maps.tiles(), parallel, [&](int64_t begin, int64_t end) {
      const Scratch<T> x(maps.clusters * maps.ld()), valid(maps.width()), line(maps.width(), T(0)), powers(maps.clusters * kJointStep);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t at = t % maps.tiles() * maps.width(), inside = std::min(maps.width(), maps.line.length - at);
        f(t / maps.tiles(), at, Joint<T>::round_up(inside), inside, x.get(), valid.get(), line.get(), powers.get());
      }
    });
  }
};

}  // namespace pix2rep
