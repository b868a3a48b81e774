// Which accesses of memory no barrier orders. With CUDA_ON_HOST_RACES only, which excludes ASan: g++ -fsanitize=thread
// makes every access of a kernel call a function, and races.cpp has those functions in place of TSan's.
#pragma once

#include <cstddef>  // defines: size_t
#include <cstdint>  // defines: uint32_t

namespace ppllava::cuda::races {

#ifdef CUDA_ON_HOST_RACES
void begin();  // of a launch
void end();
void run(int block, int thread, const char* stack, size_t stack_size);  // from now on
void forget(const void* memory, size_t size);                           // it is new
void ordered_grid();                                                    // a barrier was reached by all
void ordered_block(int block);
void ordered_warp(int block, int warp, uint32_t mask);
void atomic(int block, int thread, const void* address);
#else
inline void begin() {}
inline void end() {}
inline void run(int, int, const char*, size_t) {}
inline void forget(const void*, size_t) {}
inline void ordered_grid() {}
inline void ordered_block(int) {}
inline void ordered_warp(int, int, uint32_t) {}
inline void atomic(int, int, const void*) {}
#endif

}  // namespace ppllava::cuda::races
