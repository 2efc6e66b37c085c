// pix2rep_native::crosscorr and crosscorr_backward on the GPU. Nothing is read back, every reduction has a fixed order; beyond the results the forward pass
// takes partial moments of at most 64 MiB (or of one range, where that is more), the backward pass two copies of gP.
//
//   crosscorr_rows        pivots, weights, the sum of the ranges, gP as an operand
//   crosscorr_moments     one sweep over ranges of rows and tiles of D1 x D2 (crosscorr.1-5)
//   crosscorr_gradients   both gradients from one read (crosscorr.6); crosscorr_streamed one at a time, for float32 and wide views
//
// Views of one 16-bit dtype are multiplied in it, the pivot rounded to it, with float32 sums; others in float32 as two tf32 parts, whatever
// torch.get_float32_matmul_precision() says: on an A100 that takes three eighths of the time of plain float32 arithmetic, on an H100 at most three quarters.
#include <algorithm>
#include <optional>
#include <tuple>

#include "../common/crosscorr_arguments.h"
#include "../common/math.h"
#include "crosscorr_rows.cuh"
#include "crosscorr_sweeps.h"
#include "storage.h"

namespace pix2rep::crosscorr {
namespace {

using Optional = std::optional<Tensor>;

constexpr int64_t kPartBytes = int64_t(64) << 20;
constexpr int64_t kFewestSteps = 4;  // of a range: less would not pay for its partial sum

Storage storage_of(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  return type == ScalarType::Half ? Storage::float16 : type == ScalarType::BFloat16 ? Storage::bfloat16 : Storage::float32;
}

// What both passes are told, and the form of the arithmetic that it takes.
struct Arguments : CrosscorrArguments {
  Form form;

  Arguments(const Tensor& x, const Tensor& y, const Optional& weight) : CrosscorrArguments(x, y, weight) {
    expect_storage(x, "x"), expect_storage(y, "y");
    PIX2REP_EXPECT(d1 < (1 << 30), "x", "have less than 2^30 features", d1);
    PIX2REP_EXPECT(d2 < (1 << 30), "y", "have less than 2^30 features", d2);
    const ScalarType of_x = x.scalar_type();
    form = of_x != y.scalar_type() || of_x == ScalarType::Float ? Form::float32 : of_x == ScalarType::Half ? Form::float16 : Form::bfloat16;
  }

  bool narrow() const { return form != Form::float32; }
  View view(const Tensor& t) const {
    const int64_t size = t.element_size(), whole = 16 / size;
    const bool aligned = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0 && t.stride(0) % whole == 0 && t.size(1) % whole == 0;
    return {t.data_ptr(), t.stride(0), t.stride(1), int(t.size(1)), storage_of(t), aligned && t.stride(1) == 1 && (narrow() || size == 4)};
  }
  const float* weights() const { return weight ? data<float>(*weight) : nullptr; }
  int64_t weight_stride() const { return weight ? weight->stride(0) : 0; }

  Tensor make(std::initializer_list<int64_t> shape, ScalarType type = ScalarType::Float) const {
    return torch::stable::new_empty(x, std::vector<int64_t>(shape), type);
  }
};

using Moments = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Moments forward(Tensor x, Tensor y, Optional weight) {
  const Arguments in(x, y, weight);
  const Launch launch({{x, "x"}, {y, "y"}, {weight, "weight"}});
  const int64_t n = in.n, d1 = in.d1, d2 = in.d2;
  const auto make = [&](std::initializer_list<int64_t> shape) { return in.make(shape); };
  const Moments out{make({}), make({d1}), make({d2}), make({d1}), make({d2}), make({d1}), make({d2}), make({d1, d2})};
  const auto& [count, pivot_x, pivot_y, sum_x, sum_y, square_x, square_y, product] = out;

  const Tensor sums = in.make({kParts}, ScalarType::Double), largest = make({kParts});
  if (weight)
    launch("crosscorr weights", &survey, kParts, kThreads, kThreads * 12, in.weights(), 1, n, 0, in.weight_stride(), mutable_data<double>(sums),
           mutable_data<float>(largest));
  const Tensor rounded_x = in.make({in.narrow() ? d1 : 0}, x.scalar_type()), rounded_y = in.make({in.narrow() ? d2 : 0}, y.scalar_type());
  launch("crosscorr pivots", &pivots, ceil_div(d1, 32) + ceil_div(d2, 32), kThreads, kThreads * 8,
         PivotsTask{in.view(x), in.view(y), in.weights(), in.weight_stride(), n, mutable_data<float>(pivot_x), mutable_data<float>(pivot_y),
                    in.narrow() ? rounded_x.data_ptr() : nullptr, in.narrow() ? rounded_y.data_ptr() : nullptr, int(ceil_div(d1, 32))});

  const Tiling tiling = moments_tiling(in.form, d1, d2);
  const int64_t size = d1 * d2 + 2 * (d1 + d2), all = ceil_div(n, kStepRows);
  const int64_t most = std::min({tiling.blocks / (tiling.tiles_x * tiling.tiles_y), kPartBytes / 4 / std::max<int64_t>(size, 1), all / kFewestSteps});
  const int64_t steps = std::max<int64_t>(1, ceil_div(all, std::max<int64_t>(1, most))), splits = std::max<int64_t>(1, ceil_div(all, steps));
  const Tensor parts = make({splits, size});
  launch_moments(launch, in.form,
                 {in.view(x), in.view(y), in.weights(), in.weight_stride(), data<float>(largest), in.narrow() ? rounded_x.data_ptr() : pivot_x.data_ptr(),
                  in.narrow() ? rounded_y.data_ptr() : pivot_y.data_ptr(), mutable_data<float>(parts), n, int(splits), int(steps), int(tiling.tiles_x),
                  int(tiling.tiles_y)});
  launch("crosscorr add", &add_parts, std::max<int64_t>(1, ceil_div(size, 32)), kThreads, kThreads * 8,
         AddTask{data<float>(parts), size, splits, mutable_data<float>(product), mutable_data<float>(sum_x), mutable_data<float>(sum_y),
                 mutable_data<float>(square_x), mutable_data<float>(square_y), mutable_data<float>(count), d1, d2, n,
                 weight ? data<double>(sums) : nullptr});
  return out;
}

// One view's side of the backward pass, and the memory that it is in.
struct Prepared {
  Side side;
  Tensor grad, operand, vectors;
};

std::tuple<Tensor, Tensor> backward(Tensor grad_sum_x, Tensor grad_sum_y, Tensor grad_square_x, Tensor grad_square_y, Tensor grad_product, Tensor x,
                                    Tensor y, Optional weight, Tensor pivot_x, Tensor pivot_y, bool need_x, bool need_y) {
  const Arguments in(x, y, weight);
  const int64_t n = in.n, d1 = in.d1, d2 = in.d2;
  const CrosscorrUpstream up(in, grad_sum_x, grad_sum_y, grad_square_x, grad_square_y, grad_product, pivot_x, pivot_y);
  Prepared sides[2];
  for (int k = 0; k < 2; ++k) {
    const Tensor& like = k ? y : x;
    sides[k].grad = torch::stable::new_empty(like, (k ? need_y : need_x) ? std::vector<int64_t>{n, like.size(1)} : std::vector<int64_t>{0});
  }
  const bool wanted[] = {need_x && d1 > 0, need_y && d2 > 0};
  if (n == 0 || !(wanted[0] || wanted[1])) return {sides[0].grad, sides[1].grad};

  const Launch launch({{x, "x"}, {y, "y"}, {weight, "weight"}, {grad_sum_x, "grad_sum_x"}, {grad_sum_y, "grad_sum_y"}, {grad_square_x, "grad_square_x"},
                       {grad_square_y, "grad_square_y"}, {grad_product, "grad_product"}, {pivot_x, "pivot_x"}, {pivot_y, "pivot_y"}});
  GradientsTask task{};
  task.weight = in.weights(), task.weight_stride = in.weight_stride(), task.n = n;
  task.top = in.form == Form::float16 ? 16384.0f : 1.0f;  // the range that float16 has above and below
  const Tensor largest = in.make({kParts});
  if (in.narrow()) {
    launch("crosscorr largest", &survey, kParts, kThreads, kThreads * 12, data<float>(up.product), d1, d2, up.product.stride(0), up.product.stride(1),
           static_cast<double*>(nullptr), mutable_data<float>(largest));
    task.largest = data<float>(largest);
  }
  const auto padded = [](int64_t d) { return int(std::max<int64_t>(1, ceil_div(d, kGradientFeatures)) * kGradientFeatures); };
  for (int k = 0; k < 2; ++k) {
    const Tensor &own = k ? y : x, &other = k ? x : y;
    Prepared& made = sides[k];
    const int padded_own = padded(own.size(1)), padded_other = padded(other.size(1));
    made.operand = in.make({padded_own, padded_other}, in.narrow() ? own.scalar_type() : ScalarType::Float);
    made.vectors = in.make({2, padded_own});
    float* const constant = mutable_data<float>(made.vectors);
    const OperandTask operand{data<float>(up.product),
                              up.product.stride(k),
                              up.product.stride(1 - k),
                              int(own.size(1)),
                              int(other.size(1)),
                              padded_own,
                              padded_other,
                              data<float>(k ? up.sum_y : up.sum_x),
                              data<float>(k ? up.square_y : up.square_x),
                              data<float>(k ? up.pivot_y : up.pivot_x),
                              data<float>(k ? up.pivot_x : up.pivot_y),
                              task.largest,
                              task.top,
                              made.operand.data_ptr(),
                              constant,
                              constant + padded_own};
    const auto kernel = in.form == Form::float16 ? &prepare<Half> : in.form == Form::bfloat16 ? &prepare<BFloat16> : &prepare<float>;
    launch("crosscorr operand", kernel, ceil_div(padded_own, kWarps), kThreads, 0, operand);
    made.side = {in.view(own), padded_own, made.operand.data_ptr(), constant, constant + padded_own, data<float>(k ? up.pivot_y : up.pivot_x),
                 wanted[k] ? made.grad.data_ptr() : nullptr};
  }
  task.x = sides[0].side, task.y = sides[1].side;
  launch_gradients(launch, in.form, task);
  return {sides[0].grad, sides[1].grad};
}

}  // namespace
}  // namespace pix2rep::crosscorr

PIX2REP_CUDA_LIBRARY(m) {
  m.impl("crosscorr", TORCH_BOX(&pix2rep::crosscorr::forward));
  m.impl("crosscorr_backward", TORCH_BOX(&pix2rep::crosscorr::backward));
}
