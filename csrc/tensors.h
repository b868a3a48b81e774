// From at::Tensor to the structs of shapes.h, for the kernels of either device. All that a kernel relies on is checked
// here: torch.ops and programs of torch.export call without the checks of Python.
#pragma once

#include <ATen/ATen.h>               // defines: at::Tensor
#include <ATen/EmptyTensor.h>        // defines: at::detail::computeStorageNbytes
#include <c10/util/StringUtil.h>     // defines: c10::str
#include <c10/util/safe_numerics.h>  // defines: c10::mul_overflows, c10::add_overflows

#include <algorithm>  // defines: std::min
#include <limits>     // defines: std::numeric_limits
#include <optional>   // defines: std::optional
#include <stdexcept>  // defines: std::invalid_argument
#include <string>     // defines: std::string
#include <tuple>      // defines: std::tie
#include <utility>    // defines: std::pair
#include <vector>     // defines: std::vector

#include "shapes.h"  // defines: Grid, Clip, PoolArgs, TileArgs, ScoreArgs, RelevanceArgs

// A ValueError in Python, of one sentence: what must be, what came, what to do.
#define PPLLAVA_CHECK(condition, ...) \
  if (C10_UNLIKELY(!(condition))) throw std::invalid_argument(c10::str(__VA_ARGS__))

namespace ppllava {

using OptionalTensor = std::optional<at::Tensor>;
using Sizes = std::vector<int64_t>;

// As Python calls it.
inline std::string name_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return "float32";
    case at::kDouble:
      return "float64";
    case at::kHalf:
      return "float16";
    case at::kBFloat16:
      return "bfloat16";
    default:
      return c10::toString(dtype);
  }
}

inline Dtype dtype_of(const char* name, const at::Tensor& x) {
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
      PPLLAVA_CHECK(
          false, name, " must be float32, float16, bfloat16 or float64, got ", name_of(x.scalar_type()),
          "; convert it, e.g. ", name, ".float()");
  }
  return Dtype::float32;
}

// Of the sums over channels of x, and of scores and shares beside it.
inline at::ScalarType accumulator_of(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Sizes of a call are products of sizes that torch.ops takes from anyone.
inline int64_t times(int64_t a, int64_t b) {
  int64_t product;
  PPLLAVA_CHECK(!c10::mul_overflows(a, b, &product), "sizes must fit into 64 bits, got ", a, " times ", b);
  return product;
}

// The device of a call's tensors; any_scores: its kernels read scores of any dtype but float64.
struct Tensors {
  at::Device device;
  bool any_scores;

  void check(const char* name, const at::Tensor& x) const {
    PPLLAVA_CHECK(
        x.device() == device, name, " must be on ", device, ", the device of this call, got ", x.device(),
        "; move it there");
    PPLLAVA_CHECK(
        x.layout() == at::kStrided, name, " must be a dense tensor, got ", x.layout(), "; use ", name, ".to_dense()");
    // A storage can be cut or freed under its tensors.
    PPLLAVA_CHECK(
        at::detail::computeStorageNbytes(x.sizes(), x.strides(), x.element_size(), x.storage_offset()) <=
            x.storage().nbytes(),
        name, " must have memory for its shape ", x.sizes(), ", got a storage of ", x.storage().nbytes(),
        " bytes; its storage was resized");
  }

  void check_dtype(const char* name, const at::Tensor& x, at::ScalarType dtype) const {
    PPLLAVA_CHECK(
        x.scalar_type() == dtype, name, " must be ", name_of(dtype), " beside the other tensors of this call, got ",
        name_of(x.scalar_type()), "; convert it with ", name, ".to");
  }

  void check_sizes(const char* name, const at::Tensor& x, at::IntArrayRef sizes) const {
    PPLLAVA_CHECK(
        x.sizes() == sizes, name, " must be ", sizes, " to match the other tensors of this call, got ", x.sizes(),
        "; pass tensors of one call");
  }

  // x: as many axes as `lead` and, where `channels`, one more, whose elements lie together.
  Grid grid(const char* name, const at::Tensor& x, int axes, bool channels) const {
    check(name, x);
    Grid grid{x.data_ptr(), dtype_of(name, x), {}};
    PPLLAVA_CHECK(
        !channels || x.stride(axes) == 1 || x.size(axes) == 1, name,
        " must have a contiguous channel axis (stride 1), got strides ", x.strides(), "; use ", name, ".contiguous()");
    // The stride of an axis of one says nothing, and may be any.
    for (int n = 0; n < axes; ++n) grid.stride[4 - axes + n] = x.size(n) == 1 ? 0 : x.stride(n);
    return grid;
  }

  // As `like`, for its gradient.
  Grid grid_like(const char* name, const OptionalTensor& x, const at::Tensor& like, int axes) const {
    if (!x) return {};
    check_sizes(name, *x, like.sizes());
    check_dtype(name, *x, like.scalar_type());
    return grid(name, *x, axes, true);
  }

  // A score for each patch of `like`.
  Grid scores(const char* name, const OptionalTensor& x, const at::Tensor& like, int axes) const {
    if (!x) return {};
    check_sizes(name, *x, like.sizes().slice(0, axes));
    if (!any_scores || x->scalar_type() == at::kDouble) check_dtype(name, *x, accumulator_of(like));
    return grid(name, *x, axes, false);
  }

  void* data(const char* name, const at::Tensor& x) const {
    check(name, x);
    PPLLAVA_CHECK(
        x.is_contiguous(), name, " must be contiguous, got strides ", x.strides(), "; use ", name, ".contiguous()");
    return x.data_ptr();
  }

  void* data(const char* name, const at::Tensor& x, at::IntArrayRef sizes, at::ScalarType dtype) const {
    check_sizes(name, x, sizes);
    check_dtype(name, x, dtype);
    return data(name, x);
  }

  // One number for each patch of `like` [B, T, H, W, C], as precise as sums over its channels.
  void* patches(const char* name, const at::Tensor& x, const at::Tensor& like) const {
    return data(name, x, like.sizes().slice(0, like.dim() - 1), accumulator_of(like));
  }
};

// The clips of x [B, T, H, W, channels] or [F, H, W, channels]; counts: the frames of each.
inline std::vector<Clip> clips_of(const char* name, const at::Tensor& x, const Sizes& counts) {
  const bool ragged = x.dim() == 4;
  PPLLAVA_CHECK(
      (ragged || x.dim() == 5) && x.numel() > 0, name,
      " must be [B, T, H, W, channels] or, with cu_frames, [F, H, W, channels], and not empty, got shape ", x.sizes(),
      "; add the missing axes");
  std::vector<Clip> clips;
  clips.reserve(counts.size());
  int64_t frame = 0;
  bool fits = ragged || static_cast<int64_t>(counts.size()) == x.size(0);
  for (const int64_t count : counts) {
    fits = fits && count > 0 && (ragged ? count <= x.size(0) - frame : count == x.size(1));
    clips.push_back({ragged ? frame : 0, count});
    frame += fits ? count : 0;
  }
  PPLLAVA_CHECK(
      fits && (!ragged || frame == x.size(0)), "the frames of each clip must add up to those of ", name, " ", x.sizes(),
      ", got ", at::IntArrayRef(counts), "; pass cu_frames where ", name, " has 4 axes, and only there");
  return clips;
}

// What all calls of the relevance give its kernels.
inline void fill(
    RelevanceArgs& args, std::vector<Clip>& clips, const Tensors& on, const at::Tensor& image_embeds,
    const at::Tensor& text_embeds, double scale, const Sizes& counts) {
  clips = clips_of("image_embeds", image_embeds, counts);
  const int axes = image_embeds.dim() - 1;
  on.check_sizes("text_embeds", text_embeds, {static_cast<int64_t>(clips.size()), image_embeds.size(axes)});
  args.image_embeds = on.grid("image_embeds", image_embeds, axes, true);
  args.clips = clips.data();
  args.ragged = axes == 3;
  args.batch = clips.size();
  args.height = image_embeds.size(-3);
  args.width = image_embeds.size(-2);
  args.channels = image_embeds.size(-1);
  args.scale = scale;
}

// Kernel and stride, or the number of windows; along (T, H, W), what is unused is empty.
struct WindowSizes {
  const Sizes &kernel, &stride, &outputs;

  explicit WindowSizes(const std::vector<Sizes>& window)
      : kernel(window.at(0)), stride(window.at(1)), outputs(window.at(2)) {
    const bool adaptive = kernel.empty() && stride.empty() && outputs.size() == 3;
    const bool strided = kernel.size() == 3 && stride.size() == 3 && outputs.empty();
    bool fits = adaptive || strided;
    for (const Sizes& sizes : window)
      for (const int64_t size : sizes) fits = fits && 0 < size && size < int64_t{1} << 31;
    PPLLAVA_CHECK(
        fits, "either kernel_size and stride or output_size must be three positive numbers below 2**31, got ",
        at::IntArrayRef(kernel), ", ", at::IntArrayRef(stride), " and ", at::IntArrayRef(outputs),
        "; pass [] for the other");
  }

  // Windows along an axis of `size` patches, and patches of the largest of them or a bound of it, as in shapes.py.
  std::pair<int64_t, int64_t> along(int n, int64_t size) const {
    if (kernel.empty()) {
      const int64_t count = outputs[n];
      times(size, count + 1);  // as the kernels do
      if (size % count == 0) return {count, size / count};
      return {count, count % size == 0 ? 1 : std::min(size, (size - 1) / count + 2)};
    }
    PPLLAVA_CHECK(
        kernel[n] <= size, "kernel_size must fit into each clip, got ", at::IntArrayRef(kernel), " for an axis of ",
        size, " patches; use a smaller kernel_size, or output_size, which fits any clip");
    return {(size - kernel[n]) / stride[n] + 1, kernel[n]};
  }
};

struct Pool {
  std::vector<Clip> clips;
  PoolArgs args;
  int axes;
  int64_t slots = 0;  // of all windows
  at::ScalarType accumulator;

  // name: of values. window: kernel, stride and outputs of WindowSizes. counts: frames of each clip.
  Pool(
      const Tensors& on, const char* name, const at::Tensor& values, const OptionalTensor& weights, double temperature,
      const std::vector<Sizes>& window, const Sizes& counts)
      : clips(clips_of(name, values, counts)), args{}, axes(values.dim() - 1), accumulator(accumulator_of(values)) {
    const WindowSizes sizes(window);
    PPLLAVA_CHECK(
        temperature >= std::numeric_limits<float>::min() && temperature <= std::numeric_limits<float>::max(),
        "temperature must be positive and finite in float32, got ", temperature, "; the original model uses 0.01");
    args.values = on.grid(name, values, axes, true);
    args.weights = on.scores("weights", weights, values, axes);
    args.ragged = axes == 3;
    args.batch = clips.size();
    args.height = values.size(-3);
    args.width = values.size(-2);
    args.channels = values.size(-1);
    args.temperature = temperature;
    for (size_t n = 0; n < sizes.kernel.size(); ++n) {
      args.window.kernel[n] = sizes.kernel[n];
      args.window.stride[n] = sizes.stride[n];
    }
    std::tie(args.window.outputs[1], args.window.high) = sizes.along(1, args.height);
    std::tie(args.window.outputs[2], args.window.wide) = sizes.along(2, args.width);
    const int64_t frame = times(args.window.outputs[1], args.window.outputs[2]);
    const int64_t area = times(frame, times(args.window.high, args.window.wide));
    for (Clip& clip : clips) {
      clip.first_output = args.outputs;
      std::tie(clip.outputs, clip.span) = sizes.along(0, clip.frames);
      clip.first_slot = slots;
      args.outputs += clip.outputs;
      PPLLAVA_CHECK(
          !c10::add_overflows(slots, times(times(clip.outputs, clip.span), area), &slots),
          "the windows must fit into 64 bits; use fewer of them");
    }
    args.clips = clips.data();
    times(args.outputs, frame);
  }

  int64_t windows() const { return args.outputs * args.window.outputs[1] * args.window.outputs[2]; }

  // x: a row of `channels` for each window, one after the other, as the kernels read or write them.
  void* rows(const Tensors& on, const char* name, const at::Tensor& x, int64_t channels, at::ScalarType dtype) const {
    PPLLAVA_CHECK(
        x.dim() > 0 && x.size(-1) == channels && x.numel() == times(windows(), channels), name, " must have ", channels,
        " channels for each of ", windows(), " windows, got shape ", x.sizes(), "; pass the shape that the op returns");
    on.check_dtype(name, x, dtype);
    return on.data(name, x);
  }

  // x: a number for each slot.
  void* scratch(const Tensors& on, const char* name, const OptionalTensor& x) const {
    return x ? on.data(name, *x, {slots}, accumulator) : nullptr;
  }
};

inline void fill_backward(
    Pool& call, const Tensors& on, const at::Tensor& values, const OptionalTensor& weights,
    const OptionalTensor& grad_values, const OptionalTensor& grad_weights, const at::Tensor& shares,
    const OptionalTensor& grad_scores, const at::Tensor& grad) {
  PPLLAVA_CHECK(
      !grad_weights || (weights && grad_scores), "need_weights must be False without weights, got True; pass weights");
  call.args.grad_values = on.grid_like("grad_values", grad_values, values, call.axes);
  call.args.grad_weights = on.scores("grad_weights", grad_weights, values, call.axes);
  call.args.shares = call.scratch(on, "shares", shares);
  call.args.grad_scores = call.scratch(on, "grad_scores", grad_scores);
  call.args.grad = call.rows(on, "grad", grad, call.args.channels, values.scalar_type());
}

// The channels `channel` ... of z [rows, channels] of the patches from `first` on, all of one clip; `all`: channels of
// all tiles.
inline TileArgs tile_of(
    const Pool& call, const Tensors& on, const at::Tensor& hidden, const OptionalTensor& bias, const at::Tensor& shares,
    int64_t first, int64_t channel, int64_t all) {
  TileArgs args{call.args};
  PPLLAVA_CHECK(
      hidden.dim() == 2 && hidden.numel() > 0, "hidden must be [rows, channels], got shape ", hidden.sizes(),
      "; pass the tile of a product");
  const int64_t rows = hidden.size(0), channels = hidden.size(1);
  PPLLAVA_CHECK(
      channel >= 0 && channels <= all && channel <= all - channels, "hidden must hold some of ", all, " channels, got ",
      channels, " from ", channel, " on; pass tiles of that product");
  PPLLAVA_CHECK(
      accumulator_of(hidden) == call.accumulator, "hidden must be float64 exactly where features are, got ",
      name_of(hidden.scalar_type()), "; multiply in the dtype of features");
  int64_t before = 0, patches = 0;
  for (size_t b = 0; b < call.clips.size() && before + patches <= first; ++b) {
    before += patches;
    patches = call.clips[b].frames * call.args.height * call.args.width;
  }
  PPLLAVA_CHECK(
      first >= 0 && rows <= patches - (first - before), "hidden must hold patches of one clip, got ", rows,
      " from patch ", first, " on; split it where the clip ends");
  args.values = {on.data("hidden", hidden), dtype_of("hidden", hidden), {}};
  args.bias = bias ? on.data("bias", *bias, {channels}, hidden.scalar_type()) : nullptr;
  args.shares = call.scratch(on, "shares", shares);
  args.first = first;
  args.rows = rows;
  args.channels = channels;
  args.step = all;
  return args;
}

inline void* from_channel(void* rows, const at::Tensor& x, int64_t channel) {
  return static_cast<char*>(rows) + channel * x.element_size();
}

inline int64_t width_of(const at::Tensor& x) { return x.dim() ? x.size(-1) : 0; }

// sums: [windows, all], to which the tile adds.
inline TileArgs sums_of(
    const Pool& call, const Tensors& on, const at::Tensor& hidden, const OptionalTensor& bias, const at::Tensor& shares,
    int64_t first, int64_t channel, const at::Tensor& sums) {
  TileArgs args = tile_of(call, on, hidden, bias, shares, first, channel, width_of(sums));
  args.pooled = from_channel(call.rows(on, "sums", sums, args.step, call.accumulator), sums, channel);
  return args;
}

// grad: [windows, all] in the dtype of the tile, which becomes its gradient. dots: as shares, or none.
inline TileArgs grads_of(
    const Pool& call, const Tensors& on, const at::Tensor& hidden, const OptionalTensor& bias, const at::Tensor& shares,
    const OptionalTensor& dots, int64_t first, int64_t channel, const at::Tensor& grad) {
  TileArgs args = tile_of(call, on, hidden, bias, shares, first, channel, width_of(grad));
  args.grad = from_channel(call.rows(on, "grad", grad, args.step, hidden.scalar_type()), grad, channel);
  args.grad_scores = call.scratch(on, "dots", dots);
  return args;
}

inline ScoreArgs score_of(
    const Tensors& on, const at::Tensor& cosines, const at::Tensor& embeds, const at::Tensor& text) {
  PPLLAVA_CHECK(
      embeds.dim() == 2 && embeds.numel() > 0, "embeds must be [rows, C], got shape ", embeds.sizes(),
      "; pass the rows of a tile");
  const int64_t rows = embeds.size(0), channels = embeds.size(1);
  const auto accumulator = accumulator_of(embeds);
  return {
      on.data("embeds", embeds),
      on.data("text", text, {channels}, accumulator),
      on.data("cosines", cosines, {rows}, accumulator),
      dtype_of("embeds", embeds),
      rows,
      channels};
}

}  // namespace ppllava
