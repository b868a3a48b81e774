// From at::Tensor to the structs of shapes.h, for the kernels of either device.
#pragma once

#include <ATen/ATen.h>  // defines: at::Tensor

#include <optional>  // defines: std::optional
#include <vector>    // defines: std::vector

#include "shapes.h"  // defines: Grid, Clip, PoolArgs, TileArgs, ScoreArgs, RelevanceArgs

namespace ppllava {

using OptionalTensor = std::optional<at::Tensor>;
using Sizes = std::vector<int64_t>;

inline Dtype dtype_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return Dtype::float32;
    case at::kDouble:
      return Dtype::float64;
    case at::kHalf:
      return Dtype::float16;
    case at::kBFloat16:
      return Dtype::bfloat16;
    default:
      TORCH_CHECK(false, "expected a floating point tensor, got ", x.scalar_type());
  }
}

// Where the tensors of a call are: checked here, too, since torch.ops can be called without the checks of Python.
struct Tensors {
  at::Device device;

  void check(const at::Tensor& x) const {
    TORCH_CHECK(x.device() == device, "expected a tensor on ", device, ", got one on ", x.device());
  }

  // axes: 4 for [B, T, H, W] and 3 for [F, H, W], besides the channels.
  Grid grid(const OptionalTensor& x, int axes) const {
    if (!x) return {};
    check(*x);
    TORCH_CHECK(x->dim() >= axes, "expected a tensor of at least ", axes, " axes, got ", x->dim());
    Grid grid{x->data_ptr(), dtype_of(*x), {}};
    // The stride of an axis of one says nothing, and may be any.
    for (int n = 0; n < axes; ++n) grid.stride[4 - axes + n] = x->size(n) == 1 ? 0 : x->stride(n);
    return grid;
  }

  void* data(const OptionalTensor& x) const {
    if (!x) return nullptr;
    check(*x);
    TORCH_CHECK(x->is_contiguous(), "expected a contiguous tensor");
    return x->data_ptr();
  }

  // One number for each patch of `like` [B, T, H, W, C], as precise as sums over its channels.
  void* patches(const at::Tensor& x, const at::Tensor& like) const {
    const auto dtype = like.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    TORCH_CHECK(
        x.sizes() == like.sizes().slice(0, like.dim() - 1) && x.scalar_type() == dtype, "expected ", dtype,
        " for each patch of ", like.sizes(), ", got ", x.scalar_type(), " ", x.sizes());
    return data(x);
  }
};

// counts: frames of each clip; ragged: the clips share one frame axis.
inline std::vector<Clip> clips_of(const Sizes& counts, bool ragged) {
  std::vector<Clip> clips;
  int64_t frame = 0;
  for (const int64_t count : counts) {
    clips.push_back({ragged ? frame : 0, count});
    frame += count;
  }
  return clips;
}

// What all calls of the relevance give its kernels.
inline void fill(
    RelevanceArgs& args, std::vector<Clip>& clips, const Tensors& on, const at::Tensor& image_embeds,
    const at::Tensor& text_embeds, double scale, const Sizes& counts) {
  const bool ragged = image_embeds.dim() == 4;
  clips = clips_of(counts, ragged);
  const int64_t batch = clips.size(), channels = image_embeds.size(-1);
  TORCH_CHECK(text_embeds.sizes() == at::IntArrayRef({batch, channels}), "expected text_embeds of the videos' shape");
  args.image_embeds = on.grid(image_embeds, ragged ? 3 : 4);
  args.clips = clips.data();
  args.ragged = ragged;
  args.batch = clips.size();
  args.height = image_embeds.size(-3);
  args.width = image_embeds.size(-2);
  args.channels = image_embeds.size(-1);
  args.scale = scale;
}

struct Pool {
  std::vector<Clip> clips;
  PoolArgs args;
  int axes;

  // window: kernel and stride (zeros: adaptive), windows along (T, H, W), rows and columns in the largest window.
  // outputs, spans: pooled frames of each clip, and frames in its largest window.
  Pool(
      const Tensors& on, const at::Tensor& values, const OptionalTensor& weights, double temperature,
      const std::vector<Sizes>& window, const Sizes& counts, const Sizes& outputs, const Sizes& spans)
      : axes(values.dim() - 1) {
    clips = clips_of(counts, axes == 3);
    args = {};
    TORCH_CHECK(!weights || weights->sizes() == values.sizes().slice(0, axes), "expected weights of the values' shape");
    args.values = on.grid(values, axes);
    args.weights = on.grid(weights, axes);
    args.ragged = axes == 3;
    args.batch = clips.size();
    args.height = values.size(-3);
    args.width = values.size(-2);
    args.channels = values.size(-1);
    args.temperature = temperature;
    for (int n = 0; n < 3; ++n) {
      args.window.kernel[n] = window.at(0).at(n);
      args.window.stride[n] = window.at(1).at(n);
      args.window.outputs[n] = window.at(2).at(n);
    }
    args.window.high = window.at(3).at(0);
    args.window.wide = window.at(3).at(1);
    int64_t slot = 0;
    for (size_t b = 0; b < clips.size(); ++b) {
      Clip& clip = clips[b];
      clip.first_output = args.outputs;
      clip.outputs = outputs.at(b);
      clip.span = spans.at(b);
      clip.first_slot = slot;
      args.outputs += clip.outputs;
      slot += clip.outputs * args.window.outputs[1] * args.window.outputs[2] * args.window.slots(clip);
    }
    args.clips = clips.data();
  }

  // x: one row for each window, as the kernels read or write it.
  void check_rows(const at::Tensor& x) const {
    const int64_t windows = args.outputs * args.window.outputs[1] * args.window.outputs[2];
    TORCH_CHECK(
        x.dim() > 0 && x.numel() == windows * x.size(-1), "expected a row for each of ", windows, " windows, got ",
        x.sizes());
  }
};

inline void fill_backward(
    Pool& call, const Tensors& on, const OptionalTensor& grad_values, const OptionalTensor& grad_weights,
    const at::Tensor& shares, const OptionalTensor& grad_scores, const at::Tensor& grad) {
  call.check_rows(grad);
  TORCH_CHECK(
      grad.size(-1) == call.args.channels && dtype_of(grad) == call.args.values.dtype,
      "expected a gradient of the pooled shape and dtype");
  call.args.grad_values = on.grid(grad_values, call.axes);
  call.args.grad_weights = on.grid(grad_weights, call.axes);
  call.args.shares = on.data(shares);
  call.args.grad_scores = on.data(grad_scores);
  call.args.grad = on.data(grad);
}

// The channels `channel` ... of z [rows, channels] of the patches from `first` on; windows: their sums, or gradients.
inline TileArgs tile_of(
    const Pool& call, const Tensors& on, const at::Tensor& hidden, const OptionalTensor& bias, const at::Tensor& shares,
    int64_t first, int64_t channel, const at::Tensor& windows) {
  TileArgs args{call.args};
  call.check_rows(windows);
  TORCH_CHECK(hidden.dim() == 2, "expected a tile of 2 axes, got ", hidden.dim());
  TORCH_CHECK(channel + hidden.size(1) <= windows.size(-1), "expected channels of the windows");
  TORCH_CHECK(!bias || bias->numel() == hidden.size(1), "expected a bias of the tile's channels");
  TORCH_CHECK(!bias || bias->scalar_type() == hidden.scalar_type(), "expected a bias of the tile's dtype");
  args.values = {on.data(hidden), dtype_of(hidden), {}};
  args.bias = on.data(bias);
  args.shares = on.data(shares);
  args.first = first;
  args.rows = hidden.size(0);
  args.channels = hidden.size(1);
  args.step = windows.size(-1);
  return args;
}

inline void* from_channel(void* rows, const at::Tensor& x, int64_t channel) {
  return static_cast<char*>(rows) + channel * x.element_size();
}

inline ScoreArgs score_of(
    const Tensors& on, const at::Tensor& cosines, const at::Tensor& embeds, const at::Tensor& text) {
  TORCH_CHECK(embeds.dim() == 2 && text.numel() == embeds.size(1), "expected embeds [rows, C] and text [C]");
  const int64_t rows = embeds.size(0);
  TORCH_CHECK(cosines.numel() == rows, "expected a cosine for each row");
  return {on.data(embeds), on.data(text), on.data(cosines), dtype_of(embeds), rows, embeds.size(1)};
}

}  // namespace ppllava
