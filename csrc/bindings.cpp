// The only file that knows pybind11 and at::Tensor: tensors in, structs out. Python allocates, the kernels write.

#include <ATen/ATen.h>                // defines: at::Tensor
#include <ATen/Version.h>             // defines: at::get_cpu_capability
#include <pybind11/stl.h>             // defines: the casts of std::vector and std::optional
#include <torch/csrc/utils/pybind.h>  // defines: the cast of at::Tensor

#include <optional>  // defines: std::optional
#include <string>    // defines: std::string
#include <vector>    // defines: std::vector

#include "cpu/kernels.h"   // defines: the CPU kernels
#include "cuda/kernels.h"  // defines: the launchers of the CUDA kernels

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
};

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

const Tensors kCpu{at::kCPU};

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

// What all calls of the relevance give its kernels.
void fill(
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
};

void prompt_relevance(
    const at::Tensor& relevance, const at::Tensor& image_embeds, const at::Tensor& text_embeds, double scale,
    const Sizes& counts) {
  RelevanceArgs args{};
  std::vector<Clip> clips;
  fill(args, clips, kCpu, image_embeds, text_embeds, scale, counts);
  args.text_embeds = kCpu.data(text_embeds);
  args.relevance = kCpu.data(relevance);
  py::gil_scoped_release unlocked;
  PPLLAVA_CALL(prompt_relevance, args);
}

void prompt_relevance_backward(
    const at::Tensor& grad_image, const at::Tensor& grad_text, const at::Tensor& grad_scale, const at::Tensor& grad,
    const at::Tensor& relevance, const at::Tensor& image_embeds, const at::Tensor& text_embeds, double scale,
    const Sizes& counts) {
  RelevanceArgs args{};
  std::vector<Clip> clips;
  fill(args, clips, kCpu, image_embeds, text_embeds, scale, counts);
  args.text_embeds = kCpu.data(text_embeds);
  args.relevance = kCpu.data(relevance);
  args.grad = kCpu.data(grad);
  args.grad_image = kCpu.grid(grad_image, grad_image.dim() - 1);
  args.grad_text = kCpu.data(grad_text);
  args.grad_scale = kCpu.data(grad_scale);
  py::gil_scoped_release unlocked;
  PPLLAVA_CALL(prompt_relevance_backward, args);
}

void weighted_pool3d(
    const at::Tensor& pooled, const at::Tensor& values, const OptionalTensor& weights, double temperature,
    const std::vector<Sizes>& window, const Sizes& counts, const Sizes& outputs, const Sizes& spans) {
  Pool call(kCpu, values, weights, temperature, window, counts, outputs, spans);
  call.args.pooled = kCpu.data(pooled);
  py::gil_scoped_release unlocked;
  PPLLAVA_CALL(weighted_pool3d, call.args);
}

// Of either device.
void fill_backward(
    Pool& call, const Tensors& on, const OptionalTensor& grad_values, const OptionalTensor& grad_weights,
    const at::Tensor& shares, const OptionalTensor& grad_scores, const at::Tensor& grad) {
  call.args.grad_values = on.grid(grad_values, call.axes);
  call.args.grad_weights = on.grid(grad_weights, call.axes);
  call.args.shares = on.data(shares);
  call.args.grad_scores = on.data(grad_scores);
  call.args.grad = on.data(grad);
}

void weighted_pool3d_backward(
    const OptionalTensor& grad_values, const OptionalTensor& grad_weights, const at::Tensor& shares,
    const OptionalTensor& grad_scores, const at::Tensor& grad, const at::Tensor& values, const OptionalTensor& weights,
    double temperature, const std::vector<Sizes>& window, const Sizes& counts, const Sizes& outputs,
    const Sizes& spans) {
  Pool call(kCpu, values, weights, temperature, window, counts, outputs, spans);
  fill_backward(call, kCpu, grad_values, grad_weights, shares, grad_scores, grad);
  py::gil_scoped_release unlocked;
  PPLLAVA_CALL(weighted_pool3d_backward, call.args);
}

// The windows of patches that lie as those of `features`, whose channels play no part.
void window_shares(
    const at::Tensor& shares, const OptionalTensor& weights, const at::Tensor& features, double temperature,
    const std::vector<Sizes>& window, const Sizes& counts, const Sizes& outputs, const Sizes& spans) {
  Pool call(kCpu, features, weights, temperature, window, counts, outputs, spans);
  call.args.shares = kCpu.data(shares);
  py::gil_scoped_release unlocked;
  PPLLAVA_CALL(window_shares, call.args);
}

void window_shares_backward(
    const at::Tensor& grad_weights, const at::Tensor& shares, const at::Tensor& dots, const at::Tensor& features,
    double temperature, const std::vector<Sizes>& window, const Sizes& counts, const Sizes& outputs,
    const Sizes& spans) {
  Pool call(kCpu, features, std::nullopt, temperature, window, counts, outputs, spans);
  call.args.grad_weights = kCpu.grid(grad_weights, call.axes);
  call.args.shares = kCpu.data(shares);
  call.args.grad_scores = kCpu.data(dots);
  py::gil_scoped_release unlocked;
  PPLLAVA_CALL(window_shares_backward, call.args);
}

// Of either device: the channels `channel` ... of z [rows, channels] of the patches from `first` on.
TileArgs tile_of(
    const Pool& call, const Tensors& on, const at::Tensor& hidden, const OptionalTensor& bias, const at::Tensor& shares,
    int64_t first, int64_t step) {
  TileArgs args{call.args};
  TORCH_CHECK(hidden.dim() == 2, "expected a tile of 2 axes, got ", hidden.dim());
  TORCH_CHECK(!bias || bias->numel() == hidden.size(1), "expected a bias of the tile's channels");
  TORCH_CHECK(!bias || bias->scalar_type() == hidden.scalar_type(), "expected a bias of the tile's dtype");
  args.values = {on.data(hidden), dtype_of(hidden), {}};
  args.bias = on.data(bias);
  args.shares = on.data(shares);
  args.first = first;
  args.rows = hidden.size(0);
  args.channels = hidden.size(1);
  args.step = step;
  return args;
}

void* from_channel(void* rows, const at::Tensor& x, int64_t channel) {
  return static_cast<char*>(rows) + channel * x.element_size();
}

void pool_hidden(
    const at::Tensor& sums, const at::Tensor& hidden, const OptionalTensor& bias, const at::Tensor& shares,
    int64_t first, int64_t channel, const at::Tensor& features, const std::vector<Sizes>& window, const Sizes& counts,
    const Sizes& outputs, const Sizes& spans) {
  const Pool call(kCpu, features, std::nullopt, 1, window, counts, outputs, spans);
  TileArgs args = tile_of(call, kCpu, hidden, bias, shares, first, sums.size(-1));
  args.pooled = from_channel(kCpu.data(sums), sums, channel);
  py::gil_scoped_release unlocked;
  PPLLAVA_CALL(pool_hidden, args);
}

void pool_hidden_backward(
    const at::Tensor& hidden, const OptionalTensor& bias, const at::Tensor& shares, const OptionalTensor& dots,
    const at::Tensor& grad, int64_t first, int64_t channel, const at::Tensor& features,
    const std::vector<Sizes>& window, const Sizes& counts, const Sizes& outputs, const Sizes& spans) {
  const Pool call(kCpu, features, std::nullopt, 1, window, counts, outputs, spans);
  TORCH_CHECK(grad.scalar_type() == hidden.scalar_type(), "expected a gradient of the tile's dtype");
  TileArgs args = tile_of(call, kCpu, hidden, bias, shares, first, grad.size(-1));
  args.grad = from_channel(kCpu.data(grad), grad, channel);
  args.grad_scores = kCpu.data(dots);
  py::gil_scoped_release unlocked;
  PPLLAVA_CALL(pool_hidden_backward, args);
}

ScoreArgs score_of(
    const Tensors& on, const at::Tensor& cosines, const OptionalTensor& norms, const at::Tensor& embeds,
    const at::Tensor& text) {
  TORCH_CHECK(embeds.dim() == 2 && text.numel() == embeds.size(1), "expected embeds [rows, C] and text [C]");
  const int64_t rows = embeds.size(0);
  TORCH_CHECK(
      cosines.numel() == rows && (!norms || norms->numel() == rows), "expected a cosine and a norm for each row");
  return {on.data(embeds), on.data(text), on.data(cosines), on.data(norms), dtype_of(embeds), rows, embeds.size(1)};
}

void score_rows(
    const at::Tensor& cosines, const OptionalTensor& norms, const at::Tensor& embeds, const at::Tensor& text) {
  const ScoreArgs args = score_of(kCpu, cosines, norms, embeds, text);
  py::gil_scoped_release unlocked;
  PPLLAVA_CALL(score_rows, args);
}

#ifdef PPLLAVA_WITH_CUDA
namespace gpu {

#ifndef PPLLAVA_CUDA_ON_HOST
constexpr at::DeviceType kDevice = at::kCUDA;
#else
constexpr at::DeviceType kDevice = at::kCPU;
#endif

// The device of the first tensor of a call, and the stream to launch on: a cudaStream_t as a number.
struct Place : Tensors {
  cuda::Stream stream;

  Place(const at::Tensor& x, intptr_t handle)
      : Tensors{x.device()}, stream{x.device().index(), reinterpret_cast<void*>(handle)} {
    TORCH_CHECK(x.device().type() == kDevice, "expected a tensor on ", kDevice, ", got one on ", x.device());
    TORCH_CHECK(x.scalar_type() != at::kDouble, "expected a tensor of at most 32 bits, got float64");
  }
};

// Lives until the kernel is launched; PyTorch gives its memory only to what runs later on the same stream.
at::Tensor workspace(size_t bytes, const at::Tensor& like) {
  return at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte));
}

void check_launch(const char* error) { TORCH_CHECK(!error, "backend='cuda' could not run its kernel: ", error); }

cuda::RelevanceCall call_of(
    std::vector<Clip>& clips, const Tensors& on, const at::Tensor& relevance, const at::Tensor& image_embeds,
    const at::Tensor& text_embeds, const OptionalTensor& scale_tensor, double scale, const Sizes& counts) {
  cuda::RelevanceCall call{};
  fill(call, clips, on, image_embeds, text_embeds, scale, counts);
  call.relevance = on.data(relevance);
  call.text = on.grid(text_embeds, 1);
  std::swap(call.text.stride[0], call.text.stride[3]);
  TORCH_CHECK(!scale_tensor || scale_tensor->scalar_type() == at::kFloat, "expected a float32 scale_tensor");
  call.scale_tensor = static_cast<const float*>(on.data(scale_tensor));
  return call;
}

void prompt_relevance(
    const at::Tensor& relevance, const at::Tensor& image_embeds, const at::Tensor& text_embeds,
    const OptionalTensor& scale_tensor, double scale, const Sizes& counts, intptr_t stream) {
  const Place on(image_embeds, stream);
  std::vector<Clip> clips;
  auto call = call_of(clips, on, relevance, image_embeds, text_embeds, scale_tensor, scale, counts);
  const at::Tensor memory = workspace(cuda::relevance_bytes(call), relevance);
  call.workspace = memory.data_ptr();
  check_launch(cuda::prompt_relevance(call, on.stream));
}

void prompt_relevance_backward(
    const at::Tensor& grad_image, const at::Tensor& grad_text, const at::Tensor& grad_scale, const at::Tensor& grad,
    const at::Tensor& relevance, const at::Tensor& image_embeds, const at::Tensor& text_embeds,
    const OptionalTensor& scale_tensor, double scale, const Sizes& counts, intptr_t stream) {
  const Place on(image_embeds, stream);
  std::vector<Clip> clips;
  auto call = call_of(clips, on, relevance, image_embeds, text_embeds, scale_tensor, scale, counts);
  call.grad = on.data(grad);
  call.grad_image = on.grid(grad_image, grad_image.dim() - 1);
  call.text_grad = on.grid(grad_text, 1);
  std::swap(call.text_grad.stride[0], call.text_grad.stride[3]);
  call.scale_grad = static_cast<float*>(on.data(grad_scale));
  const at::Tensor memory = workspace(cuda::relevance_backward_bytes(call), relevance);
  call.workspace = memory.data_ptr();
  check_launch(cuda::prompt_relevance_backward(call, on.stream));
}

void weighted_pool3d(
    const at::Tensor& pooled, const at::Tensor& values, const OptionalTensor& weights, double temperature,
    const std::vector<Sizes>& window, const Sizes& counts, const Sizes& outputs, const Sizes& spans, intptr_t stream) {
  const Place on(values, stream);
  Pool call(on, values, weights, temperature, window, counts, outputs, spans);
  call.args.pooled = on.data(pooled);
  check_launch(cuda::weighted_pool3d(call.args, on.stream));
}

void weighted_pool3d_backward(
    const OptionalTensor& grad_values, const OptionalTensor& grad_weights, const at::Tensor& shares,
    const OptionalTensor& grad_scores, const at::Tensor& grad, const at::Tensor& values, const OptionalTensor& weights,
    double temperature, const std::vector<Sizes>& window, const Sizes& counts, const Sizes& outputs, const Sizes& spans,
    intptr_t stream) {
  const Place on(values, stream);
  Pool call(on, values, weights, temperature, window, counts, outputs, spans);
  fill_backward(call, on, grad_values, grad_weights, shares, grad_scores, grad);
  check_launch(cuda::weighted_pool3d_backward(call.args, on.stream));
}

void prompt_guided_pool3d(
    const at::Tensor& pooled, const at::Tensor& relevance, const at::Tensor& values, const at::Tensor& image_embeds,
    const at::Tensor& text_embeds, const OptionalTensor& scale_tensor, double scale, double temperature,
    const std::vector<Sizes>& window, const Sizes& counts, const Sizes& outputs, const Sizes& spans, intptr_t stream) {
  const Place on(values, stream);
  std::vector<Clip> clips;
  auto call = call_of(clips, on, relevance, image_embeds, text_embeds, scale_tensor, scale, counts);
  Pool pool(on, values, std::nullopt, temperature, window, counts, outputs, spans);
  pool.args.pooled = on.data(pooled);
  const at::Tensor memory = workspace(cuda::guided_bytes(call), relevance);
  call.workspace = memory.data_ptr();
  check_launch(cuda::prompt_guided_pool3d(call, pool.args, on.stream));
}

}  // namespace gpu
#endif

}  // namespace
}  // namespace ppllava

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("prompt_relevance", &ppllava::prompt_relevance);
  m.def("prompt_relevance_backward", &ppllava::prompt_relevance_backward);
  m.def("weighted_pool3d", &ppllava::weighted_pool3d);
  m.def("weighted_pool3d_backward", &ppllava::weighted_pool3d_backward);
  m.def("window_shares", &ppllava::window_shares);
  m.def("window_shares_backward", &ppllava::window_shares_backward);
  m.def("pool_hidden", &ppllava::pool_hidden);
  m.def("pool_hidden_backward", &ppllava::pool_hidden_backward);
  m.def("score_rows", &ppllava::score_rows);
#ifdef PPLLAVA_WITH_CUDA
  m.attr("cuda_architectures") = PPLLAVA_CUDA_ARCHS;
  m.attr("cuda_version") = PPLLAVA_CUDA_VERSION;
  m.def("cuda_prompt_relevance", &ppllava::gpu::prompt_relevance);
  m.def("cuda_prompt_relevance_backward", &ppllava::gpu::prompt_relevance_backward);
  m.def("cuda_weighted_pool3d", &ppllava::gpu::weighted_pool3d);
  m.def("cuda_weighted_pool3d_backward", &ppllava::gpu::weighted_pool3d_backward);
  m.def("cuda_prompt_guided_pool3d", &ppllava::gpu::prompt_guided_pool3d);
#else
  m.attr("cuda_missing") = PPLLAVA_CUDA_MISSING;
#endif
}
