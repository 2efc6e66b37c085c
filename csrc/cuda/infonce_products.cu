#include "infonce_products.cuh"

namespace pix2rep::infonce {

template <int kSlice, bool kSplit>
static void launch_slice(const Launch& launch, const ProductsTask& given, bool listed) {
  using S = Shape<kSlice, kSplit>;
  ProductsTask task = given;
  const int64_t resident = S::Walks::shared_bytes(task.own, true);
  task.resident = task.own.scaled_width() <= 256 && resident <= launch.shared_limit();
  const int64_t blocks = task.own.groups * ((task.own.count + kTile - 1) / kTile) * task.slices * task.parts;
  const int64_t shared = S::Walks::shared_bytes(task.own, task.resident);
  if constexpr (kSplit) {
    launch("infonce products", &products<kSlice, kListed, true>, blocks, S::kThreads, shared, task);
  } else {
    const auto kernel = listed                         ? &products<kSlice, kListed, false>
                        : task.regime == Regime::plain ? &products<kSlice, kPlain, false>
                                                       : &products<kSlice, kShifted, false>;
    launch("infonce products", kernel, blocks, S::kThreads, shared, task);
  }
}

void launch_products(const Launch& launch, const ProductsTask& task, int slice, bool listed) {
  if (task.own.split) return launch_slice<64, true>(launch, task, listed);
  if (slice == 32) return launch_slice<32, false>(launch, task, listed);
  if (slice == 64) return launch_slice<64, false>(launch, task, listed);
  if (slice == 128) return launch_slice<128, false>(launch, task, listed);
  launch_slice<256, false>(launch, task, listed);
}

}  // namespace pix2rep::infonce
