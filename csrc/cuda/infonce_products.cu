#include "infonce_products.cuh"

namespace pix2rep::infonce {

template <int kSlice, int kForm, bool kSplit = false, bool kWide = false>
static void launch_form(const Launch& launch, const ProductsTask& task) {
  using S = Shape<kSlice, kForm, kSplit, kWide>;
  const int64_t blocks = task.own.groups * ((task.own.count + kTile - 1) / kTile) * task.slices * task.parts;
  launch("infonce products", &products<kSlice, kForm, kSplit, kWide>, blocks, S::kThreads, S::Panels::shared_bytes(task.own), task);
}

template <int kSlice>
static void launch_slice(const Launch& launch, const ProductsTask& task, bool listed) {
  if (listed) return launch_form<kSlice, kListed>(launch, task);
  if (task.regime == Regime::plain) return launch_form<kSlice, kPlain>(launch, task);
  launch_form<kSlice, kShifted>(launch, task);
}

void launch_products(const Launch& launch, const ProductsTask& task, int slice, bool listed) {
  if (task.own.split) return launch_form<64, kListed, true, true>(launch, task);
  if (task.own.d > 256) return launch_form<256, kListed, false, true>(launch, task);
  if (slice == 32) return launch_slice<32>(launch, task, listed);
  if (slice == 64) return launch_slice<64>(launch, task, listed);
  if (slice == 128) return launch_slice<128>(launch, task, listed);
  launch_slice<256>(launch, task, listed);
}

}  // namespace pix2rep::infonce
