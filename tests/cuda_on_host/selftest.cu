// Small kernels, right and wrong, that show what a run on the host finds. argv: the kernels to run; exit status 1 if
// one of them has a wrong result. nvcc compiles the same file, and then it runs on a GPU.

#include "common.cuh"  // defines: launch, dynamic_shared, grid_barrier, warp_sum

#include <cstdio>   // defines: printf
#include <cstdlib>  // defines: malloc
#include <cstring>  // defines: strcmp

namespace ppllava::cuda {
namespace {

#ifdef PPLLAVA_CUDA_ON_HOST
void* allocate(size_t bytes) { return malloc(bytes); }
const char* finish() { return nullptr; }
#else
void* allocate(size_t bytes) {
  void* memory = nullptr;
  return cudaMallocManaged(&memory, bytes) == cudaSuccess ? memory : nullptr;
}
const char* finish() { return message(cudaDeviceSynchronize()); }
#endif

constexpr int kBlocks = 3, kAllThreads = kBlocks * kThreads;

struct Arguments {
  const float* in;  // [kAllThreads] 1, 2, 3, ..
  float* out;       // [kAllThreads]
  __half* half;     // [kAllThreads]
  __nv_bfloat16* bfloat16;
  float* sums;        // [kBlocks]
  unsigned* counter;  // 0
};

__device__ int global_id() { return blockIdx.x * blockDim.x + threadIdx.x; }
__device__ float* floats() { return reinterpret_cast<float*>(dynamic_shared()); }

// out[i] = sum over the warp of in
__global__ void warp_reduction(const __grid_constant__ Arguments a) {
  a.out[global_id()] = warp_sum(a.in[global_id()]);
}

// out[i] = 32 * in[the first of the warp] + in[i + 1, or i at the warp's end] + lanes of the warp with an even in
__global__ void warp_collectives(const __grid_constant__ Arguments a) {
  const float x = __ldg(a.in + global_id());
  const double first = __shfl_sync(kAll, static_cast<double>(x), 0);
  const float right = __shfl_down_sync(kAll, x, 1);
  const unsigned even = __ballot_sync(kAll, static_cast<int>(x) % 2 == 0);
  float half = 0;
  if (lane_id() < 16) half = __shfl_xor_sync(0xffffu, x, 1) - __shfl_xor_sync(0xffffu, static_cast<int64_t>(x), 1);
  a.out[global_id()] = static_cast<float>(32 * first) + right + static_cast<float>(__popc(even)) + half;
}

// shared[i] = in[i], and then the sum over the block
template <bool BARRIER>
__device__ float tree_sum(const Arguments& a) {
  float* shared = floats();
  shared[threadIdx.x] = a.in[global_id()];
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    if constexpr (BARRIER) __syncthreads();
  }
  if constexpr (!BARRIER) __syncthreads();
  return shared[0];
}

__global__ void block_reduction(const __grid_constant__ Arguments a) { a.out[global_id()] = tree_sum<true>(a); }

// The same through the warps and common.cuh.
__global__ void two_block_sums(const __grid_constant__ Arguments a) {
  const float sum = block_sum(a.in[global_id()], floats());
  a.out[global_id()] = (sum + block_sum(a.in[global_id()] + 1, floats()) - kThreads) / 2;
}

// out[i] = sum over the grid of in
template <bool BARRIER>
__global__ void grid_sum(const __grid_constant__ Arguments a) {
  const float sum = tree_sum<true>(a);
  if (threadIdx.x == 0) a.sums[blockIdx.x] = sum;
  if constexpr (BARRIER) grid_barrier();
  float all = 0;
  for (int b = 0; b < gridDim.x; ++b) all += a.sums[b];
  a.out[global_id()] = all;
}

// The same by the block that ends last.
__global__ void last_block_sum(const __grid_constant__ Arguments a) {
  auto* last = reinterpret_cast<unsigned*>(dynamic_shared() + kThreads * sizeof(float));
  const float sum = tree_sum<true>(a);
  if (threadIdx.x == 0) {
    a.sums[blockIdx.x] = sum;
    __threadfence();
    *last = atomicAdd(a.counter, 1u);
  }
  __syncthreads();
  if (*last + 1 < gridDim.x) return;
  float all = 0;
  for (int b = 0; b < gridDim.x; ++b) all += a.sums[b];
  for (int n = threadIdx.x; n < kAllThreads; n += kThreads) a.out[n] = all;
}

// half, bfloat16 = in, a stride of 3 elements modulo the grid; out = their sum
__global__ void strided_copy(const __grid_constant__ Arguments a) {
  const int to = (global_id() * 5 + 2) % kAllThreads;
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a.in[to], 0);
  a.half[to] = __float2half_rn(a.in[to]);
  a.bfloat16[to] = pair.x;
  a.out[to] = to_float(a.half[to]) + to_float(a.bfloat16[to]);
}

__global__ void past_shared(const __grid_constant__ Arguments a) {
  floats()[threadIdx.x + 1] = a.in[global_id()];
  a.out[global_id()] = 0;
}

__global__ void past_global(const __grid_constant__ Arguments a) { a.out[global_id()] = a.in[global_id() + 1]; }

__global__ void not_aligned(const __grid_constant__ Arguments a) {
  a.out[global_id()] = reinterpret_cast<const float4*>(a.in + 1)->x;
}

// Noticed by the page below the stack, as a GPU would not.
__device__ int depth(volatile int* above, int n) {
  volatile int here[64];
  here[n % 64] = n + *above;
  return n == 0 ? here[0] : depth(here + n % 64, n - 1) + here[n % 64];
}

__global__ void deep_recursion(const __grid_constant__ Arguments a) {
  volatile int top = 0;
  a.out[global_id()] = static_cast<float>(depth(&top, 1 << 20));
}

__global__ void never_written(const __grid_constant__ Arguments a) { a.out[global_id()] = floats()[threadIdx.x]; }

__global__ void no_syncthreads(const __grid_constant__ Arguments a) { a.out[global_id()] = tree_sum<false>(a); }

// Right in a forward order: each lane reads what the one before it wrote.
__global__ void no_syncwarp(const __grid_constant__ Arguments a) {
  floats()[threadIdx.x] = a.in[global_id()];
  a.out[global_id()] = floats()[lane_id() == 0 ? threadIdx.x : threadIdx.x - 1] + (lane_id() == 0 ? 0 : 1);
}

__global__ void two_blocks_write_one(const __grid_constant__ Arguments a) {
  a.out[global_id()] = a.in[global_id()];
  if (threadIdx.x == 0) a.sums[0] = 1;
}

__global__ void divergent_shuffle(const __grid_constant__ Arguments a) {
  float x = a.in[global_id()];
  if (lane_id() < 16)
    x = __shfl_xor_sync(kAll, x, 1);
  else
    x = __shfl_sync(kAll, x, 0);
  a.out[global_id()] = x;
}

__global__ void shuffle_after_exit(const __grid_constant__ Arguments a) {
  if (lane_id() == 31) return;
  a.out[global_id()] = __shfl_sync(kAll, a.in[global_id()], 0);
}

__global__ void shuffle_outside_of_mask(const __grid_constant__ Arguments a) {
  if (lane_id() < 16) a.out[global_id()] = __shfl_sync(0xffffu, a.in[global_id()], 16);
}

__global__ void barrier_of_some(const __grid_constant__ Arguments a) {
  if (threadIdx.x < 64) __syncthreads();
  a.out[global_id()] = a.in[global_id()];
}

__global__ void two_barriers(const __grid_constant__ Arguments a) {
  if (threadIdx.x < 64)
    __syncthreads();
  else
    __syncthreads();
  a.out[global_id()] = a.in[global_id()];
}

__global__ void grid_barrier_of_some(const __grid_constant__ Arguments a) {
  if (blockIdx.x > 0) grid_barrier();
  a.out[global_id()] = a.in[global_id()];
}

using Kernel = void (*)(Arguments);
using Expected = double (*)(int i);

double sum_of(int first, int count) { return count * (first + 1 + (count - 1) / 2.0); }
double same(int i) { return i + 1; }
double over_warp(int i) { return sum_of(i / kWarp * kWarp, kWarp); }
double over_block(int i) { return sum_of(i / kThreads * kThreads, kThreads); }
double over_grid(int) { return sum_of(0, kAllThreads); }
double collected(int i) { return 32.0 * (i / kWarp * kWarp + 1) + (i % kWarp == kWarp - 1 ? i + 1 : i + 2) + 16; }
double copied(int i) { return __half2float(__float2half_rn(i + 1)) + __bfloat162float(__float2bfloat16_rn(i + 1)); }

struct Case {
  const char* name;
  Kernel kernel;
  Expected expected;
  bool cooperative = false;
};

const Case kCases[] = {
    {"warp_reduction", warp_reduction, over_warp},
    {"warp_collectives", warp_collectives, collected},
    {"block_reduction", block_reduction, over_block},
    {"two_block_sums", two_block_sums, over_block},
    {"grid_sum", grid_sum<true>, over_grid, true},
    {"last_block_sum", last_block_sum, over_grid},
    {"strided_copy", strided_copy, copied},
    {"past_shared", past_shared, same},
    {"past_global", past_global, same},
    {"not_aligned", not_aligned, same},
    {"deep_recursion", deep_recursion, same},
    {"never_written", never_written, same},
    {"no_syncthreads", no_syncthreads, over_block},
    {"no_syncwarp", no_syncwarp, same},
    {"no_grid_barrier", grid_sum<false>, over_grid, true},
    {"two_blocks_write_one", two_blocks_write_one, same},
    {"divergent_shuffle", divergent_shuffle, same},
    {"shuffle_after_exit", shuffle_after_exit, same},
    {"shuffle_outside_of_mask", shuffle_outside_of_mask, same},
    {"barrier_of_some", barrier_of_some, same},
    {"two_barriers", two_barriers, same},
    {"grid_barrier_of_some", grid_barrier_of_some, same, true},
    {"grid_barrier_without_cooperation", grid_sum<true>, over_grid},
};

bool run(const Case& test) {
  Arguments a;
  float* in = static_cast<float*>(allocate(kAllThreads * sizeof(float)));
  a.in = in;
  a.out = static_cast<float*>(allocate(kAllThreads * sizeof(float)));
  a.half = static_cast<__half*>(allocate(kAllThreads * sizeof(__half)));
  a.bfloat16 = static_cast<__nv_bfloat16*>(allocate(kAllThreads * sizeof(__nv_bfloat16)));
  a.sums = static_cast<float*>(allocate(kBlocks * sizeof(float)));
  a.counter = static_cast<unsigned*>(allocate(sizeof(unsigned)));
  for (int n = 0; n < kAllThreads; ++n) in[n] = n + 1;
  memset(a.out, 0xff, kAllThreads * sizeof(float));
  memset(a.sums, 0xff, kBlocks * sizeof(float));
  *a.counter = 0;
  const size_t shared = (kThreads + (test.kernel == last_block_sum)) * sizeof(float);
  const char* error = launch(test.kernel, {kBlocks, kThreads, shared, test.cooperative, 0, nullptr}, a);
  if (!error) error = finish();
  if (error) return printf("%s: %s\n", test.name, error), false;
  for (int n = 0; n < kAllThreads; ++n)
    if (!(a.out[n] == static_cast<float>(test.expected(n))))
      return printf("%s: wrong at %d: got %g, expected %g\n", test.name, n, a.out[n], test.expected(n)), false;
  return printf("%s: right\n", test.name), true;
}

// What a device of CUDA_ON_HOST_BLOCKS blocks refuses.
bool refuses() {
  int resident = 0;
  if (resident_blocks(resident, warp_reduction, 32, 0, 0)) return false;
  const Launch bad[] = {
      {0, 32, 0, false, 0, nullptr},
      {1, 33, 0, false, 0, nullptr},
      {1, 1056, 0, false, 0, nullptr},
      {1, 32, 232449, false, 0, nullptr},
      {1 + resident, 32, 0, true, 0, nullptr}};
  for (const Launch& where : bad) {
    const char* error = launch(warp_reduction, where, Arguments{});
    if (!error) return printf("launches: %d blocks of %d threads were taken\n", where.blocks, where.threads), false;
    printf("launches: %s\n", error);
  }
  return true;
}

}  // namespace
}  // namespace ppllava::cuda

int main(int count, char** names) {
  bool right = true;
  for (int n = 1; n < count; ++n) {
    if (!strcmp(names[n], "launches")) right &= ppllava::cuda::refuses();
    for (const auto& test : ppllava::cuda::kCases)
      if (!strcmp(names[n], test.name)) right &= ppllava::cuda::run(test);
  }
  return right ? 0 : 1;
}
