// Pairs that are no negatives: -inf in place of their similarity, so that every use of it is exactly 0.
#pragma once

#include "infonce_tiles.cuh"

namespace pix2rep::infonce {

constexpr int kNowhere = INT32_MIN / 2;

// Which candidates are no negatives by their place: stream - own is one of three numbers, or a list names the pair.
struct LeftOut {
  int ahead[3];                    // 0, span, -span, or kNowhere
  const int64_t* own_positive;     // [G, own.count]: stream == own_positive[own]
  const int64_t* stream_positive;  // [G, stream.count]: own == stream_positive[stream]

  // Whether a product of rows by columns holds such pairs, lists aside, when its first column is `first` ahead of its first row.
  template <int kRows, int kCount>
  __device__ __forceinline__ bool touch(int first) const {
    bool found = false;
#pragma unroll
    for (int k = 0; k < 3; ++k) found |= unsigned(ahead[k] - first + kRows - 1) < unsigned(kRows + kCount - 1);
    return found;
  }

  // Leaves them out of a product whose first column is `first` ahead of its first row.
  template <int kM>
  __device__ __forceinline__ void apply(Product<kM>& s, int first) const {
    device::rarely();
    const int left[3] = {ahead[0] - first, ahead[1] - first, ahead[2] - first};
    each<kM>(s, 0, 0, [&](float& x, int row, int column) {
      if (left[0] == column - row || left[1] == column - row || left[2] == column - row) x = -INFINITY;
    });
  }
};

// Lists and ids of one group, and what its rows count. Product rows are own rows when kOwnRows, else stream rows.
struct Masks {
  LeftOut left_out;
  const int64_t *own_ids, *stream_ids;  // nullptr where ids play no part
  int own_count, stream_count;

  __device__ __forceinline__ Masks(const LeftOut& all, const Operand& own, const Operand& stream, int64_t group, int64_t stream_group, bool ids)
      : left_out(all),
        own_ids(ids ? own.ids + group * own.padded : nullptr),
        stream_ids(ids ? stream.ids + stream_group * stream.padded : nullptr),
        own_count(int(own.count)),
        stream_count(int(stream.count)) {
    if (all.own_positive) left_out.own_positive += group * own.count;
    if (all.stream_positive) left_out.stream_positive += group * stream.count;
  }

  template <bool kOwnRows, int kM>
  __device__ __forceinline__ void apply(Product<kM>& s, int row, int column) const {
    const int64_t* of_rows = kOwnRows ? left_out.own_positive : left_out.stream_positive;
    const int64_t* of_columns = kOwnRows ? left_out.stream_positive : left_out.own_positive;
    if (of_rows) by_row<kM>(s, of_rows, kOwnRows ? own_count : stream_count, row, column);
    if (of_columns) by_column<kM>(s, of_columns, kOwnRows ? stream_count : own_count, row, column);
    if (own_ids) by_id<kM>(s, (kOwnRows ? own_ids : stream_ids) + row, (kOwnRows ? stream_ids : own_ids) + column);
  }

 private:
  // What the k-th of a list names; indices fit into 32 bits, and one that does not names nothing.
  __device__ __forceinline__ static int named(const int64_t* list, int count, int k) {
    const int64_t found = k < count ? list[k] : -1;
    return found >= 0 && found < INT32_MAX ? int(found) : -1;
  }

  template <int kM>
  __device__ __forceinline__ static void by_row(Product<kM>& s, const int64_t* list, int count, int row, int column) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int ahead = named(list, count, row + 16 * m + 8 * h) - column;
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) s[m][n][2 * h + i] = ahead == 8 * n + i ? -INFINITY : s[m][n][2 * h + i];
      }
  }

  template <int kM>
  __device__ __forceinline__ static void by_column(Product<kM>& s, const int64_t* list, int count, int row, int column) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int ahead = named(list, count, column + 8 * n + i) - row;
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h) s[m][n][2 * h + i] = ahead == 16 * m + 8 * h ? -INFINITY : s[m][n][2 * h + i];
      }
  }

  // All 64 bits are compared: a lane has few rows and columns, and numbers of 32 bits would take a sort.
  template <int kM>
  __device__ __forceinline__ static void by_id(Product<kM>& s, const int64_t* of_rows, const int64_t* of_columns) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const int64_t id[2] = {of_rows[16 * m], of_rows[16 * m + 8]};
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][n][i] = id[i / 2] == of_columns[8 * n + i % 2] ? -INFINITY : s[m][n][i];
    }
  }
};

}  // namespace pix2rep::infonce
