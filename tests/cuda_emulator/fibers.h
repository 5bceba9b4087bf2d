// Stacks that one thread switches between: a hand-written switch on x86-64 (5 ns), ucontext elsewhere (180 ns).
#pragma once

#include <sys/mman.h>

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
// The emulator's own state is not a kernel's: the race detector must neither see it nor take it for synchronisation.
#define EMULATOR_INTERNAL __attribute__((no_sanitize("thread")))
#else
#define EMULATOR_INTERNAL
#endif

namespace emulator {

#if defined(__x86_64__)
struct Context {
  void* stack_pointer;
};
extern "C" void emulator_switch(void** save, void* load);
asm(R"(.text
.weak emulator_switch
.type emulator_switch,@function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
.size emulator_switch, .-emulator_switch)");
EMULATOR_INTERNAL inline void make_context(Context& context, char* stack, size_t size, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + size) - 1;
  *top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) {
    *--top = nullptr;
  }
  context.stack_pointer = top;
}
EMULATOR_INTERNAL inline void switch_context(Context& from, Context& to) {
  emulator_switch(&from.stack_pointer, to.stack_pointer);
}
#else
}  // namespace emulator
#include <ucontext.h>
namespace emulator {
struct Context {
  ucontext_t context;
};
EMULATOR_INTERNAL inline void make_context(Context& c, char* stack, size_t size, void (*entry)()) {
  getcontext(&c.context);
  c.context.uc_stack.ss_sp = stack;
  c.context.uc_stack.ss_size = size;
  c.context.uc_link = nullptr;
  makecontext(&c.context, entry, 0);
}
EMULATOR_INTERNAL inline void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
#endif

inline char* map_pages(size_t bytes) {
  void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return static_cast<char*>(pages);
}
// The race detector forgets what it knows of pages that are mapped anew.
inline void forget_pages(char* pages, size_t bytes) {
  mmap(pages, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
}

}  // namespace emulator
