// The end of infonce's backward pass: sum the parts of the products, add the positive pairs, scale; the temperature's gradient (infonce.7).
#pragma once

#include "infonce_rows.cuh"

namespace pix2rep::infonce {

struct Parts {
  const float* data;  // [count, G, own.padded, own.d]
  int count;
};

struct GradientsTask {
  View view;         // of the rows whose gradient this is; view.positive: the partner of each, or in `listed` the row that each partner names
  bool listed;       // partners are the anchors whose positive this row is
  Source rows, partners;
  Weights own_weights, partner_weights;
  Parts negatives, queue;
  const float* largest;  // of Extremes
  float halved;          // the weight of <x, grad> less the queue's share: "joint" counts each pair twice
  Temperature temperature;
  void* grad;   // [G, count, width]
  float* dots;  // [G count / kRowWarps] sums of <x, grad> of the rows of a block, or nullptr
};

__device__ __forceinline__ void store(void* to, Storage storage, int64_t at, float value) {
  if (storage == Storage::float32) static_cast<float*>(to)[at] = value;
  if (storage == Storage::float16) static_cast<torch::headeronly::Half*>(to)[at] = value;
  if (storage == Storage::bfloat16) static_cast<torch::headeronly::BFloat16*>(to)[at] = value;
}

__global__ void gradients(GradientsTask task) {
  const View& view = task.view;
  const Operand &own = view.own, &partner = view.partner;
  const int lane = threadIdx.x % 32;
  const int64_t index = int64_t(blockIdx.x) * kRowWarps + threadIdx.x / 32, group = index / view.count, k = index % view.count;
  float dot = 0;
  if (group < own.groups) {
    const int64_t row = group * own.padded + view.offset + k, home = task.rows.home(group, k);
    const bool known = task.rows.has(home), kept = own.bias[row] == 0;
    const int64_t match = view.positive && !task.listed ? view.positive[group * view.count + k] : k;
    const bool inside = !task.listed && match >= 0 && match < view.partner_count;
    const int64_t partner_row = group * partner.padded + view.partner_offset + match;
    float share = 0;  // of the partner in the gradient of this row
    if (task.own_weights.positive_share) share += task.own_weights.positive_share[row];
    if (inside && task.partner_weights.positive_share) share += task.partner_weights.positive_share[partner_row];
    const bool attracts = inside && partner.bias[partner_row] == 0;
    const int64_t partner_home = attracts ? task.partners.home(group, match) : -1;
    const float scale = largest_of(task.largest, group) / task.temperature();
    const float nothing = share - share;  // NaN where the share is not finite, which no missing partner hides
    for (int first = 0; first < task.rows.width; first += 32) {
      const int feature = first + lane;
      const bool held = feature < task.rows.width;
      float negatives = 0, queued = 0, attracted = nothing;
      for (int part = 0; held && part < task.negatives.count; ++part)
        negatives += task.negatives.data[(part * own.groups * own.padded + row) * own.d + feature];
      for (int part = 0; held && part < task.queue.count; ++part)
        queued += task.queue.data[(part * own.groups * own.padded + row) * own.d + feature];
      if (attracts && held) attracted = task.partners.has(partner_home) ? share * task.partners(group, partner_home, feature) : NAN;
      for (int64_t anchors = 0; task.listed && anchors < view.partner_count; anchors += 32) {
        const int64_t mine = anchors + lane;
        const bool names = mine < view.partner_count && view.positive[group * view.partner_count + mine] == k;
        for (uint32_t named = device::ballot(names && partner.bias[group * partner.padded + mine] == 0); named; named &= named - 1) {
          const int64_t anchor = anchors + __ffs(int(named)) - 1;
          if (held) attracted += task.partner_weights.positive_share[group * partner.padded + anchor] * task.partners(group, anchor, feature);
        }
      }
      if (!held) continue;
      const float total = negatives + attracted;
      if (task.dots && kept && known) dot += task.rows(group, home, feature) * (total * task.halved + queued) * scale;
      if (known) store(task.grad, task.rows.storage, (group * view.count + home) * task.rows.width + feature, kept ? (total + queued) * scale : 0);
    }
    dot = warp_sum(dot);
  }
  if (!task.dots) return;
  float* dots = reinterpret_cast<float*>(device::shared_memory());
  if (lane == 0) dots[threadIdx.x / 32] = dot;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int w = 1; w < kRowWarps; ++w) dot += dots[w];
  task.dots[blockIdx.x] = dot;
}

// The sum of up to two lists of dots, in a fixed order, as the temperature's gradient. One block.
__global__ void temperature_gradient(const float* first, int64_t first_count, const float* second, int64_t second_count, Temperature temperature, float* out) {
  float sum = 0;
  for (int64_t i = threadIdx.x; i < first_count; i += kRowThreads) sum += first[i];
  for (int64_t i = threadIdx.x; i < second_count; i += kRowThreads) sum += second[i];
  float* sums = reinterpret_cast<float*>(device::shared_memory());
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int w = 1; w < kRowWarps; ++w) sum += sums[w];
  *out = *temperature.value < temperature.floor ? 0 : -sum / temperature();
}

}  // namespace pix2rep::infonce
