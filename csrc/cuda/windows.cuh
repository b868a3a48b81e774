// Windows of patches, the softmax of their scores, and weighted sums of rows.
#pragma once

#include "clips.cuh"  // defines: Batch, DeviceClip

namespace ppllava::cuda {

using DeviceAxis = AxisOf<int>;

PPLLAVA_DEVICE inline DeviceAxis axis_of(const PoolArgs& a, const DeviceClip& clip, int n) {
  const int size = n == 0 ? clip.frames : static_cast<int>(n == 1 ? a.height : a.width);
  const int outputs = n == 0 ? clip.outputs : static_cast<int>(a.window.outputs[n]);
  return {size, outputs, static_cast<int>(a.window.kernel[n]), static_cast<int>(a.window.stride[n])};
}

// A box of (T, H, W), of patches or of windows, walked in order.
struct Box {
  int begin[3], size[3];

  PPLLAVA_DEVICE int volume() const { return size[0] * size[1] * size[2]; }
  __device__ void place(int k, int (&at)[3]) const {
    const int rest = k / size[2];
    at[0] = begin[0] + rest / size[1], at[1] = begin[1] + rest % size[1], at[2] = begin[2] + k % size[2];
  }
};

// One window: its clip, its patches, and its index among all windows of the call.
struct PooledWindow {
  int b;
  DeviceClip clip;
  Box patches;
  int64_t index;

  __device__ PooledWindow(const PoolArgs& a, const Batch& batch, int64_t window) : index(window) {
    const int rows = static_cast<int>(a.window.outputs[1]), columns = static_cast<int>(a.window.outputs[2]);
    const int at_w = static_cast<int>(window) % columns, rest = static_cast<int>(window) / columns;
    const int output = rest / rows;
    b = batch.find(&DeviceClip::first_output, output);
    clip = batch.at(b);
    const int at[3] = {output - clip.first_output, rest % rows, at_w};
    for (int n = 0; n < 3; ++n) {
      const DeviceAxis axis = axis_of(a, clip, n);
      patches.begin[n] = axis.begin(at[n]);
      patches.size[n] = axis.end(at[n]) - patches.begin[n];
    }
  }
};

// One patch of a launch, whose frames follow each other, clip after clip.
struct LaunchedPatch {
  int b;
  DeviceClip clip;
  int at[3];

  __device__ LaunchedPatch(const PoolArgs& a, const Batch& batch, int64_t patch) {
    const int in_frame = static_cast<int>(a.height * a.width), width = static_cast<int>(a.width);
    const int64_t frame = patch / in_frame + (batch.ragged ? batch.clip[0].first_frame : 0);
    const int inside = static_cast<int>(patch % in_frame);
    b = batch.ragged ? batch.find(&DeviceClip::first_frame, static_cast<int>(frame))
                     : static_cast<int>(frame / batch.clip[0].frames);
    clip = batch.at(b);
    at[0] = static_cast<int>(frame - (batch.ragged ? clip.first_frame : int64_t{b} * clip.frames));
    at[1] = inside / width, at[2] = inside % width;
  }

  // Of its element in a tensor of the call.
  __device__ int64_t offset(const Batch& batch, const Grid& grid) const {
    return grid.offset(batch.first + b, clip.first_frame + at[0], at[1], at[2]);
  }
};

// Scratch of the backward: of a window of the clip, the slot of its patch (t, h, w).
inline __device__ int64_t slot_of(const PoolArgs& a, const DeviceClip& clip, int64_t window, int t, int h, int w) {
  return clip.first_slot + ((window * clip.span + t) * a.window.high + h) * a.window.wide + w;
}

// The windows that hold one patch of a clip, in order.
struct PatchWindows {
  const PoolArgs& a;
  const DeviceClip& clip;
  int at[3];
  DeviceAxis axes[3];
  Box windows;

  __device__ PatchWindows(const PoolArgs& args, const DeviceClip& where, const int (&patch)[3])
      : a(args), clip(where), at{patch[0], patch[1], patch[2]} {
    for (int n = 0; n < 3; ++n) {
      axes[n] = axis_of(a, clip, n);
      windows.begin[n] = axes[n].first(at[n]);
      const int size = axes[n].last(at[n]) - windows.begin[n];
      windows.size[n] = size > 0 ? size : 0;
    }
  }

  // Of the k-th: the slot of the patch, and the index among all windows of the call.
  __device__ int64_t slot(int k, int64_t& window) const {
    int o[3];
    windows.place(k, o);
    const int64_t local = (o[0] * a.window.outputs[1] + o[1]) * a.window.outputs[2] + o[2];
    window = clip.first_output * a.window.outputs[1] * a.window.outputs[2] + local;
    return slot_of(
        a, clip, local, at[0] - axes[0].begin(o[0]), at[1] - axes[1].begin(o[1]), at[2] - axes[2].begin(o[2]));
  }
};

// What one lane knows of one row of a weighted sum.
struct Term {
  float share;
  int64_t offset;
};

// Rows, and chunks of each lane in a row, that a warp has in flight: a window has many rows, a patch has few windows.
constexpr int kWindowRows = 4, kWindowColumns = 2, kPatchRows = 1, kPatchColumns = 4;

template <class T, int COLUMNS>
constexpr int kSlice = COLUMNS * kWarp * kChunk<T>;  // channels that a warp takes at a time

// Channels of one lane in the slice that begins at `base`.
template <class T>
__device__ int channel_of(int base, int column) {
  return base + (column * kWarp + lane_id()) * kChunk<T>;
}

// ROWS rows from the k-th on, out of `count`, as far as they go; term: that of row lane.
template <class T, bool ALIGNED, int ROWS, int COLUMNS>
__device__ void load_rows(
    Raw (&raw)[ROWS][COLUMNS], const T* rows, const Term& term, int k, int count, int base, int channels) {
#pragma unroll
  for (int j = 0; j < ROWS; ++j) {
    const T* row = rows + __shfl_sync(kAll, term.offset, (k + j) % kWarp);
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) {
      const int d = channel_of<T>(base, i);
      raw[j][i] = load_raw<T, ALIGNED>(row + d, k + j < count ? channels - d : 0);
    }
  }
}

// out[d] = sum_k share_k rows[offset_k + d] for the channels first <= d < last. Lane n has term(n) as `mine`; terms
// beyond the first 32 are asked for.
template <class T, bool ALIGNED, int ROWS, int COLUMNS, class Terms>
__device__ void weigh_rows(
    T* out, const T* rows, const Term& mine, int count, int first, int last, const Terms& terms) {
  constexpr int N = kChunk<T>;
#pragma unroll 1
  for (int base = first; base < last; base += kSlice<T, COLUMNS>) {
    float sum[COLUMNS][N] = {};
#pragma unroll 1
    for (int begin = 0; begin < count; begin += kWarp) {
      const Term term = begin == 0 ? mine : terms(begin + lane_id());
      const int here = count - begin < kWarp ? count - begin : kWarp;
#pragma unroll 1
      for (int k = 0; k < here; k += ROWS) {
        Raw raw[ROWS][COLUMNS];
        load_rows<T, ALIGNED>(raw, rows, term, k, here, base, last);
#pragma unroll
        for (int j = 0; j < ROWS; ++j) {
          const float share = __shfl_sync(kAll, term.share, (k + j) % kWarp);
          if (k + j >= here) break;
#pragma unroll
          for (int i = 0; i < COLUMNS; ++i) {
            float x[N];
            unpack<T>(x, raw[j][i]);
#pragma unroll
            for (int n = 0; n < N; ++n) sum[i][n] += share * x[n];
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) {
      const int d = channel_of<T>(base, i);
      store_chunk<T, ALIGNED>(out + d, sum[i], last - d);
    }
  }
}

// p[i] = softmax over the window of score(i) / temperature, a patch for each lane at a time. Score: of a place (t, h,
// w) of the clip.
template <class Score>
struct WindowSoftmax {
  const PoolArgs& a;
  const PooledWindow& window;
  Score score;
  int64_t b;
  float largest = -INFINITY, total = 0;
  Term mine;  // of patch `lane`

  __device__ WindowSoftmax(const PoolArgs& args, const PooledWindow& which, int64_t clip, const Score& scores)
      : a(args), window(which), score(scores), b(clip) {
    const int volume = window.patches.volume();
    mine = scored(lane_id());
    largest = mine.share;
#pragma unroll 1
    for (int k = kWarp + lane_id(); k < volume; k += kWarp) largest = fmaxf(largest, scored(k).share);
    largest = warp_max(largest);
    total = lane_id() < volume ? exponential(mine.share) : 0.f;
#pragma unroll 1
    for (int k = kWarp + lane_id(); k < volume; k += kWarp) total += exponential(scored(k).share);
    total = warp_sum(total);
    mine = normalised(mine, lane_id());
  }

  __device__ Term operator()(int k) const { return normalised(scored(k), k); }

 private:
  __device__ float exponential(float s) const { return expf((s - largest) / static_cast<float>(a.temperature)); }
  __device__ Term normalised(Term t, int k) const {
    t.share = k < window.patches.volume() ? exponential(t.share) / total : 0.f;
    return t;
  }
  __device__ Term scored(int k) const {
    if (k >= window.patches.volume()) return {-INFINITY, 0};
    int at[3];
    window.patches.place(k, at);
    const int64_t frame = window.clip.first_frame + at[0];
    return {score(b, frame, at), a.values.offset(b, frame, at[1], at[2])};
  }
};

inline __device__ bool rows_aligned(const PoolArgs& a) {
  const Grid pooled{a.pooled ? a.pooled : const_cast<void*>(a.grad), a.values.dtype, {a.channels, 0, 0, 0}};
  return is_aligned(a.values, a.channels) && is_aligned(pooled, a.channels) &&
         (!a.grad_values.data || is_aligned(a.grad_values, a.channels));
}

// One window's slice of channels.
template <class Score>
__device__ void pool_window(
    const PoolArgs& a, const Batch& batch, const PooledWindow& window, int slice, const Score& score) {
  const WindowSoftmax<Score> softmax(a, window, batch.first + window.b, score);
  with_rows(a.values.dtype, rows_aligned(a), [&](auto zero, auto aligned) {
    using T = decltype(zero);
    constexpr int kSize = kSlice<T, kWindowColumns>;
    const int channels = static_cast<int>(a.channels), first = slice * kSize;
    const int last = first + kSize < channels ? first + kSize : channels;
    T* out = static_cast<T*>(a.pooled) + window.index * a.channels;
    const T* rows = static_cast<const T*>(a.values.data);
    weigh_rows<T, decltype(aligned)::value, kWindowRows, kWindowColumns>(
        out, rows, softmax.mine, window.patches.volume(), first, last, softmax);
  });
}

// Scores of a tensor, or none: equal ones.
struct WeightScores {
  Grid weights;

  __device__ float operator()(int64_t b, int64_t frame, const int (&at)[3]) const {
    return weights.data ? load_scalar(weights, weights.offset(b, frame, at[1], at[2])) : 0.f;
  }
};

// Whether the index of a window of the whole call fits into 32 bits.
inline bool countable(const PoolArgs& a) {
  return static_cast<double>(a.outputs) * a.window.outputs[1] * a.window.outputs[2] <= kMost;
}

// Slices of channels of a row, for the dtype of `values`.
inline int slices_of(const PoolArgs& a) {
  return static_cast<int>(ceil_div(
      a.channels, a.values.dtype == Dtype::float32 ? kSlice<float, kWindowColumns> : kSlice<__half, kWindowColumns>));
}

}  // namespace ppllava::cuda
