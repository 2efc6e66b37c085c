// joint on raw memory, free of tensors: pixels in tiles, each read, turned into probabilities and multiplied while it is in cache.
//
// With a radius the other map's probabilities go through a scratch, a few images at a time: box-filtered when collapsed; else with margins of zeros,
// so that a displacement is a shift of the pointer. Sums run over chunks of tiles that depend on sizes alone, and chunks are added in order, in double.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "joint_kernels.h"
#include "warp_core.h"

namespace pix2rep {

constexpr int64_t kTileBytes = int64_t(64) << 10;     // of probabilities of one map
constexpr int64_t kScratchBytes = int64_t(4) << 20;   // of probabilities of a few images, one at least
constexpr int64_t kSumBytes = int64_t(512) << 10;     // of the sums that one task keeps, over displacements
constexpr int64_t kMaxChunks = 64, kChunkPixels = 4096, kFlush = 32;  // kFlush: tiles between float and double sums

template <class T>
const JointKernels<T>& joint_kernels() {
  if constexpr (std::is_same_v<T, float>)
    return PIX2REP_PICK(joint_float);
  else
    return PIX2REP_PICK(joint_double);
}

// A map of any storage type and strides (in bytes, spatial axes slowest first), read or written as T in planes: `count` pixels a stride apart.
template <class T, class Pointer>
struct JointMap {
  Pointer data;
  int64_t batch_stride, channel_stride, stride[3];
  void (*run)(Pointer at, int64_t channel_stride, int64_t pixel_stride, int64_t channels, int64_t count, T* planes, int64_t ld);
};
template <class T>
using JointSource = JointMap<T, const char*>;
template <class T>
using JointSink = JointMap<T, char*>;

// The pixels of an image along one line, each axis padded by its reach when displacements are to be shifts of that line.
struct JointLine {
  int64_t size[3], reach[3];  // slowest axis first; reach is the radius, at most size - 1
  int64_t pitch[3];           // from one slice, row, pixel to the next
  int64_t length, margin;     // from the first pixel to past the last; zeros needed on either side

  JointLine(const int64_t (&extent)[3], int64_t radius, bool padded) {
    for (int axis = 0; axis < 3; ++axis) size[axis] = extent[axis], reach[axis] = std::min(radius, std::max<int64_t>(extent[axis] - 1, 0));
    const int64_t gap[3] = {padded ? reach[0] : 0, padded ? reach[1] : 0, padded ? reach[2] : 0};
    pitch[2] = 1, pitch[1] = size[2] + gap[2], pitch[0] = pitch[1] * (size[1] + gap[1]);
    length = size[0] * size[1] * size[2] == 0 ? 0 : (size[0] - 1) * pitch[0] + (size[1] - 1) * pitch[1] + size[2];
    margin = gap[0] * pitch[0] + gap[1] * pitch[1] + gap[2];
  }
  int64_t pixels() const { return size[0] * size[1] * size[2]; }

  // f(z, y, x, position, count) for the runs of pixels in [begin, end).
  template <class F>
  void runs(int64_t begin, int64_t end, const F& f) const {
    for (int64_t at = begin; at < end;) {
      const int64_t z = at / pitch[0], y = at % pitch[0] / pitch[1], x = at % pitch[1];
      if (y >= size[1]) {
        at = (z + 1) * pitch[0];
      } else if (x >= size[2]) {
        at += pitch[1] - x;
      } else {
        const int64_t count = std::min(size[2] - x, end - at);
        f(z, y, x, at, count);
        at += count;
      }
    }
  }
};

// One call. mask is [B, *S] bytes, nullptr where absent.
template <class T>
struct Joint {
  using Source = JointSource<T>;
  int64_t batch, clusters, radius;
  bool collapsed, logits;
  const bool* mask;
  JointLine line;
  int64_t outer_axis;  // the first spatial axis of the caller: 1 in 2D
  const JointKernels<T>& kernels = joint_kernels<T>();

  int64_t width() const {  // pixels of a tile
    const int64_t wanted = kTileBytes / int64_t(sizeof(T)) / std::max<int64_t>(clusters, 1) / kJointStep * kJointStep;
    return std::clamp<int64_t>(wanted, kJointStep, std::min<int64_t>(1024, (line.length + kJointStep - 1) / kJointStep * kJointStep));
  }
  int64_t tiles() const { return (line.length + width() - 1) / width(); }  // of an image
  int64_t ld() const { return width() + 16; }  // a cache line more, or planes a power of two apart share cache sets
  int64_t squared() const { return clusters * clusters; }

  // Masked probabilities (joint.1) of positions [begin, begin + count) of one image; `valid` is 1 on pixels that count. Whether all do.
  bool tile(const Source& map, int64_t image, int64_t begin, int64_t count, bool probabilities, T* out, int64_t ld, T* valid) const {
    const int64_t end = std::min(begin + count, line.length);
    const bool* const kept = mask ? mask + image * line.pixels() : nullptr;
    int64_t read = 0, held = 0;
    line.runs(begin, end, [&](int64_t, int64_t, int64_t, int64_t, int64_t run) { read += run; });
    if (read < count) {
      std::fill_n(valid, count, T(0));
      for (int64_t k = 0; k < clusters; ++k) std::fill_n(out + k * ld, count, T(0));
    }
    line.runs(begin, end, [&](int64_t z, int64_t y, int64_t x, int64_t at, int64_t run) {
      const char* from = map.data + image * map.batch_stride + z * map.stride[0] + y * map.stride[1] + x * map.stride[2];
      if (probabilities) map.run(from, map.channel_stride, map.stride[2], clusters, run, out + at - begin, ld);
      T* const to = valid + at - begin;
      if (!kept) {
        std::fill_n(to, run, T(1)), held += run;
        return;
      }
      const bool* flags = kept + (z * line.size[1] + y) * line.size[2] + x;
      for (int64_t i = 0; i < run; ++i) to[i] = T(flags[i]);
      held += std::count(flags, flags + run, true);
    });
    if (!probabilities) return held == count;
    if (logits) kernels.softmax(out, ld, clusters, count);
    if (held < count) kernels.keep(out, ld, clusters, count, valid);
    return held == count;
  }

  static int64_t round_up(int64_t count) { return (count + kJointStep - 1) / kJointStep * kJointStep; }

  // f(begin, end) over chunks of `count` tiles.
  template <class Parallel, class F>
  void over(int64_t count, const Parallel& parallel, const F& f) const {
    const int64_t chunks = std::clamp<int64_t>(count * width() / kChunkPixels, 1, 4 * kMaxChunks);
    parallel(chunks, [&](int64_t chunk) { f(count * chunk / chunks, count * (chunk + 1) / chunks); });
  }

  // A gradient of positions [at, at + pixels), exactly 0 where they do not count, to where it belongs.
  void write(T* gradient, const T* valid, bool all, int64_t image, int64_t at, int64_t pixels, const JointSink<T>& out) const {
    if (!all) kernels.keep(gradient, ld(), clusters, pixels, valid);
    line.runs(at, std::min(at + pixels, line.length), [&](int64_t z, int64_t y, int64_t x, int64_t position, int64_t run) {
      char* to = out.data + image * out.batch_stride + z * out.stride[0] + y * out.stride[1] + x * out.stride[2];
      out.run(to, out.channel_stride, out.stride[2], clusters, run, gradient + position - at, ld());
    });
  }

  // Images whose scratch is filled at a time; without a radius there is none.
  int64_t group() const {
    if (radius == 0) return std::max<int64_t>(batch, 1);
    return std::clamp<int64_t>(kScratchBytes / std::max<int64_t>(clusters * line.length * int64_t(sizeof(T)), 1), 1, std::max<int64_t>(batch, 1));
  }
  int64_t plane() const { return (2 * line.margin + line.length + 2 * kJointStep - 1) / kJointStep * kJointStep + width() + 16; }

  // Scratch for group() images, its margins and the ends of its planes zero.
  Scratch<T> scratch() const { return Scratch<T>(group() * clusters * plane(), T(0)); }

  template <class Parallel>
  void fill(const Source& map, int64_t first, int64_t count, const Parallel& parallel, T* out) const {
    parallel(count * tiles(), [&](int64_t task) {
      const int64_t image = task / tiles(), begin = task % tiles() * width();
      const Scratch<T> valid(width());
      tile(map, first + image, begin, width(), true, out + image * clusters * plane() + line.margin + begin, plane(), valid.get());
    });
    if (collapsed) parallel(count * clusters, [&](int64_t task) { box(out + task * plane()); });
  }

  // (joint.3) box_T of one plane, axis by axis through strips in cache.
  void box(T* plane) const {
    for (int axis = 0; axis < 3; ++axis) {
      const int64_t reach = line.reach[axis], n = line.size[axis], pitch = line.pitch[axis];
      if (reach == 0) continue;
      const int64_t strip = axis == 2 ? 1 : std::min(pitch, kJointStep), window = 2 * reach + 1;
      const Scratch<T> x((n + window) * strip + kJointStep), sums(n * strip + kJointStep);
      for (int64_t outer = 0; outer < line.pixels() / (n * pitch); ++outer)
        for (int64_t begin = 0; begin < pitch; begin += strip) {
          T* const from = plane + outer * n * pitch + begin;
          const int64_t used = std::min(strip, pitch - begin);
          std::fill_n(x.get(), (n + window) * strip + kJointStep, T(0));
          const int64_t lines = pitch == 1 ? 1 : n, entries = pitch == 1 ? n : used;
          for (int64_t i = 0; i < lines; ++i) std::copy_n(from + i * pitch, entries, x.get() + (i + reach) * strip);
          kernels.window_sums(x.get(), n * strip, strip, window, sums.get());
          for (int64_t i = 0; i < lines; ++i) std::copy_n(sums.get() + i * strip, entries, from + i * pitch);
        }
    }
  }

  // Displacements inside the reach: place in the result, and shift along the line. Collapsed, they are one.
  struct Displacement {
    int64_t index, shift;
  };
  std::vector<Displacement> displacements() const {
    if (collapsed || radius == 0) return {{0, 0}};
    std::vector<Displacement> out;
    const int64_t side = 2 * radius + 1, outer = outer_axis == 0 ? radius : 0;
    for (int64_t z = -std::min(outer, line.reach[0]); z <= std::min(outer, line.reach[0]); ++z)
      for (int64_t y = -line.reach[1]; y <= line.reach[1]; ++y)
        for (int64_t x = -line.reach[2]; x <= line.reach[2]; ++x)
          out.push_back({((z + outer) * side + y + radius) * side + x + radius, z * line.pitch[0] + y * line.pitch[1] + x});
    return out;
  }

  // S [count, K, K], zero on entry.
  template <class Parallel>
  void forward(const Source& a, const Source& b, const Parallel& parallel, T* sums) const {
    constexpr int64_t lanes = 16 / sizeof(T);
    const std::vector<Displacement> shifts = displacements();
    const int64_t each = std::clamp<int64_t>(kSumBytes / std::max<int64_t>(squared() * 16, 1), 1, int64_t(shifts.size()));
    const int64_t slices = (int64_t(shifts.size()) + each - 1) / each, entries = int64_t(shifts.size()) * squared();
    const Scratch<T> other = radius ? scratch() : Scratch<T>(0);
    std::vector<double> total(entries), partial;
    for (int64_t first = 0; first < batch; first += group()) {
      const int64_t images = std::min(group(), batch - first), count = images * tiles();
      if (radius) fill(a, first, images, parallel, other.get());
      // Partial sums take a quarter of the inputs at most.
      const int64_t affordable = count * width() * clusters * int64_t(sizeof(T)) / 2 / (entries * int64_t(sizeof(double)));
      const int64_t chunks = std::clamp<int64_t>(std::min(affordable, count * width() / kChunkPixels), 1, kMaxChunks);
      partial.assign(chunks * entries, 0);
      parallel(chunks * slices, [&](int64_t task) {
        const int64_t chunk = task / slices, begin = task % slices * each, end = std::min<int64_t>(begin + each, int64_t(shifts.size()));
        const Scratch<T> x(radius ? 0 : clusters * ld()), y(clusters * ld()), valid(width()), held((end - begin) * squared() * lanes, T(0));
        double* const out = partial.data() + chunk * entries + begin * squared();
        const int64_t last = count * (chunk + 1) / chunks;
        int64_t waiting = 0;
        for (int64_t t = count * chunk / chunks; t < last; ++t) {
          const int64_t image = t / tiles(), at = t % tiles() * width(), pixels = std::min(width(), round_up(line.length - at));
          tile(b, first + image, at, pixels, true, y.get(), ld(), valid.get());
          if (radius == 0) tile(a, first + image, at, pixels, true, x.get(), ld(), valid.get());
          const T* const from = radius ? other.get() + image * clusters * plane() + line.margin + at : x.get();
          for (int64_t d = begin; d < end; ++d)
            kernels.gram(from + shifts[d].shift, radius ? plane() : ld(), y.get(), ld(), clusters, pixels, held.get() + (d - begin) * squared() * lanes);
          if (++waiting < kFlush && t + 1 < last) continue;
          waiting = 0;
          for (int64_t i = 0; i < (end - begin) * squared(); ++i)
            for (int64_t j = 0; j < lanes; ++j) out[i] += double(held.get()[i * lanes + j]), held.get()[i * lanes + j] = 0;
        }
      });
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        for (int64_t i = 0; i < entries; ++i) total[i] += partial[chunk * entries + i];
    }
    for (size_t d = 0; d < shifts.size(); ++d)
      for (int64_t i = 0; i < squared(); ++i) sums[shifts[d].index * squared() + i] = T(total[d * squared() + i]);
  }

  // (joint.6-7) with grad_sums [count, K, K]; nullptr for a gradient that is not needed. Every element is written.
  template <class Parallel>
  void backward(const Source& a, const Source& b, const T* grad_sums, const Parallel& parallel, const JointSink<T>* grad_a, const JointSink<T>* grad_b) const {
    const std::vector<Displacement> shifts = displacements();
    const Scratch<T> straight(int64_t(shifts.size()) * squared()), transposed(int64_t(shifts.size()) * squared());
    for (size_t d = 0; d < shifts.size(); ++d)
      for (int64_t k = 0; k < clusters; ++k)
        for (int64_t l = 0; l < clusters; ++l) {
          const T g = grad_sums[shifts[d].index * squared() + k * clusters + l];
          straight.get()[d * squared() + k * clusters + l] = g, transposed.get()[d * squared() + l * clusters + k] = g;
        }
    if (radius == 0) return at_once(a, b, straight.get(), transposed.get(), parallel, grad_a, grad_b);
    const Scratch<T> other = scratch();
    if (grad_a) side(a, b, straight.get(), shifts, -1, other.get(), parallel, *grad_a);
    if (grad_b) side(b, a, transposed.get(), shifts, 1, other.get(), parallel, *grad_b);
  }

 private:
  void finish(T* gradient, const T* probabilities, const T* valid, bool all, int64_t image, int64_t at, int64_t pixels, const JointSink<T>& out) const {
    if (logits) kernels.softmax_gradient(probabilities, ld(), gradient, ld(), clusters, pixels);
    write(gradient, valid, all, image, at, pixels, out);
  }

  template <class Parallel>
  void at_once(const Source& a, const Source& b, const T* g, const T* transposed, const Parallel& parallel, const JointSink<T>* grad_a,
               const JointSink<T>* grad_b) const {
    over(batch * tiles(), parallel, [&](int64_t begin, int64_t end) {
      const Scratch<T> x(clusters * ld()), y(clusters * ld()), gradient(clusters * ld()), valid(width());
      for (int64_t t = begin; t < end; ++t) {
        const int64_t image = t / tiles(), at = t % tiles() * width(), pixels = std::min(width(), round_up(line.length - at));
        tile(a, image, at, pixels, true, x.get(), ld(), valid.get());
        const bool all = tile(b, image, at, pixels, true, y.get(), ld(), valid.get());
        if (grad_a) {
          kernels.mix(g, y.get(), ld(), clusters, pixels, gradient.get(), ld(), false);
          finish(gradient.get(), x.get(), valid.get(), all, image, at, pixels, *grad_a);
        }
        if (grad_b) {
          kernels.mix(transposed, x.get(), ld(), clusters, pixels, gradient.get(), ld(), false);
          finish(gradient.get(), y.get(), valid.get(), all, image, at, pixels, *grad_b);
        }
      }
    });
  }

  // Gradient of `own`, from the other map's probabilities in the scratch.
  template <class Parallel>
  void side(const Source& own, const Source& other, const T* g, const std::vector<Displacement>& shifts, int64_t sign, T* probabilities,
            const Parallel& parallel, const JointSink<T>& out) const {
    for (int64_t first = 0; first < batch; first += group()) {
      const int64_t images = std::min(group(), batch - first);
      fill(other, first, images, parallel, probabilities);
      over(images * tiles(), parallel, [&](int64_t begin, int64_t end) {
        const Scratch<T> x(clusters * ld()), gradient(clusters * ld()), valid(width());
        for (int64_t t = begin; t < end; ++t) {
          const int64_t image = t / tiles(), at = t % tiles() * width(), pixels = std::min(width(), round_up(line.length - at));
          const bool all = tile(own, first + image, at, pixels, logits, x.get(), ld(), valid.get());
          const T* const from = probabilities + image * clusters * plane() + line.margin + at;
          for (size_t d = 0; d < shifts.size(); ++d)
            kernels.mix(g + d * squared(), from + sign * shifts[d].shift, plane(), clusters, pixels, gradient.get(), ld(), d > 0);
          finish(gradient.get(), x.get(), valid.get(), all, first + image, at, pixels, out);
        }
      });
    }
  }
};

}  // namespace pix2rep
