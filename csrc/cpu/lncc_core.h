// lncc on raw memory, free of tensors. A task is a box of one map: it streams through the planes, and through the rows of each, and keeps
//
//   the pixels of a window's planes (2D: of the box), converted, 0 outside the image;
//   in 3D the parts of a window's rows; for the gradient the sums of a window's rows and, in 3D, of a window's planes.
//
// What lies around the box its neighbours compute again. Windows are summed tap by tap, so that no pixel depends on how a map was cut: the bits are the
// same for any number of threads.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "isa.h"
#include "lncc_kernels.h"
#include "scratch.h"

namespace pix2rep {

constexpr int64_t kLnccBytes = int64_t(768) << 10;  // of buffers a thread fills, as far as the window allows: within a usual L2 cache
constexpr int64_t kLnccColumns = 512;               // that a box has at most
constexpr int64_t kLnccNarrow = 128;                // columns that a box is not cut below for the cache,
constexpr int64_t kLnccLeast = 8;                   // nor rows or planes below

// [B, C, D, H, W], D = 1 in 2D; strides in values.
struct LnccMap {
  char* data;
  Storage storage;
  int64_t stride[5];

  char* at(const int64_t* channel, int64_t z, int64_t y, int64_t x) const {
    return data + (channel[0] * stride[0] + channel[1] * stride[1] + z * stride[2] + y * stride[3] + x * stride[4]) * kBytes[int(storage)];
  }
};

struct LnccProblem {
  LnccMap i, j, grad_cc;  // grad_cc: backward alone
  int64_t size[5];
  bool solid;  // 3D
  int64_t window;
  double eps;
};

struct LnccBox {
  int64_t channel[2], first[3], size[3];  // z, y, x
};

// Sizes and places of a task's buffers; `reach`, how many radii around the box it sees, is 1 forward and 2 backward.
template <class T>
struct LnccPlan {
  int64_t taps[3], radius[3], halo[3], reach, rows, planes, line;
  int64_t parts, sums, stack, merged, weights, grad, out, end;  // in values; pixels come first

  LnccPlan(const LnccProblem& p, const int64_t* box, int64_t reach) : reach(reach) {
    for (int a = 0; a < 3; ++a) {
      radius[a] = a == 0 && !p.solid ? 0 : std::min(p.window / 2, p.size[2 + a] - 1);  // beyond it lies no pixel of the image
      halo[a] = reach * radius[a], taps[a] = 2 * radius[a] + 1;
    }
    constexpr int64_t W = 64 / int64_t(sizeof(T));  // of the widest vector, which may end beyond the line's last value
    line = (box[2] + 2 * halo[2] + 2 * W - 1) / W * W;
    if (line % (4 * W) == 0) line += W;  // lines that are a power of two apart share cache sets
    rows = box[1] + 2 * halo[1];
    planes = taps[0];
    parts = planes * rows * 2 * line;
    sums = parts + (p.solid ? taps[1] * 5 * line : 0);
    stack = sums + (reach == 2 ? taps[1] * 7 * line : 0);
    merged = stack + (reach == 2 && p.solid ? taps[0] * box[1] * 7 * line : 0);
    weights = merged + 5 * line;
    out = weights + 5 * line;
    grad = out + 7 * line;
    end = grad + line;
  }
};

template <class T>
const LnccKernels<T>& lncc_kernels() {
  if constexpr (std::is_same_v<T, float>) return PIX2REP_PICK(lncc_float);
  if constexpr (std::is_same_v<T, double>) return PIX2REP_PICK(lncc_double);
}

template <class T>
class LnccSweep {
 public:
  LnccSweep(const LnccProblem& problem, const int64_t* largest, int64_t reach)
      : p_(problem), kernels_(lncc_kernels<T>()), plan_(problem, largest, reach), memory_(plan_.end, T(0)), eps_(T(problem.eps)),
        slots_(std::max(plan_.taps[0], plan_.taps[1])) {
    T count = 1, k = T(problem.window);
    for (int a = problem.solid ? 0 : 1; a < 3; ++a, count *= k) {
      const int64_t taps = plan_.taps[a];
      for (int64_t t = 0; t < taps; ++t) steps_[a].push_back(1 / T(t + 1)), weights_[a].push_back(count * T(t) / T(t + 1));
      axis_[a] = {taps, steps_[a].data(), weights_[a].data(), T(taps) / k, count * T(taps) * (k - T(taps)) / k};
    }
  }

  // (lncc.4) of a box into cc, a contiguous map.
  void forward(const LnccBox& box, const LnccMap& cc) {
    open(box);
    for (int64_t z = first(0) - radius(0); z < end(0) + radius(0); ++z) {
      read_plane(z);
      const int64_t centre = z - radius(0);
      if (centre < first(0)) continue;
      parts_end_ = first(1) - radius(1);
      for (int64_t y = first(1); y < end(1); ++y) {
        kernels_.score(parts_of_row(centre, y, box.size[2] + 2 * radius(2)), axis_[2], eps_, box.size[2], plan_.line, at(plan_.out));
        kernels_.store[int(cc.storage)](at(plan_.out), box.size[2], cc.at(box.channel, centre, y, first(2)));
      }
    }
  }

  // (lncc.9) of a box into grad_i and, where it has memory, grad_j.
  void backward(const LnccBox& box, const LnccMap& grad_i, const LnccMap& grad_j) {
    open(box);
    const bool both = grad_j.data != nullptr;
    const int64_t line = plan_.line, columns = box.size[2];
    const auto finish = [&](int64_t z, int64_t y) {
      kernels_.store[int(grad_i.storage)](at(plan_.out) + 2 * line, columns, grad_i.at(box.channel, z, y, first(2)));
      if (both) kernels_.store[int(grad_j.storage)](at(plan_.out) + 6 * line, columns, grad_j.at(box.channel, z, y, first(2)));
    };
    for (int64_t z = first(0) - 2 * radius(0); z < end(0) + 2 * radius(0); ++z) {
      read_plane(z);
      const int64_t centre = z - radius(0), done = centre - radius(0);
      if (centre < first(0) - radius(0)) continue;
      const bool exists = 0 <= centre && centre < p_.size[2];
      if (!exists) std::memset(stacked(centre, first(1)), 0, size_t(7 * line * box.size[1]) * sizeof(T));
      parts_end_ = first(1) - 2 * radius(1);
      for (int64_t y = first(1) - radius(1); exists && y < end(1) + radius(1); ++y) {
        sum_row(box, centre, y, both);
        const int64_t row = y - radius(1);
        if (row < first(1)) continue;
        for (int64_t t = 0; t < plan_.taps[1]; ++t) slots_[t] = slot(plan_.sums, 7, row - radius(1) + t);
        const T* seen = p_.solid ? nullptr : pixels(centre, row) + plan_.halo[2];
        kernels_.gather(slots_.data(), plan_.taps[1], seen, both, columns, line, p_.solid ? stacked(centre, row) : at(plan_.out));
        if (!p_.solid) finish(centre, row);
      }
      if (!p_.solid || done < first(0)) continue;
      for (int64_t y = first(1); y < end(1); ++y) {
        for (int64_t t = 0; t < plan_.taps[0]; ++t) slots_[t] = stacked(done - radius(0) + t, y);
        kernels_.gather(slots_.data(), plan_.taps[0], pixels(done, y) + plan_.halo[2], both, columns, line, at(plan_.out));
        finish(done, y);
      }
    }
  }

 private:
  int64_t radius(int axis) const { return plan_.radius[axis]; }
  int64_t first(int axis) const { return box_->first[axis]; }
  int64_t end(int axis) const { return box_->first[axis] + box_->size[axis]; }
  T* at(int64_t offset) const { return memory_.get() + offset; }

  // Row y of a ring of as many slots as a window has rows.
  T* slot(int64_t ring, int64_t lines, int64_t y) const {
    return at(ring) + (y - (first(1) - plan_.halo[1])) % plan_.taps[1] * lines * plan_.line;
  }
  T* stacked(int64_t z, int64_t y) const {
    return at(plan_.stack) + ((z - (first(0) - plan_.halo[0])) % plan_.taps[0] * box_->size[1] + y - first(1)) * 7 * plan_.line;
  }
  T* pixels(int64_t z, int64_t y) const {
    const int64_t plane = (z - (first(0) - plan_.halo[0])) % plan_.planes;
    return at(0) + (plane * plan_.rows + y - (first(1) - plan_.halo[1])) * 2 * plan_.line;
  }

  void open(const LnccBox& box) { box_ = &box; }

  // A row of `map` from column `from` on, 0 outside the image.
  void read(const LnccMap& map, int64_t z, int64_t y, int64_t from, int64_t count, T* to) const {
    const int64_t width = p_.size[4], left = std::clamp<int64_t>(-from, 0, count), right = std::clamp<int64_t>(width - from, left, count);
    std::fill(to, to + left, T(0));
    if (right > left) kernels_.load[int(map.storage)](map.at(box_->channel, z, y, from + left), map.stride[4], right - left, to + left);
    std::fill(to + right, to + count, T(0));
  }

  void read_plane(int64_t z) {
    const int64_t columns = box_->size[2] + 2 * plan_.halo[2];
    for (int64_t y = first(1) - plan_.halo[1]; y < end(1) + plan_.halo[1]; ++y) {
      T* row = pixels(z, y);
      if (z < 0 || z >= p_.size[2] || y < 0 || y >= p_.size[3]) {
        std::fill(row, row + 2 * plan_.line, T(0));
        continue;
      }
      read(p_.i, z, y, first(2) - plan_.halo[2], columns, row);
      read(p_.j, z, y, first(2) - plan_.halo[2], columns, row + plan_.line);
    }
  }

  // (lncc.8) down to the parts of row y of plane z, each a column of the windows; rows come in ascending order, `parts_end_` is the next.
  const T* parts_of_row(int64_t z, int64_t y, int64_t columns) {
    if (p_.solid) {
      for (; parts_end_ <= y + radius(1); ++parts_end_) {
        for (int64_t t = 0; t < plan_.taps[0]; ++t) slots_[t] = pixels(z - radius(0) + t, parts_end_);
        kernels_.pixels(slots_.data(), axis_[0], columns, plan_.line, slot(plan_.parts, 5, parts_end_));
      }
    }
    for (int64_t t = 0; t < plan_.taps[1]; ++t) slots_[t] = p_.solid ? slot(plan_.parts, 5, y - radius(1) + t) : pixels(z, y - radius(1) + t);
    (p_.solid ? kernels_.merge : kernels_.pixels)(slots_.data(), axis_[1], columns, plan_.line, at(plan_.merged));
    return at(plan_.merged);
  }

  // The windows of one row, summed along it.
  void sum_row(const LnccBox& box, int64_t z, int64_t y, bool both) {
    const int64_t line = plan_.line, windows = box.size[2] + 2 * radius(2), from = first(2) - radius(2);
    T* const to = slot(plan_.sums, 7, y);
    if (y < 0 || y >= p_.size[3]) {
      std::fill(to, to + 7 * line, T(0));
      return;
    }
    const T* parts = parts_of_row(z, y, windows + 2 * radius(2));
    T *const weights = at(plan_.weights), *const grad = at(plan_.grad);
    read(p_.grad_cc, z, y, from, windows, grad);
    kernels_.weigh(parts, axis_[2], eps_, grad, both, windows, line, weights);
    const int64_t left = std::clamp<int64_t>(-from, 0, windows), right = std::clamp<int64_t>(p_.size[4] - from, left, windows);
    for (int64_t q = 0; q < 5; ++q) {
      std::fill(weights + q * line, weights + q * line + left, T(0));
      std::fill(weights + q * line + right, weights + q * line + windows, T(0));
    }
    kernels_.spread(weights, plan_.taps[2], both, box.size[2], line, to);
  }

  const LnccProblem& p_;
  const LnccKernels<T>& kernels_;
  const LnccPlan<T> plan_;
  const Scratch<T> memory_;
  const T eps_;
  std::vector<T> steps_[3], weights_[3];
  LnccAxis<T> axis_[3] = {};
  std::vector<const T*> slots_;
  const LnccBox* box_ = nullptr;
  int64_t parts_end_ = 0;
};

// The sizes of a box: whole planes where they fit in the cache, and enough boxes for the threads.
template <class T>
void lncc_boxes(const LnccProblem& p, int64_t reach, int64_t workers, int64_t* box) {
  const auto share = [&](int axis, int64_t pieces) { return (p.size[2 + axis] + pieces - 1) / pieces; };
  const auto pieces = [&](int axis) { return share(axis, box[axis]); };
  const auto cut = [&](int axis) { box[axis] = std::min(share(axis, pieces(axis) + 1), box[axis] - 1); };
  std::copy(p.size + 2, p.size + 5, box);
  box[2] = share(2, (box[2] + kLnccColumns - 1) / kLnccColumns);
  const auto cuttable = [&](int axis) { return box[axis] > (axis == 2 ? kLnccNarrow : kLnccLeast); };
  while ((cuttable(1) || cuttable(2)) && LnccPlan<T>(p, box, reach).end * int64_t(sizeof(T)) > kLnccBytes)
    cut(cuttable(2) && (box[2] > box[1] || !cuttable(1)) ? 2 : 1);
  const int64_t least = kLnccLeast + 2 * reach * (p.window / 2);
  for (int axis : {1, 0})
    while (workers > 1 && p.size[0] * p.size[1] * pieces(0) * pieces(1) * pieces(2) < 2 * workers && box[axis] > least) cut(axis);
}

// f(sweep, box) for every box of the problem.
template <class T, class Parallel, class F>
void lncc_tasks(const LnccProblem& p, int64_t reach, const Parallel& parallel, const F& f) {
  int64_t largest[3], count = p.size[0] * p.size[1], pieces[3];
  lncc_boxes<T>(p, reach, parallel.workers(), largest);
  for (int a = 0; a < 3; ++a) count *= pieces[a] = (p.size[2 + a] + largest[a] - 1) / largest[a];
  const int64_t chunks = std::min<int64_t>(count, parallel.workers());
  parallel(chunks, [&](int64_t chunk) {
    LnccSweep<T> sweep(p, largest, reach);
    for (int64_t task = count * chunk / chunks; task < count * (chunk + 1) / chunks; ++task) {
      LnccBox box;
      int64_t rest = task / p.size[1];
      // Channels go fastest: where they are last in memory they share its lines.
      box.channel[1] = task % p.size[1];
      for (int a = 2; a >= 0; --a) {
        box.first[a] = rest % pieces[a] * largest[a], rest /= pieces[a];
        box.size[a] = std::min(largest[a], p.size[2 + a] - box.first[a]);
      }
      box.channel[0] = rest;
      f(sweep, box);
    }
  });
}

template <class T, class Parallel>
void lncc_forward(const LnccProblem& p, const LnccMap& cc, const Parallel& parallel) {
  lncc_tasks<T>(p, 1, parallel, [&](LnccSweep<T>& sweep, const LnccBox& box) { sweep.forward(box, cc); });
}

// A result without memory is not asked for.
template <class T, class Parallel>
void lncc_backward(LnccProblem p, LnccMap grad_i, LnccMap grad_j, const Parallel& parallel) {
  if (!grad_i.data && !grad_j.data) return;
  if (!grad_i.data) std::swap(p.i, p.j), std::swap(grad_i, grad_j);
  lncc_tasks<T>(p, 2, parallel, [&](LnccSweep<T>& sweep, const LnccBox& box) { sweep.backward(box, grad_i, grad_j); });
}

}  // namespace pix2rep
