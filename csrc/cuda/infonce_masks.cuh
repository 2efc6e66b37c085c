// Pairs that are no negatives: -inf in place of their similarity, so that every use of it is exactly 0.
#pragma once

#include "infonce_tiles.cuh"

namespace pix2rep::infonce {

// Which candidates are no negatives by their place: own == stream, |own - stream| == span, or those that a list names.
struct LeftOut {
  bool diagonal, apart;
  int span;
  const int64_t* own_positive;     // [G, own.count]: stream == own_positive[own]
  const int64_t* stream_positive;  // [G, stream.count]: own == stream_positive[stream]

  // Whether the blocks that begin at own and stream hold such pairs, lists aside.
  __device__ __forceinline__ bool touch(int own, int own_rows, int stream, int stream_rows) const {
    const int low = stream - own - own_rows, high = stream - own + stream_rows;  // both outside
    const bool near = diagonal && low < 0 && high > 0;
    const bool far = apart && ((low < span && high > span) || (low < -span && high > -span));
    return near || far;
  }

  // Leaves them out of a product whose first column is `ahead` of its first row.
  template <int kM>
  __device__ __forceinline__ void apply(Product<kM>& s, int ahead) const {
    const int far = apart ? span : 0, near = diagonal ? 0 : far;
    each<kM>(s, 0, 0, [&](float& x, int row, int column) {
      const int d = ahead + column - row;
      if (d == near || d == far || d == -far) x = -INFINITY;
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
    const int64_t *own_list = left_out.own_positive, *stream_list = left_out.stream_positive;
    if (own_list || stream_list) {
      by_list<kM>(s, kOwnRows ? own_list : stream_list, kOwnRows ? own_count : stream_count, kOwnRows ? stream_list : own_list,
                  kOwnRows ? stream_count : own_count, row, column);
    }
    if (own_ids) by_id<kM>(s, (kOwnRows ? own_ids : stream_ids) + row, (kOwnRows ? stream_ids : own_ids) + column);
  }

 private:
  template <int kM>
  __device__ __forceinline__ static void by_list(Product<kM>& s, const int64_t* of_rows, int rows, const int64_t* of_columns, int columns, int row, int column) {
    // Indices fit into 32 bits; one that lies outside names nothing, and no other word is -1 or as large.
    const auto listed = [](const int64_t* list, int count, int k) {
      const int64_t named = list && k < count ? list[k] : -1;
      return named >= 0 && named < INT32_MAX ? int(named) : -1;
    };
    int of_row[kM][2];
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) of_row[m][h] = listed(of_rows, rows, row + 16 * m + 8 * h);
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int c = column + 8 * n + i, of_column = listed(of_columns, columns, c);
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h)
            s[m][n][2 * h + i] = of_row[m][h] == c || of_column == row + 16 * m + 8 * h ? -INFINITY : s[m][n][2 * h + i];
      }
  }

  // All 64 bits are compared: a lane has few rows and columns, and numbers of 32 bits would take a sort.
  template <int kM>
  __device__ __forceinline__ static void by_id(Product<kM>& s, const int64_t* of_rows, const int64_t* of_columns) {
    int64_t id[kM][2];
#pragma unroll
    for (int m = 0; m < kM; ++m) id[m][0] = of_rows[16 * m], id[m][1] = of_rows[16 * m + 8];
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      const int64_t first = of_columns[8 * n], second = of_columns[8 * n + 1];
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][n][i] = id[m][i / 2] == (i % 2 ? second : first) ? -INFINITY : s[m][n][i];
    }
  }
};

}  // namespace pix2rep::infonce
