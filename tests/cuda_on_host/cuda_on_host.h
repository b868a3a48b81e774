// What a kernel needs of CUDA, on a CPU and for tests alone: nvcc's words, warp collectives, barriers and launches.
// Threads are fibers of one CPU thread, see scheduler.cpp.
#pragma once

#include <cuda_bf16.h>         // defines: __nv_bfloat16; here since it uses the words that are redefined below
#include <cuda_fp16.h>         // defines: __half
#include <vector_functions.h>  // defines: make_float4
#include <vector_types.h>      // defines: uint3, dim3, float4

#include <algorithm>        // defines: std::min, std::max
#include <bit>              // defines: std::bit_cast, std::popcount
#include <cmath>            // defines: std::fmin, std::sqrt
#include <cstddef>          // defines: size_t
#include <cstdint>          // defines: uint64_t
#include <cstring>          // defines: memcpy
#include <functional>       // defines: std::function
#include <source_location>  // defines: std::source_location
#include <tuple>            // defines: std::tuple, std::apply
#include <type_traits>      // defines: std::is_arithmetic_v, std::common_type_t
#include <utility>          // defines: std::forward

#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __shared__
#undef __managed__
#undef __grid_constant__
#undef __launch_bounds__
#undef __cluster_dims__
#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ _Pragma("GCC error \"no __shared__ variables: all shared memory comes from dynamic_shared()\"")
#define __constant__ _Pragma("GCC error \"no __constant__ variables on the host\"")
#define __managed__ _Pragma("GCC error \"no __managed__ variables on the host\"")
#define __cluster_dims__(...) _Pragma("GCC error \"no clusters on the host\"")

namespace ppllava::cuda {

struct Launch {
  int blocks, threads;
  size_t shared;  // bytes
  bool cooperative;
  int device;
  void* stream;
};

namespace host {

enum class Kind { syncthreads, grid_barrier, syncwarp, shfl, shfl_xor, shfl_down, ballot };
using Site = std::source_location;  // where a collective is called

// Waits until all that must take part are there. mask: lanes; source: the lane whose value is returned.
uint64_t meet(Kind kind, Site site, unsigned mask = 0, uint64_t value = 0, int source = 0);
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
int lane();
void acquire_release(const void* address);  // an atomic was here
const char* run(const Launch& where, const void* kernel, const std::function<void()>& thread);
constexpr size_t kMaxShared = 227 << 10;  // of an H200
int resident_blocks();

template <class T>
T shuffle(Kind kind, Site site, unsigned mask, T x, int source) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "no such shuffle in CUDA");
  uint64_t bits = 0;
  memcpy(&bits, &x, sizeof(x));
  bits = meet(kind, site, mask, bits, source);
  memcpy(&x, &bits, sizeof(x));
  return x;
}

}  // namespace host

char* dynamic_shared();  // 16-byte aligned, 0xFF at first; of as many bytes as the launch asked for, null for none
void grid_barrier(host::Site site = host::Site::current());
inline void prefetch_l2(const void*) {}

// The one way to launch: runs the grid to its end. Null, or what is wrong with the launch.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), const Launch& where, Arguments&&... arguments) {
  const std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
  return host::run(where, reinterpret_cast<const void*>(kernel), [&] { std::apply(kernel, parameters); });
}

// Few, so that blocks loop and barriers span several; CUDA_ON_HOST_BLOCKS changes it.
template <class Kernel>
const char* resident_blocks(int& blocks, Kernel, int, size_t shared, int) {
  blocks = shared > host::kMaxShared ? 0 : host::resident_blocks();
  return nullptr;
}

}  // namespace ppllava::cuda

// Of the fiber that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#define CUDA_ON_HOST_SITE ppllava::cuda::host::Site site = ppllava::cuda::host::Site::current()

inline void __syncthreads(CUDA_ON_HOST_SITE) {
  ppllava::cuda::host::meet(ppllava::cuda::host::Kind::syncthreads, site);
}

inline void __syncwarp(unsigned mask = 0xffffffff, CUDA_ON_HOST_SITE) {
  ppllava::cuda::host::meet(ppllava::cuda::host::Kind::syncwarp, site, mask);
}

template <class T>
T __shfl_sync(unsigned mask, T x, int lane, CUDA_ON_HOST_SITE) {
  return ppllava::cuda::host::shuffle(ppllava::cuda::host::Kind::shfl, site, mask, x, lane & 31);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T x, int lane_mask, CUDA_ON_HOST_SITE) {
  const int lane = ppllava::cuda::host::lane() ^ lane_mask;
  return ppllava::cuda::host::shuffle(ppllava::cuda::host::Kind::shfl_xor, site, mask, x, lane);
}

// A lane that would read beyond the warp keeps its own.
template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned delta, CUDA_ON_HOST_SITE) {
  const int own = ppllava::cuda::host::lane(), lane = delta < 32u - own ? own + delta : own;
  return ppllava::cuda::host::shuffle(ppllava::cuda::host::Kind::shfl_down, site, mask, x, lane);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_HOST_SITE) {
  using namespace ppllava::cuda::host;
  return static_cast<unsigned>(meet(Kind::ballot, site, mask, predicate != 0));
}

template <class T>
T __ldg(const T* address) {
  return *address;
}

inline void __threadfence() {}

template <class T>
__attribute__((no_sanitize("thread"))) T atomicAdd(T* address, std::type_identity_t<T> x) {
  static_assert(std::is_integral_v<T>, "sums of floats by atomics depend on the order");
  ppllava::cuda::host::acquire_release(address);
  const T before = *address;
  *address = before + x;
  return before;
}

// CUDA's, which the standard library does not have as global functions.
template <class A, class B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
constexpr auto min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return std::fmin(static_cast<T>(a), static_cast<T>(b));
  else
    return std::min(static_cast<T>(a), static_cast<T>(b));
}

template <class A, class B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
constexpr auto max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return std::fmax(static_cast<T>(a), static_cast<T>(b));
  else
    return std::max(static_cast<T>(a), static_cast<T>(b));
}

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(int x) { return x ? std::countr_zero(static_cast<unsigned>(x)) + 1 : 0; }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
