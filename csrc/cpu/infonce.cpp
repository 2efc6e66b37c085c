// pix2rep_native::infonce and infonce_backward on the CPU: schemas, argument checks, storage types, groups.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <unordered_map>

#include "../common/infonce_arguments.h"
#include "infonce_solve.h"
#include "parallel.h"

namespace pix2rep {
namespace {

using Optional = OptionalTensor;

struct SerialParallel {
  int64_t workers() const { return 1; }

  template <class F>
  void operator()(int64_t count, const F& f) const {
    for (int64_t task = 0; task < count; ++task) f(task);
  }
};

template <class T>
RowSource<T> row_source(const Tensor& tensor, const char* name, int64_t group) {
  return with_float_type(tensor.scalar_type(), name, [&](auto zero) {
    using S = decltype(zero);
    const bool grouped = tensor.dim() == 3;
    const int64_t rows = tensor.dim() - 2;
    RowSource<T> out;
    out.data = reinterpret_cast<const char*>(data<S>(tensor)) + (grouped ? group * tensor.stride(0) * int64_t(sizeof(S)) : 0);
    out.row_bytes = tensor.stride(rows) * int64_t(sizeof(S));
    out.column_bytes = tensor.stride(rows + 1) * int64_t(sizeof(S));
    out.read = [](const char* row, int64_t column_bytes, int64_t d, T* to) {
      for (int64_t c = 0; c < d; ++c) to[c] = T(*reinterpret_cast<const S*>(row + c * column_bytes));
    };
    return out;
  });
}

template <class T>
RowSink<T> row_sink(const Tensor& tensor, const char* name, int64_t group) {
  return with_float_type(tensor.scalar_type(), name, [&](auto zero) {
    using S = decltype(zero);
    RowSink<T> out;
    out.data = reinterpret_cast<char*>(mutable_data<S>(tensor) + group * tensor.stride(0));
    out.row_bytes = tensor.stride(1) * int64_t(sizeof(S));
    out.write = [](const T* from, int64_t d, char* row) {
      for (int64_t c = 0; c < d; ++c) reinterpret_cast<S*>(row)[c] = S(from[c]);
    };
    return out;
  });
}

// The arguments shared by both passes; vectors are made contiguous, ids renumbered to int32.
struct Arguments : InfonceShape {
  Tensor a, b;
  Optional positive, valid_a, valid_b, queue;
  std::vector<int32_t> id_a, id_b;
  double tau;
  bool at_floor;
  ScalarType type;  // of the arithmetic

  Arguments(const Tensor& a, const Tensor& b, const Tensor& temperature, double floor, const std::string& kind, const Optional& positive,
            const Optional& valid_a, const Optional& valid_b, const Optional& ids_a, const Optional& ids_b, const Optional& queue)
      : InfonceShape(a, b, temperature, kind, positive, valid_a, valid_b, ids_a, ids_b, queue),
        a(a),
        b(b),
        positive(contiguous(positive)),
        valid_a(contiguous(valid_a)),
        valid_b(contiguous(valid_b)),
        queue(queue) {
    type = compute_type(a, b);
    const double given = with_float_type(temperature.scalar_type(), "temperature", [&](auto zero) { return double(*data<decltype(zero)>(temperature)); });
    const double least = temperature.scalar_type() == ScalarType::Float ? double(float(floor)) : floor;
    at_floor = given < least;
    tau = at_floor ? least : given;
    check_positive();
    if (ids_a) renumber(*ids_a, *ids_b);
  }

  template <class T>
  InfonceInputs<T> group(int64_t g) const {
    const auto at = [&](const Optional& t, auto zero, int64_t count) { return t ? data<decltype(zero)>(*t) + g * count : nullptr; };
    return {negatives, n, m, d, queue ? queue->size(0) : 0, row_source<T>(a, "a", g), row_source<T>(b, "b", g),
            queue && queue->size(0) ? row_source<T>(*queue, "queue", 0) : RowSource<T>{}, at(positive, int64_t{}, n), at(valid_a, bool{}, n),
            at(valid_b, bool{}, m), id_a.empty() ? nullptr : id_a.data() + g * n, id_b.empty() ? nullptr : id_b.data() + g * m, tau};
  }

  // f(group, parallel): many small groups run side by side, a large one spreads over the threads.
  template <class F>
  void for_groups(const F& f) const {
    if (groups > 1 && n + m <= 4096)
      TorchParallel{}(groups, [&](int64_t g) { f(g, SerialParallel{}); });
    else
      for (int64_t g = 0; g < groups; ++g) f(g, TorchParallel{});
  }

 private:
  void check_positive() const {
    if (!positive) return;
    const int64_t* p = data<int64_t>(*positive);
    for (int64_t g = 0; g < groups; ++g, p += n) {
      std::vector<bool> seen(m);
      for (int64_t i = 0; i < n; ++i) {
        PIX2REP_EXPECT(p[i] >= 0 && p[i] < m, "positive", "be in [0, M)", p[i], " with M = ", m);
        PIX2REP_EXPECT(negatives == Negatives::forward || !seen[p[i]], "positive",
                       "be a permutation of each group with negatives 'joint' or 'cross'", p[i], " twice");
        seen[p[i]] = true;
      }
    }
  }

  void renumber(const Tensor& ids_a, const Tensor& ids_b) {
    std::unordered_map<int64_t, int32_t> number;
    for (const auto& [ids, out] : {std::pair{&ids_a, &id_a}, std::pair{&ids_b, &id_b}}) {
      const Tensor dense = torch::stable::contiguous(*ids);
      const int64_t* id = data<int64_t>(dense);
      for (int64_t i = 0; i < dense.numel(); ++i) out->push_back(number.emplace(id[i], int32_t(number.size())).first->second);
    }
  }
};

std::tuple<Tensor, Tensor> infonce(Tensor a, Tensor b, Tensor temperature, double temperature_floor, std::string negatives, Optional positive,
                                   Optional valid_a, Optional valid_b, Optional ids_a, Optional ids_b, Optional queue,
                                   std::optional<std::string> precision) {
  expect_precision(precision);
  const Arguments in(a, b, temperature, temperature_floor, negatives, positive, valid_a, valid_b, ids_a, ids_b, queue);
  const int64_t anchors = in.anchors();
  Tensor losses = torch::stable::new_empty(a, {in.groups, anchors}, in.type), lse = torch::stable::new_empty(a, {in.groups, anchors}, in.type);
  with_compute_type(in.type, [&](auto zero) {
    using T = decltype(zero);
    in.for_groups([&](int64_t g, const auto& parallel) {
      infonce_forward<T>(in.group<T>(g), parallel, mutable_data<T>(losses) + g * anchors, mutable_data<T>(lse) + g * anchors);
    });
  });
  return {losses, lse};
}

std::tuple<Tensor, Tensor, Tensor> infonce_backward(Tensor grad_losses, Tensor losses, Tensor lse, Tensor a, Tensor b, Tensor temperature,
                                                    double temperature_floor, std::string negatives, Optional positive, Optional valid_a,
                                                    Optional valid_b, Optional ids_a, Optional ids_b, Optional queue,
                                                    std::optional<std::string> precision, bool need_a, bool need_b, bool need_temperature) {
  expect_precision(precision);
  const Arguments in(a, b, temperature, temperature_floor, negatives, positive, valid_a, valid_b, ids_a, ids_b, queue);
  const int64_t anchors = in.anchors();
  in.expect_saved(grad_losses, losses, lse, in.type);
  const auto zeros = [](const Tensor& like, bool need) {
    return need ? torch::stable::new_zeros(like, {like.size(0), like.size(1), like.size(2)}) : torch::stable::new_empty(like, {0});
  };
  Tensor grad_a = zeros(a, need_a), grad_b = zeros(b, need_b);
  std::vector<double> grad_tau(in.groups);
  grad_losses = torch::stable::contiguous(grad_losses), losses = torch::stable::contiguous(losses), lse = torch::stable::contiguous(lse);
  with_compute_type(in.type, [&](auto zero) {
    using T = decltype(zero);
    in.for_groups([&](int64_t g, const auto& parallel) {
      InfonceGradients<T> out;
      if (need_a) out.a = row_sink<T>(grad_a, "a", g);
      if (need_b) out.b = row_sink<T>(grad_b, "b", g);
      if (need_temperature && !in.at_floor) out.temperature = &grad_tau[g];
      const InfonceInputs<T> inputs = in.group<T>(g);
      const T* from = data<T>(grad_losses) + g * anchors;
      InfonceBackward<T, std::decay_t<decltype(parallel)>>(inputs, parallel, from, data<T>(losses) + g * anchors, data<T>(lse) + g * anchors, out).run();
    });
  });
  double total = 0;
  for (double g : grad_tau) total += g;
  Tensor grad_temperature = need_temperature ? torch::stable::new_empty(temperature, {}) : torch::stable::new_empty(temperature, {0});
  if (need_temperature) torch::stable::fill_(grad_temperature, total);
  return {grad_a, grad_b, grad_temperature};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pix2rep_native, m) {
  m.def("infonce(" PIX2REP_INFONCE_INPUTS ") -> (Tensor losses, Tensor lse)");
  m.def("infonce_backward(Tensor grad_losses, Tensor losses, Tensor lse, " PIX2REP_INFONCE_INPUTS
        ", bool need_a, bool need_b, bool need_temperature) -> (Tensor grad_a, Tensor grad_b, Tensor grad_temperature)");
}

STABLE_TORCH_LIBRARY_IMPL(pix2rep_native, CPU, m) {
  m.impl("infonce", TORCH_BOX(&infonce));
  m.impl("infonce_backward", TORCH_BOX(&infonce_backward));
}

}  // namespace pix2rep
