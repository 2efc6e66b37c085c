// Rows added to sums and written from a table. Planes become rows, and rows planes, through tiles transposed in registers.
// Additions are in double and in the order of the pixels, so that every instruction set gives the same bits.
#include "pool_kernels.h"

#include "convert.h"

namespace pix2rep {
namespace PIX2REP_ISA {

namespace {

constexpr int kFew = 4;  // channels too few to be turned into rows
constexpr int kDoubles = Simd<double>::width;
#if defined(__AVX512F__)
constexpr int kGroup = 16;  // sums of a run that stay in registers, vectors
#else
constexpr int kGroup = 8;
#endif

typedef float Floats __attribute__((vector_size(PIX2REP_VECTOR_BYTES / 2)));
typedef uint32_t Words __attribute__((vector_size(PIX2REP_VECTOR_BYTES / 2)));
typedef uint16_t Halves __attribute__((vector_size(PIX2REP_VECTOR_BYTES / 4)));

static inline Vec<double> to_double(Floats x) {
#if defined(__AVX512F__)  // gcc 12 takes __builtin_convertvector apart
  return (Vec<double>)_mm512_cvtps_pd((__m256)x);
#elif defined(__AVX2__)
  return (Vec<double>)_mm256_cvtps_pd((__m128)x);
#else
  return __builtin_convertvector(x, Vec<double>);
#endif
}

template <class S>
static inline Vec<double> read(const S* p) {
  if constexpr (std::is_same_v<S, double>) {
    return load(p);
  } else if constexpr (std::is_same_v<S, float>) {
    Floats narrow;
    std::memcpy(&narrow, p, sizeof(narrow));
    return to_double(narrow);
  } else {
    Halves bits;
    std::memcpy(&bits, p, sizeof(bits));
    return to_double(widen_bits<Floats>(__builtin_convertvector(bits, Words), S{}));
  }
}

// Adds N vectors of channels, from `row` on.
template <int N, class S>
static inline void add_run(const S* row, int64_t stride, int count, double* sum) {
  Vec<double> s[N];
#pragma GCC unroll 16
  for (int v = 0; v < N; ++v) s[v] = load(sum + v * kDoubles);
  for (int i = 0; i < count; ++i, row += stride)
#pragma GCC unroll 16
    for (int v = 0; v < N; ++v) s[v] += read(row + v * kDoubles);
#pragma GCC unroll 16
  for (int v = 0; v < N; ++v) store(sum + v * kDoubles, s[v]);
}

template <class S>
void add_rows(const S* rows, int64_t row_stride, const Run* runs, int count, int64_t channels, double* sums, int64_t sums_stride) {
  for (const Run* run = runs; run != runs + count; ++run) {
    const S* row = rows + run->begin * row_stride;
    double* sum = sums + run->region * sums_stride;
    int64_t c = 0;
    for (; c + kGroup * kDoubles <= channels; c += kGroup * kDoubles) add_run<kGroup>(row + c, row_stride, run->count, sum + c);
    if (c + kGroup / 2 * kDoubles <= channels) add_run<kGroup / 2>(row + c, row_stride, run->count, sum + c), c += kGroup / 2 * kDoubles;
    if (c + kGroup / 4 * kDoubles <= channels) add_run<kGroup / 4>(row + c, row_stride, run->count, sum + c), c += kGroup / 4 * kDoubles;
    for (; c + kDoubles <= channels; c += kDoubles) add_run<1>(row + c, row_stride, run->count, sum + c);
    for (; c < channels; ++c) {
      double s = sum[c];
      for (int i = 0; i < run->count; ++i) s += widen(row[i * row_stride + c]);
      sum[c] = s;
    }
  }
}

// Storage moved through lanes of float or double: 16 bits travel in 32 as they are.
template <class S>
using Lane = std::conditional_t<sizeof(S) == 8, double, float>;
typedef uint16_t Packed __attribute__((vector_size(PIX2REP_VECTOR_BYTES / 2)));
typedef uint32_t Unpacked __attribute__((vector_size(PIX2REP_VECTOR_BYTES)));

template <class S>
static inline Vec<Lane<S>> take(const S* p) {
  if constexpr (sizeof(S) > 2) {
    return load(p);
  } else {
    Packed bits;
    std::memcpy(&bits, p, sizeof(bits));
    return (Vec<float>)__builtin_convertvector(bits, Unpacked);
  }
}

template <class S>
static inline void put(S* p, Vec<Lane<S>> v) {
  if constexpr (sizeof(S) > 2) {
    store(p, v);
  } else {
    const Packed bits = __builtin_convertvector((Unpacked)v, Packed);
    std::memcpy(p, &bits, sizeof(bits));
  }
}

// Rows of a tile as float or double, from at most kPlanes planes.
template <class S>
static inline void turn(const S* planes, int64_t stride, int pixels, int64_t channels, Compute<S>* rows) {
  using L = Lane<S>;
  constexpr int W = Simd<L>::width;
  for (int64_t c = 0; c < channels; c += W)
    for (int p = 0; p < pixels; p += W) {
      Vec<L> tile[W];
      const S* from = planes + c * stride + p;
      const int64_t height = channels - c < W ? channels - c : W;
      if (height == W && p + W <= pixels) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) tile[i] = take(from + i * stride);
      } else {
        S some[W * W] = {};
        for (int64_t i = 0; i < height; ++i) std::memcpy(some + i * W, from + i * stride, (pixels - p < W ? pixels - p : W) * sizeof(S));
        for (int i = 0; i < W; ++i) tile[i] = take(some + i * W);
      }
      transpose_tile<L>(tile);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        if constexpr (sizeof(S) == 2) tile[i] = widen_bits<Vec<float>>((Unpacked)tile[i], S{});
        store(rows + (p + i) * kPlanes + c, tile[i]);
      }
    }
}

// Few planes as they are: in lanes along a run, the same ones for every instruction set.
template <class S>
static inline void add_plane(const S* plane, const Run* runs, int count, double* sums, int64_t sums_stride) {
  constexpr int N = 8;
  for (const Run* run = runs; run != runs + count; ++run) {
    const S* p = plane + run->begin;
    double s = sums[run->region * sums_stride];
    int i = 0;
    if (run->count >= 2 * N) {
      double lane[N] = {};
      for (; i + N <= run->count; i += N)
        for (int k = 0; k < N; ++k) lane[k] += widen(p[i + k]);
      s += ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
    }
    for (; i < run->count; ++i) s += widen(p[i]);
    sums[run->region * sums_stride] = s;
  }
}

template <class S>
void add_planes(const S* planes, int64_t plane_stride, int pixels, const Run* runs, int count, int64_t channels, double* sums, int64_t sums_stride) {
  alignas(64) Compute<S> rows[kTile * kPlanes];
  for (int64_t c = 0; c < channels; c += kPlanes) {
    const int64_t some = channels - c < kPlanes ? channels - c : kPlanes;
    if (some <= kFew) {
      for (int64_t i = c; i < channels; ++i) add_plane(planes + i * plane_stride, runs, count, sums + i, sums_stride);
      return;
    }
    turn(planes + c * plane_stride, plane_stride, pixels, some, rows);
    add_rows(rows, kPlanes, runs, count, some, sums + c, sums_stride);
  }
}

template <class T>
void mean(const double* partials, int64_t stride, int64_t many, int64_t count, int64_t channels, T* mean) {
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0;
    for (int64_t k = 0; k < many; ++k) sum += partials[k * stride + c];
    mean[c] = count ? T(sum / double(count)) : T(0);
  }
}

template <class S>
void share(const Compute<S>* grad, int64_t count, int64_t channels, S* row) {
  for (int64_t c = 0; c < channels; ++c) narrow(count ? grad[c] / Compute<S>(count) : Compute<S>(0), row[c]);
}

// `count` copies of `bytes` at `to`, `stride` bytes apart; N vectors at a time.
template <int N>
static inline void repeat(const char* from, int count, char* to, int64_t stride) {
  constexpr int W = PIX2REP_VECTOR_BYTES;
  Vec<float> v[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) std::memcpy(&v[i], from + i * W, W);
  for (int k = 0; k < count; ++k, to += stride)
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) std::memcpy(to + i * W, &v[i], W);
}

template <class S>
void put_rows(const S* table, int64_t table_stride, const Run* runs, int count, int64_t channels, S* rows, int64_t row_stride) {
  constexpr int64_t W = PIX2REP_VECTOR_BYTES;
  const int64_t bytes = channels * int64_t(sizeof(S)), stride = row_stride * int64_t(sizeof(S));
  for (const Run* run = runs; run != runs + count; ++run) {
    const char* from = reinterpret_cast<const char*>(table + run->region * table_stride);
    char* to = reinterpret_cast<char*>(rows + run->begin * row_stride);
    int64_t at = 0;
    for (; at + 8 * W <= bytes; at += 8 * W) repeat<8>(from + at, run->count, to + at, stride);
    for (; at + 2 * W <= bytes; at += 2 * W) repeat<2>(from + at, run->count, to + at, stride);
    for (; at + W <= bytes; at += W) repeat<1>(from + at, run->count, to + at, stride);
    if (at < bytes && bytes >= W)
      repeat<1>(from + bytes - W, run->count, to + bytes - W, stride);  // overlaps what is written already
    else if (at < bytes)
      for (int k = 0; k < run->count; ++k)
        for (int64_t c = 0; c < channels; ++c) std::memcpy(to + k * stride + c * sizeof(S), from + c * sizeof(S), sizeof(S));
  }
}

template <class S>
void put_planes(const S* table, int64_t table_stride, const Run* runs, int count, int64_t channels, S* planes, int64_t plane_stride) {
  using L = Lane<S>;
  constexpr int W = Simd<L>::width;
  const S* rows[kTile];
  int pixels = 0;
  for (const Run* run = runs; run != runs + count; ++run)
    for (int k = 0; k < run->count; ++k) rows[pixels++] = table + run->region * table_stride;
  int64_t c = 0;
  for (; c + W <= channels; c += W)
    for (int p = 0; p < pixels; p += W) {
      Vec<L> tile[W];
      if (p + W <= pixels) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) tile[i] = take(rows[p + i] + c);
        transpose_tile<L>(tile);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) put(planes + (c + i) * plane_stride + p, tile[i]);
        continue;
      }
      for (int i = 0; i < W; ++i)
        for (int k = p; k < pixels; ++k) planes[(c + i) * plane_stride + k] = rows[k][c + i];
    }
  for (; c < channels; ++c)
    for (int p = 0; p < pixels; ++p) planes[c * plane_stride + p] = rows[p][c];
}

template <class S>
constexpr PoolKernels<S> table() {
  return {add_rows<S>, add_planes<S>, mean<Compute<S>>, share<S>, put_rows<S>, put_planes<S>};
}

}  // namespace

extern const PoolKernels<float> pool_float = table<float>();
extern const PoolKernels<double> pool_double = table<double>();
extern const PoolKernels<F16> pool_f16 = table<F16>();
extern const PoolKernels<BF16> pool_bf16 = table<BF16>();

}  // namespace PIX2REP_ISA
}  // namespace pix2rep
