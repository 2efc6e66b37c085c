// pix2rep_native::crosscorr and crosscorr_backward on the CPU: schemas, argument checks, storage types.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../common/crosscorr_arguments.h"
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

using Moments = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Moments forward(Tensor x, Tensor y, Optional weight) {
  const CrosscorrArguments in(x, y, weight);
  const int64_t d1 = in.d1, d2 = in.d2;
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
  const CrosscorrArguments in(x, y, weight);
  const CrosscorrUpstream up(in, grad_sum_x, grad_sum_y, grad_square_x, grad_square_y, grad_product, pivot_x, pivot_y);
  const auto make = [&](const Tensor& like, bool need) {
    return prepared(need ? torch::stable::new_empty(like, {in.n, like.size(1)}) : torch::stable::new_empty(like, {0}));
  };
  const Tensor grad_x = make(x, need_x), grad_y = make(y, need_y);
  if (in.n == 0 || !(need_x || need_y)) return {grad_x, grad_y};
  with_compute_type(in.type, [&](auto zero) {
    using T = decltype(zero);
    const CrosscorrView none{};
    const CrosscorrGradients<T> gradients{data<T>(up.sum_x),   data<T>(up.sum_y),   data<T>(up.square_x), data<T>(up.square_y),
                                          data<T>(up.product), data<T>(up.pivot_x), data<T>(up.pivot_y),  need_x ? view_of(grad_x, "x") : none,
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
