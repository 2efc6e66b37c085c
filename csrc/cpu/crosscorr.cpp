// pix2rep_native::crosscorr and crosscorr_backward on the CPU: schemas, argument checks, storage types.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "crosscorr_core.h"
#include "maps.h"
#include "parallel.h"

namespace pix2rep {
namespace {

using Optional = std::optional<Tensor>;

CrosscorrView view_of(const Tensor& t, const char* name) {
  const Storage storage = storage_of(t, name);
  return {static_cast<char*>(t.data_ptr()), t.size(1), t.stride(0) * kBytes[int(storage)], t.stride(1), storage};
}

// The arguments shared by both passes.
struct Arguments {
  Tensor x, y;
  Optional weight;
  int64_t n;
  ScalarType type;  // of the arithmetic

  Arguments(const Tensor& x, const Tensor& y, const Optional& weight) : x(x), y(y) {
    PIX2REP_EXPECT(x.dim() == 2, "x", "have shape [N, D1]", x.dim(), " axes");
    n = x.size(0);
    PIX2REP_EXPECT(y.dim() == 2 && y.size(0) == n, "y", "have shape [N, D2] with x's N", y.dim(), " axes of which the first is ", y.size(0));
    view_of(x, "x"), view_of(y, "y");
    type = compute_type(x, y);
    if (weight) this->weight = vector(*weight, "weight", n);
  }

  // Contiguous, of the arithmetic's type.
  Tensor vector(const Tensor& t, const char* name, int64_t count) const {
    PIX2REP_EXPECT(t.dim() == 1 && t.size(0) == count, name, "be a vector with one entry a row (weight) or feature", t.numel(), " entries");
    return typed(t, name);
  }
  Tensor typed(const Tensor& t, const char* name) const {
    PIX2REP_EXPECT(t.scalar_type() == type, name, "be float64 where x or y is, else float32", "scalar type ", int(t.scalar_type()));
    return torch::stable::contiguous(t);
  }
};

using Moments = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Moments forward(Tensor x, Tensor y, Optional weight) {
  const Arguments in(x, y, weight);
  const int64_t d1 = x.size(1), d2 = y.size(1);
  const auto make = [&](std::initializer_list<int64_t> shape) { return torch::stable::new_empty(x, shape, in.type); };
  const Moments out{make({}), make({d1}), make({d2}), make({d1}), make({d2}), make({d1}), make({d2}), make({d1, d2})};
  with_compute_type(in.type, [&](auto zero) {
    using T = decltype(zero);
    const auto memory = std::apply([](const auto&... t) { return CrosscorrMoments<T>{mutable_data<T>(t)...}; }, out);
    crosscorr_forward<T>(view_of(x, "x"), view_of(y, "y"), in.weight ? data<T>(*in.weight) : nullptr, in.n, TorchParallel{}, memory);
  });
  return out;
}

std::tuple<Tensor, Tensor> backward(Tensor grad_sum_x, Tensor grad_sum_y, Tensor grad_square_x, Tensor grad_square_y, Tensor grad_product, Tensor x,
                                    Tensor y, Optional weight, Tensor pivot_x, Tensor pivot_y, bool need_x, bool need_y) {
  const Arguments in(x, y, weight);
  const int64_t d1 = x.size(1), d2 = y.size(1);
  grad_sum_x = in.vector(grad_sum_x, "grad_sum_x", d1), grad_sum_y = in.vector(grad_sum_y, "grad_sum_y", d2);
  grad_square_x = in.vector(grad_square_x, "grad_square_x", d1), grad_square_y = in.vector(grad_square_y, "grad_square_y", d2);
  pivot_x = in.vector(pivot_x, "pivot_x", d1), pivot_y = in.vector(pivot_y, "pivot_y", d2);
  PIX2REP_EXPECT(grad_product.dim() == 2 && grad_product.size(0) == d1 && grad_product.size(1) == d2, "grad_product", "have shape [D1, D2]",
                 grad_product.dim(), " axes and ", grad_product.numel(), " entries");
  grad_product = in.typed(grad_product, "grad_product");
  const auto make = [&](const Tensor& like, bool need) {
    return prepared(need ? torch::stable::new_empty(like, {in.n, like.size(1)}) : torch::stable::new_empty(like, {0}));
  };
  const Tensor grad_x = make(x, need_x), grad_y = make(y, need_y);
  if (in.n == 0 || !(need_x || need_y)) return {grad_x, grad_y};
  with_compute_type(in.type, [&](auto zero) {
    using T = decltype(zero);
    const CrosscorrView none{};
    const CrosscorrGradients<T> gradients{data<T>(grad_sum_x),   data<T>(grad_sum_y), data<T>(grad_square_x), data<T>(grad_square_y),
                                          data<T>(grad_product), data<T>(pivot_x),    data<T>(pivot_y),       need_x ? view_of(grad_x, "x") : none,
                                          need_y ? view_of(grad_y, "y") : none};
    crosscorr_backward<T>(view_of(x, "x"), view_of(y, "y"), in.weight ? data<T>(*in.weight) : nullptr, in.n, TorchParallel{}, gradients);
  });
  return {grad_x, grad_y};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pix2rep_native, m) {
  m.def("crosscorr(Tensor x, Tensor y, Tensor? weight) -> (Tensor count, Tensor pivot_x, Tensor pivot_y, Tensor sum_x, Tensor sum_y, "
        "Tensor square_x, Tensor square_y, Tensor product)");
  m.def("crosscorr_backward(Tensor grad_sum_x, Tensor grad_sum_y, Tensor grad_square_x, Tensor grad_square_y, Tensor grad_product, Tensor x, Tensor y, "
        "Tensor? weight, Tensor pivot_x, Tensor pivot_y, bool need_x, bool need_y) -> (Tensor grad_x, Tensor grad_y)");
}

STABLE_TORCH_LIBRARY_IMPL(pix2rep_native, CPU, m) {
  m.impl("crosscorr", TORCH_BOX(&forward));
  m.impl("crosscorr_backward", TORCH_BOX(&backward));
}

}  // namespace pix2rep
