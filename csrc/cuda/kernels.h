// The launchers of the CUDA kernels, torch-free: structs and a stream in; null, or what went wrong, out.
#pragma once

#include <cstddef>  // defines: size_t

#include "../shapes.h"  // defines: Grid, PoolArgs, TileArgs, ScoreArgs, RelevanceArgs

namespace ppllava::cuda {

struct Stream {
  int device;
  void* handle;  // a cudaStream_t
};

// What the relevance needs on a GPU beside RelevanceArgs; text_embeds, grad_text and grad_scale there are unused.
struct RelevanceCall : RelevanceArgs {
  Grid text, text_grad;       // [B, C], stride[0] of the batch
  const float* scale_tensor;  // [1] a factor of scale, or null
  float* scale_grad;          // [1]
  void* workspace;            // of as many bytes as below, 16-byte aligned
};

size_t relevance_bytes(const RelevanceArgs&);
size_t relevance_backward_bytes(const RelevanceArgs&);
size_t guided_bytes(const RelevanceArgs&);

const char* prompt_relevance(const RelevanceCall&, Stream);
const char* prompt_relevance_backward(const RelevanceCall&, Stream);
const char* weighted_pool3d(const PoolArgs&, Stream);
const char* weighted_pool3d_backward(const PoolArgs&, Stream);
const char* prompt_guided_pool3d(const RelevanceCall&, const PoolArgs&, Stream);

const char* score_rows(const ScoreArgs&, Stream);
const char* window_shares(const PoolArgs&, Stream);
const char* window_shares_backward(const PoolArgs&, Stream);
const char* pool_hidden(const TileArgs&, Stream);
const char* pool_hidden_backward(const TileArgs&, Stream);

}  // namespace ppllava::cuda
