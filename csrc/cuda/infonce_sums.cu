#include "infonce_sums.cuh"

#include "infonce_online.cuh"

namespace pix2rep::infonce {

// Whether the kept rows of a block stay in shared memory.
static bool fits(const Launch& launch, const Operand& own, int64_t bytes) { return own.scaled_width() <= 256 && bytes <= launch.shared_limit(); }

void launch_sums(const Launch& launch, const SumsTask& given, bool biased, bool listed) {
  SumsTask task = given;
  task.resident = fits(launch, task.own, SumRing::shared_bytes(task.own, true));
  const int64_t blocks = task.own.groups * task.own_parts * task.stream_parts, shared = SumRing::shared_bytes(task.own, task.resident);
  const auto kernel = listed ? &sums<true, true> : biased ? &sums<true, false> : &sums<false, false>;
  launch("infonce sums", kernel, blocks, kSumThreads, shared, task);
}

void launch_online(const Launch& launch, const OnlineTask& given) {
  OnlineTask task = given;
  task.resident = fits(launch, task.own, OnlineRing::shared_bytes(task.own, true));
  const int64_t blocks = task.own.groups * ((task.own.count + kTile - 1) / kTile);
  launch("infonce online", &online, blocks, kOnlineThreads, OnlineRing::shared_bytes(task.own, task.resident), task);
}

}  // namespace pix2rep::infonce
