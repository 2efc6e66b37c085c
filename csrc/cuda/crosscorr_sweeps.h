// The sweeps over the rows: what each is given, launched with the kernel that serves it.
#pragma once

#include "crosscorr_tiles.cuh"
#include "launch.h"

namespace pix2rep::crosscorr {

constexpr int kStepRows = 32;  // rows that a block multiplies at once in the moments

// How the products take their operands: views of one 16-bit dtype in it, others in float32.
enum class Form { float16, bfloat16, float32 };

struct MomentsTask {
  View x, y;
  const float* weight;  // nullptr: all 1
  int64_t weight_stride;
  const float* largest;         // [kParts] of the weights
  const void *pivot_x, *pivot_y;  // [d] in the form's type
  float* parts;                 // [splits, D1 D2 + 2 (D1 + D2)]: product, sums and squares of x and y in the order of the op
  int64_t n;
  int splits, steps;            // of kStepRows rows, to a split
  int tiles_x, tiles_y;
};

struct Tiling {
  int64_t tiles_x, tiles_y, blocks;  // blocks: of all splits, one wave
};
Tiling moments_tiling(Form form, int64_t d1, int64_t d2);
void launch_moments(const Launch& launch, Form form, const MomentsTask& task);

// One view and its gradient w (constant + slope t + unit other @ g^T); t is the view's value, in float32 less its pivot.
struct Side {
  View view;
  int padded;  // features of the operand g
  const void* g;  // [padded, padded of the other], scaled by 1 / unit
  const float *constant, *slope;  // [padded]
  const float* pivot;
  void* grad;  // [N, d] in the view's dtype; nullptr: not wanted
};

struct GradientsTask {
  Side x, y;
  const float* weight;
  int64_t weight_stride;
  const float* largest;  // [kParts] of the product's gradient, nullptr in float32
  float top;             // the largest entry of g is in [top, 2 top)
  int64_t n;
};

// Features to which an operand is padded.
constexpr int kGradientFeatures = 64;
void launch_gradients(const Launch& launch, Form form, const GradientsTask& task);

}  // namespace pix2rep::crosscorr
