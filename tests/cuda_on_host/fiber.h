// Stacks and the switch between them, with the notes that ASan needs to follow.
#pragma once

#include <sys/mman.h>  // defines: mmap, mprotect
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>  // defines: __sanitizer_start_switch_fiber
#endif
#ifndef __x86_64__
#include <ucontext.h>  // defines: swapcontext
#endif

#include <cstddef>  // defines: size_t
#include <cstdint>  // defines: uintptr_t
#include <vector>   // defines: std::vector

namespace ppllava::cuda::host {

struct Context {
#ifdef __x86_64__
  void* top = nullptr;  // of the stack, where the registers lie
#else
  ucontext_t registers;
#endif
  const void* bottom = nullptr;
  size_t size = 0;
  void* fake_stack = nullptr;  // ASan's
};

#ifdef __x86_64__
// Pushes the registers that a call keeps, and pops those of the other stack. swapcontext costs a system call.
extern "C" void cuda_on_host_switch(void** from, void* to);
asm(R"(
.pushsection .text
.type cuda_on_host_switch, @function
cuda_on_host_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size cuda_on_host_switch, .-cuda_on_host_switch
.popsection
)");
#endif

// Makes `to` run until something switches back. ends: `from` never runs again.
inline void switch_context(Context& from, Context& to, [[maybe_unused]] bool ends = false) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack, to.bottom, to.size);
#endif
#ifdef __x86_64__
  cuda_on_host_switch(&from.top, to.top);
#else
  swapcontext(&from.registers, &to.registers);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// First thing on a new stack. root: the context of the stack that the first fiber came from, whose place ASan knows.
inline void entered([[maybe_unused]] Context& root, [[maybe_unused]] bool first) {
#ifdef __SANITIZE_ADDRESS__
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (first) root.bottom = bottom, root.size = size;
#endif
}

// Stacks are used again and again. Below each lies a page that must not be touched.
class Stacks {
 public:
  static constexpr size_t kSize = 256 << 10, kGuard = 64 << 10;

  char* operator[](size_t n) {
    while (stacks_.size() <= n) {
      void* fresh = mmap(nullptr, kGuard + kSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (fresh == MAP_FAILED || mprotect(fresh, kGuard, PROT_NONE)) return nullptr;
      stacks_.push_back(static_cast<char*>(fresh) + kGuard);
    }
    return stacks_[n];
  }

 private:
  std::vector<char*> stacks_;
};

inline void prepare(Context& context, char* stack, void (*entry)()) {
  context = {};
  context.bottom = stack;
  context.size = Stacks::kSize;
#ifdef __x86_64__
  // Six registers, the return address, and what keeps the stack aligned as after a call.
  auto* top = reinterpret_cast<uintptr_t*>(stack + Stacks::kSize) - 8;
  for (int n = 0; n < 8; ++n) top[n] = 0;
  top[6] = reinterpret_cast<uintptr_t>(entry);
  context.top = top;
#else
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = stack;
  context.registers.uc_stack.ss_size = Stacks::kSize;
  makecontext(&context.registers, entry, 0);
#endif
}

}  // namespace ppllava::cuda::host
