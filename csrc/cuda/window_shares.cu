// p[o, i] = softmax_{i in o}(w[i] / temperature), and the gradient of w from dots[o, i] = g[o] . h[i].

#include "windows.cuh"  // defines: PooledWindow, LaunchedPatch, PatchWindows, WindowSoftmax, slot_of

namespace ppllava::cuda {
namespace {

// The slot of a window's k-th patch.
inline __device__ int64_t slot_in(const PoolArgs& a, const PooledWindow& window, int k) {
  int at[3];
  window.patches.place(k, at);
  for (int n = 0; n < 3; ++n) at[n] -= window.patches.begin[n];
  const int64_t first = window.clip.first_output * a.window.outputs[1] * a.window.outputs[2];
  return slot_of(a, window.clip, window.index - first, at[0], at[1], at[2]);
}

// The window of this warp among those of the launch.
inline __device__ int64_t window_of(const PoolArgs& a, const Batch& batch, int item) {
  return batch.clip[0].first_output * a.window.outputs[1] * a.window.outputs[2] + item;
}

// shares[o, i] = p[o, i], a warp for each window.
__global__ void __launch_bounds__(kThreads, 2)
    share_windows(const __grid_constant__ PoolArgs a, const __grid_constant__ Batch batch, int windows) {
  const int item = warp_item();
  if (item >= windows) return;
  const PooledWindow window(a, batch, window_of(a, batch, item));
  const WindowSoftmax<WeightScores> softmax(a, window, batch.first + window.b, WeightScores{a.weights});
  for (int k = lane_id(); k < window.patches.volume(); k += kWarp)
    static_cast<float*>(a.shares)[slot_in(a, window, k)] = (k < kWarp ? softmax.mine : softmax(k)).share;
}

// grad_scores[o, i] = p[o, i] (dots[o, i] - m[o]) / temperature,  m[o] = sum_j p[o, j] dots[o, j], in place of the
// dots, a warp for each window. Where one p is almost 1 its dot - m is far smaller than its dot: hence float64.
__global__ void __launch_bounds__(kThreads, 2)
    score_windows(const __grid_constant__ PoolArgs a, const __grid_constant__ Batch batch, int windows) {
  const int item = warp_item();
  if (item >= windows) return;
  const PooledWindow window(a, batch, window_of(a, batch, item));
  const int volume = window.patches.volume();
  double mean = 0, total = 0;
  for (int k = lane_id(); k < volume; k += kWarp) {
    const int64_t slot = slot_in(a, window, k);
    const double share = static_cast<const float*>(a.shares)[slot];
    mean += share * static_cast<const float*>(a.grad_scores)[slot];
    total += share;
  }
  mean = warp_sum(mean) / warp_sum(total);
  for (int k = lane_id(); k < volume; k += kWarp) {
    const int64_t slot = slot_in(a, window, k);
    float& score = static_cast<float*>(a.grad_scores)[slot];
    const float away = static_cast<float>(score - mean);
    score = static_cast<const float*>(a.shares)[slot] * away / static_cast<float>(a.temperature);
  }
}

// grad_weights[i] = sum_{o with i} grad_scores[o, i], a thread for each patch.
__global__ void __launch_bounds__(kThreads, 2)
    collect_scores(const __grid_constant__ PoolArgs a, const __grid_constant__ Batch batch, int64_t patches) {
  const int64_t item = int64_t{warp_item()} * kWarp + lane_id();
  if (item >= patches) return;
  const LaunchedPatch patch(a, batch, item);
  const PatchWindows windows(a, patch.clip, patch.at);
  float sum = 0;
  for (int k = 0; k < windows.windows.volume(); ++k) {
    int64_t window;
    sum += static_cast<const float*>(a.grad_scores)[windows.slot(k, window)];
  }
  store_scalar(a.grad_weights, patch.offset(batch, a.grad_weights), sum);
}

}  // namespace

const char* window_shares(const PoolArgs& a, Stream stream) {
  if (!countable(a)) return kTooMany;
  return for_each_batch(a, kForwardTile, [&](const Batch& batch, int, int64_t outputs) {
    const int64_t windows = outputs * a.window.outputs[1] * a.window.outputs[2];
    return launch(share_windows, warp_each(windows, stream), a, batch, static_cast<int>(windows));
  });
}

const char* window_shares_backward(const PoolArgs& a, Stream stream) {
  if (!countable(a)) return kTooMany;
  return for_each_batch(a, kForwardTile, [&](const Batch& batch, int, int64_t outputs) -> const char* {
    const int64_t windows = outputs * a.window.outputs[1] * a.window.outputs[2];
    int64_t patches = 0;
    for (int n = 0; n < batch.clips; ++n) patches += patches_of(a, a.clips[batch.first + n]);
    if (ceil_div(patches, kWarp) > kMost) return kTooMany;
    const Launch where = warp_each(windows, stream);
    if (const char* error = launch(score_windows, where, a, batch, static_cast<int>(windows))) return error;
    return launch(collect_scores, warp_each(ceil_div(patches, kWarp), stream), a, batch, patches);
  });
}

}  // namespace ppllava::cuda
