// Arguments of infonce that every C++ backend checks alike, so that no kernel can read out of bounds.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>
#include <utility>

#include "check.h"
#include "negatives.h"
#include "view.h"

namespace pix2rep {

#define PIX2REP_INFONCE_INPUTS                                                                                                       \
  "Tensor a, Tensor b, Tensor temperature, float temperature_floor, str negatives, Tensor? positive, Tensor? valid_a, Tensor? valid_b, " \
  "Tensor? ids_a, Tensor? ids_b, Tensor? queue, str? precision"

using OptionalTensor = std::optional<Tensor>;

struct InfonceShape {
  Negatives negatives;
  int64_t groups, n, m, d;

  InfonceShape(const Tensor& a, const Tensor& b, const Tensor& temperature, const std::string& kind, const OptionalTensor& positive,
               const OptionalTensor& valid_a, const OptionalTensor& valid_b, const OptionalTensor& ids_a, const OptionalTensor& ids_b,
               const OptionalTensor& queue) {
    expect_float(a, "a"), expect_float(b, "b"), expect_float(temperature, "temperature");
    PIX2REP_EXPECT(a.dim() == 3, "a", "have shape [G, N, D]", a.dim(), " axes");
    PIX2REP_EXPECT(b.dim() == 3 && b.size(0) == a.size(0) && b.size(2) == a.size(2), "b", "have shape [G, M, D] with a's G and D", b.dim(), " axes");
    PIX2REP_EXPECT(kind == "joint" || kind == "cross" || kind == "forward", "negatives", "be 'joint', 'cross' or 'forward'", kind);
    negatives = kind == "joint" ? Negatives::joint : kind == "cross" ? Negatives::cross : Negatives::forward;
    groups = a.size(0), n = a.size(1), m = b.size(1), d = a.size(2);
    PIX2REP_EXPECT(negatives == Negatives::forward || n == m, "b", "have a's N rows unless negatives is 'forward'", m);
    PIX2REP_EXPECT(n + m < (int64_t(1) << 31), "a", "have N + M < 2^31 rows a group", n + m);
    PIX2REP_EXPECT(temperature.numel() == 1, "temperature", "hold one value", temperature.numel());
    expect_vector(positive, "positive", n, ScalarType::Long);
    expect_vector(valid_a, "valid_a", n, ScalarType::Bool), expect_vector(valid_b, "valid_b", m, ScalarType::Bool);
    expect_vector(ids_a, "ids_a", n, ScalarType::Long), expect_vector(ids_b, "ids_b", m, ScalarType::Long);
    PIX2REP_EXPECT(ids_a.has_value() == ids_b.has_value(), "ids_b", "be given with ids_a, and only with it", ids_b ? "one" : "none");
    PIX2REP_EXPECT(positive || n <= m, "positive", "be given where a has more rows than b", "none");
    if (!queue) return;
    expect_float(*queue, "queue");
    PIX2REP_EXPECT(queue->dim() == 2 && queue->size(1) == d, "queue", "have shape [Q, D]", queue->dim(), " axes");
    PIX2REP_EXPECT(queue->size(0) < (int64_t(1) << 31), "queue", "have Q < 2^31 rows", queue->size(0));
  }

  int64_t anchors() const { return negatives == Negatives::forward ? n : 2 * n; }

  // What the backward pass is given of the forward one, in the type of its arithmetic.
  void expect_saved(const Tensor& grad_losses, const Tensor& losses, const Tensor& lse, ScalarType type) const {
    for (const auto& [t, name] : {std::pair{&grad_losses, "grad_losses"}, std::pair{&losses, "losses"}, std::pair{&lse, "lse"}}) {
      PIX2REP_EXPECT(t->dim() == 2 && t->size(0) == groups && t->size(1) == anchors(), name, "have shape [G, anchors]", t->dim(), " axes and ",
                     t->numel(), " entries");
      PIX2REP_EXPECT(t->scalar_type() == type, name, "be float32, or float64 where a or b is", "scalar type ", int(t->scalar_type()));
    }
  }

 private:
  void expect_vector(const OptionalTensor& t, const char* name, int64_t count, ScalarType type) const {
    if (!t) return;
    PIX2REP_EXPECT(t->dim() == 2 && t->size(0) == groups && t->size(1) == count, name, "have one entry a row", t->numel(), " entries");
    PIX2REP_EXPECT(t->scalar_type() == type, name, "be bool (valid_*) or int64 (positive, ids_*)", "scalar type ", int(t->scalar_type()));
  }
};

inline void expect_precision(const std::optional<std::string>& precision) {
  const bool known = !precision || *precision == "ieee" || *precision == "tf32x3" || *precision == "fp16";
  PIX2REP_EXPECT(known, "precision", "be 'ieee', 'tf32x3', 'fp16' or none", precision ? *precision : "");
}

inline OptionalTensor contiguous(const OptionalTensor& t) { return t ? OptionalTensor(torch::stable::contiguous(*t)) : t; }

}  // namespace pix2rep
