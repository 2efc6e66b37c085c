// pix2rep_native::lncc and lncc_backward on the CPU: schemas, argument checks, layouts, storage types.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "../common/check.h"
#include "../common/view.h"
#include "lncc_core.h"
#include "parallel.h"

namespace pix2rep {
namespace {

Storage storage_of(const Tensor& tensor, const char* argument) {
  return with_float_type(tensor.scalar_type(), argument, [](auto zero) {
    if (std::is_same_v<decltype(zero), torch::headeronly::Half>) return Storage::f16;
    if (std::is_same_v<decltype(zero), torch::headeronly::BFloat16>) return Storage::bf16;
    return std::is_same_v<decltype(zero), float> ? Storage::f32 : Storage::f64;
  });
}

LnccMap map_of(const Tensor& tensor, const char* argument) {
  const int64_t skip = tensor.dim() == 5 ? 0 : 1;  // a plane is a volume of one
  LnccMap map{static_cast<char*>(tensor.data_ptr()), storage_of(tensor, argument), {}};
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) map.stride[axis < 2 ? axis : axis + skip] = tensor.stride(axis);
  return map;
}

bool same_shape(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t axis = 0; same && axis < a.dim(); ++axis) same = a.size(axis) == b.size(axis);
  return same;
}

LnccProblem problem_of(const Tensor& i, const Tensor& j, int64_t window, double eps) {
  PIX2REP_EXPECT(i.dim() == 4 || i.dim() == 5, "i", "have shape [B, C, H, W] or [B, C, D, H, W]", i.dim(), " axes");
  PIX2REP_EXPECT(same_shape(i, j), "j", "have the shape of i", j.dim(), " axes of which the last has ", j.dim() ? j.size(j.dim() - 1) : 0);
  PIX2REP_EXPECT(window > 0 && window % 2 == 1, "window", "be odd and > 0", window);
  PIX2REP_EXPECT(eps >= 1e-30 && eps < std::numeric_limits<double>::infinity(), "eps", "be > 0 and finite (1e-30 at least)", eps);
  LnccProblem p{map_of(i, "i"), map_of(j, "j"), {}, {}, i.dim() == 5, window, eps};
  for (int64_t axis = 0; axis < 5; ++axis) p.size[axis] = p.solid ? i.size(axis) : axis == 2 ? 1 : i.size(axis < 2 ? axis : axis - 1);
  return p;
}

ScalarType compute_type(const Tensor& i, const Tensor& j) {
  return i.scalar_type() == ScalarType::Double || j.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor empty_like(const Tensor& tensor, ScalarType type) {
  std::vector<int64_t> sizes;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) sizes.push_back(tensor.size(axis));
  return torch::stable::new_empty(tensor, sizes, type);
}

template <class F>
void with_compute(const Tensor& i, const Tensor& j, const F& f) {
  compute_type(i, j) == ScalarType::Double ? f(double{}) : f(float{});
}

Tensor forward(Tensor i, Tensor j, int64_t window, double eps) {
  const LnccProblem p = problem_of(i, j, window, eps);
  Tensor cc = empty_like(i, compute_type(i, j));
  if (cc.numel() > 0) with_compute(i, j, [&](auto zero) { lncc_forward<decltype(zero)>(p, map_of(cc, "cc"), TorchParallel{}); });
  return cc;
}

std::tuple<Tensor, Tensor> backward(Tensor grad_cc, Tensor i, Tensor j, int64_t window, double eps, bool need_i, bool need_j) {
  LnccProblem p = problem_of(i, j, window, eps);
  PIX2REP_EXPECT(same_shape(grad_cc, i), "grad_cc", "have the shape of i", grad_cc.dim(), " axes");
  p.grad_cc = map_of(grad_cc, "grad_cc");
  const auto grad_of = [](const Tensor& map, bool need) {
    return need ? empty_like(map, map.scalar_type()) : torch::stable::new_empty(map, {0});
  };
  Tensor grad_i = grad_of(i, need_i), grad_j = grad_of(j, need_j);
  const auto out = [](const Tensor& grad, bool need) { return need ? map_of(grad, "grad") : LnccMap{}; };
  if (i.numel() > 0)
    with_compute(i, j, [&](auto zero) { lncc_backward<decltype(zero)>(p, out(grad_i, need_i), out(grad_j, need_j), TorchParallel{}); });
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
