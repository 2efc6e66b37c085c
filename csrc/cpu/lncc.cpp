// pix2rep_native::lncc and lncc_backward on the CPU: schemas, argument checks, layouts, storage types.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "lncc_core.h"
#include "maps.h"
#include "parallel.h"

namespace pix2rep {
namespace {

LnccMap map_of(const Tensor& tensor, const char* argument) {
  const int64_t skip = tensor.dim() == 5 ? 0 : 1;  // a plane is a volume of one
  LnccMap map{static_cast<char*>(tensor.data_ptr()), storage_of(tensor, argument), {}};
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) map.stride[axis < 2 ? axis : axis + skip] = tensor.stride(axis);
  return map;
}

LnccProblem problem_of(const Tensor& i, const Tensor& j, int64_t window, double eps) {
  PIX2REP_EXPECT(i.dim() == 4 || i.dim() == 5, "i", "have shape [B, C, H, W] or [B, C, D, H, W]", i.dim(), " axes");
  PIX2REP_EXPECT(shape_of(j) == shape_of(i), "j", "have the shape of i", j.dim(), " axes of which the last has ", j.dim() ? j.size(j.dim() - 1) : 0);
  PIX2REP_EXPECT(window > 0 && window % 2 == 1, "window", "be odd and > 0", window);
  PIX2REP_EXPECT(eps >= 1e-30 && eps < std::numeric_limits<double>::infinity(), "eps", "be > 0 and finite (1e-30 at least)", eps);
  LnccProblem p{map_of(i, "i"), map_of(j, "j"), {}, {}, i.dim() == 5, window, eps};
  for (int64_t axis = 0; axis < 5; ++axis) p.size[axis] = p.solid ? i.size(axis) : axis == 2 ? 1 : i.size(axis < 2 ? axis : axis - 1);
  return p;
}

Tensor forward(Tensor i, Tensor j, int64_t window, double eps) {
  const LnccProblem p = problem_of(i, j, window, eps);
  const Tensor cc = torch::stable::new_empty(i, shape_of(i), compute_type(i, j));
  if (cc.numel() > 0) with_compute_type(compute_type(i, j), [&](auto zero) { lncc_forward<decltype(zero)>(p, map_of(cc, "cc"), TorchParallel{}); });
  return cc;
}

std::tuple<Tensor, Tensor> backward(Tensor grad_cc, Tensor i, Tensor j, int64_t window, double eps, bool need_i, bool need_j) {
  LnccProblem p = problem_of(i, j, window, eps);
  PIX2REP_EXPECT(shape_of(grad_cc) == shape_of(i), "grad_cc", "have the shape of i", grad_cc.dim(), " axes");
  p.grad_cc = map_of(grad_cc, "grad_cc");
  const auto grad_of = [](const Tensor& map, bool need) { return prepared(torch::stable::new_empty(map, need ? shape_of(map) : Sizes{0})); };
  Tensor grad_i = grad_of(i, need_i), grad_j = grad_of(j, need_j);
  const auto out = [](const Tensor& grad, bool need) { return need ? map_of(grad, "grad") : LnccMap{}; };
  if (i.numel() > 0)
    with_compute_type(compute_type(i, j), [&](auto zero) { lncc_backward<decltype(zero)>(p, out(grad_i, need_i), out(grad_j, need_j), TorchParallel{}); });
  return {grad_i, grad_j};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pix2rep_native, m) {
  m.def("lncc(Tensor i, Tensor j, int window, float eps) -> Tensor cc");
  m.def("lncc_backward(Tensor grad_cc, Tensor i, Tensor j, int window, float eps, bool need_i, bool need_j) -> (Tensor grad_i, Tensor grad_j)");
}

STABLE_TORCH_LIBRARY_IMPL(pix2rep_native, CPU, m) {
  m.impl("lncc", TORCH_BOX(&forward));
  m.impl("lncc_backward", TORCH_BOX(&backward));
}

}  // namespace pix2rep
