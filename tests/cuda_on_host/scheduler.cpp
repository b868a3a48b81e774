// Runs grids: threads as fibers that switch where they meet, in an order that a test can choose.

#include "cuda_on_host.h"

#include <cstdlib>  // defines: malloc, free
#include <memory>   // defines: std::unique_ptr
#include <mutex>    // defines: std::mutex
#include <numeric>  // defines: std::iota
#include <random>   // defines: std::mt19937
#include <string>   // defines: std::string

#include "fiber.h"     // defines: Context, Stacks, switch_context
#include "races.h"     // defines: races::begin, races::run, races::ordered_grid
#include "settings.h"  // defines: choose_order, dropped, describe

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace ppllava::cuda::host {
namespace {

constexpr int kLanes = 32, kMaxThreads = 1024;

enum class State { ready, waits, exited };

struct Block {
  int index;
  std::unique_ptr<char, decltype(&free)> shared{nullptr, free};
  int in_barrier = 0;              // threads in __syncthreads
  std::vector<uint32_t> in_warps;  // [warps] lanes in a collective of their warp
};

struct Fiber {
  Context context;
  Block* block;
  int slot, thread;  // slot: among the fibers that are alive together
  State state;
  Kind kind;
  Site site;
  unsigned mask;
  uint64_t value, result;
  int source;

  bool same(const Fiber& other) const {
    return kind == other.kind && mask == other.mask && site.line() == other.site.line() &&
           site.column() == other.site.column() && !strcmp(site.file_name(), other.site.file_name());
  }
};

// Everything about the grid that runs; one at a time.
struct Grid {
  Launch where;
  const std::function<void()>* thread;
  Order order;
  std::mt19937 random;
  std::vector<Block> blocks;    // that are alive together
  std::vector<Fiber> fibers;    // [alive blocks * threads]
  std::vector<uint64_t> ready;  // bits of fibers
  int in_grid_barrier;          // fibers
  Context root;
  bool first;  // no fiber has run yet
};

std::mutex one_grid;
Grid grid;
Stacks stacks;
thread_local Fiber* current;
std::string describe(const Fiber& fiber) {
  std::string text = "block " + std::to_string(fiber.block->index) + " thread " + std::to_string(fiber.thread);
  if (fiber.state == State::exited) return text + " has exited";
  text += " waits in " + describe(fiber.kind, fiber.site);
  char mask[32] = "";
  if (fiber.kind >= Kind::syncwarp) snprintf(mask, sizeof(mask), " (mask 0x%08x)", fiber.mask);
  return text + mask;
}

void set_ready(Fiber& fiber, bool is_ready) {
  const uint64_t bit = uint64_t{1} << fiber.slot % 64;
  if (is_ready)
    grid.ready[fiber.slot / 64] |= bit;
  else
    grid.ready[fiber.slot / 64] &= ~bit;
}

// The next fiber to run, null for none. Lowest or highest first lets a thread run as far ahead of the others as it can.
Fiber* next() {
  const int words = grid.ready.size();
  const unsigned start = grid.order == Order::shuffle ? grid.random() % grid.fibers.size() : 0;
  for (int n = 0; n <= words; ++n) {
    const int word = grid.order == Order::reverse ? (2 * words - 1 - n) % words : (start / 64 + n) % words;
    uint64_t bits = grid.ready[word];
    if (n == 0 && !(grid.order == Order::reverse)) bits &= ~uint64_t{0} << start % 64;
    if (!bits) continue;
    const int bit = grid.order == Order::reverse ? 63 - std::countl_zero(bits) : std::countr_zero(bits);
    return &grid.fibers[word * 64 + bit];
  }
  return nullptr;
}

void resume(Context& from, Fiber& to, bool ends = false) {
  current = &to;
  threadIdx.x = to.thread;
  blockIdx.x = to.block->index;
  races::run(to.block->index, to.thread, static_cast<const char*>(to.context.bottom), to.context.size);
  switch_context(from, to.context, ends);
}

// All fibers wait or have exited: the first that waits, and one that it waits for.
[[noreturn]] void stuck() {
  for (const Fiber& fiber : grid.fibers) {
    if (fiber.state != State::waits) continue;
    for (const Fiber& other : grid.fibers) {
      const bool warp = fiber.kind >= Kind::syncwarp;
      const bool here = other.block == fiber.block && (!warp || other.thread / kLanes == fiber.thread / kLanes);
      const bool meant =
          fiber.kind == Kind::grid_barrier || (here && (!warp || fiber.mask >> other.thread % kLanes & 1));
      if (!meant || (other.state == State::waits && fiber.same(other))) continue;
      const char* rule =
          warp ? "not all lanes of the mask come to the same call" : "not all threads come to the same barrier";
      fail("%s: %s, but %s", rule, describe(fiber).c_str(), describe(other).c_str());
    }
  }
  fail("all threads wait and none can tell for whom");
}

void release(Fiber& fiber) {
  fiber.state = State::ready;
  set_ready(fiber, true);
}

// Lets fibers [first, first + count) go if all of them are at the same barrier.
bool release_all(int first, int count) {
  for (int n = first; n < first + count; ++n)
    if (!grid.fibers[n].same(grid.fibers[first])) return false;
  for (int n = first; n < first + count; ++n) release(grid.fibers[n]);
  return true;
}

void release_lanes(Fiber& self) {
  uint32_t& there = self.block->in_warps[self.thread / kLanes];
  Fiber* warp = &self - self.thread % kLanes;
  there |= 1u << self.thread % kLanes;
  if ((there & self.mask) != self.mask) return;
  uint32_t ballot = 0;
  for (int n = 0; n < kLanes; ++n) {
    if (!(self.mask >> n & 1)) continue;
    if (!warp[n].same(self)) return;
    ballot |= static_cast<uint32_t>(warp[n].value != 0) << n;
  }
  for (int n = 0; n < kLanes; ++n) {
    if (!(self.mask >> n & 1)) continue;
    warp[n].result = self.kind == Kind::ballot ? ballot : warp[warp[n].source].value;
    release(warp[n]);
  }
  there &= ~self.mask;
  if (self.kind == Kind::syncwarp) races::ordered_warp(self.block->index, self.thread / kLanes, self.mask);
}

void arrive(Fiber& self) {
  const int threads = grid.where.threads, first = self.slot - self.thread;
  if (self.kind == Kind::grid_barrier) {
    const int all = grid.fibers.size();
    if (++grid.in_grid_barrier < all || !release_all(0, all)) return;
    grid.in_grid_barrier = 0;
    races::ordered_grid();
  } else if (self.kind == Kind::syncthreads) {
    if (++self.block->in_barrier < threads || !release_all(first, threads)) return;
    self.block->in_barrier = 0;
    races::ordered_block(self.block->index);
  } else {
    release_lanes(self);
  }
}

void enter_thread() {
  entered(grid.root, std::exchange(grid.first, false));
  (*grid.thread)();
  Fiber& self = *current;
  self.state = State::exited;
  set_ready(self, false);
  if (Fiber* other = next()) resume(self.context, *other, true);
  for (const Fiber& fiber : grid.fibers)
    if (fiber.state != State::exited) stuck();
  switch_context(self.context, grid.root, true);
}

const char* run_together(const std::vector<int>& indices) {
  const int threads = grid.where.threads, count = threads * static_cast<int>(indices.size());
  grid.blocks.clear();
  grid.blocks.resize(indices.size());
  grid.fibers.assign(count, {});
  grid.ready.assign((count + 63) / 64, 0);
  grid.in_grid_barrier = 0;
  grid.first = true;
  for (int slot = 0; slot < count; ++slot) {
    Block& block = grid.blocks[slot / threads];
    if (slot % threads == 0) {
      block.index = indices[slot / threads];
      block.in_warps.assign(threads / kLanes, 0);
      if (grid.where.shared) {
        block.shared.reset(static_cast<char*>(malloc(grid.where.shared)));
        memset(block.shared.get(), 0xff, grid.where.shared);
        races::forget(block.shared.get(), grid.where.shared);
      }
    }
    char* stack = stacks[slot];
    if (!stack) return "out of memory for the stacks of threads";
    Fiber& fiber = grid.fibers[slot];
    fiber.block = &block;
    fiber.slot = slot;
    fiber.thread = slot % threads;
    fiber.state = State::ready;
    prepare(fiber.context, stack, enter_thread);
    set_ready(fiber, true);
  }
  resume(grid.root, *next());
  current = nullptr;
  return nullptr;
}

}  // namespace

int lane() { return current->thread % kLanes; }

void acquire_release(const void* address) { races::atomic(current->block->index, current->thread, address); }

uint64_t meet(Kind kind, Site site, unsigned mask, uint64_t value, int source) {
  if (!current) fail("%s, outside of a kernel", describe(kind, site).c_str());
  if (kind == Kind::grid_barrier && !grid.where.cooperative)
    fail("%s, in a launch that is not cooperative", describe(kind, site).c_str());
  if (dropped(kind, site)) return 0;
  Fiber& self = *current;
  self.kind = kind;
  self.site = site;
  self.mask = mask;
  self.value = value;
  self.source = source;
  self.state = State::waits;
  if (kind >= Kind::syncwarp && !(mask >> lane() & 1))
    fail("lane %d is not in its own mask: %s", lane(), describe(self).c_str());
  if (kind >= Kind::shfl && kind < Kind::ballot && !(mask >> (source & 31) & 1))
    fail("lane %d reads lane %d, which is not in the mask: %s", lane(), source, describe(self).c_str());
  set_ready(self, false);
  arrive(self);
  Fiber* other = next();
  if (!other) stuck();
  if (other != &self) resume(self.context, *other);
  return self.result;
}

const char* run(const Launch& where, const void* kernel, const std::function<void()>& thread) {
  if (current) fail("a launch inside of a kernel");
  const std::lock_guard lock(one_grid);
  if (where.blocks < 1) return "invalid configuration: a grid needs a block";
  if (where.threads < 1 || where.threads > kMaxThreads || where.threads % kLanes)
    return "invalid configuration: threads must be a multiple of 32, at most 1024";
  if (where.shared > kMaxShared) return "invalid configuration: more than 227 KB of shared memory";
  if (where.cooperative && where.blocks > resident_blocks())
    return "invalid configuration: a cooperative grid of more blocks than are resident";
  grid.where = where;
  grid.thread = &thread;
  std::tie(grid.order, grid.random) = choose_order(kernel);
  blockDim = dim3(where.threads);
  gridDim = dim3(where.blocks);
  std::vector<int> indices(where.blocks);
  std::iota(indices.begin(), indices.end(), 0);
  if (grid.order == Order::reverse) std::reverse(indices.begin(), indices.end());
  if (grid.order == Order::shuffle) std::shuffle(indices.begin(), indices.end(), grid.random);
  races::begin();
  const char* error = nullptr;
  if (where.cooperative)
    error = run_together(indices);
  else
    for (size_t n = 0; n < indices.size() && !error; ++n) error = run_together({indices[n]});
  grid.blocks.clear();
  races::end();
  return error;
}

}  // namespace ppllava::cuda::host

namespace ppllava::cuda {

char* dynamic_shared() { return host::current->block->shared.get(); }

void grid_barrier(host::Site site) { host::meet(host::Kind::grid_barrier, site); }

}  // namespace ppllava::cuda
