// crosscorr on raw memory, free of tensors: pivots, chunks of rows, partial sums in an order that depends on the sizes alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "crosscorr_kernels.h"
#include "isa.h"
#include "scratch.h"

namespace pix2rep {

// [N, d] of any storage and strides; columns are `column_stride` values apart.
struct CrosscorrView {
  char* data;
  int64_t d, row_bytes, column_stride;
  Storage storage;

  int64_t ld() const { return (d + 15) / 16 * 16; }
};

template <class T>
struct CrosscorrMoments {
  T *count, *pivot_x, *pivot_y, *sum_x, *sum_y, *square_x, *square_y, *product;
};

template <class T>
struct CrosscorrGradients {
  const T *sum_x, *sum_y, *square_x, *square_y, *product;  // of the moments
  const T *pivot_x, *pivot_y;
  CrosscorrView x, y;  // gradients to write, contiguous columns; data nullptr: not wanted
};

namespace crosscorr {

constexpr int64_t kPilotRows = 128;

template <class T>
const CrosscorrKernels<T>& kernels() {
  if constexpr (std::is_same_v<T, float>)
    return PIX2REP_PICK(crosscorr_float);
  else
    return PIX2REP_PICK(crosscorr_double);
}

template <class T>
Scratch<T> padded(const T* values, int64_t d, int64_t ld, T scale = 1) {
  Scratch<T> out(ld, T(0));
  for (int64_t i = 0; i < d; ++i) out.get()[i] = scale * values[i];
  return out;
}

// Groups of rows of one view as pointers: into the view where vectors may be loaded from there, else to copies. Rows that take no part are the pivot,
// so that they become 0.
template <class T>
class Groups {
 public:
  Groups(const CrosscorrView& view, const T* pivot)
      : view_(view), pivot_(pivot), copies_(kernels<T>().group * view.ld(), T(0)),
        direct_(view.storage == kStorage<T> && view.column_stride == 1 && view.d == view.ld() &&
                view.row_bytes % int64_t(sizeof(T)) == 0) {}

  const T* const* operator()(int64_t first, int64_t end, const T* weight) {
    for (int64_t r = 0; r < kernels<T>().group; ++r) {
      const int64_t n = first + r;
      const char* row = view_.data + n * view_.row_bytes;
      if (n >= end || (weight && weight[n] == 0)) {
        rows_[r] = pivot_;
      } else if (direct_) {
        rows_[r] = reinterpret_cast<const T*>(row);
        // The next chunk is on its way while this one is multiplied.
        for (int64_t line = 0; line < view_.d * int64_t(sizeof(T)); line += 64) __builtin_prefetch(row + kChunkRows * view_.row_bytes + line);
      } else {
        T* copy = copies_.get() + r * view_.ld();
        kernels<T>().load[int(view_.storage)](row, view_.column_stride, view_.d, copy);
        rows_[r] = copy;
      }
    }
    return rows_;
  }

 private:
  const CrosscorrView& view_;
  const T* pivot_;
  Scratch<T> copies_;
  bool direct_;
  const T* rows_[8];
};

// Row of the i-th pilot: one in each of equal steps, at places within them that follow no pattern of the rows.
inline int64_t pilot_row(int64_t i, int64_t step) { return i * step + ((i * 40503 & 0xffff) * step >> 16); }

// Mean of the pilot rows that take part, 0 when none does; padded.
template <class T>
Scratch<T> pivot(const CrosscorrView& view, const T* weight, int64_t n) {
  const int64_t step = std::max<int64_t>(n / kPilotRows, 1);
  Scratch<T> row(view.ld(), T(0));
  std::vector<double> sum(view.d);
  int64_t count = 0;
  for (int64_t i = 0; i < std::min(n, kPilotRows); ++i) {
    const int64_t at = pilot_row(i, step);
    if (weight && weight[at] == 0) continue;
    ++count;
    kernels<T>().load[int(view.storage)](view.data + at * view.row_bytes, view.column_stride, view.d, row.get());
    for (int64_t j = 0; j < view.d; ++j) sum[j] += row.get()[j];
  }
  for (int64_t j = 0; j < view.d; ++j) row.get()[j] = count ? T(sum[j] / count) : T(0);
  return row;
}

// Partial products: a chunk adds 2 kChunkRows flops to each number, so that four chunks outweigh the reduction; at most 32, within 64 MiB while more
// than four.
inline int64_t partials_of(int64_t chunks, int64_t bytes) {
  const int64_t fitting = (int64_t(64) << 20) / std::max<int64_t>(bytes, 1);
  return std::clamp<int64_t>(std::min(chunks / 4, std::max<int64_t>(fitting, 4)), 1, 32);
}

template <class T>
struct Weights {  // of one group, 0 past the end
  const T* all;
  T buffer[8];

  const T* operator()(int64_t first, int64_t end) {
    if (!all) return nullptr;
    for (int64_t r = 0; r < 8; ++r) buffer[r] = first + r < end ? all[first + r] : T(0);
    return buffer;
  }
};

// Sums over chunks [begin, end): float within one chunk, double across.
template <class T>
void accumulate(const CrosscorrView& x, const CrosscorrView& y, const T* weight, const T* pivot_x, const T* pivot_y, int64_t n, int64_t begin,
                int64_t end, double* sums, T* product) {
  const auto& k = kernels<T>();
  const int64_t lx = x.ld(), ly = y.ld(), both = lx + ly;
  Groups<T> rows_x(x, pivot_x), rows_y(y, pivot_y);
  Weights<T> weights{weight, {}};
  Scratch<T> panels(kChunkRows * both), chunk_sums(2 * both);
  T *sum = chunk_sums.get(), *square = sum + both;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * kChunkRows, last = std::min(n, first + kChunkRows);
    std::fill_n(sum, 2 * both, T(0));
    for (int64_t row = first; row < last; row += k.group) {
      const T* w = weights(row, last);
      k.pack_x(rows_x(row, last, weight), w, pivot_x, row - first, lx, panels.get(), sum, square);
      k.pack_y(rows_y(row, last, weight), w, pivot_y, row - first, ly, panels.get() + kChunkRows * lx, sum + lx, square + lx);
    }
    for (int64_t i = 0; i < 2 * both; ++i) sums[i] += sum[i];
    k.product(panels.get(), panels.get() + kChunkRows * lx, last - first, lx, ly, chunk > begin, product);
  }
}

}  // namespace crosscorr

template <class T, class Parallel>
void crosscorr_forward(const CrosscorrView& x, const CrosscorrView& y, const T* weight, int64_t n, const Parallel& parallel,
                       const CrosscorrMoments<T>& out) {
  using namespace crosscorr;
  const int64_t lx = x.ld(), ly = y.ld(), both = lx + ly;
  const int64_t chunks = (n + kChunkRows - 1) / kChunkRows, partials = partials_of(chunks, lx * ly * int64_t(sizeof(T)));
  const Scratch<T> pivot_x = pivot(x, weight, n), pivot_y = pivot(y, weight, n);
  const Scratch<double> sums(partials * 2 * both, 0.0);
  const Scratch<T> products(partials * lx * ly);
  if (chunks == 0) std::fill_n(products.get(), lx * ly, T(0));
  parallel(partials, [&](int64_t p) {
    accumulate(x, y, weight, pivot_x.get(), pivot_y.get(), n, p * chunks / partials, (p + 1) * chunks / partials, sums.get() + p * 2 * both,
               products.get() + p * lx * ly);
  });
  for (int64_t p = 1; p < partials; ++p)
    for (int64_t i = 0; i < 2 * both; ++i) sums.get()[i] += sums.get()[p * 2 * both + i];
  const auto copy = [&](const double* from, int64_t d, T* to) {
    for (int64_t i = 0; i < d; ++i) to[i] = T(from[i]);
  };
  copy(sums.get(), x.d, out.sum_x), copy(sums.get() + lx, y.d, out.sum_y);
  copy(sums.get() + both, x.d, out.square_x), copy(sums.get() + both + lx, y.d, out.square_y);
  std::copy_n(pivot_x.get(), x.d, out.pivot_x), std::copy_n(pivot_y.get(), y.d, out.pivot_y);
  double count = n;
  if (weight) {
    count = 0;
    for (int64_t i = 0; i < n; ++i) count += weight[i];
  }
  *out.count = T(count);
  constexpr int64_t rows = 16;
  parallel((x.d + rows - 1) / rows, [&](int64_t task) {
    std::vector<double> total(ly);
    for (int64_t i = task * rows; i < std::min(x.d, (task + 1) * rows); ++i) {
      std::fill(total.begin(), total.end(), 0.0);
      for (int64_t p = 0; p < partials; ++p) {
        const T* from = products.get() + (p * lx + i) * ly;
        for (int64_t j = 0; j < ly; ++j) total[j] += from[j];
      }
      copy(total.data(), y.d, out.product + i * y.d);
    }
  });
}

template <class T, class Parallel>
void crosscorr_backward(const CrosscorrView& x, const CrosscorrView& y, const T* weight, int64_t n, const Parallel& parallel,
                        const CrosscorrGradients<T>& in) {
  using namespace crosscorr;
  constexpr int64_t kRows = 64;  // of a chunk, shifted once for both gradients
  const auto& k = kernels<T>();
  const int64_t lx = x.ld(), ly = y.ld();
  const bool need_x = in.x.data, need_y = in.y.data;
  const Scratch<T> pivot_x = padded(in.pivot_x, x.d, lx), pivot_y = padded(in.pivot_y, y.d, ly);
  const Scratch<T> constant_x = padded(in.sum_x, x.d, lx), constant_y = padded(in.sum_y, y.d, ly);
  const Scratch<T> slope_x = padded(in.square_x, x.d, lx, T(2)), slope_y = padded(in.square_y, y.d, ly, T(2));
  const Scratch<T> for_x(need_x ? y.d * lx : 0), for_y(need_y ? x.d * ly : 0);
  if (need_x) k.pack_gradient(in.product, 1, y.d, y.d, x.d, lx, for_x.get());
  if (need_y) k.pack_gradient(in.product, y.d, 1, x.d, y.d, ly, for_y.get());
  const int64_t chunks = (n + kRows - 1) / kRows, tasks = std::min<int64_t>(chunks, 64);
  parallel(tasks, [&](int64_t task) {
    Groups<T> rows_x(x, pivot_x.get()), rows_y(y, pivot_y.get());
    const Scratch<T> u(kRows * lx), v(kRows * ly), out(kRows * std::max(lx, ly));
    T w[kRows];
    for (int64_t chunk = task * chunks / tasks; chunk < (task + 1) * chunks / tasks; ++chunk) {
      const int64_t first = chunk * kRows, last = std::min(n, first + kRows), rows = (last - first + k.group - 1) / k.group * k.group;
      for (int64_t r = 0; r < rows; r += k.group) {
        k.shift(rows_x(first + r, last, weight), pivot_x.get(), lx, u.get() + r * lx);
        k.shift(rows_y(first + r, last, weight), pivot_y.get(), ly, v.get() + r * ly);
      }
      if (weight)
        for (int64_t r = 0; r < rows; ++r) w[r] = first + r < last ? weight[first + r] : T(0);
      const auto write = [&](const CrosscorrView& to, const T* own, const T* other, const Scratch<T>& panels, const Scratch<T>& constant,
                             const Scratch<T>& slope, int64_t d) {
        char* begin = to.data + first * to.row_bytes;
        const bool direct = to.storage == kStorage<T> && to.d == to.ld() && rows == last - first;
        T* into = direct ? reinterpret_cast<T*>(begin) : out.get();
        k.gradient(own, other, panels.get(), constant.get(), slope.get(), weight ? w : nullptr, rows, d, to.ld(), (d + 15) / 16 * 16, into);
        for (int64_t r = 0; !direct && r < last - first; ++r) k.store[int(to.storage)](into + r * to.ld(), to.d, begin + r * to.row_bytes);
      };
      if (need_x) write(in.x, u.get(), v.get(), for_x, constant_x, slope_x, y.d);
      if (need_y) write(in.y, v.get(), u.get(), for_y, constant_y, slope_y, x.d);
    }
  });
}

}  // namespace pix2rep
