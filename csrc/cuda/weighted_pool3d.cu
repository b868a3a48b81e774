// y[o] = sum_{i in o} p[o, i] v[i],  p[o, i] = softmax_{i in o}(w[i] / temperature)

#include "windows.cuh"  // defines: PooledWindow, LaunchedPatch, PatchWindows, WindowSoftmax, pool_window, weigh_rows

namespace ppllava::cuda {
namespace {

// A warp for each window and slice of channels.
__global__ void __launch_bounds__(kThreads, 2)
    pool_windows(const __grid_constant__ PoolArgs a, const __grid_constant__ Batch batch, int items, int slices) {
  const int item = blockIdx.x * (blockDim.x / kWarp) + warp_id();
  if (item >= items) return;
  const int64_t first = batch.clip[0].first_output * a.window.outputs[1] * a.window.outputs[2];
  const PooledWindow window(a, batch, first + item / slices);
  pool_window(a, batch, window, item % slices, WeightScores{a.weights});
}

// g[o] . v[i] of 32 patches, one for each lane, over the slices of this warp.
template <class T, bool ALIGNED>
__device__ float dots_of_rows(const PoolArgs& a, const T* grad, const Term& term, int count) {
  constexpr int N = kChunk<T>;
  const int channels = static_cast<int>(a.channels);
  float mine = 0;
  for (int base = warp_id() * kSlice<T, kWindowColumns>; base < channels; base += kWarps * kSlice<T, kWindowColumns>) {
    float g[kWindowColumns][N];
#pragma unroll
    for (int i = 0; i < kWindowColumns; ++i) {
      const int d = channel_of<T>(base, i);
      unpack<T>(g[i], load_raw<T, ALIGNED>(grad + d, channels - d));
    }
    for (int k = 0; k < count; k += kWindowRows) {
      Raw raw[kWindowRows][kWindowColumns];
      load_rows<T, ALIGNED>(raw, static_cast<const T*>(a.values.data), term, k, count, base, channels);
#pragma unroll
      for (int j = 0; j < kWindowRows; ++j) {
        float dot = 0;
#pragma unroll
        for (int i = 0; i < kWindowColumns; ++i) {
          float x[N];
          unpack<T>(x, raw[j][i]);
#pragma unroll
          for (int n = 0; n < N; ++n) dot += g[i][n] * x[n];
        }
        dot = warp_sum(dot);
        if (lane_id() == k + j) mine += dot;
      }
    }
  }
  return mine;
}

// shares[o, i] = p[o, i];  grad_scores[o, i] = p[o, i] (g[o].v[i] - m[o]) / temperature,  m[o] = sum_j p[o, j]
// g[o].v[j] A block for each window. Where one p is almost 1 its dot - m is far smaller than its dot: m is kept in
// float64, or its rounding, divided by the temperature, would be the error of the gradient.
__global__ void __launch_bounds__(kThreads, 2)
    backward_windows(const __grid_constant__ PoolArgs a, const __grid_constant__ Batch batch) {
  const int64_t first = batch.clip[0].first_output * a.window.outputs[1] * a.window.outputs[2];
  const PooledWindow window(a, batch, first + blockIdx.x);
  const WindowSoftmax<WeightScores> softmax(a, window, batch.first + window.b, WeightScores{a.weights});
  const int volume = window.patches.volume();
  const int64_t slots = window.clip.span * a.window.high * a.window.wide;
  const int64_t local = window.index - window.clip.first_output * a.window.outputs[1] * a.window.outputs[2];
  const int64_t first_slot = window.clip.first_slot + local * slots;
  float* dots = reinterpret_cast<float*>(dynamic_shared());  // [kWarps, 32]

  const auto slot = [&](int k) {
    int at[3];
    window.patches.place(k, at);
    for (int n = 0; n < 3; ++n) at[n] -= window.patches.begin[n];
    return first_slot + (at[0] * a.window.high + at[1]) * a.window.wide + at[2];
  };
  double mean = 0, total = 0;
  for (int begin = 0; begin < volume; begin += kWarp) {
    const Term term = begin == 0 ? softmax.mine : softmax(begin + lane_id());
    const int here = volume - begin < kWarp ? volume - begin : kWarp;
    if (a.grad_scores) {
      float mine = 0;
      with_rows(a.values.dtype, rows_aligned(a), [&](auto zero, auto aligned) {
        using T = decltype(zero);
        const T* grad = static_cast<const T*>(a.grad) + window.index * a.channels;
        mine = dots_of_rows<T, decltype(aligned)::value>(a, grad, term, here);
      });
      __syncthreads();  // dots may still be read
      dots[threadIdx.x] = mine;
      __syncthreads();
    }
    if (warp_id() != 0 || lane_id() >= here) continue;
    static_cast<float*>(a.shares)[slot(begin + lane_id())] = term.share;
    if (a.grad_scores) {
      float dot = dots[lane_id()];
      for (int w = 1; w < kWarps; ++w) dot += dots[w * kWarp + lane_id()];
      static_cast<float*>(a.grad_scores)[slot(begin + lane_id())] = dot;
      mean += static_cast<double>(term.share) * dot;
      total += term.share;
    }
  }
  if (!a.grad_scores || warp_id() != 0) return;
  mean = warp_sum(mean) / warp_sum(total);
  for (int k = lane_id(); k < volume; k += kWarp) {
    float& grad_score = static_cast<float*>(a.grad_scores)[slot(k)];
    const float away = static_cast<float>(grad_score - mean);
    grad_score = static_cast<float*>(a.shares)[slot(k)] * away / static_cast<float>(a.temperature);
  }
}

// grad_values[i] = sum_{o with i} p[o, i] g[o];  grad_weights[i] = sum_{o with i} grad_scores[o, i]
// A warp for each patch, which collects its own windows, in order: no atomics, the same bits every time.
__global__ void __launch_bounds__(kThreads, 2)
    backward_patches(const __grid_constant__ PoolArgs a, const __grid_constant__ Batch batch, int64_t items) {
  const int64_t item = int64_t{blockIdx.x} * kWarps + warp_id();
  if (item >= items) return;
  const LaunchedPatch patch(a, batch, item);
  const PatchWindows windows(a, patch.clip, patch.at);
  const int count = windows.windows.volume();
  const auto term = [&](int k) -> Term {
    if (k >= count) return {0, 0};
    int64_t window;
    const int64_t n = windows.slot(k, window);
    return {static_cast<const float*>(a.shares)[n], window * a.channels};
  };
  if (a.grad_weights.data) {
    float sum = 0;
    for (int k = lane_id(); k < count; k += kWarp) {
      int64_t window;
      sum += static_cast<const float*>(a.grad_scores)[windows.slot(k, window)];
    }
    sum = warp_sum(sum);
    if (lane_id() == 0) store_scalar(a.grad_weights, patch.offset(batch, a.grad_weights), sum);
  }
  if (a.grad_values.data) {
    with_rows(a.values.dtype, rows_aligned(a), [&](auto zero, auto aligned) {
      using T = decltype(zero);
      T* out = static_cast<T*>(a.grad_values.data) + patch.offset(batch, a.grad_values);
      const int channels = static_cast<int>(a.channels);
      weigh_rows<T, decltype(aligned)::value, kPatchRows, kPatchColumns>(
          out, static_cast<const T*>(a.grad), term(lane_id()), count, 0, channels, term);
    });
  }
}

Launch ordinary(int64_t blocks, size_t shared, Stream stream) {
  return {static_cast<int>(blocks), kThreads, shared, false, stream.device, stream.handle};
}

}  // namespace

const char* weighted_pool3d(const PoolArgs& a, Stream stream) {
  const int slices = slices_of(a);
  return for_each_batch(a, kForwardTile, [&](const Batch& batch, int, int64_t outputs) -> const char* {
    const int64_t items = outputs * a.window.outputs[1] * a.window.outputs[2] * slices;
    if (!countable(a) || items > kMost) return kTooMany;
    // Few items: fewer warps in each block, for more processors at work.
    const int warps = items < 4096 ? 2 : kWarps;
    Launch where = ordinary(ceil_div(items, warps), 0, stream);
    where.threads = warps * kWarp;
    return launch(pool_windows, where, a, batch, static_cast<int>(items), slices);
  });
}

const char* weighted_pool3d_backward(const PoolArgs& a, Stream stream) {
  return for_each_batch(a, kForwardTile, [&](const Batch& batch, int, int64_t outputs) -> const char* {
    const int64_t windows = outputs * a.window.outputs[1] * a.window.outputs[2];
    int64_t items = 0;
    for (int n = 0; n < batch.clips; ++n) items += patches_of(a, a.clips[batch.first + n]);
    if (!countable(a) || ceil_div(items, kWarps) > kMost) return kTooMany;
    if (const char* error = launch(backward_windows, ordinary(windows, kThreads * sizeof(float), stream), a, batch))
      return error;
    return launch(backward_patches, ordinary(ceil_div(items, kWarps), 0, stream), a, batch, items);
  });
}

}  // namespace ppllava::cuda
