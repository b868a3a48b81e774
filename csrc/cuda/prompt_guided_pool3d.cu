// Relevance and pooling in one launch: blocks score patches, wait for each other, and pool windows with the softmax of
// the scores, which nothing but the second-level cache has seen in between.

#include <algorithm>  // defines: std::max, std::min

#include "scores.cuh"   // defines: score_parts, clip_statistics, normalise_parts
#include "windows.cuh"  // defines: PooledWindow, pool_window

namespace ppllava::cuda {
namespace {

// exp(logit - max) / sum: the relevance itself, before anyone has to read it.
struct LogitScores {
  const float* logits;  // of the clip
  Statistics statistics;
  int first_frame, height, width;

  __device__ float operator()(int64_t, int64_t frame, const int (&at)[3]) const {
    const int64_t n = ((frame - first_frame) * height + at[1]) * width + at[2];
    return expf(logits[n] - statistics.largest) / statistics.total;
  }
};

// The rows of a warp's first window are fetched into the second-level cache while the blocks wait for each other.
inline __device__ void prefetch_window(const PoolArgs& a, const Batch& batch, const PooledWindow& window, int slice) {
  if (lane_id() >= window.patches.volume()) return;
  int at[3];
  window.patches.place(lane_id(), at);
  const int64_t offset = a.values.offset(batch.first + window.b, window.clip.first_frame + at[0], at[1], at[2]);
  const int64_t size = a.values.dtype == Dtype::float32 ? 4 : 2;
  constexpr int kLine = 128, kBytes = kWindowColumns * kWarp * 16;
  const char* row = static_cast<const char*>(a.values.data) + offset * size;
  for (int64_t n = int64_t{slice} * kBytes; n < (slice + 1) * kBytes && n < a.channels * size; n += kLine)
    prefetch_l2(row + n);
}

static_assert(sizeof(RelevanceCall) + sizeof(PoolArgs) + sizeof(Batch) + 64 < 4096, "kernel parameters of any GPU");

__global__ void __launch_bounds__(kThreads, 2) score_and_pool(
    const __grid_constant__ RelevanceCall r, const __grid_constant__ PoolArgs a, const __grid_constant__ Batch batch,
    int parts, int items, int slices, float* logits, Statistics* partials) {
  const ScoreMemory memory;
  score_parts(r, batch, parts, logits, partials, memory);

  const int begin = static_cast<int>(int64_t{items} * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(int64_t{items} * (blockIdx.x + 1) / gridDim.x);
  const int64_t in_output = a.window.outputs[1] * a.window.outputs[2];
  const int64_t first = batch.clip[0].first_output * in_output;
  if (begin + warp_id() < end) {
    const int item = begin + warp_id();
    prefetch_window(a, batch, PooledWindow(a, batch, first + item / slices), item % slices);
  }
  grid_barrier();

  normalise_parts(r, batch, parts, logits, partials, memory);
  for (int item = begin; item < end;) {
    const PooledWindow head(a, batch, first + item / slices);
    const Statistics statistics = clip_statistics(r, head.clip, partials, memory);
    const int64_t in_frame = r.height * r.width;
    const LogitScores scores{
        logits + first_patch(batch, head.b, head.clip, in_frame), statistics, head.clip.first_frame,
        static_cast<int>(r.height), static_cast<int>(r.width)};
    const int64_t clip_end = ((head.clip.first_output + head.clip.outputs) * in_output - first) * slices;
    const int stop = clip_end < end ? static_cast<int>(clip_end) : end;
    for (int n = item + warp_id(); n < stop; n += kWarps)
      pool_window(a, batch, PooledWindow(a, batch, first + n / slices), n % slices, scores);
    item = stop;
  }
}

}  // namespace

size_t guided_bytes(const RelevanceArgs& a) {
  int64_t patches = 0;
  for (int64_t b = 0; b < a.batch; ++b) patches += patches_of(a, a.clips[b]);
  return relevance_bytes(a) + patches * sizeof(float);
}

const char* prompt_guided_pool3d(const RelevanceCall& r, const PoolArgs& a, Stream stream) {
  auto* partials = static_cast<Statistics*>(r.workspace);
  auto* logits = reinterpret_cast<float*>(partials + count_parts(r, kForwardTile));
  const size_t shared = ScoreMemory::bytes(r.channels);
  const int slices = slices_of(a);
  int resident;
  if (const char* error = cooperative_blocks(resident, score_and_pool, shared, stream)) return error;
  return for_each_batch(a, kForwardTile, [&](const Batch& batch, int parts, int64_t outputs) -> const char* {
    const int64_t items = outputs * a.window.outputs[1] * a.window.outputs[2] * slices;
    if (!countable(a) || items > kMost) return kTooMany;
    // Half of the warps without an item, where there are few, for more processors at work.
    const int64_t useful = std::max<int64_t>(parts, ceil_div(items, kWarps / 2));
    const Launch where{
        static_cast<int>(std::min<int64_t>(resident, useful)), kThreads, shared, true, stream.device, stream.handle};
    return launch(score_and_pool, where, r, a, batch, parts, static_cast<int>(items), slices, logits, partials);
  });
}

}  // namespace ppllava::cuda
