// The sweeps over pairs: what each is given, launched with the kernel that serves it.
#pragma once

#include "infonce_masks.cuh"
#include "launch.h"

namespace pix2rep::infonce {

struct SumsTask {
  Operand own, stream;
  LeftOut left_out;
  bool ids, triangle;  // triangle: own and stream are the same rows in the same parts; those below the diagonal mirror those above
  float *own_sums, *stream_sums;  // [stream_parts, G, own.padded], [own_parts, G, stream.padded] or nullptr
  int own_parts, stream_parts, part_blocks, part_tiles;
  Temperature temperature;
  Regime regime;

  __device__ int stream_part(int block) const { return block % stream_parts; }
  __device__ int own_part(int block) const { return block / stream_parts % own_parts; }
  __device__ int group(int block) const { return block / stream_parts / own_parts; }
};

struct OnlineTask {
  Operand own, stream;
  LeftOut left_out;
  bool ids, rescue;  // rescue: only in blocks with a row whose sum in `found` is all but flushed
  Sums found;                  // [parts, G, own.padded]; lse2 is written
};

struct ProductsTask {
  Operand own, stream;
  Weights own_weights, stream_weights;
  LeftOut left_out;
  bool ids;
  float* out;  // [parts, G, own.padded, own.d]
  const float* smallest;  // of Extremes
  int parts, part_tiles, slices;
  Temperature temperature;
  Regime regime;
};

// biased: some rows are invalid, or exp2 needs a shift. listed: single pairs are left out by ids or positives.
void launch_sums(const Launch& launch, const SumsTask& task, bool biased, bool listed);
void launch_online(const Launch& launch, const OnlineTask& task);
// slice: features that a block accumulates, of product_slice.
void launch_products(const Launch& launch, const ProductsTask& task, int slice, bool listed);

inline int product_slice(const Operand& own) { return own.split ? 64 : own.d <= 32 ? 32 : own.d <= 64 ? 64 : own.d <= 128 ? 128 : 256; }

}  // namespace pix2rep::infonce
