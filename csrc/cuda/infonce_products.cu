#include "infonce_products.cuh"

namespace pix2rep::infonce {

template <int kSlice, int kForm, bool kSplit>
static void launch_form(const Launch& launch, const ProductsTask& given) {
  using S = Shape<kSlice, kForm, kSplit>;
  ProductsTask task = given;
  task.resident = task.own.scaled_width() <= 256 && S::Walks::shared_bytes(task.own, true) <= launch.shared_limit();
  const int64_t blocks = task.own.groups * ((task.own.count + kTile - 1) / kTile) * task.slices * task.parts;
  launch("infonce products", &products<kSlice, kForm, kSplit>, blocks, S::kThreads, S::Walks::shared_bytes(task.own, task.resident), task);
}

template <int kSlice>
static void launch_slice(const Launch& launch, const ProductsTask& task, bool listed) {
  if (listed) return launch_form<kSlice, kListed, false>(launch, task);
  if (task.regime == Regime::plain) return launch_form<kSlice, kPlain, false>(launch, task);
  launch_form<kSlice, kShifted, false>(launch, task);
}

void launch_products(const Launch& launch, const ProductsTask& task, int slice, bool listed) {
  if (task.own.split) return launch_form<64, kListed, true>(launch, task);
  if (slice == 32) return launch_slice<32>(launch, task, listed);
  if (slice == 64) return launch_slice<64>(launch, task, listed);
  if (slice == 128) return launch_slice<128>(launch, task, listed);
  launch_slice<256>(launch, task, listed);
}

}  // namespace pix2rep::infonce
