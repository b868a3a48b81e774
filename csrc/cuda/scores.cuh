// Scores of patches, l[i] = s cos(x[i], c), and the statistics of their softmax over a clip: (max, sum of exp(l -
// max)). A part gives statistics of its own; those of the clip are combined from them in a fixed order by every block.
#pragma once

#include "clips.cuh"  // defines: Batch, DeviceClip, part_size

namespace ppllava::cuda {

struct Statistics {
  float largest, total;
};

// -inf and 0 for no patch at all.
inline __device__ Statistics merge(Statistics a, Statistics b) {
  const float largest = fmaxf(a.largest, b.largest);
  const float x = a.largest == largest ? a.total : a.total * expf(a.largest - largest);
  const float y = b.largest == largest ? b.total : b.total * expf(b.largest - largest);
  return {largest, x + y};
}

constexpr const char* kTooWide =
    "image_embeds has more channels than fit into the shared memory of this GPU; use backend='triton' or 'reference'";

// Blocks of a cooperative grid, at most.
template <class Kernel>
const char* cooperative_blocks(int& blocks, Kernel kernel, size_t shared, Stream stream) {
  if (const char* error = resident_blocks(blocks, kernel, kThreads, shared, stream.device)) return error;
  return blocks < 1 ? kTooWide : nullptr;
}

// The dynamic shared memory of the kernels that score.
struct ScoreMemory {
  double* scratch;  // [kScratch]
  float* unit;      // [C], zero up to a multiple of 8

  static constexpr int kScratch = 4 * kWarps;

  static size_t bytes(int64_t channels) {
    return kScratch * sizeof(double) + ceil_div(channels, 8) * 8 * sizeof(float);
  }

  __device__ ScoreMemory()
      : scratch(reinterpret_cast<double*>(dynamic_shared())), unit(reinterpret_cast<float*>(scratch + kScratch)) {}

  template <class T>
  __device__ T* as() const {
    return reinterpret_cast<T*>(scratch);
  }
};

inline __device__ float full_scale(const RelevanceCall& r) {
  return static_cast<float>(r.scale) * (r.scale_tensor ? *r.scale_tensor : 1.f);
}

// unit = c / max(|c|, eps) of clip b; returns |c|. Callers have met at a barrier since they read another one there.
inline __device__ float load_unit(const RelevanceCall& r, int64_t b, const ScoreMemory& memory) {
  const int channels = static_cast<int>(r.channels);
  float square = 0;
  for (int c = threadIdx.x; c < ceil_div(channels, 8) * 8; c += kThreads) {
    const float x = c < channels ? load_scalar(r.text, b * r.text.stride[0] + c) : 0.f;
    memory.unit[c] = x;
    square += x * x;
  }
  const float norm = sqrtf(block_sum(square, memory.as<float>()));
  for (int c = threadIdx.x; c < channels; c += kThreads) memory.unit[c] /= clamped(norm);
  __syncthreads();
  return norm;
}

inline __device__ int64_t
patch_offset(const RelevanceCall& r, const Grid& grid, int64_t b, const DeviceClip& clip, int patch) {
  const int width = static_cast<int>(r.width), height = static_cast<int>(r.height), row = patch / width;
  return grid.offset(b, clip.first_frame + row / height, row % height, patch % width);
}

struct DotAndSquare {
  float dot, square;
};

// (x . c^, x . x) of ROWS patches, for all lanes of a warp; ROWS * kDeep loads are in flight.
template <class T, bool ALIGNED, int ROWS>
__device__ void dots_and_squares(
    DotAndSquare (&sums)[ROWS], const T* const (&rows)[ROWS], int channels, const float* unit) {
  constexpr int N = kChunk<T>, kDeep = 4;
  for (int j = 0; j < ROWS; ++j) sums[j] = {0, 0};
  for (int base = 0; base < channels; base += kDeep * kWarp * N) {
    Raw raw[kDeep][ROWS];
#pragma unroll
    for (int i = 0; i < kDeep; ++i)
#pragma unroll
      for (int j = 0; j < ROWS; ++j) {
        const int d = base + (i * kWarp + lane_id()) * N;
        raw[i][j] = load_raw<T, ALIGNED>(rows[j] + d, channels - d);
      }
#pragma unroll
    for (int i = 0; i < kDeep; ++i) {
      const int d = base + (i * kWarp + lane_id()) * N;
      if (d >= channels) break;
      float u[N], x[N];
#pragma unroll
      for (int n = 0; n < N; n += 4) {
        const float4 four = *reinterpret_cast<const float4*>(unit + d + n);
        u[n] = four.x, u[n + 1] = four.y, u[n + 2] = four.z, u[n + 3] = four.w;
      }
#pragma unroll
      for (int j = 0; j < ROWS; ++j) {
        unpack<T>(x, raw[i][j]);
#pragma unroll
        for (int n = 0; n < N; ++n) {
          sums[j].dot += x[n] * u[n];
          sums[j].square += x[n] * x[n];
        }
      }
    }
  }
  for (int j = 0; j < ROWS; ++j) sums[j] = {warp_sum(sums[j].dot), warp_sum(sums[j].square)};
}

// Parts of the block, out of `count` in this launch.
struct PartRange {
  int begin, end;

  __device__ explicit PartRange(int count)
      : begin(static_cast<int>(int64_t{count} * blockIdx.x / gridDim.x)),
        end(static_cast<int>(int64_t{count} * (blockIdx.x + 1) / gridDim.x)) {}
};

// One part: its clip, and its patches there.
struct Part {
  int b;
  DeviceClip clip;
  int begin, end;  // patches of the clip
  int64_t first;   // of the clip, in relevance

  __device__ Part(const RelevanceCall& r, const Batch& batch, int part, int tile)
      : b(batch.find(&DeviceClip::first_part, part)), clip(batch.at(b)) {
    const int in_frame = static_cast<int>(r.height * r.width), patches = clip.frames * in_frame;
    const int size = part_size(patches, tile);
    begin = (part - clip.first_part) * size;
    end = begin + size < patches ? begin + size : patches;
    first = first_patch(batch, b, clip, in_frame);
  }
};

template <class T, bool ALIGNED>
__device__ Statistics
score_part(const RelevanceCall& r, int64_t b, const Part& part, float scale, float* logits, const float* unit) {
  constexpr int kRows = 2;
  Statistics mine{-INFINITY, 0};
  for (int patch = part.begin + warp_id() * kRows; patch < part.end; patch += kWarps * kRows) {
    const T* rows[kRows];
    for (int j = 0; j < kRows; ++j) {
      const int inside = patch + j < part.end ? patch + j : part.end - 1;
      rows[j] = static_cast<const T*>(r.image_embeds.data) + patch_offset(r, r.image_embeds, b, part.clip, inside);
    }
    DotAndSquare sums[kRows];
    dots_and_squares<T, ALIGNED>(sums, rows, static_cast<int>(r.channels), unit);
    for (int j = 0; j < kRows && patch + j < part.end; ++j) {
      const float logit = scale * (sums[j].dot / clamped(sqrtf(sums[j].square)));
      if (lane_id() == 0) logits[part.first + patch + j] = logit;
      mine = merge(mine, {logit, 1});
    }
  }
  return mine;
}

// logits [F, H, W], and partials [parts] of the whole call.
inline __device__ void score_parts(
    const RelevanceCall& r, const Batch& batch, int parts, float* logits, Statistics* partials,
    const ScoreMemory& memory) {
  const float scale = full_scale(r);
  const PartRange range(parts);
  int clip_of_unit = -1;
  for (int index = range.begin; index < range.end; ++index) {
    const Part part(r, batch, batch.clip[0].first_part + index, kForwardTile);
    const int64_t b = batch.first + part.b;
    if (part.b != clip_of_unit) load_unit(r, b, memory);
    clip_of_unit = part.b;
    Statistics mine;
    with_rows(r.image_embeds.dtype, is_aligned(r.image_embeds, r.channels), [&](auto zero, auto aligned) {
      mine = score_part<decltype(zero), decltype(aligned)::value>(r, b, part, scale, logits, memory.unit);
    });
    // Two sets in turns: what is written here was last read before the barrier of the part before.
    Statistics* of_warps = memory.as<Statistics>() + index % 2 * kWarps;
    if (lane_id() == 0) of_warps[warp_id()] = mine;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 1; w < kWarps; ++w) mine = merge(mine, of_warps[w]);
      partials[batch.clip[0].first_part + index] = mine;
    }
  }
}

// Of a whole clip, for all threads of the block.
inline __device__ Statistics
clip_statistics(const RelevanceCall& r, const DeviceClip& clip, const Statistics* partials, const ScoreMemory& memory) {
  const int patches = clip.frames * static_cast<int>(r.height * r.width);
  const int count = static_cast<int>(ceil_div(patches, part_size(patches, kForwardTile)));
  Statistics clip_total{-INFINITY, 0};
  for (int n = threadIdx.x; n < count; n += kThreads)
    clip_total.largest = fmaxf(clip_total.largest, partials[clip.first_part + n].largest);
  clip_total.largest = block_max(clip_total.largest, memory.as<float>());
  for (int n = threadIdx.x; n < count; n += kThreads)
    clip_total.total += merge({clip_total.largest, 0}, partials[clip.first_part + n]).total;
  clip_total.total = block_sum(clip_total.total, memory.as<float>());
  return clip_total;
}

// relevance = exp(logit - max) / sum, of the parts that this block scored.
inline __device__ void normalise_parts(
    const RelevanceCall& r, const Batch& batch, int parts, const float* logits, const Statistics* partials,
    const ScoreMemory& memory) {
  const PartRange range(parts);
  Statistics statistics{};
  int clip_of_statistics = -1;
  for (int index = range.begin; index < range.end; ++index) {
    const Part part(r, batch, batch.clip[0].first_part + index, kForwardTile);
    if (part.b != clip_of_statistics) statistics = clip_statistics(r, part.clip, partials, memory);
    clip_of_statistics = part.b;
    for (int patch = part.begin + threadIdx.x; patch < part.end; patch += kThreads) {
      const int64_t n = part.first + patch;
      static_cast<float*>(r.relevance)[n] = expf(logits[n] - statistics.largest) / statistics.total;
    }
  }
}

}  // namespace ppllava::cuda
