// One infonce call on the GPU: operands prepared row by row, in the order of the positives, and what depends on them alone.
#pragma once

#include <cmath>
#include <vector>

#include "../common/infonce_arguments.h"
#include "infonce_rows.cuh"
#include "infonce_sweeps.h"
#include "storage.h"

namespace pix2rep::infonce {

// `owner` keeps what its pointers name.
struct Rows {
  Operand operand;
  bool masked;  // some row may be invalid
  std::vector<Tensor> owner;
};

inline Storage storage_of(const Tensor& tensor, const char* name) {
  expect_storage(tensor, name);
  const ScalarType type = tensor.scalar_type();
  return type == ScalarType::Half ? Storage::float16 : type == ScalarType::BFloat16 ? Storage::bfloat16 : Storage::float32;
}

// The arguments of both passes, checked: what every backend takes, and of it what CUDA does.
inline InfonceShape checked(const Tensor& a, const Tensor& b, const Tensor& tau, const std::string& kind, const OptionalTensor& positive,
                            const OptionalTensor& valid_a, const OptionalTensor& valid_b, const OptionalTensor& ids_a, const OptionalTensor& ids_b,
                            const OptionalTensor& queue) {
  const InfonceShape shape(a, b, tau, kind, positive, valid_a, valid_b, ids_a, ids_b, queue);
  expect_storage(a, "a"), expect_storage(b, "b");
  if (queue) expect_storage(*queue, "queue");
  PIX2REP_EXPECT(tau.scalar_type() == ScalarType::Float, "temperature", "be float32", "scalar type ", int(tau.scalar_type()));
  PIX2REP_EXPECT(shape.d <= (1 << 20), "a", "have at most 2^20 features on CUDA", shape.d);
  return shape;
}

template <class T>
const T* data_or_null(const OptionalTensor& t) {
  return t ? data<T>(*t) : nullptr;
}

struct Problem : InfonceShape {
  Launch launch;
  Tensor a, b;
  Temperature temperature;
  OptionalTensor index, positive, queue_rows;  // index: the positives of "joint" and "cross", permutations that order b; positive: those of "forward"
  bool has_ids, split, gradient;
  Rows x, y, queue;  // "joint" has a and b in x
  int64_t queue_count = 0;
  float too_small;
  Regime regime;

  Problem(const InfonceShape& shape, const Tensor& a, const Tensor& b, const Tensor& tau, double floor, const OptionalTensor& given,
          const OptionalTensor& valid_a, const OptionalTensor& valid_b, const OptionalTensor& ids_a, const OptionalTensor& ids_b,
          const OptionalTensor& queue, const std::optional<std::string>& precision, bool gradient)
      : InfonceShape(shape),
        launch({{a, "a"}, {b, "b"}, {tau, "temperature"}, {given, "positive"}, {valid_a, "valid_a"}, {valid_b, "valid_b"}, {ids_a, "ids_a"},
                {ids_b, "ids_b"}, {queue, "queue"}}),
        a(a), b(b), has_ids(ids_a.has_value()), gradient(gradient) {
    (negatives == Negatives::forward ? positive : index) = contiguous(given);
    const bool wide = a.scalar_type() == ScalarType::Float || b.scalar_type() == ScalarType::Float;
    split = precision ? *precision != "fp16" : wide;
    if (queue && queue->size(0) > 0) queue_rows = queue, queue_count = queue->size(0);

    const int64_t most = negatives == Negatives::joint ? n + m : m;
    const double candidates = double(std::max({most + queue_count, negatives == Negatives::joint ? most : n, int64_t(2)}));
    const double headroom = 125 - std::log2(candidates);
    temperature = {data<float>(tau), float(floor), float(headroom)};
    too_small = float(std::ldexp(candidates, 20 - 126));
    // By the floor alone. One constant serves down to 0.0075: below, cosines under -0.2 would be flushed as a rule.
    regime = 1.4426950408889634 / floor * 1.004 <= headroom ? Regime::plain : floor >= 0.0075 ? Regime::shifted : Regime::online;

    const OptionalTensor masks[] = {contiguous(valid_a), contiguous(valid_b)}, ids[] = {contiguous(ids_a), contiguous(ids_b)};
    if (negatives == Negatives::joint) {
      x = allocate(groups, n + m, masks[0] || masks[1]);
      prepare_rows(x, source(a, "a"), masks[0], ids[0], 0, n);
      prepare_rows(x, source(b, "b", index), masks[1], ids[1], n, x.operand.padded - n);
    } else {
      x = allocate(groups, n, masks[0].has_value()), y = allocate(groups, m, masks[1].has_value());
      prepare_rows(x, source(a, "a"), masks[0], ids[0], 0, x.operand.padded);
      prepare_rows(y, source(b, "b", index), masks[1], ids[1], 0, y.operand.padded);
    }
    if (queue_count > 0) {
      this->queue = allocate(1, queue_count, false);
      prepare_rows(this->queue, source(*queue_rows, "queue"), {}, {}, 0, this->queue.operand.padded);
    }
  }

  bool joint() const { return negatives == Negatives::joint; }
  const Rows& partners() const { return joint() ? x : y; }

  // The anchors, or at least the rows, of one side: 0 for a, 1 for b.
  View view(int side) const {
    const Rows &own = side && !joint() ? y : x, &partner = !side && !joint() ? y : x;
    const int64_t count = side ? m : n, other = side ? n : m;
    return {own.operand,  partner.operand,      joint() && side ? n : 0, joint() && !side ? n : 0, count, other, side ? n : 0,
            anchors(), side ? data_or_null<int64_t>(index) : nullptr, side ? nullptr : data_or_null<int64_t>(positive)};
  }
  int sides() const { return negatives == Negatives::forward ? 1 : 2; }

  // What a sweep of x, or of y when `swapped`, leaves out.
  LeftOut left_out(bool swapped) const {
    if (joint()) return {{0, int(n), -int(n)}, nullptr, nullptr};
    if (!positive) return {{0, kNowhere, kNowhere}, nullptr, nullptr};
    const int64_t* list = data<int64_t>(*positive);
    return {{kNowhere, kNowhere, kNowhere}, swapped ? nullptr : list, swapped ? list : nullptr};
  }
  static LeftOut nothing() { return {{kNowhere, kNowhere, kNowhere}, nullptr, nullptr}; }

  Source source(const Tensor& rows, const char* name, const OptionalTensor& order = {}) const {
    const bool grouped = rows.dim() == 3;
    const int64_t axis = rows.dim() - 2;
    return {rows.data_ptr(),        storage_of(rows, name), grouped ? rows.stride(0) : 0,  rows.stride(axis),
            rows.stride(axis + 1), rows.size(axis),        int(d), data_or_null<int64_t>(order)};
  }

  Tensor floats(std::initializer_list<int64_t> shape) const { return torch::stable::new_empty(a, std::vector<int64_t>(shape), ScalarType::Float); }

 private:
  Rows allocate(int64_t count_groups, int64_t count, bool masked) const {
    Rows rows;
    Operand& operand = rows.operand;
    const int64_t padded = std::max<int64_t>(1, ceil_div(count, kTile)) * kTile;
    operand.groups = count_groups, operand.count = count, operand.padded = padded;
    operand.split = split;
    operand.d = int(std::max<int64_t>(1, ceil_div(d, split ? kPanel : 16)) * (split ? kPanel : 16));
    rows.masked = masked;
    const auto take = [&](int64_t width, ScalarType type) {
      rows.owner.push_back(torch::stable::new_empty(a, {count_groups, padded, width}, type));
      return rows.owner.back().data_ptr();
    };
    operand.scaled = static_cast<uint16_t*>(take(operand.scaled_width(), ScalarType::Half));
    operand.plain = gradient ? static_cast<uint16_t*>(take(operand.plain_width(), ScalarType::BFloat16)) : nullptr;
    operand.bias = static_cast<float*>(take(1, ScalarType::Float));
    operand.ids = has_ids ? static_cast<int64_t*>(take(1, ScalarType::Long)) : nullptr;
    return rows;
  }

  void prepare_rows(const Rows& rows, const Source& from, const OptionalTensor& valid, const OptionalTensor& ids, int64_t offset, int64_t written) const {
    Operand operand = rows.operand;
    if (!ids) operand.ids = nullptr;
    launch("infonce prepare", &prepare, ceil_div(operand.groups * written, kRowWarps), kRowThreads, 0, from, data_or_null<bool>(valid),
           data_or_null<int64_t>(ids), operand, temperature, offset, written);
  }
};

}  // namespace pix2rep::infonce
