// What all CUDA kernels share: launches, rows of channels in 16-byte chunks, and reductions in a fixed order.
#pragma once

#include "kernels.h"  // defines: Grid, Dtype, Stream

#ifdef PPLLAVA_CUDA_ON_HOST
#include "cuda_on_host.h"  // defines: the twins of everything in the #else below, on a CPU, for tests
#else
#include <cooperative_groups.h>  // defines: cooperative_groups::this_grid
#include <cuda_runtime.h>        // defines: cudaLaunchKernelEx
#endif
#include <cuda_bf16.h>  // defines: __nv_bfloat16
#include <cuda_fp16.h>  // defines: __half

#include <cstring>  // defines: memcpy
#include <utility>  // defines: std::forward

namespace ppllava::cuda {

#ifndef PPLLAVA_CUDA_ON_HOST

inline __device__ char* dynamic_shared() {
  extern __shared__ __align__(16) char shared[];
  return shared;
}

// All threads of a cooperative grid; what was written before it can be read after it.
inline __device__ void grid_barrier() { cooperative_groups::this_grid().sync(); }

inline __device__ void prefetch_l2(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

struct Launch {
  int blocks, threads;
  size_t shared;  // bytes
  bool cooperative;
  int device;
  void* stream;
};

inline const char* message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

template <class Kernel>
cudaError_t allow_shared(Kernel kernel, size_t bytes) {
  constexpr size_t kWithoutAsking = 48 << 10;
  if (bytes <= kWithoutAsking) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

// The one way to launch. An error of this launch is returned, not left for the next call to find.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), const Launch& where, Arguments&&... arguments) {
  if (const char* error = message(cudaSetDevice(where.device))) return error;
  if (const char* error = message(allow_shared(kernel, where.shared))) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(where.blocks);
  config.blockDim = dim3(where.threads);
  config.dynamicSmemBytes = where.shared;
  config.stream = static_cast<cudaStream_t>(where.stream);
  config.attrs = &attribute;
  config.numAttrs = where.cooperative ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  if (error != cudaSuccess) cudaGetLastError();
  return message(error);
}

// Blocks that the device holds at once; 0 where one asks for more shared memory than it can have.
template <class Kernel>
const char* resident_blocks(int& blocks, Kernel kernel, int threads, size_t shared, int device) {
  int each = 0, processors = 0, most_shared = 0;
  blocks = 0;
  if (const char* error = message(cudaSetDevice(device))) return error;
  cudaError_t error = cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess && shared > static_cast<size_t>(most_shared)) return nullptr;
  if (error == cudaSuccess) error = allow_shared(kernel, shared);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  blocks = each * processors;
  return message(error);
}

#endif

constexpr int kWarp = 32, kWarps = 8, kThreads = kWarp * kWarps;
constexpr unsigned kAll = 0xffffffff;  // lanes
constexpr float kEps = 1e-12f;         // as torch.nn.functional.normalize

inline __device__ int lane_id() { return threadIdx.x % kWarp; }
inline __device__ int warp_id() { return threadIdx.x / kWarp; }
inline __device__ int warp_item() { return blockIdx.x * (blockDim.x / kWarp) + warp_id(); }  // of warp_each

// A warp for each item. Few items: fewer warps in each block, for more processors at work.
inline Launch warp_each(int64_t items, Stream stream) {
  const int warps = items < 4096 ? 2 : kWarps;
  const int64_t blocks = (items + warps - 1) / warps;
  return {static_cast<int>(blocks), warps * kWarp, 0, false, stream.device, stream.handle};
}

PPLLAVA_DEVICE inline int64_t ceil_div(int64_t n, int64_t size) { return (n + size - 1) / size; }

// max(norm, eps) that keeps NaN.
inline __device__ float clamped(float norm) { return norm < kEps ? kEps : norm; }

template <class T>
__device__ T warp_sum(T x) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(kAll, x, mask);
  return x;
}

inline __device__ float warp_max(float x) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, mask));
  return x;
}

// The sum over all threads of the block, for all of them; scratch: kWarps numbers.
template <class T>
__device__ T block_sum(T x, T* scratch) {
  x = warp_sum(x);
  __syncthreads();  // scratch may still be read
  if (lane_id() == 0) scratch[warp_id()] = x;
  __syncthreads();
  T sum = scratch[0];
  for (int w = 1; w < kWarps; ++w) sum += scratch[w];
  return sum;
}

inline __device__ float block_max(float x, float* scratch) {
  x = warp_max(x);
  __syncthreads();  // scratch may still be read
  if (lane_id() == 0) scratch[warp_id()] = x;
  __syncthreads();
  float largest = scratch[0];
  for (int w = 1; w < kWarps; ++w) largest = fmaxf(largest, scratch[w]);
  return largest;
}

// One number of any dtype.
inline __device__ float load_scalar(const Grid& x, int64_t offset) {
  switch (x.dtype) {
    case Dtype::float16:
      return __half2float(static_cast<const __half*>(x.data)[offset]);
    case Dtype::bfloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(x.data)[offset]);
    default:
      return static_cast<const float*>(x.data)[offset];
  }
}

inline __device__ void store_scalar(const Grid& x, int64_t offset, float number) {
  switch (x.dtype) {
    case Dtype::float16:
      static_cast<__half*>(x.data)[offset] = __float2half_rn(number);
      return;
    case Dtype::bfloat16:
      static_cast<__nv_bfloat16*>(x.data)[offset] = __float2bfloat16_rn(number);
      return;
    default:
      static_cast<float*>(x.data)[offset] = number;
  }
}

// Channels that one lane handles at a time: 16 bytes of them.
template <class T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));

// 16 bytes as they lie in memory: loads of several rows are in flight before the first is converted.
using Raw = uint4;

// `count` channels from `row` on, zero beyond them. ALIGNED: whole chunks at 16-byte addresses.
template <class T, bool ALIGNED>
__device__ Raw load_raw(const T* row, int count) {
  Raw raw = make_uint4(0, 0, 0, 0);
  if constexpr (ALIGNED) {
    if (count > 0) raw = __ldg(reinterpret_cast<const Raw*>(row));
  } else {
    T x[kChunk<T>];
    memcpy(x, &raw, sizeof(raw));
#pragma unroll
    for (int n = 0; n < kChunk<T>; ++n)
      if (n < count) x[n] = row[n];
    memcpy(&raw, x, sizeof(raw));
  }
  return raw;
}

inline __device__ float to_float(float x) { return x; }
inline __device__ float to_float(__half x) { return __half2float(x); }
inline __device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ void unpack(float (&out)[kChunk<T>], const Raw& raw) {
  T x[kChunk<T>];
  memcpy(x, &raw, sizeof(raw));
#pragma unroll
  for (int n = 0; n < kChunk<T>; ++n) out[n] = to_float(x[n]);
}

inline __device__ void round_pair(float* out, float a, float b) { out[0] = a, out[1] = b; }
inline __device__ void round_pair(__half* out, float a, float b) {
  const __half2 pair = __floats2half2_rn(a, b);
  memcpy(out, &pair, sizeof(pair));
}
inline __device__ void round_pair(__nv_bfloat16* out, float a, float b) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  memcpy(out, &pair, sizeof(pair));
}

// The inverse of load_raw and unpack.
template <class T, bool ALIGNED>
__device__ void store_chunk(T* row, const float (&in)[kChunk<T>], int count) {
  alignas(16) T x[kChunk<T>];
#pragma unroll
  for (int n = 0; n < kChunk<T>; n += 2) round_pair(x + n, in[n], in[n + 1]);
  if constexpr (ALIGNED) {
    Raw raw;
    memcpy(&raw, x, sizeof(raw));
    if (count > 0) *reinterpret_cast<Raw*>(row) = raw;
  } else {
#pragma unroll
    for (int n = 0; n < kChunk<T>; ++n)
      if (n < count) row[n] = x[n];
  }
}

// As load_raw, for what this kernel writes, too.
template <class T, bool ALIGNED>
__device__ Raw load_written(const T* row, int count) {
  if constexpr (!ALIGNED) return load_raw<T, false>(row, count);
  return count > 0 ? *reinterpret_cast<const Raw*>(row) : make_uint4(0, 0, 0, 0);
}

// As many float32 as one chunk of T has channels, zero beyond `count`.
template <class T, bool ALIGNED>
__device__ void load_floats(float (&out)[kChunk<T>], const float* from, int count) {
#pragma unroll
  for (int n = 0; n < kChunk<T>; n += 4) {
    float x[4];
    unpack<float>(x, load_written<float, ALIGNED>(from + n, count - n));
#pragma unroll
    for (int m = 0; m < 4; ++m) out[n + m] = x[m];
  }
}

template <class T, bool ALIGNED>
__device__ void store_floats(float* to, const float (&in)[kChunk<T>], int count) {
#pragma unroll
  for (int n = 0; n < kChunk<T>; n += 4) {
    const float x[4] = {in[n], in[n + 1], in[n + 2], in[n + 3]};
    store_chunk<float, ALIGNED>(to + n, x, count - n);
  }
}

// Whether rows of `channels` start at 16-byte addresses and end there.
PPLLAVA_DEVICE inline bool is_aligned(const Grid& x, int64_t channels) {
  const int64_t size = x.dtype == Dtype::float32 ? 4 : 2;
  int64_t all = static_cast<int64_t>(reinterpret_cast<uintptr_t>(x.data)) | channels * size;
  for (int n = 0; n < 4; ++n) all |= x.stride[n] * size;
  return all % 16 == 0;
}

template <bool VALUE>
struct Flag {
  static constexpr bool value = VALUE;
};

// Call function(T{}, Flag<ALIGNED>{}) for the dtype, where every thread of a block takes the same branch.
template <class Function>
__device__ void with_rows(Dtype dtype, bool aligned, const Function& function) {
  switch (dtype) {
    case Dtype::float16:
      return aligned ? function(__half{}, Flag<true>{}) : function(__half{}, Flag<false>{});
    case Dtype::bfloat16:
      return aligned ? function(__nv_bfloat16{}, Flag<true>{}) : function(__nv_bfloat16{}, Flag<false>{});
    default:
      return aligned ? function(float{}, Flag<true>{}) : function(float{}, Flag<false>{});
  }
}

}  // namespace ppllava::cuda
