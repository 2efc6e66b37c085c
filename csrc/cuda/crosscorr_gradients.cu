#include "crosscorr_gradients.cuh"

#include <algorithm>

#include "crosscorr_streamed.cuh"

namespace pix2rep::crosscorr {

template <class T>
static void launch_form(const Launch& launch, const GradientsTask& task) {
  if constexpr (sizeof(T) == 2) {
    const Jobs jobs(task);
    const int64_t tiles = (task.n + jobs.rows() - 1) / std::max(jobs.rows(), 1);
    if (jobs.count() <= 8 && task.x.padded * task.y.padded <= 256 * 256) {
      const Shared shared(task, jobs.rows());
      // Rows are a block's own: their number changes no bit.
      if (shared.all <= launch.shared_limit())
        return launch("crosscorr gradients", task.weight ? &gradients<T, true> : &gradients<T, false>,
                      std::min<int64_t>(tiles, 2 * launch.multiprocessors()), jobs.threads, shared.all, task);
    }
  }
  for (const bool for_x : {true, false}) {
    const Side &own = for_x ? task.x : task.y, &other = for_x ? task.y : task.x;
    const int64_t tiles = (task.n + kStreamedRows - 1) / kStreamedRows;
    if (own.grad)
      launch("crosscorr streamed gradient", &streamed<T>, tiles * (own.padded / kGradientFeatures), kStreamedThreads, kStreamedBytes, task, own, other);
  }
}

void launch_gradients(const Launch& launch, Form form, const GradientsTask& task) {
  if (form == Form::float16) return launch_form<Half>(launch, task);
  if (form == Form::bfloat16) return launch_form<BFloat16>(launch, task);
  launch_form<float>(launch, task);
}

}  // namespace pix2rep::crosscorr
