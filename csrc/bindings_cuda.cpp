// What Python calls of the CUDA kernels, with a stream as the last argument.

#include <pybind11/stl.h>             // defines: the casts of std::vector and std::optional
#include <torch/csrc/utils/pybind.h>  // defines: the cast of at::Tensor

#include "cuda/kernels.h"  // defines: the launchers of the CUDA kernels
#include "tensors.h"       // defines: Tensors, Pool, fill, fill_backward, tile_of, score_of

namespace ppllava {
namespace {

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
  call.relevance = on.patches(relevance, image_embeds);
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
  call.grad = on.patches(grad, image_embeds);
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
  on.patches(relevance, values);
  Pool pool(on, values, std::nullopt, temperature, window, counts, outputs, spans);
  pool.args.pooled = on.data(pooled);
  const at::Tensor memory = workspace(cuda::guided_bytes(call), relevance);
  call.workspace = memory.data_ptr();
  check_launch(cuda::prompt_guided_pool3d(call, pool.args, on.stream));
}

void window_shares(
    const at::Tensor& shares, const OptionalTensor& weights, const at::Tensor& features, double temperature,
    const std::vector<Sizes>& window, const Sizes& counts, const Sizes& outputs, const Sizes& spans, intptr_t stream) {
  const Place on(features, stream);
  Pool call(on, features, weights, temperature, window, counts, outputs, spans);
  call.args.shares = on.data(shares);
  check_launch(cuda::window_shares(call.args, on.stream));
}

void window_shares_backward(
    const at::Tensor& grad_weights, const at::Tensor& shares, const at::Tensor& dots, const at::Tensor& features,
    double temperature, const std::vector<Sizes>& window, const Sizes& counts, const Sizes& outputs, const Sizes& spans,
    intptr_t stream) {
  const Place on(features, stream);
  Pool call(on, features, std::nullopt, temperature, window, counts, outputs, spans);
  call.args.grad_weights = on.grid(grad_weights, call.axes);
  call.args.shares = on.data(shares);
  call.args.grad_scores = on.data(dots);
  check_launch(cuda::window_shares_backward(call.args, on.stream));
}

void pool_hidden(
    const at::Tensor& sums, const at::Tensor& hidden, const OptionalTensor& bias, const at::Tensor& shares,
    int64_t first, int64_t channel, const at::Tensor& features, const std::vector<Sizes>& window, const Sizes& counts,
    const Sizes& outputs, const Sizes& spans, intptr_t stream) {
  const Place on(hidden, stream);
  const Pool call(on, features, std::nullopt, 1, window, counts, outputs, spans);
  TileArgs args = tile_of(call, on, hidden, bias, shares, first, channel, sums);
  args.pooled = from_channel(on.data(sums), sums, channel);
  check_launch(cuda::pool_hidden(args, on.stream));
}

void pool_hidden_backward(
    const at::Tensor& hidden, const OptionalTensor& bias, const at::Tensor& shares, const OptionalTensor& dots,
    const at::Tensor& grad, int64_t first, int64_t channel, const at::Tensor& features,
    const std::vector<Sizes>& window, const Sizes& counts, const Sizes& outputs, const Sizes& spans, intptr_t stream) {
  const Place on(hidden, stream);
  const Pool call(on, features, std::nullopt, 1, window, counts, outputs, spans);
  TORCH_CHECK(grad.scalar_type() == hidden.scalar_type(), "expected a gradient of the tile's dtype");
  TileArgs args = tile_of(call, on, hidden, bias, shares, first, channel, grad);
  args.grad = from_channel(on.data(grad), grad, channel);
  args.grad_scores = on.data(dots);
  check_launch(cuda::pool_hidden_backward(args, on.stream));
}

void score_rows(const at::Tensor& cosines, const at::Tensor& embeds, const at::Tensor& text, intptr_t stream) {
  const Place on(embeds, stream);
  check_launch(cuda::score_rows(score_of(on, cosines, embeds, text), on.stream));
}

}  // namespace

void define_cuda(pybind11::module_& m) {
  m.def("cuda_prompt_relevance", &prompt_relevance);
  m.def("cuda_prompt_relevance_backward", &prompt_relevance_backward);
  m.def("cuda_weighted_pool3d", &weighted_pool3d);
  m.def("cuda_weighted_pool3d_backward", &weighted_pool3d_backward);
  m.def("cuda_prompt_guided_pool3d", &prompt_guided_pool3d);
  m.def("cuda_window_shares", &window_shares);
  m.def("cuda_window_shares_backward", &window_shares_backward);
  m.def("cuda_pool_hidden", &pool_hidden);
  m.def("cuda_pool_hidden_backward", &pool_hidden_backward);
  m.def("cuda_score_rows", &score_rows);
}

}  // namespace ppllava
