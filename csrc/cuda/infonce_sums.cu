#include "infonce_sums.cuh"

#include "infonce_online.cuh"

namespace pix2rep::infonce {

template <bool kBiased, bool kListed, bool kWide>
static void launch_form(const Launch& launch, const SumsTask& task) {
  const int64_t blocks = task.own.groups * task.own_parts * task.stream_parts;
  launch("infonce sums", &sums<kBiased, kListed, kWide>, blocks, kSumThreads, SumRing<kWide>::shared_bytes(task.own), task);
}

void launch_sums(const Launch& launch, const SumsTask& task, bool biased, bool listed) {
  // Chips with 99 KiB a block keep 128 features and stream more.
  const bool wide = task.own.split || task.own.d > 256 || SumRing<false>::shared_bytes(task.own) > launch.shared_limit();
  if (wide) return launch_form<true, true, true>(launch, task);
  if (listed) return launch_form<true, true, false>(launch, task);
  if (biased) return launch_form<true, false, false>(launch, task);
  launch_form<false, false, false>(launch, task);
}

void launch_online(const Launch& launch, const OnlineTask& task) {
  const int64_t blocks = task.own.groups * ((task.own.count + kTile - 1) / kTile);
  launch("infonce online", &online, blocks, kOnlineThreads, OnlineRing::shared_bytes(task.own), task);
}

}  // namespace pix2rep::infonce
