// The clips of a launch, small enough to travel as a kernel parameter: no upload, and safe to capture in a CUDA graph.
#pragma once

#include "common.cuh"  // defines: ceil_div

namespace ppllava::cuda {

#ifndef PPLLAVA_CUDA_ON_HOST
constexpr int kMaxClips = 64;    // of different length in one launch; more take several launches
constexpr int kMaxParts = 2048;  // of one clip
#else
constexpr int kMaxClips = 3;  // so that small tests take several launches
constexpr int kMaxParts = 4;  // and several tiles in a part
#endif
constexpr int kForwardTile = 32;  // patches that a block scores at a time
constexpr int kBackwardTile = 32;

// A clip is cut into parts, whose sums are combined in order. They depend on its length alone, and on no neighbour.
PPLLAVA_DEVICE inline int part_size(int64_t patches, int tile) {
  return static_cast<int>(tile * ceil_div(patches, int64_t{tile} * kMaxParts));
}

// Counts of a clip, and sums of those of the clips before it.
struct DeviceClip {
  int first_frame, frames, first_output, outputs;
  int span;        // frames in its largest window
  int first_part;  // of the forward's or the backward's
  int64_t first_slot;
};

struct Batch {
  bool ragged;  // else clip[0] stands for all, and clip[1] - clip[0] for the step from each to the next
  int clips;
  int first;  // clip of the whole call
  DeviceClip clip[kMaxClips + 1];

  __device__ DeviceClip at(int b) const {
    if (ragged) return clip[b];
    DeviceClip one = clip[0];
    one.first_output = b * clip[1].first_output;
    one.first_part = b * clip[1].first_part;
    one.first_slot = b * clip[1].first_slot;
    return one;
  }

  // The clip that holds part or output `index`, as the field says.
  __device__ int find(int DeviceClip::* field, int index) const {
    if (!ragged) return index / (clip[1].*field);
    int low = 0, high = clips;  // low <= result < high
    while (low + 1 < high) {
      const int middle = (low + high) / 2;
      (clip[middle].*field <= index ? low : high) = middle;
    }
    return low;
  }
};

// Where the patches of a clip begin in a contiguous [B, T, H, W] or [F, H, W].
inline __device__ int64_t first_patch(const Batch& batch, int b, const DeviceClip& clip, int64_t patches_of_frame) {
  const int64_t frame = batch.ragged ? clip.first_frame : static_cast<int64_t>(batch.first + b) * clip.frames;
  return frame * patches_of_frame;
}

template <class Args>
int64_t patches_of(const Args& a, const Clip& clip) {
  return clip.frames * a.height * a.width;
}

template <class Args>
int64_t count_parts(const Args& a, int tile) {
  int64_t parts = 0;
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t patches = patches_of(a, a.clips[b]);
    parts += ceil_div(patches, part_size(patches, tile));
  }
  return parts;
}

// Counts are 32 bits wide in the kernels; offsets are 64.
constexpr int64_t kMost = 1 << 30;
constexpr const char* kTooMany = "more than 2**30 frames, patches of a clip, windows or channels in one call; split it";

// Call function(batch, parts, outputs) for each launch that the clips of `a` need, until one fails.
template <class Args, class Function>
const char* for_each_batch(const Args& a, int tile, const Function& function) {
  int64_t parts = 0, outputs = 0;
  for (int64_t first = 0; first < a.batch;) {
    Batch batch{};
    batch.ragged = a.ragged;
    batch.first = static_cast<int>(first);
    const int64_t end = a.ragged && a.batch > first + kMaxClips ? first + kMaxClips : a.batch;
    batch.clips = static_cast<int>(end - first);
    const int64_t first_part = parts, first_output = outputs;
    for (int64_t b = first; b <= end; ++b) {
      const Clip clip = b < a.batch ? a.clips[b] : Clip{};
      const int64_t patches = patches_of(a, clip);
      const int64_t frames = clip.first_frame + clip.frames;
      const int64_t counts[] = {patches, parts, outputs, frames, a.channels};
      for (const int64_t count : counts)
        if (count > kMost) return kTooMany;
      if (b - first < (a.ragged ? kMaxClips + 1 : 2)) {
        batch.clip[b - first] = {
            static_cast<int>(clip.first_frame),
            static_cast<int>(clip.frames),
            static_cast<int>(outputs),
            static_cast<int>(clip.outputs),
            static_cast<int>(clip.span),
            static_cast<int>(parts),
            clip.first_slot};
      }
      if (b == end) break;
      parts += ceil_div(patches, part_size(patches, tile));
      outputs += clip.outputs;
    }
    if (const char* error = function(batch, static_cast<int>(parts - first_part), outputs - first_output)) return error;
    first = end;
  }
  return nullptr;
}

}  // namespace ppllava::cuda
