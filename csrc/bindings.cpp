// What Python calls: tensors in, structs out. Python allocates, the kernels write.

#include <ATen/Version.h>             // defines: at::get_cpu_capability
#include <pybind11/stl.h>             // defines: the casts of std::vector and std::optional
#include <torch/csrc/utils/pybind.h>  // defines: the cast of at::Tensor
#include <torch/version.h>            // defines: TORCH_VERSION

#include <string>       // defines: std::string
#include <string_view>  // defines: std::string_view

#include "cpu/kernels.h"  // defines: the CPU kernels
#include "tensors.h"      // defines: Tensors, Pool, fill, fill_backward, sums_of, grads_of, score_of

namespace ppllava {

namespace py = pybind11;
void define_cuda(py::module_& m);  // in bindings_cuda.cpp

namespace {

const Tensors kCpu{at::kCPU, false};

// ppllava_kernels/extension.py finds this in the file, too, where it does not load.
const char kBuiltFor[] = "ppllava_kernels was built for PyTorch " TORCH_VERSION;

// As ATen chooses for its own kernels, ATEN_CPU_CAPABILITY included.
#ifdef PPLLAVA_X86
#ifndef PPLLAVA_AVX512
#define PPLLAVA_AVX512 AVX512  // tests/fuzz compiles one of the two, and calls it for both
#endif
#define PPLLAVA_CALL(kernel, args)                                 \
  static const std::string capability = at::get_cpu_capability();  \
  if (capability == "AVX512") return PPLLAVA_AVX512::kernel(args); \
  if (capability == "AVX2") return AVX2::kernel(args);             \
  DEFAULT::kernel(args)
#else
#define PPLLAVA_CALL(kernel, args) DEFAULT::kernel(args)
#endif

// One text for each clip, as precise as the sums over its channels.
void* text_of(const char* name, const at::Tensor& text, const at::Tensor& image_embeds, const RelevanceArgs& args) {
  return kCpu.data(name, text, {args.batch, args.channels}, accumulator_of(image_embeds));
}

void prompt_relevance(
    const at::Tensor& relevance, const at::Tensor& image_embeds, const at::Tensor& text_embeds, double scale,
    const Sizes& counts) {
  RelevanceArgs args{};
  std::vector<Clip> clips;
  fill(args, clips, kCpu, image_embeds, text_embeds, scale, counts);
  args.text_embeds = text_of("text_embeds", text_embeds, image_embeds, args);
  args.relevance = kCpu.patches("relevance", relevance, image_embeds);
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
  args.text_embeds = text_of("text_embeds", text_embeds, image_embeds, args);
  args.relevance = kCpu.patches("relevance", relevance, image_embeds);
  args.grad = kCpu.patches("grad", grad, image_embeds);
  args.grad_image = kCpu.grid_like("grad_image", grad_image, image_embeds, image_embeds.dim() - 1);
  args.grad_text = text_of("grad_text", grad_text, image_embeds, args);
  args.grad_scale = kCpu.data("grad_scale", grad_scale, {}, accumulator_of(image_embeds));
  py::gil_scoped_release unlocked;
  PPLLAVA_CALL(prompt_relevance_backward, args);
}

void weighted_pool3d(
    const at::Tensor& pooled, const at::Tensor& values, const OptionalTensor& weights, double temperature,
    const std::vector<Sizes>& window, const Sizes& counts) {
  Pool call(kCpu, "values", values, weights, temperature, window, counts);
  call.args.pooled = call.rows(kCpu, "pooled", pooled, call.args.channels, values.scalar_type());
  py::gil_scoped_release unlocked;
  PPLLAVA_CALL(weighted_pool3d, call.args);
}

void weighted_pool3d_backward(
    const OptionalTensor& grad_values, const OptionalTensor& grad_weights, const at::Tensor& shares,
    const OptionalTensor& grad_scores, const at::Tensor& grad, const at::Tensor& values, const OptionalTensor& weights,
    double temperature, const std::vector<Sizes>& window, const Sizes& counts) {
  Pool call(kCpu, "values", values, weights, temperature, window, counts);
  fill_backward(call, kCpu, values, weights, grad_values, grad_weights, shares, grad_scores, grad);
  py::gil_scoped_release unlocked;
  PPLLAVA_CALL(weighted_pool3d_backward, call.args);
}

// The windows of patches that lie as those of `features`, whose channels play no part.
void window_shares(
    const at::Tensor& shares, const OptionalTensor& weights, const at::Tensor& features, double temperature,
    const std::vector<Sizes>& window, const Sizes& counts) {
  Pool call(kCpu, "features", features, weights, temperature, window, counts);
  call.args.shares = call.scratch(kCpu, "shares", shares);
  py::gil_scoped_release unlocked;
  PPLLAVA_CALL(window_shares, call.args);
}

void window_shares_backward(
    const at::Tensor& grad_weights, const at::Tensor& shares, const at::Tensor& dots, const at::Tensor& features,
    double temperature, const std::vector<Sizes>& window, const Sizes& counts) {
  Pool call(kCpu, "features", features, std::nullopt, temperature, window, counts);
  call.args.grad_weights = kCpu.scores("grad_weights", grad_weights, features, call.axes);
  call.args.shares = call.scratch(kCpu, "shares", shares);
  call.args.grad_scores = call.scratch(kCpu, "dots", dots);
  py::gil_scoped_release unlocked;
  PPLLAVA_CALL(window_shares_backward, call.args);
}

void pool_hidden(
    const at::Tensor& sums, const at::Tensor& hidden, const OptionalTensor& bias, const at::Tensor& shares,
    int64_t first, int64_t channel, const at::Tensor& features, const std::vector<Sizes>& window, const Sizes& counts) {
  const Pool call(kCpu, "features", features, std::nullopt, 1, window, counts);
  const TileArgs args = sums_of(call, kCpu, hidden, bias, shares, first, channel, sums);
  py::gil_scoped_release unlocked;
  PPLLAVA_CALL(pool_hidden, args);
}

void pool_hidden_backward(
    const at::Tensor& hidden, const OptionalTensor& bias, const at::Tensor& shares, const OptionalTensor& dots,
    const at::Tensor& grad, int64_t first, int64_t channel, const at::Tensor& features,
    const std::vector<Sizes>& window, const Sizes& counts) {
  const Pool call(kCpu, "features", features, std::nullopt, 1, window, counts);
  const TileArgs args = grads_of(call, kCpu, hidden, bias, shares, dots, first, channel, grad);
  py::gil_scoped_release unlocked;
  PPLLAVA_CALL(pool_hidden_backward, args);
}

void score_rows(const at::Tensor& cosines, const at::Tensor& embeds, const at::Tensor& text) {
  const ScoreArgs args = score_of(kCpu, cosines, embeds, text);
  py::gil_scoped_release unlocked;
  PPLLAVA_CALL(score_rows, args);
}

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
  m.attr("torch_version") = ppllava::kBuiltFor + std::string_view(ppllava::kBuiltFor).rfind(' ') + 1;
#ifdef PPLLAVA_WITH_CUDA
  m.attr("cuda_architectures") = PPLLAVA_CUDA_ARCHS;
  m.attr("cuda_version") = PPLLAVA_CUDA_VERSION;
  ppllava::define_cuda(m);
#else
  m.attr("cuda_missing") = PPLLAVA_CUDA_MISSING;
#endif
}
