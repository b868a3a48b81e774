// What Python calls of the CUDA kernels, with a stream as the last argument.

#include <pybind11/stl.h>             // defines: the casts of std::vector and std::optional
#include <torch/csrc/utils/pybind.h>  // defines: the cast of at::Tensor

#include "cuda/kernels.h"  // defines: the launchers of the CUDA kernels
#include "tensors.h"       // defines: Tensors, Pool, fill, fill_backward, sums_of, grads_of, score_of

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
      : Tensors{x.device(), true}, stream{x.device().index(), reinterpret_cast<void*>(handle)} {
    PPLLAVA_CHECK(
        x.device().type() == kDevice, "backend='cuda' runs on ", kDevice, " tensors, got one on ", x.device(),
        "; move it there");
    PPLLAVA_CHECK(
        x.scalar_type() != at::kDouble, "backend='cuda' computes in float32, got float64; use backend='reference'");
  }

  // x [B, C] of any dtype but float64; stride[0] of the batch.
  Grid texts(const char* name, const at::Tensor& x, const RelevanceArgs& args) const {
    check_sizes(name, x, {args.batch, args.channels});
    if (x.scalar_type() == at::kDouble) check_dtype(name, x, at::kFloat);
    Grid texts = grid(name, x, 1, true);
    std::swap(texts.stride[0], texts.stride[3]);
    return texts;
  }
};

// Lives until the kernel is launched; PyTorch gives its memory only to what runs later on the same stream.
at::Tensor workspace(size_t bytes, const at::Tensor& like) {
  return at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte));
}

void check_launch(const char* error) { TORCH_CHECK(!error, "backend='cuda' could not run its kernel: ", error); }

cuda::RelevanceCall call_of(
    std::vector<Clip>& clips, const Place& on, const at::Tensor& relevance, const at::Tensor& image_embeds,
    const at::Tensor& text_embeds, const OptionalTensor& scale_tensor, double scale, const Sizes& counts) {
  cuda::RelevanceCall call{};
  fill(call, clips, on, image_embeds, text_embeds, scale, counts);
  call.relevance = on.patches("relevance", relevance, image_embeds);
  call.text = on.texts("text_embeds", text_embeds, call);
  if (scale_tensor)
    call.scale_tensor = static_cast<const float*>(on.data("scale_tensor", *scale_tensor, {}, at::kFloat));
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
  call.grad = on.patches("grad", grad, image_embeds);
  call.grad_image = on.grid_like("grad_image", grad_image, image_embeds, image_embeds.dim() - 1);
  call.text_grad = on.texts("grad_text", grad_text, call);
  call.scale_grad = static_cast<float*>(on.data("grad_scale", grad_scale, {}, at::kFloat));
  const at::Tensor memory = workspace(cuda::relevance_backward_bytes(call), relevance);
  call.workspace = memory.data_ptr();
  check_launch(cuda::prompt_relevance_backward(call, on.stream));
}

void weighted_pool3d(
    const at::Tensor& pooled, const at::Tensor& values, const OptionalTensor& weights, double temperature,
    const std::vector<Sizes>& window, const Sizes& counts, intptr_t stream) {
  const Place on(values, stream);
  Pool call(on, "values", values, weights, temperature, window, counts);
  call.args.pooled = call.rows(on, "pooled", pooled, call.args.channels, values.scalar_type());
  check_launch(cuda::weighted_pool3d(call.args, on.stream));
}

void weighted_pool3d_backward(
    const OptionalTensor& grad_values, const OptionalTensor& grad_weights, const at::Tensor& shares,
    const OptionalTensor& grad_scores, const at::Tensor& grad, const at::Tensor& values, const OptionalTensor& weights,
    double temperature, const std::vector<Sizes>& window, const Sizes& counts, intptr_t stream) {
  const Place on(values, stream);
  Pool call(on, "values", values, weights, temperature, window, counts);
  fill_backward(call, on, values, weights, grad_values, grad_weights, shares, grad_scores, grad);
  check_launch(cuda::weighted_pool3d_backward(call.args, on.stream));
}

void prompt_guided_pool3d(
    const at::Tensor& pooled, const at::Tensor& relevance, const at::Tensor& values, const at::Tensor& image_embeds,
    const at::Tensor& text_embeds, const OptionalTensor& scale_tensor, double scale, double temperature,
    const std::vector<Sizes>& window, const Sizes& counts, intptr_t stream) {
  const Place on(values, stream);
  std::vector<Clip> clips;
  auto call = call_of(clips, on, relevance, image_embeds, text_embeds, scale_tensor, scale, counts);
  on.patches("relevance", relevance, values);
  Pool pool(on, "values", values, std::nullopt, temperature, window, counts);
  pool.args.pooled = pool.rows(on, "pooled", pooled, pool.args.channels, values.scalar_type());
  const at::Tensor memory = workspace(cuda::guided_bytes(call), relevance);
  call.workspace = memory.data_ptr();
  check_launch(cuda::prompt_guided_pool3d(call, pool.args, on.stream));
}

void window_shares(
    const at::Tensor& shares, const OptionalTensor& weights, const at::Tensor& features, double temperature,
    const std::vector<Sizes>& window, const Sizes& counts, intptr_t stream) {
  const Place on(features, stream);
  Pool call(on, "features", features, weights, temperature, window, counts);
  call.args.shares = call.scratch(on, "shares", shares);
  check_launch(cuda::window_shares(call.args, on.stream));
}

void window_shares_backward(
    const at::Tensor& grad_weights, const at::Tensor& shares, const at::Tensor& dots, const at::Tensor& features,
    double temperature, const std::vector<Sizes>& window, const Sizes& counts, intptr_t stream) {
  const Place on(features, stream);
  Pool call(on, "features", features, std::nullopt, temperature, window, counts);
  call.args.grad_weights = on.scores("grad_weights", grad_weights, features, call.axes);
  call.args.shares = call.scratch(on, "shares", shares);
  call.args.grad_scores = call.scratch(on, "dots", dots);
  check_launch(cuda::window_shares_backward(call.args, on.stream));
}

void pool_hidden(
    const at::Tensor& sums, const at::Tensor& hidden, const OptionalTensor& bias, const at::Tensor& shares,
    int64_t first, int64_t channel, const at::Tensor& features, const std::vector<Sizes>& window, const Sizes& counts,
    intptr_t stream) {
  const Place on(hidden, stream);
  const Pool call(on, "features", features, std::nullopt, 1, window, counts);
  const TileArgs args = sums_of(call, on, hidden, bias, shares, first, channel, sums);
  check_launch(cuda::pool_hidden(args, on.stream));
}

void pool_hidden_backward(
    const at::Tensor& hidden, const OptionalTensor& bias, const at::Tensor& shares, const OptionalTensor& dots,
    const at::Tensor& grad, int64_t first, int64_t channel, const at::Tensor& features,
    const std::vector<Sizes>& window, const Sizes& counts, intptr_t stream) {
  const Place on(hidden, stream);
  const Pool call(on, "features", features, std::nullopt, 1, window, counts);
  const TileArgs args = grads_of(call, on, hidden, bias, shares, dots, first, channel, grad);
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
