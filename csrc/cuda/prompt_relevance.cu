// r[i] = softmax over one clip of l[i],  l[i] = s cos(x[i], c)
// dl[i] = r[i] (dr[i] - sum_j r[j] dr[j]);  dcos[i] = s dl[i];  ds = sum dl[i] cos[i]
// dx[i] = dcos[i] (c^ - cos[i] x^[i]) / |x[i]|;  dc^ = sum dcos[i] x^[i];  dc = (dc^ - (dc^.c^) c^) / |c|

#include <algorithm>  // defines: std::max, std::min

#include "scores.cuh"  // defines: score_parts, normalise_parts, load_unit, dots_and_squares

namespace ppllava::cuda {
namespace {

__global__ void __launch_bounds__(kThreads, 2) score_and_normalise(
    const __grid_constant__ RelevanceCall r, const __grid_constant__ Batch batch, int parts, float* logits,
    Statistics* partials) {
  const ScoreMemory memory;
  score_parts(r, batch, parts, logits, partials, memory);
  grid_barrier();
  normalise_parts(r, batch, parts, logits, partials, memory);
}

// Sums over the patches of a part; `text` is sum dcos[i] x^[i]. Kept in float64: where one r is almost 1, dr - mean is
// far smaller than dr.
struct Sums {
  double *weighted, *total;  // [parts] of r dr, and of r
  double* scale;             // [parts] of dl cos
  float* text;               // [parts, C]
};

// What the channels of a patch are multiplied with: dx = image (c^ - along x), and x text is summed.
struct Factors {
  float text, image, along;
};

// The dynamic shared memory of the backward.
struct BackwardMemory : ScoreMemory {
  Factors* factors;  // [kBackwardTile]
  float* text_sums;  // [groups, C], at most 2048 of them or one group

  static size_t bytes(int64_t channels) {
    const int64_t sums = std::max<int64_t>(kThreads * kChunk<__half>, ceil_div(channels, 8) * 8);
    return ScoreMemory::bytes(channels) + kBackwardTile * sizeof(Factors) + sums * sizeof(float);
  }
  __device__ explicit BackwardMemory(int64_t channels)
      : factors(reinterpret_cast<Factors*>(unit + ceil_div(channels, 8) * 8)),
        text_sums(reinterpret_cast<float*>(factors + kBackwardTile)) {}
};

// Sums of r dr and r of the part, a warp for each.
__device__ void sum_grads(const RelevanceCall& r, const Batch& batch, int parts, const Sums& sums) {
  const auto* relevance = static_cast<const float*>(r.relevance);
  const auto* grad = static_cast<const float*>(r.grad);
  for (int index = blockIdx.x * kWarps + warp_id(); index < parts; index += gridDim.x * kWarps) {
    const Part part(r, batch, batch.clip[0].first_part + index, kBackwardTile);
    double weighted = 0, total = 0;
    for (int patch = part.begin + lane_id(); patch < part.end; patch += kWarp) {
      const double share = relevance[part.first + patch];
      weighted += share * grad[part.first + patch];
      total += share;
    }
    weighted = warp_sum(weighted), total = warp_sum(total);
    if (lane_id() != 0) continue;
    sums.weighted[batch.clip[0].first_part + index] = weighted;
    sums.total[batch.clip[0].first_part + index] = total;
  }
}

// The sum of numbers [count] over the parts of a clip, for all threads of the block.
__device__ double sum_parts(const double* numbers, const DeviceClip& clip, int count, const ScoreMemory& memory) {
  double sum = 0;
  for (int n = threadIdx.x; n < count; n += kThreads) sum += numbers[clip.first_part + n];
  return block_sum(sum, memory.scratch);
}

__device__ int parts_of(const RelevanceCall& r, const DeviceClip& clip) {
  const int patches = clip.frames * static_cast<int>(r.height * r.width);
  return static_cast<int>(ceil_div(patches, part_size(patches, kBackwardTile)));
}

// Factors of one tile, two patches for each warp at a time; returns this warp's sum of dl cos.
template <class T, bool ALIGNED>
__device__ double tile_factors(
    const RelevanceCall& r, int64_t b, const Part& part, int tile, int tile_end, float scale, double mean,
    const BackwardMemory& memory) {
  constexpr int kPatches = 2;
  double scale_sum = 0;
  for (int patch = tile + warp_id() * kPatches; patch < tile_end; patch += kWarps * kPatches) {
    const T* rows[kPatches];
    for (int j = 0; j < kPatches; ++j) {
      const int inside = patch + j < tile_end ? patch + j : tile_end - 1;
      rows[j] = static_cast<const T*>(r.image_embeds.data) + patch_offset(r, r.image_embeds, b, part.clip, inside);
    }
    DotAndSquare sums[kPatches];
    dots_and_squares<T, ALIGNED>(sums, rows, static_cast<int>(r.channels), memory.unit);
    for (int j = 0; j < kPatches && patch + j < tile_end; ++j) {
      const int64_t n = part.first + patch + j;
      const float norm = sqrtf(sums[j].square), inverse = 1 / clamped(norm), cosine = sums[j].dot * inverse;
      const double share = static_cast<const float*>(r.relevance)[n];
      const double grad_logit = share * (static_cast<const float*>(r.grad)[n] - mean);
      scale_sum += grad_logit * cosine;
      const float factor = scale * static_cast<float>(grad_logit) * inverse;
      // A zero embedding gets no gradient.
      if (lane_id() == 0) memory.factors[patch + j - tile] = {factor, norm <= kEps ? 0 : factor, cosine * inverse};
    }
  }
  return scale_sum;
}

// Gradients of one tile's patches, and their share in that of the text. Each thread has chunks of its own, or several
// threads share one and take turns with the patches, each with a sum of its own.
template <class T, bool ALIGNED>
__device__ void tile_grads(
    const RelevanceCall& r, int64_t b, const Part& part, int tile, int tile_end, const BackwardMemory& memory) {
  constexpr int N = kChunk<T>, kDeep = 2;
  const int channels = static_cast<int>(r.channels), chunks = static_cast<int>(ceil_div(channels, N));
  const int groups = chunks < kThreads ? kThreads / chunks : 1, group = chunks < kThreads ? threadIdx.x / chunks : 0;
  if (group >= groups) return;
  for (int chunk = chunks < kThreads ? threadIdx.x % chunks : threadIdx.x; chunk < chunks; chunk += kThreads) {
    const int d = chunk * N;
    float sum[N] = {};
    for (int first = tile + group; first < tile_end; first += kDeep * groups) {
      Raw raw[kDeep];
#pragma unroll
      for (int i = 0; i < kDeep; ++i) {
        const int patch = first + i * groups < tile_end ? first + i * groups : first;
        const int64_t offset = patch_offset(r, r.image_embeds, b, part.clip, patch);
        raw[i] = load_raw<T, ALIGNED>(static_cast<const T*>(r.image_embeds.data) + offset + d, channels - d);
      }
#pragma unroll
      for (int i = 0; i < kDeep; ++i) {
        const int patch = first + i * groups;
        if (patch >= tile_end) break;
        const Factors factors = memory.factors[patch - tile];
        float x[N];
        unpack<T>(x, raw[i]);
#pragma unroll
        for (int n = 0; n < N; ++n) {
          sum[n] += factors.text * x[n];
          const float unit = d + n < channels ? memory.unit[d + n] : 0;
          x[n] = factors.image * (unit - factors.along * x[n]);
        }
        const int64_t offset = patch_offset(r, r.grad_image, b, part.clip, patch);
        store_chunk<T, ALIGNED>(static_cast<T*>(r.grad_image.data) + offset + d, x, channels - d);
      }
    }
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (d + n < channels) memory.text_sums[group * channels + d + n] += sum[n];
  }
}

__device__ bool rows_aligned(const RelevanceCall& r) {
  return is_aligned(r.image_embeds, r.channels) && is_aligned(r.grad_image, r.channels);
}

__device__ void grads_of_parts(
    const RelevanceCall& r, const Batch& batch, int parts, const Sums& sums, const BackwardMemory& memory) {
  const float scale = full_scale(r);
  const int channels = static_cast<int>(r.channels);
  const PartRange range(parts);
  int clip_of_unit = -1;
  double mean = 0;
  for (int index = range.begin; index < range.end; ++index) {
    const int global = batch.clip[0].first_part + index;
    const Part part(r, batch, global, kBackwardTile);
    const int64_t b = batch.first + part.b;
    if (part.b != clip_of_unit) {
      load_unit(r, b, memory);
      const int count = parts_of(r, part.clip);
      mean = sum_parts(sums.weighted, part.clip, count, memory) / sum_parts(sums.total, part.clip, count, memory);
      clip_of_unit = part.b;
    }
    int groups = 1;
    double scale_sum = 0;
    with_rows(r.image_embeds.dtype, rows_aligned(r), [&](auto zero, auto aligned) {
      using T = decltype(zero);
      constexpr bool kAligned = decltype(aligned)::value;
      const int chunks = static_cast<int>(ceil_div(channels, kChunk<T>));
      groups = chunks < kThreads ? kThreads / chunks : 1;
      for (int n = threadIdx.x; n < groups * channels; n += kThreads) memory.text_sums[n] = 0;
      for (int tile = part.begin; tile < part.end; tile += kBackwardTile) {
        const int tile_end = tile + kBackwardTile < part.end ? tile + kBackwardTile : part.end;
        __syncthreads();  // factors may still be read
        scale_sum += tile_factors<T, kAligned>(r, b, part, tile, tile_end, scale, mean, memory);
        __syncthreads();
        tile_grads<T, kAligned>(r, b, part, tile, tile_end, memory);
      }
    });
    scale_sum = block_sum(lane_id() == 0 ? scale_sum : 0., memory.scratch);  // and text_sums are complete
    if (threadIdx.x == 0) sums.scale[global] = scale_sum;
    for (int c = threadIdx.x; c < channels; c += kThreads) {
      float sum = memory.text_sums[c];
      for (int group = 1; group < groups; ++group) sum += memory.text_sums[group * channels + c];
      sums.text[int64_t{global} * channels + c] = sum;
    }
    __syncthreads();  // text_sums is read
  }
}

// dc^ = sum of the parts of a clip, 32 channels for each block; it takes the place of the first part's.
__device__ void sum_texts(const RelevanceCall& r, const Batch& batch, const Sums& sums, const BackwardMemory& memory) {
  const int channels = static_cast<int>(r.channels), columns = static_cast<int>(ceil_div(channels, kWarp));
  float* of_warps = memory.text_sums;  // [kWarps, 32]
  for (int64_t item = blockIdx.x; item < int64_t{batch.clips} * columns; item += gridDim.x) {
    const DeviceClip clip = batch.at(static_cast<int>(item / columns));
    const int count = parts_of(r, clip), c = static_cast<int>(item % columns) * kWarp + lane_id();
    float* text = sums.text + int64_t{clip.first_part} * channels + c;
    float sum = 0;
    for (int n = warp_id(); n < count && c < channels; n += kWarps) sum += text[int64_t{n} * channels];
    __syncthreads();  // of_warps may still be read
    of_warps[threadIdx.x] = sum;
    __syncthreads();
    if (warp_id() != 0 || c >= channels) continue;
    for (int w = 1; w < kWarps; ++w) sum += of_warps[w * kWarp + lane_id()];
    *text = sum;
  }
}

// dc = (dc^ - (dc^ . c^) c^) / |c|, a clip for each block.
__device__ void finish_texts(
    const RelevanceCall& r, const Batch& batch, const Sums& sums, const BackwardMemory& memory) {
  const int channels = static_cast<int>(r.channels);
  for (int b = blockIdx.x; b < batch.clips; b += gridDim.x) {
    const float norm = load_unit(r, batch.first + b, memory);
    const float* text = sums.text + int64_t{batch.at(b).first_part} * channels;
    float along = 0;
    for (int c = threadIdx.x; c < channels; c += kThreads) along += text[c] * memory.unit[c];
    along = block_sum(along, memory.as<float>());
    for (int c = threadIdx.x; c < channels; c += kThreads) {
      const float grad = norm <= kEps ? 0 : (text[c] - along * memory.unit[c]) / norm;
      store_scalar(r.text_grad, (batch.first + b) * r.text_grad.stride[0] + c, grad);
    }
  }
}

__global__ void __launch_bounds__(kThreads, 2) relevance_backward(
    const __grid_constant__ RelevanceCall r, const __grid_constant__ Batch batch, int parts, Sums sums) {
  const BackwardMemory memory(r.channels);
  sum_grads(r, batch, parts, sums);
  grid_barrier();
  grads_of_parts(r, batch, parts, sums, memory);
  grid_barrier();
  sum_texts(r, batch, sums, memory);
  grid_barrier();
  finish_texts(r, batch, sums, memory);
  // The clips of earlier launches are summed, too: the last launch of a call has the whole sum.
  if (blockIdx.x != 0) return;
  const int end = batch.clip[0].first_part + parts;
  double sum = 0;
  for (int n = threadIdx.x; n < end; n += kThreads) sum += sums.scale[n];
  sum = block_sum(sum, memory.scratch);
  if (threadIdx.x == 0) *r.scale_grad = static_cast<float>(sum);
}

Launch cooperative(int resident, int64_t useful, size_t shared, Stream stream) {
  const int blocks = static_cast<int>(std::min<int64_t>(resident, useful));
  return {blocks, kThreads, shared, true, stream.device, stream.handle};
}

}  // namespace

size_t relevance_bytes(const RelevanceArgs& a) { return count_parts(a, kForwardTile) * sizeof(Statistics); }

size_t relevance_backward_bytes(const RelevanceArgs& a) {
  return count_parts(a, kBackwardTile) * (3 * sizeof(double) + a.channels * sizeof(float));
}

const char* prompt_relevance(const RelevanceCall& r, Stream stream) {
  const size_t shared = ScoreMemory::bytes(r.channels);
  int resident;
  if (const char* error = cooperative_blocks(resident, score_and_normalise, shared, stream)) return error;
  auto* logits = static_cast<float*>(r.relevance);  // normalised in place, each by the block that scored it
  return for_each_batch(r, kForwardTile, [&](const Batch& batch, int parts, int64_t) {
    const Launch where = cooperative(resident, parts, shared, stream);
    return launch(score_and_normalise, where, r, batch, parts, logits, static_cast<Statistics*>(r.workspace));
  });
}

const char* prompt_relevance_backward(const RelevanceCall& r, Stream stream) {
  const int64_t all = count_parts(r, kBackwardTile);
  auto* numbers = static_cast<double*>(r.workspace);
  const Sums sums{numbers, numbers + all, numbers + 2 * all, reinterpret_cast<float*>(numbers + 3 * all)};
  const size_t shared = BackwardMemory::bytes(r.channels);
  int resident;
  if (const char* error = cooperative_blocks(resident, relevance_backward, shared, stream)) return error;
  return for_each_batch(r, kBackwardTile, [&](const Batch& batch, int parts, int64_t) {
    return launch(relevance_backward, cooperative(resident, parts, shared, stream), r, batch, parts, sums);
  });
}

}  // namespace ppllava::cuda
