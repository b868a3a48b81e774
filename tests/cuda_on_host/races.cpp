// Every access of global and shared memory is compared with the last ones to the same bytes: of two by different
// threads, one of them a write, a barrier must lie between. Shuffles and ballots order no memory, as CUDA has it.

#include "races.h"

#include <dlfcn.h>  // defines: dladdr

#include <algorithm>      // defines: std::max
#include <cstdio>         // defines: popen
#include <cstring>        // defines: strcspn
#include <map>            // defines: std::map
#include <memory>         // defines: std::unique_ptr
#include <string>         // defines: std::string
#include <unordered_map>  // defines: std::unordered_map

#include "cuda_on_host.h"  // defines: host::fail

namespace ppllava::cuda::races {
namespace {

// A point in time of a thread: all that it did before `time`. now is the number of barriers reached.
struct Thread {
  int block, thread;
  bool operator==(const Thread&) const = default;
  bool same_warp(Thread other) const { return block == other.block && thread / 32 == other.thread / 32; }
  long block_key() const { return block * 2048L; }
  long key() const { return block * 2048L + 1024 + thread; }
};

struct Access {
  Thread by;
  uint32_t time = 0;  // 0: none
  const void* from;   // the instruction after it
};

// Readers: the last, the last other one of its warp, of another warp, of another block. A write by whomever then meets
// a reader that it must be ordered with, if there is one.
struct Cell {
  Access write, read, in_warp, in_block, in_grid;
};

constexpr uintptr_t kPage = 256;
struct Page {
  Cell cells[kPage];
};

uint32_t now;
bool on = false;
Thread self;
uintptr_t stack;
size_t stack_size;
std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
uint32_t by_grid;                                // when the last barrier of the grid was
std::unordered_map<long, uint32_t> by_block;     // [block]
std::unordered_map<long, uint32_t> by_warp;      // [block, warp]
std::unordered_map<long, uint32_t> by_lane;      // [block, thread, other lane]
std::map<long, std::map<long, uint32_t>> known;  // [block]: what its threads know of others through atomics
std::map<const void*, std::map<long, uint32_t>> published;

uint32_t find(const auto& times, long key) {
  const auto at = times.find(key);
  return at == times.end() ? 0 : at->second;
}

void merge(std::map<long, uint32_t>& into, const std::map<long, uint32_t>& from) {
  for (const auto& [key, time] : from) into[key] = std::max(into[key], time);
}

long warp_key(int block, int warp) { return block * 32L + warp; }
long pair_key(Thread a, int lane) { return (a.block * 1024L + a.thread) * 32 + lane; }

bool ordered(const Access& before) {
  if (before.time < by_grid || before.by == self) return true;
  if (before.by.block != self.block) {
    const auto at = known.find(self.block);
    if (at == known.end()) return false;
    return before.time < std::max(find(at->second, before.by.block_key()), find(at->second, before.by.key()));
  }
  if (before.time < find(by_block, self.block)) return true;
  if (!before.by.same_warp(self)) return false;
  const uint32_t lanes = find(by_lane, pair_key(self, before.by.thread % 32));
  return before.time < std::max(find(by_warp, warp_key(self.block, self.thread / 32)), lanes);
}

// file:line of an instruction, and of the calls that were inlined around it.
std::string source(const void* instruction) {
  Dl_info at;
  if (!dladdr(instruction, &at) || !at.dli_fname) return "?";
  const long offset = static_cast<const char*>(instruction) - static_cast<const char*>(at.dli_fbase) - 1;
  char command[4096], line[4096];
  snprintf(command, sizeof(command), "LD_PRELOAD= addr2line -i -e '%s' 0x%lx", at.dli_fname, offset);
  std::string text;
  FILE* lines = popen(command, "r");
  while (lines && fgets(line, sizeof(line), lines))
    text += (text.empty() ? "" : " in ") + std::string(line, strcspn(line, " \n"));
  if (lines) pclose(lines);
  return text.empty() ? "?" : text;
}

void compare(const Access& before, bool was_write, uintptr_t address, bool is_write, const void* from) {
  if (!before.time || ordered(before)) return;
  host::fail(
      "race: no barrier between block %d thread %d, which %s %#lx at %s, and block %d thread %d, which %s it at %s",
      before.by.block, before.by.thread, was_write ? "wrote" : "read", static_cast<unsigned long>(address),
      source(before.from).c_str(), self.block, self.thread, is_write ? "writes" : "reads", source(from).c_str());
}

void access(uintptr_t address, bool is_write, const void* from) {
  std::unique_ptr<Page>& page = pages[address / kPage];
  if (!page) page = std::make_unique<Page>();
  Cell& cell = page->cells[address % kPage];
  const Access here{self, now, from};
  compare(cell.write, true, address, is_write, from);
  if (is_write) {
    for (const Access* read : {&cell.read, &cell.in_warp, &cell.in_block, &cell.in_grid})
      compare(*read, false, address, true, from);
    cell.write = here;
    return;
  }
  const Access last = cell.read;
  cell.read = here;
  if (!last.time || last.by == self) return;
  (last.by.same_warp(self) ? cell.in_warp : last.by.block == self.block ? cell.in_block : cell.in_grid) = last;
}

// Numbers have two bytes or more: the even bytes stand for all, and an odd one for itself.
void touch(const void* memory, size_t size, bool is_write, const void* from) {
  const auto address = reinterpret_cast<uintptr_t>(memory);
  if (!on || address - stack < stack_size) return;
  if (size == 1) return access(address, is_write, from);
  for (uintptr_t byte = (address + 1) / 2 * 2; byte < address + size; byte += 2) access(byte, is_write, from);
}

}  // namespace

void begin() {
  now = 1;
  on = true;
}

void end() {
  on = false;
  by_grid = 0;
  for (auto* times : {&by_block, &by_warp, &by_lane}) times->clear();
  pages.clear();
  known.clear();
  published.clear();
}

void run(int block, int thread, const char* bottom, size_t size) {
  self = {block, thread};
  stack = reinterpret_cast<uintptr_t>(bottom);
  stack_size = size;
}

void forget(const void* memory, size_t size) {
  const auto first = reinterpret_cast<uintptr_t>(memory);
  for (uintptr_t byte = first; byte < first + size; ++byte) {
    const auto at = pages.find(byte / kPage);
    if (at == pages.end())
      byte = byte / kPage * kPage + kPage - 1;
    else
      at->second->cells[byte % kPage] = {};
  }
}

void ordered_grid() { by_grid = ++now; }

void ordered_block(int block) { by_block[block] = ++now; }

void ordered_warp(int block, int warp, uint32_t mask) {
  ++now;
  if (mask == ~0u) {
    by_warp[warp_key(block, warp)] = now;
    return;
  }
  for (int a = 0; a < 32; ++a)
    for (int b = 0; b < 32; ++b)
      if (mask >> a & mask >> b & 1) by_lane[pair_key({block, warp * 32 + a}, b)] = now;
}

// What this thread did, and its block before its last barrier, is known to whoever comes here later, and to its block.
void atomic(int block, int thread, const void* address) {
  const Thread here{block, thread};
  merge(known[block], published[address]);
  known[block][here.block_key()] = find(by_block, block);
  known[block][here.key()] = ++now;
  merge(published[address], known[block]);
}

}  // namespace ppllava::cuda::races

#define CUDA_ON_HOST_ACCESS(name, size, is_write)                                     \
  extern "C" void __tsan_##name(void* memory) {                                       \
    ppllava::cuda::races::touch(memory, size, is_write, __builtin_return_address(0)); \
  }
#define CUDA_ON_HOST_ACCESSES(size)                      \
  CUDA_ON_HOST_ACCESS(read##size, size, false)           \
  CUDA_ON_HOST_ACCESS(write##size, size, true)           \
  CUDA_ON_HOST_ACCESS(unaligned_read##size, size, false) \
  CUDA_ON_HOST_ACCESS(unaligned_write##size, size, true)

CUDA_ON_HOST_ACCESSES(1)
CUDA_ON_HOST_ACCESSES(2)
CUDA_ON_HOST_ACCESSES(4)
CUDA_ON_HOST_ACCESSES(8)
CUDA_ON_HOST_ACCESSES(16)

extern "C" {
void __tsan_read_range(void* memory, size_t size) {
  ppllava::cuda::races::touch(memory, size, false, __builtin_return_address(0));
}
void __tsan_write_range(void* memory, size_t size) {
  ppllava::cuda::races::touch(memory, size, true, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
