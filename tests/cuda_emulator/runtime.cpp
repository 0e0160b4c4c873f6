// Runs the threads of a CUDA grid on the CPU: one fiber for each thread of a block, on one thread of the operating system,
// block after block. A fiber gives way only where CUDA's rules let others be waited for: at barriers, at operations
// of a warp, at the end. Shared memory is poisoned for each block; copies of cp.async land as late as the rules
// allow, or at once. For tests only.
#include "cuda_emulator.h"
#include <algorithm>
#include <stdio.h>
#include <stdlib.h>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <utility>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
extern "C" {
void *__tsan_get_current_fiber();
void *__tsan_create_fiber(unsigned);
void __tsan_switch_to_fiber(void *, unsigned);
void __tsan_acquire(void *);
void __tsan_release(void *);
void AnnotateIgnoreReadsBegin(const char *, int);
void AnnotateIgnoreReadsEnd(const char *, int);
void AnnotateIgnoreWritesBegin(const char *, int);
void AnnotateIgnoreWritesEnd(const char *, int);
}
#endif

namespace emu {
Thread *self;
Block block;

namespace {
// What orders threads, for ThreadSanitizer; the emulator's own bookkeeping is hidden from it.
inline void acquire([[maybe_unused]] void *token) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(token);
#endif
}
inline void release([[maybe_unused]] void *token) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(token);
#endif
}
struct Unseen {
#if defined(__SANITIZE_THREAD__)
  Unseen() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
#else
  ~Unseen() {}
#endif
};

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr size_t kStack = 512 << 10;
#else
constexpr size_t kStack = 128 << 10;
#endif

enum State : uint8_t { RUNNING, AT_BARRIER, IN_WARP, DONE };
struct Copy {
  void *to;
  const void *from;
  int bytes;
  bool valid;
};
struct Fiber : Thread {
  State state = DONE;
  void *operands = nullptr;
  char *stack = nullptr;
  size_t stack_size = kStack;
  void *sp = nullptr, *fake_stack = nullptr, *tsan = nullptr;
  ucontext_t context;
  std::vector<std::vector<Copy>> groups; // of cp.async, oldest first
  std::vector<Copy> open;
};
struct Warp {
  int arrived = 0;
  unsigned runnable = 0; // lanes that can go on
  const char *op = nullptr;
  alignas(8) char tokens[2][8]; // by parity: a warp may be one rendezvous ahead
  unsigned phase = 0;
};

Fiber host;
std::vector<Fiber *> fibers; // those of the launch
std::vector<Fiber *> pool;   // live on from launch to launch
std::vector<Warp> warps;
std::vector<int> order;
int live, at_barrier;
alignas(8) char tokens[2][8];
unsigned phase;
alignas(8) char launch_token[8];
int (*entry_point)(void **, const size_t *);
void **arguments;
const size_t *argument_sizes;
std::string error;

#if defined(__x86_64__) && !defined(EMU_UCONTEXT)
#define EMU_ASM 1
extern "C" void emu_switch(void **save, void *to);
asm(".text\n.p2align 4\n.local emu_switch\nemu_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp,(%rdi)\nmov %rsi,%rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");
#endif

Fiber *me() { return static_cast<Fiber *>(self); }

void finish_switch([[maybe_unused]] Fiber *fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber->fake_stack, nullptr, nullptr);
#endif
}

__attribute__((noinline)) void switch_to(Fiber *to) {
  Fiber *from = me();
  if (to == from) return;
  self = to;
#ifdef EMU_ASM
  void *sp = to->sp; // read here: behind the switch ThreadSanitizer takes the reader for the other fiber
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from->fake_stack, to->stack, to->stack_size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to->tsan, 1); // 1: the switch orders nothing, so that missing barriers show as races
#endif
#ifdef EMU_ASM
  emu_switch(&from->sp, sp);
#else
  swapcontext(&from->context, &to->context);
#endif
  finish_switch(from);
}

void set(Fiber *fiber, State state) {
  unsigned bit = 1u << fiber->lane, &runnable = warps[fiber->warp].runnable;
  fiber->state = state;
  runnable = state == RUNNING ? runnable | bit : runnable & ~bit;
}

// Greedy: the first warp of the order runs until it blocks, the widest skew that a missing barrier can meet.
void schedule() {
  if (!live) return switch_to(&host);
  for (int w : order)
    if (unsigned runnable = warps[w].runnable) {
      int lane = block.flags & REVERSE ? 31 - __builtin_clz(runnable) : __builtin_ctz(runnable);
      return switch_to(fibers[w * 32 + lane]);
    }
  std::string message = "deadlock:";
  for (Fiber *f : fibers)
    if (f->state != DONE && message.size() < 300)
      message += " thread " + std::to_string(f->warp * 32 + f->lane) + " waits at " +
                 (f->state == AT_BARRIER ? "__syncthreads" : warps[f->warp].op);
  fail(message.c_str());
}

void open_barrier() {
  for (Fiber *f : fibers)
    if (f->state == AT_BARRIER) set(f, RUNNING);
  at_barrier = 0;
  phase++;
}

void land(const Copy &c) { // word by word: what GCC makes of memcpy is not seen by ThreadSanitizer
  unsigned *to = static_cast<unsigned *>(c.to);
  const unsigned *from = static_cast<const unsigned *>(c.from);
  for (int i = 0; i < c.bytes / 4; i++) to[i] = c.valid ? from[i] : 0u;
}

void entry() {
  finish_switch(me());
  for (;;) { // a fiber serves every block of the launch
    acquire(launch_token);
    entry_point(arguments, argument_sizes);
    release(launch_token);
    Unseen unseen;
    me()->groups.clear();
    me()->open.clear();
    set(me(), DONE);
    live--;
    if (live && at_barrier == live) open_barrier(); // threads that are gone count as arrived
    schedule();
  }
}

void make_fiber(Fiber &f) {
  f.stack = static_cast<char *>(
      mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(f.stack, kStack);
#endif
#if defined(__SANITIZE_THREAD__)
  f.tsan = __tsan_create_fiber(0);
#endif
#ifdef EMU_ASM
  void **top = reinterpret_cast<void **>(f.stack + kStack - 72); // at entry the stack is 8 more than a multiple of 16
  *top = nullptr;
  *--top = reinterpret_cast<void *>(entry);
  top -= 6;
  memset(top, 0, 48);
  f.sp = top;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack;
  f.context.uc_stack.ss_size = kStack;
  f.context.uc_link = nullptr;
  makecontext(&f.context, entry, 0);
#endif
}

void run_grid(size_t smem) {
  self = &host;
#if defined(__SANITIZE_THREAD__)
  host.tsan = __tsan_get_current_fiber();
#endif
#if defined(__SANITIZE_ADDRESS__)
  pthread_attr_t attributes;
  void *stack;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &host.stack_size);
  host.stack = static_cast<char *>(stack);
  pthread_attr_destroy(&attributes);
#endif
  const dim3 threads = block.threads, grid = block.grid;
  int n = int(threads.x * threads.y * threads.z);
  warps.assign(n / 32, Warp());
  order.resize(n / 32);
  while (int(pool.size()) < n) {
    pool.push_back(new Fiber);
    make_fiber(*pool.back());
  }
  fibers.assign(pool.begin(), pool.begin() + n);
  for (int i = 0; i < n; i++) {
    unsigned x = unsigned(i);
    fibers[i]->tid = {x % threads.x, x / threads.x % threads.y, x / (threads.x * threads.y)};
    fibers[i]->lane = i % 32;
    fibers[i]->warp = i / 32;
  }
  for (int i = 0; i < n / 32; i++) order[i] = block.flags & REVERSE ? n / 32 - 1 - i : i;
  unsigned random = 12345;
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x && error.empty(); x++) {
        block.index = {x, y, z};
        void *memory = nullptr; // of the exact size, so that AddressSanitizer sees overruns
        if (posix_memalign(&memory, 128, smem ? smem : 1)) abort();
        block.smem = static_cast<unsigned char *>(memset(memory, 0xff, smem)); // NaN, -1
        if (block.flags & SHUFFLE)
          for (int k = n / 32 - 1; k > 0; k--) {
            random = random * 1664525u + 1013904223u;
            std::swap(order[k], order[(random >> 8) % unsigned(k + 1)]);
          }
        live = n;
        at_barrier = 0;
        for (Warp &w : warps) w.runnable = ~0u;
        for (Fiber *f : fibers) f->state = RUNNING;
        release(launch_token);
        {
          Unseen unseen;
          schedule();
        }
        acquire(launch_token);
        free(memory);
      }
  if (!error.empty()) pool.clear(); // fibers that hang in a failed kernel are abandoned
}
} // namespace

void fail(const char *message) {
  char where[64];
  snprintf(where, sizeof where, "block (%u, %u, %u): ", block.index.x, block.index.y, block.index.z);
  if (error.empty()) error = std::string(where) + message;
  switch_to(&host);
}

void sync_block() {
  Unseen unseen;
  char *token = tokens[phase & 1];
  release(token);
  set(me(), AT_BARRIER);
  if (++at_barrier == live) open_barrier();
  schedule();
  acquire(token);
}

void sync_warp(const char *op, void *mine, void (*f)(void **)) {
  Unseen unseen;
  Warp &w = warps[self->warp];
  me()->operands = mine;
  if (w.arrived && strcmp(w.op, op)) fail((std::string("divergent warp: ") + op + " meets " + w.op).c_str());
  w.op = op;
  char *token = w.tokens[w.phase & 1];
  release(token);
  if (++w.arrived < 32) {
    set(me(), IN_WARP);
    schedule();
  } else {
    void *all[32];
    Fiber **lanes = &fibers[self->warp * 32];
    for (int l = 0; l < 32; l++) all[l] = lanes[l]->operands;
    acquire(token);
    f(all);
    w.arrived = 0;
    w.phase++;
    release(token);
    for (int l = 0; l < 32; l++)
      if (lanes[l]->state == IN_WARP) set(lanes[l], RUNNING);
  }
  acquire(token);
}

void cp_async(void *to, const void *from, int bytes, bool valid) {
  if ((reinterpret_cast<uintptr_t>(to) | (valid ? reinterpret_cast<uintptr_t>(from) : 0)) & uintptr_t(bytes - 1))
    fail("cp.async: an address is not a multiple of the size of the copy");
  Copy copy{to, from, bytes, valid};
  if (block.flags & CP_ASYNC_EAGER)
    land(copy);
  else
    me()->open.push_back(copy);
}

void cp_commit() {
  me()->groups.push_back(std::move(me()->open));
  me()->open.clear();
}

void cp_wait(int pending) {
  auto &groups = me()->groups;
  while (int(groups.size()) > pending) {
    for (const Copy &c : groups.front()) land(c);
    groups.erase(groups.begin());
  }
}
} // namespace emu

// Like cuLaunchKernel: arguments are pointers. 0 is success; else `message` says what is wrong.
extern "C" __attribute__((visibility("default"))) int emu_launch(int (*entry)(void **, const size_t *),
                                                                 const unsigned *grid, const unsigned *threads,
                                                                 size_t smem, void **arguments, const size_t *sizes,
                                                                 unsigned flags, char *message, size_t length) {
  if (threads[0] * threads[1] * threads[2] % 32) {
    snprintf(message, length, "the threads of a block must be a multiple of 32");
    return 1;
  }
  if (grid[1] > 65535 || grid[2] > 65535 || !grid[0] || !grid[1] || !grid[2]) {
    snprintf(message, length, "the grid is (%u, %u, %u)", grid[0], grid[1], grid[2]);
    return 1;
  }
  if (int wrong = entry(nullptr, sizes)) {
    snprintf(message, length, "argument %d has another size than the kernel's parameter, or their number differs",
             wrong - 1);
    return 1;
  }
  emu::block = {{0, 0, 0}, {threads[0], threads[1], threads[2]}, {grid[0], grid[1], grid[2]}, nullptr, flags};
  emu::entry_point = entry;
  emu::arguments = arguments;
  emu::argument_sizes = sizes;
  emu::error.clear();
  emu::run_grid(smem);
  if (emu::error.empty()) return 0;
  snprintf(message, length, "%s", emu::error.c_str());
  return 2;
}
