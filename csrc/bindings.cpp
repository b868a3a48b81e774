// The only file that knows pybind11 and at::Tensor: tensors in, structs out. Python allocates, the kernels write.

#include <ATen/ATen.h>                // defines: at::Tensor
#include <ATen/Version.h>             // defines: at::get_cpu_capability
#include <pybind11/stl.h>             // defines: the casts of std::vector and std::optional
#include <torch/csrc/utils/pybind.h>  // defines: the cast of at::Tensor

#include <optional>  // defines: std::optional
#include <string>    // defines: std::string
#include <vector>    // defines: std::vector

#include "cpu/kernels.h"  // defines: the CPU kernels

namespace ppllava {
namespace {

namespace py = pybind11;
using OptionalTensor = std::optional<at::Tensor>;
using Sizes = std::vector<int64_t>;

Dtype dtype_of(const at::Tensor& x) {
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

// axes: 4 for [B, T, H, W] and 3 for [F, H, W], besides the channels.
Grid grid_of(const OptionalTensor& x, int axes) {
  if (!x) return {};
  TORCH_CHECK(x->device().is_cpu() && x->dim() >= axes, "expected a CPU tensor of at least ", axes, " axes");
  Grid grid{x->data_ptr(), dtype_of(*x), {}};
  for (int n = 0; n < axes; ++n) grid.stride[4 - axes + n] = x->stride(n);
  return grid;
}

void* data_of(const OptionalTensor& x) {
  if (!x) return nullptr;
  TORCH_CHECK(x->device().is_cpu() && x->is_contiguous(), "expected a contiguous CPU tensor");
  return x->data_ptr();
}

// counts: frames of each clip; ragged: the clips share one frame axis.
std::vector<Clip> clips_of(const Sizes& counts, bool ragged) {
  std::vector<Clip> clips;
  int64_t frame = 0;
  for (const int64_t count : counts) {
    clips.push_back({ragged ? frame : 0, count});
    frame += count;
  }
  return clips;
}

// As ATen chooses for its own kernels, ATEN_CPU_CAPABILITY included.
#ifdef PPLLAVA_X86
#define PPLLAVA_CALL(kernel, args)                                \
  static const std::string capability = at::get_cpu_capability(); \
  if (capability == "AVX512") return AVX512::kernel(args);        \
  if (capability == "AVX2") return AVX2::kernel(args);            \
  DEFAULT::kernel(args)
#else
#define PPLLAVA_CALL(kernel, args) DEFAULT::kernel(args)
#endif

struct Relevance {
  std::vector<Clip> clips;
  RelevanceArgs args;

  Relevance(const at::Tensor& image_embeds, const at::Tensor& text_embeds, double scale, const Sizes& counts) {
    const bool ragged = image_embeds.dim() == 4;
    clips = clips_of(counts, ragged);
    args = {};
    args.image_embeds = grid_of(image_embeds, ragged ? 3 : 4);
    args.text_embeds = data_of(text_embeds);
    args.clips = clips.data();
    args.batch = clips.size();
    args.height = image_embeds.size(-3);
    args.width = image_embeds.size(-2);
    args.channels = image_embeds.size(-1);
    args.scale = scale;
  }
};

void prompt_relevance(
    const at::Tensor& relevance, const at::Tensor& image_embeds, const at::Tensor& text_embeds, double scale,
    const Sizes& counts) {
  Relevance call(image_embeds, text_embeds, scale, counts);
  call.args.relevance = data_of(relevance);
  py::gil_scoped_release unlocked;
  PPLLAVA_CALL(prompt_relevance, call.args);
}

void prompt_relevance_backward(
    const at::Tensor& grad_image, const at::Tensor& grad_text, const at::Tensor& grad_scale, const at::Tensor& grad,
    const at::Tensor& relevance, const at::Tensor& image_embeds, const at::Tensor& text_embeds, double scale,
    const Sizes& counts) {
  Relevance call(image_embeds, text_embeds, scale, counts);
  call.args.relevance = data_of(relevance);
  call.args.grad = data_of(grad);
  call.args.grad_image = grid_of(grad_image, grad_image.dim() - 1);
  call.args.grad_text = data_of(grad_text);
  call.args.grad_scale = data_of(grad_scale);
  py::gil_scoped_release unlocked;
  PPLLAVA_CALL(prompt_relevance_backward, call.args);
}

struct Pool {
  std::vector<Clip> clips;
  PoolArgs args;
  int axes;

  // window: kernel and stride (zeros: adaptive), windows along (T, H, W), rows and columns in the largest window.
  // outputs, spans: pooled frames of each clip, and frames in its largest window.
  Pool(
      const at::Tensor& values, const OptionalTensor& weights, double temperature, const std::vector<Sizes>& window,
      const Sizes& counts, const Sizes& outputs, const Sizes& spans)
      : axes(values.dim() - 1) {
    clips = clips_of(counts, axes == 3);
    args = {};
    args.values = grid_of(values, axes);
    args.weights = grid_of(weights, axes);
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
};

void weighted_pool3d(
    const at::Tensor& pooled, const at::Tensor& values, const OptionalTensor& weights, double temperature,
    const std::vector<Sizes>& window, const Sizes& counts, const Sizes& outputs, const Sizes& spans) {
  Pool call(values, weights, temperature, window, counts, outputs, spans);
  call.args.pooled = data_of(pooled);
  py::gil_scoped_release unlocked;
  PPLLAVA_CALL(weighted_pool3d, call.args);
}

void weighted_pool3d_backward(
    const OptionalTensor& grad_values, const OptionalTensor& grad_weights, const at::Tensor& shares,
    const OptionalTensor& grad_scores, const at::Tensor& grad, const at::Tensor& values, const OptionalTensor& weights,
    double temperature, const std::vector<Sizes>& window, const Sizes& counts, const Sizes& outputs,
    const Sizes& spans) {
  Pool call(values, weights, temperature, window, counts, outputs, spans);
  call.args.grad_values = grid_of(grad_values, call.axes);
  call.args.grad_weights = grid_of(grad_weights, call.axes);
  call.args.shares = data_of(shares);
  call.args.grad_scores = data_of(grad_scores);
  call.args.grad = data_of(grad);
  py::gil_scoped_release unlocked;
  PPLLAVA_CALL(weighted_pool3d_backward, call.args);
}

}  // namespace
}  // namespace ppllava

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("prompt_relevance", &ppllava::prompt_relevance);
  m.def("prompt_relevance_backward", &ppllava::prompt_relevance_backward);
  m.def("weighted_pool3d", &ppllava::weighted_pool3d);
  m.def("weighted_pool3d_backward", &ppllava::weighted_pool3d_backward);
}
