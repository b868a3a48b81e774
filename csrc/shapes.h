// What the kernels see: plain structs, no torch.
#pragma once

#include <cstdint>  // defines: int64_t

#ifdef __CUDACC__
#define PPLLAVA_DEVICE __host__ __device__
#else
#define PPLLAVA_DEVICE
#endif

namespace ppllava {

enum class Dtype { float32, float64, float16, bfloat16 };

// A tensor over (batch, frame, row, column) with a contiguous channel axis, if it has one. Ragged batches share one
// frame axis and have a batch stride of 0.
struct Grid {
  void* data;  // null: not given
  Dtype dtype;
  int64_t stride[4];  // of (batch, frame, row, column), in elements

  PPLLAVA_DEVICE int64_t offset(int64_t batch, int64_t frame, int64_t row, int64_t column) const {
    return batch * stride[0] + frame * stride[1] + row * stride[2] + column * stride[3];
  }
};

// The frames of one video, in the input and in the pooled output.
struct Clip {
  int64_t first_frame;  // on the frame axis of the input: 0 for dense batches
  int64_t frames;
  int64_t first_output;  // on the packed frame axis of the output
  int64_t outputs;
  int64_t span;        // frames in its largest window
  int64_t first_slot;  // of its windows' patches in the scratch of the backward
};

// The windows of one axis: kernel and stride or, where kernel is 0, adaptive. A GPU divides 32 bits faster than 64.
template <class Int>
struct AxisOf {
  Int size, outputs, kernel, stride;

  // Window o holds the positions begin(o) <= i < end(o).
  PPLLAVA_DEVICE Int begin(Int o) const {
    return kernel ? o * stride : static_cast<Int>(static_cast<int64_t>(o) * size / outputs);
  }
  PPLLAVA_DEVICE Int end(Int o) const {
    if (kernel) return o * stride + kernel;
    return static_cast<Int>((static_cast<int64_t>(o + 1) * size + outputs - 1) / outputs);
  }

  // Position i lies in the windows first(i) <= o < last(i), except that strided windows can leave gaps.
  PPLLAVA_DEVICE Int first(Int i) const {
    if (!kernel) return static_cast<Int>(static_cast<int64_t>(i) * outputs / size);
    return i < kernel ? 0 : (i - kernel) / stride + 1;
  }
  PPLLAVA_DEVICE Int last(Int i) const {
    const int64_t o = kernel ? i / stride + 1 : (static_cast<int64_t>(i + 1) * outputs + size - 1) / size;
    return o < outputs ? static_cast<Int>(o) : outputs;
  }
};

using Axis = AxisOf<int64_t>;

struct Window {
  int64_t kernel[3], stride[3];  // kernel 0: adaptive
  int64_t outputs[3];            // outputs[0] is that of the clip and comes from Clip
  int64_t high, wide;            // rows and columns in the largest window

  // Scratch of the backward: for each window of a clip as many slots as its largest window has patches.
  int64_t slots(const Clip& clip) const { return clip.span * high * wide; }
  int64_t slot(const Clip& clip, int64_t window, int64_t t, int64_t h, int64_t w) const {
    const int64_t local = window - clip.first_output * outputs[1] * outputs[2];
    return clip.first_slot + ((local * clip.span + t) * high + h) * wide + w;
  }
};

// Y[o] = sum over i in window o of softmax(weights[i] / temperature) * values[i]
struct PoolArgs {
  Grid values, weights;        // [B, T, H, W, D], [B, T, H, W] in the accumulator's dtype
  void* pooled;                // [outputs, Ho, Wo, D], the dtype of values
  const void* grad;            // [outputs, Ho, Wo, D]; backward only
  Grid grad_values;            // [B, T, H, W, D]
  Grid grad_weights;           // [B, T, H, W] in the accumulator's dtype
  void *shares, *grad_scores;  // [slots]: each clip's windows x (span, high, wide)
  const Clip* clips;           // [batch]
  bool ragged;                 // the clips share one frame axis
  int64_t batch, outputs, height, width, channels;
  Window window;
  double temperature;
};

// Some channels of z = x W1, before bias and gelu, of the patches first <= i < first + rows of all clips, which lie in
// one clip: a row of `values` each. What is pooled adds up over tiles.
struct TileArgs : PoolArgs {  // values: data and dtype; channels: of the tile; pooled: in the accumulator's dtype
  const void* bias;           // [channels] or null, in the dtype of values
  int64_t first, rows;
  int64_t step;  // from one row of pooled or grad to the next
};

// cosines[i] = cos(embeds[i], text)
struct ScoreArgs {
  const void* embeds;  // [rows, C]
  const void* text;    // [C] in the accumulator's dtype
  void* cosines;       // [rows] in the accumulator's dtype
  Dtype dtype;         // of embeds
  int64_t rows, channels;
};

// relevance[i] = softmax over one clip of scale * cos(image_embeds[i], text_embeds)
struct RelevanceArgs {
  Grid image_embeds;        // [B, T, H, W, C]
  const void* text_embeds;  // [B, C] in the accumulator's dtype
  void* relevance;          // [B, T, H, W] in the accumulator's dtype
  const void* grad;         // [B, T, H, W]; backward only
  Grid grad_image;          // [B, T, H, W, C]
  void* grad_text;          // [B, C] in the accumulator's dtype
  void* grad_scale;         // [1]
  const Clip* clips;        // [batch]
  bool ragged;              // the clips share one frame axis
  int64_t batch, height, width, channels;
  double scale;
};

}  // namespace ppllava
