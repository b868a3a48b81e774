// The epilogues of the projector's matrix products:
//     h[i] = gelu(z[i] + b1),  sums[o] += sum_{i in o, i in the tile} p[o, i] h[i],
//     dz[i] = gelu'(z[i] + b1) sum_{o with i} p[o, i] g[o],  dots[o, i] += g[o] . h[i]
// and the cosines of the guide's product.

#include <algorithm>  // defines: std::max

#include "windows.cuh"  // defines: PatchWindows, Term, slot_of, load_rows

namespace ppllava::cuda {
namespace {

// Rows that a warp has in flight. Four, as in weighted_pool3d, take more registers than there are beside gelu.
constexpr int kRows = 2;

// The cosines of kRows rows with the text, whose length every warp sums up beside them.
template <class T, bool ALIGNED>
__device__ void cosines_of_rows(const ScoreArgs& a, int64_t first) {
  constexpr int N = kChunk<T>;
  const int channels = static_cast<int>(a.channels);
  const T* rows[kRows];
  for (int j = 0; j < kRows; ++j)
    rows[j] = static_cast<const T*>(a.embeds) + (first + j < a.rows ? first + j : first) * a.channels;
  float dot[kRows] = {}, square[kRows] = {}, length = 0;
#pragma unroll 1
  for (int base = 0; base < channels; base += kSlice<T, kWindowColumns>) {
    Raw raw[kRows][kWindowColumns];
    float text[kWindowColumns][N];
#pragma unroll
    for (int i = 0; i < kWindowColumns; ++i) {
      const int d = channel_of<T>(base, i);
#pragma unroll
      for (int j = 0; j < kRows; ++j) raw[j][i] = load_raw<T, ALIGNED>(rows[j] + d, channels - d);
      load_floats<T, ALIGNED>(text[i], static_cast<const float*>(a.text) + d, channels - d);
    }
#pragma unroll
    for (int i = 0; i < kWindowColumns; ++i) {
#pragma unroll
      for (int n = 0; n < N; ++n) length += text[i][n] * text[i][n];
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        float x[N];
        unpack<T>(x, raw[j][i]);
#pragma unroll
        for (int n = 0; n < N; ++n) {
          dot[j] += x[n] * text[i][n];
          square[j] += x[n] * x[n];
        }
      }
    }
  }
  length = clamped(sqrtf(warp_sum(length)));
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    const float norm = sqrtf(warp_sum(square[j])), cosine = warp_sum(dot[j]) / clamped(norm) / length;
    if (lane_id() != 0 || first + j >= a.rows) continue;
    static_cast<float*>(a.cosines)[first + j] = cosine;
  }
}

__global__ void __launch_bounds__(kThreads, 2) score_embeds(const __grid_constant__ ScoreArgs a) {
  const int64_t first = int64_t{warp_item()} * kRows;
  if (first >= a.rows) return;
  const bool aligned = is_aligned({const_cast<void*>(a.embeds), a.dtype, {}}, a.channels) &&
                       is_aligned({const_cast<void*>(a.text), Dtype::float32, {}}, a.channels);
  with_rows(a.dtype, aligned, [&](auto zero, auto whole) {
    cosines_of_rows<decltype(zero), decltype(whole)::value>(a, first);
  });
}

// Of one clip: the patches of a tile, and the windows that hold any of them.
struct Tile {
  DeviceClip clip;
  Box patches, windows;
};

// A chunk of the bias, zero without one.
template <class T, bool ALIGNED>
__device__ Raw load_bias(const TileArgs& a, int d) {
  const T* bias = static_cast<const T*>(a.bias);
  return load_raw<T, ALIGNED>(bias ? bias + d : bias, bias ? static_cast<int>(a.channels) - d : 0);
}

// gelu(x) = x cdf(x), and its slope cdf(x) + x pdf(x), of the normal distribution.
inline __device__ float cdf(float x) { return 0.5f * (1 + erff(x * 0.70710678118654752f)); }
inline __device__ float slope(float x, float cdf) { return cdf + x * (0.39894228040143268f * expf(-0.5f * x * x)); }

// sums[d] += sum_k share_k gelu(z[offset_k + d] + b1[d]) for the channels of one slice.
template <class T, bool ALIGNED, class Terms>
__device__ void add_rows(const TileArgs& a, float* sums, int first, int count, const Terms& terms) {
  constexpr int N = kChunk<T>;
  const int channels = static_cast<int>(a.channels);
  Raw bias[kWindowColumns];
  float sum[kWindowColumns][N];
#pragma unroll
  for (int i = 0; i < kWindowColumns; ++i) {
    const int d = channel_of<T>(first, i);
    bias[i] = load_bias<T, ALIGNED>(a, d);
    load_floats<T, ALIGNED>(sum[i], sums + d, channels - d);
  }
#pragma unroll 1
  for (int begin = 0; begin < count; begin += kWarp) {
    const Term term = terms(begin + lane_id());
    const int here = count - begin < kWarp ? count - begin : kWarp;
#pragma unroll 1
    for (int k = 0; k < here; k += kRows) {
      Raw raw[kRows][kWindowColumns];
      load_rows<T, ALIGNED>(raw, static_cast<const T*>(a.values.data), term, k, here, first, channels);
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        const float share = __shfl_sync(kAll, term.share, (k + j) % kWarp);
        if (k + j >= here) break;
#pragma unroll
        for (int i = 0; i < kWindowColumns; ++i) {
          float x[N], b[N];
          unpack<T>(x, raw[j][i]);
          unpack<T>(b, bias[i]);
#pragma unroll
          for (int n = 0; n < N; ++n) {
            x[n] += b[n];
            sum[i][n] += share * (x[n] * cdf(x[n]));
          }
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kWindowColumns; ++i) {
    const int d = channel_of<T>(first, i);
    store_floats<T, ALIGNED>(sums + d, sum[i], channels - d);
  }
}

// Whether the rows of the tile, of the bias and of `others`, which are `step` apart, are whole chunks.
inline __device__ bool tile_aligned(const TileArgs& a, const void* others, Dtype dtype) {
  return is_aligned(a.values, a.channels) && is_aligned({const_cast<void*>(a.bias), a.values.dtype, {}}, a.channels) &&
         is_aligned({const_cast<void*>(others), dtype, {a.step, 0, 0, 0}}, a.channels);
}

// A warp for each window and slice of channels; of the window, the patches that lie in the tile.
__global__ void __launch_bounds__(kThreads, 2)
    pool_tile(const __grid_constant__ TileArgs a, const __grid_constant__ Tile tile, int items, int slices) {
  const int item = warp_item();
  if (item >= items) return;
  int o[3], begin[3];
  tile.windows.place(item / slices, o);
  Box patches;
  for (int n = 0; n < 3; ++n) {
    const DeviceAxis axis = axis_of(a, tile.clip, n);
    const int end = axis.end(o[n]), tile_begin = tile.patches.begin[n], tile_end = tile_begin + tile.patches.size[n];
    begin[n] = axis.begin(o[n]);
    patches.begin[n] = begin[n] > tile_begin ? begin[n] : tile_begin;
    patches.size[n] = (end < tile_end ? end : tile_end) - patches.begin[n];
  }
  const int64_t local = (o[0] * a.window.outputs[1] + o[1]) * a.window.outputs[2] + o[2];
  const int64_t window = tile.clip.first_output * a.window.outputs[1] * a.window.outputs[2] + local;
  const int count = patches.volume();
  const auto term = [&](int k) -> Term {
    if (k >= count) return {0, 0};
    int at[3];
    patches.place(k, at);
    const int t = at[0] - tile.patches.begin[0], h = at[1] - tile.patches.begin[1];
    const int64_t row = (t * tile.patches.size[1] + h) * tile.patches.size[2] + at[2];
    const int64_t slot = slot_of(a, tile.clip, local, at[0] - begin[0], at[1] - begin[1], at[2] - begin[2]);
    return {static_cast<const float*>(a.shares)[slot], row * a.channels};
  };
  float* sums = static_cast<float*>(a.pooled) + window * a.step;
  with_rows(a.values.dtype, tile_aligned(a, sums, Dtype::float32), [&](auto zero, auto aligned) {
    using T = decltype(zero);
    add_rows<T, decltype(aligned)::value>(a, sums, item % slices * kSlice<T, kWindowColumns>, count, term);
  });
}

// One patch: its row of z becomes that of dz, and its windows' dots grow.
template <class T, bool ALIGNED>
__device__ void row_backward(const TileArgs& a, T* row, const PatchWindows& windows) {
  constexpr int N = kChunk<T>;
  const int channels = static_cast<int>(a.channels), count = windows.windows.volume();
#pragma unroll 1
  for (int base = 0; base < channels; base += kSlice<T, kWindowColumns>) {
    float h[kWindowColumns][N], slopes[kWindowColumns][N], sum[kWindowColumns][N] = {};
#pragma unroll
    for (int i = 0; i < kWindowColumns; ++i) {
      const int d = channel_of<T>(base, i);
      unpack<T>(slopes[i], load_bias<T, ALIGNED>(a, d));
      unpack<T>(h[i], load_written<T, ALIGNED>(row + d, channels - d));
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const float x = h[i][n] + slopes[i][n], c = cdf(x);
        h[i][n] = x * c;
        slopes[i][n] = slope(x, c);
      }
    }
#pragma unroll 1
    for (int begin = 0; begin < count; begin += kWarp) {
      const int here = count - begin < kWarp ? count - begin : kWarp;
      Term term{0, 0};
      int64_t slot = 0;
      if (lane_id() < here) {
        int64_t window;
        slot = windows.slot(begin + lane_id(), window);
        term = {static_cast<const float*>(a.shares)[slot], window * a.step};
      }
      float mine = 0;  // g . h of window `lane`
#pragma unroll 1
      for (int k = 0; k < here; k += kRows) {
        Raw raw[kRows][kWindowColumns];
        load_rows<T, ALIGNED>(raw, static_cast<const T*>(a.grad), term, k, here, base, channels);
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
          const float share = __shfl_sync(kAll, term.share, (k + j) % kWarp);
          if (k + j >= here) break;
          float dot = 0;
#pragma unroll
          for (int i = 0; i < kWindowColumns; ++i) {
            float g[N];
            unpack<T>(g, raw[j][i]);
#pragma unroll
            for (int n = 0; n < N; ++n) {
              dot += g[n] * h[i][n];
              sum[i][n] += share * g[n];
            }
          }
          if (!a.grad_scores) continue;
          dot = warp_sum(dot);
          if (lane_id() == k + j) mine = dot;
        }
      }
      if (a.grad_scores && lane_id() < here) static_cast<float*>(a.grad_scores)[slot] += mine;
    }
#pragma unroll
    for (int i = 0; i < kWindowColumns; ++i) {
      const int d = channel_of<T>(base, i);
#pragma unroll
      for (int n = 0; n < N; ++n) sum[i][n] = count ? sum[i][n] * slopes[i][n] : 0;  // NaN in gaps stays there
      store_chunk<T, ALIGNED>(row + d, sum[i], channels - d);
    }
  }
}

// A warp for each patch of the tile.
__global__ void __launch_bounds__(kThreads, 2)
    tile_backward(const __grid_constant__ TileArgs a, const __grid_constant__ Tile tile) {
  const int row = warp_item();
  if (row >= tile.patches.volume()) return;
  int at[3];
  tile.patches.place(row, at);
  const PatchWindows windows(a, tile.clip, at);
  with_rows(a.values.dtype, tile_aligned(a, a.grad, a.values.dtype), [&](auto zero, auto aligned) {
    using T = decltype(zero);
    row_backward<T, decltype(aligned)::value>(a, static_cast<T*>(a.values.data) + row * a.channels, windows);
  });
}

constexpr const char* kNoTile = "expected a tile of whole frames of one clip, or of whole rows of one frame";

// Null, or what is wrong.
const char* find_tile(Tile& tile, const TileArgs& a) {
  int64_t b = 0, first = a.first;
  while (b < a.batch && first >= patches_of(a, a.clips[b])) first -= patches_of(a, a.clips[b++]);
  if (b == a.batch || first < 0 || a.rows < 1 || first + a.rows > patches_of(a, a.clips[b])) return kNoTile;
  const Clip& clip = a.clips[b];
  if (!countable(a) || std::max(patches_of(a, clip), a.channels) > kMost) return kTooMany;
  const auto narrow = [](int64_t n) { return static_cast<int>(n); };
  const int width = narrow(a.width), height = narrow(a.height), row = narrow(first / width % height);
  const int frames = narrow(ceil_div(a.rows, a.height * a.width)), rows = narrow(a.rows / frames / width);
  tile.clip = {0, narrow(clip.frames), narrow(clip.first_output), narrow(clip.outputs), narrow(clip.span)};
  tile.clip.first_slot = clip.first_slot;
  tile.patches = {{narrow(first / width / height), row, 0}, {frames, rows, width}};
  if (first % width || tile.patches.volume() != a.rows || row + rows > height || (frames > 1 && rows < height))
    return kNoTile;
  for (int n = 0; n < 3; ++n) {
    const DeviceAxis axis = axis_of(a, tile.clip, n);
    const int begin = axis.first(tile.patches.begin[n]);
    const int end = axis.last(tile.patches.begin[n] + tile.patches.size[n] - 1);
    tile.windows.begin[n] = begin, tile.windows.size[n] = std::max(end - begin, 0);
  }
  return nullptr;
}

}  // namespace

const char* score_rows(const ScoreArgs& a, Stream stream) {
  if (std::max(a.rows, a.channels) > kMost) return kTooMany;
  return launch(score_embeds, warp_each(ceil_div(a.rows, kRows), stream), a);
}

const char* pool_hidden(const TileArgs& a, Stream stream) {
  Tile tile{};
  if (const char* error = find_tile(tile, a)) return error;
  const int slices = slices_of(a);
  const int64_t items = int64_t{tile.windows.size[0]} * tile.windows.size[1] * tile.windows.size[2] * slices;
  if (items > kMost) return kTooMany;
  // Strided windows can leave the whole tile out.
  return items ? launch(pool_tile, warp_each(items, stream), a, tile, static_cast<int>(items), slices) : nullptr;
}

const char* pool_hidden_backward(const TileArgs& a, Stream stream) {
  Tile tile{};
  if (const char* error = find_tile(tile, a)) return error;
  return launch(tile_backward, warp_each(a.rows, stream), a, tile);
}

}  // namespace ppllava::cuda
