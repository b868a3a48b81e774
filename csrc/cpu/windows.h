// Windows of patches, windows of a patch, and the softmax of a window's scores.
#pragma once

#include "rows.h"  // defines: Accumulator, PoolArgs

#include <algorithm>  // defines: std::max, std::upper_bound
#include <limits>     // defines: std::numeric_limits

namespace ppllava::CPU_CAPABILITY {

// One window: where it lies in its clip, and the index of its output row.
struct Place {
  int64_t batch, first_frame;
  int64_t begin[3], end[3];  // along (T, H, W)
};

inline Axis axis_of(const PoolArgs& a, const Clip& clip, int n) {
  const int64_t sizes[3] = {clip.frames, a.height, a.width};
  return {sizes[n], n == 0 ? clip.outputs : a.window.outputs[n], a.window.kernel[n], a.window.stride[n]};
}

inline int64_t clip_of_output(const PoolArgs& a, int64_t output) {
  const Clip* clip =
      std::upper_bound(a.clips, a.clips + a.batch, output, [](int64_t o, const Clip& c) { return o < c.first_output; });
  return clip - a.clips - 1;
}

inline Place place_of(const PoolArgs& a, int64_t index) {  // index: of [outputs, Ho, Wo]
  const int64_t column = index % a.window.outputs[2], rest = index / a.window.outputs[2];
  const int64_t row = rest % a.window.outputs[1], output = rest / a.window.outputs[1];
  const int64_t batch = clip_of_output(a, output);
  const Clip& clip = a.clips[batch];
  const int64_t at[3] = {output - clip.first_output, row, column};
  Place place{batch, clip.first_frame, {}, {}};
  for (int n = 0; n < 3; ++n) {
    const Axis axis = axis_of(a, clip, n);
    place.begin[n] = axis.begin(at[n]);
    place.end[n] = axis.end(at[n]);
  }
  return place;
}

template <class Function>
void for_each_patch(const Place& p, Function function) {
  for (int64_t t = p.begin[0]; t < p.end[0]; ++t)
    for (int64_t h = p.begin[1]; h < p.end[1]; ++h)
      for (int64_t w = p.begin[2]; w < p.end[2]; ++w) function(t, h, w);
}

// The first patch of each clip among those of all clips, and how many there are: [batch + 1].
inline std::vector<int64_t> first_patches(const PoolArgs& a) {
  std::vector<int64_t> first{0};
  for (int64_t b = 0; b < a.batch; ++b) first.push_back(first[b] + a.clips[b].frames * a.height * a.width);
  return first;
}

// A patch in its clip.
struct Patch {
  int64_t batch;
  int64_t at[3];  // (t, h, w)
};

inline Patch patch_of(const PoolArgs& a, const std::vector<int64_t>& first, int64_t index) {
  const int64_t batch = std::upper_bound(first.begin(), first.end(), index) - first.begin() - 1;
  const int64_t local = index - first[batch], row = local / a.width;
  return {batch, {row / a.height, row % a.height, local % a.width}};
}

// Call function(window, slot) for each window that holds the patch, in order; slot: that of the patch in the window.
template <class Function>
void for_each_window(const PoolArgs& a, const Patch& patch, Function function) {
  const Clip& clip = a.clips[patch.batch];
  const Axis axes[3] = {axis_of(a, clip, 0), axis_of(a, clip, 1), axis_of(a, clip, 2)};
  const auto& at = patch.at;
  for (int64_t t = axes[0].first(at[0]); t < axes[0].last(at[0]); ++t)
    for (int64_t h = axes[1].first(at[1]); h < axes[1].last(at[1]); ++h)
      for (int64_t w = axes[2].first(at[2]); w < axes[2].last(at[2]); ++w) {
        const int64_t window = ((clip.first_output + t) * a.window.outputs[1] + h) * a.window.outputs[2] + w;
        function(
            window,
            a.window.slot(clip, window, at[0] - axes[0].begin(t), at[1] - axes[1].begin(h), at[2] - axes[2].begin(w)));
      }
}

// Call function(slot, t, h, w) for each patch of a window, in order.
template <class Function>
void for_each_slot(const PoolArgs& a, const Place& place, int64_t window, Function function) {
  for_each_patch(place, [&](int64_t t, int64_t h, int64_t w) {
    const Clip& clip = a.clips[place.batch];
    function(a.window.slot(clip, window, t - place.begin[0], h - place.begin[1], w - place.begin[2]), t, h, w);
  });
}

inline int64_t count_windows(const PoolArgs& a) { return a.outputs * a.window.outputs[1] * a.window.outputs[2]; }

// shares of one window, in the order of its patches, from its scores; all equal without any.
template <class Acc>
void load_shares(std::vector<Acc>& shares, const PoolArgs& a, const Place& place) {
  const auto* weights = static_cast<const Acc*>(a.weights.data);
  shares.clear();
  for_each_patch(place, [&](int64_t t, int64_t h, int64_t w) {
    shares.push_back(weights ? weights[a.weights.offset(place.batch, place.first_frame + t, h, w)] : Acc(0));
  });
  Acc largest = -std::numeric_limits<Acc>::infinity();
  double sum = 0;
  for (const auto score : shares) largest = std::max(largest, score);
  for (auto& share : shares) sum += share = std::exp((share - largest) / static_cast<Acc>(a.temperature));
  for (auto& share : shares) share /= static_cast<Acc>(sum);
}

}  // namespace ppllava::CPU_CAPABILITY
