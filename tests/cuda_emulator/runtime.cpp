// Runs the threads of a CUDA grid on the CPU: one fiber for each thread of a block, on one thread of the operating system,
// block after block. A fiber gives way only where CUDA's rules let others be waited for: at barriers, at operations
// of a warp, at the end. Shared memory is poisoned for each block; copies of cp.async land as late as the rules
// allow, or at once. For tests only.
#include "cuda_emulator.h"
#include <algorithm>
#include <deque>
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

enum State : uint8_t { RUNNING, AT_BARRIER, AT_MBARRIER, IN_WARP, DONE };
struct Copy {
  void *to;
  const void *from;
  int bytes;
  bool valid;
};
struct Product { // of a warpgroup, as one thread sees it
  float *d;
  int columns;
  unsigned long long a, b;
  float (*convert)(uint16_t);
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
  std::vector<std::vector<Product>> product_groups; // of wgmma, alike
  std::vector<Product> open_products;
  bool fenced = false;
  size_t products = 0; // in this block
};
// What a bulk copy of the tensor memory accelerator still has to do.
struct Bulk {
  std::vector<Copy> runs; // of 16 bytes
  unsigned long long *barrier;
  int bytes;
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
// Of a block. One for both would order a thread that starts late behind all that a thread did that is gone.
alignas(8) char start_token[8], end_token[8];
int (*entry_point)(void **, const size_t *);
void **arguments;
const size_t *argument_sizes;
std::string error;
std::deque<Bulk> bulk;                                            // on their way, oldest first
std::vector<std::vector<std::pair<unsigned long long, unsigned long long>>> group_products; // what each warpgroup multiplied

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

void land(const Copy &c);
void settle(unsigned long long *barrier, int arrivals, int bytes);
void land_oldest() {
  for (const Copy &c : bulk.front().runs) land(c);
  unsigned long long *barrier = bulk.front().barrier;
  int bytes = bulk.front().bytes;
  bulk.pop_front();
  settle(barrier, 0, -bytes);
}

// Greedy: the first warp of the order runs until it blocks, the widest skew that a missing barrier can meet. Bulk copies
// land when nobody can go on without them.
void schedule() {
  if (!live) return switch_to(&host);
  for (;;) {
    for (int w : order)
      if (unsigned runnable = warps[w].runnable) {
        int lane = block.flags & REVERSE ? 31 - __builtin_clz(runnable) : __builtin_ctz(runnable);
        return switch_to(fibers[w * 32 + lane]);
      }
    if (bulk.empty()) break;
    land_oldest();
  }
  std::string message = "deadlock:";
  for (Fiber *f : fibers)
    if (f->state != DONE && message.size() < 300)
      message += " thread " + std::to_string(f->warp * 32 + f->lane) + " waits at " +
                 (f->state == AT_BARRIER    ? "__syncthreads"
                  : f->state == AT_MBARRIER ? "an mbarrier"
                                            : warps[f->warp].op);
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
    acquire(start_token);
    entry_point(arguments, argument_sizes);
    release(end_token);
    Unseen unseen;
    if (!me()->product_groups.empty() || !me()->open_products.empty()) fail("a thread ends before its wgmma does");
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
        bulk.clear();
        group_products.assign(n / 128 + 1, {});
        for (Fiber *f : fibers) f->fenced = false, f->products = 0;
        block.smem_bytes = smem;
        live = n;
        at_barrier = 0;
        for (Warp &w : warps) w.runnable = ~0u;
        for (Fiber *f : fibers) f->state = RUNNING;
        release(start_token);
        {
          Unseen unseen;
          schedule();
        }
        acquire(end_token);
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

// ---- barriers that count bytes, and the copies of the tensor memory accelerator ----------------------------------------
namespace {
struct Mbarrier {
  uint8_t magic, phase, count, pending;
  int bytes;
};
static_assert(sizeof(Mbarrier) == 8, "");
constexpr uint8_t kMagic = 0x5a;

Mbarrier *mbarrier_at(unsigned long long *barrier) {
  Mbarrier *b = reinterpret_cast<Mbarrier *>(barrier);
  if (reinterpret_cast<uintptr_t>(barrier) & 7) fail("mbarrier: the address is not a multiple of 8");
  if (b->magic != kMagic) fail("mbarrier: it is not initialised");
  return b;
}

void settle(unsigned long long *barrier, int arrivals, int bytes) {
  Mbarrier *b = mbarrier_at(barrier);
  if (arrivals > b->pending) fail("mbarrier: more threads arrive than were announced");
  b->pending = uint8_t(b->pending - arrivals);
  b->bytes += bytes;
  if (b->pending || b->bytes) return;
  b->phase ^= 1;
  b->pending = b->count;
  for (Fiber *f : fibers)
    if (f->state == AT_MBARRIER) set(f, RUNNING); // to look again
}

// A tensor map as provider.py writes it.
struct Map {
  unsigned magic;
  uint8_t im2col, axes, itemsize, swizzle;
  uint64_t address;
  unsigned dims[5];
  unsigned padding;
  uint64_t strides[4]; // bytes, of all axes but the first
  uint16_t box[5];     // of a tile
  uint8_t steps[5];
  uint8_t more;
  int16_t lower[3], upper[3];
  uint16_t channels, pixels;
};
static_assert(sizeof(Map) <= 128, "");
constexpr unsigned kMap = 0x7a3b5c1d;

// Where byte `address` of shared memory lies with the 128B swizzle: runs of 16 bytes trade places within a row of 128,
// by the number of the row among eight.
unsigned swizzled(unsigned address) { return address ^ (address >> 7 & 7) << 4; }
unsigned char *in_smem(unsigned address, int bytes) {
  const unsigned first = fc::shared_address(block.smem);
  if (address < first || address + unsigned(bytes) > first + block.smem_bytes) fail("shared memory: the address is outside");
  return block.smem + (address - first);
}
} // namespace

void mbarrier_init(unsigned long long *barrier, int count) {
  if (reinterpret_cast<uintptr_t>(barrier) & 7) fail("mbarrier: the address is not a multiple of 8");
  const Mbarrier b = {kMagic, 0, uint8_t(count), uint8_t(count), 0};
  memcpy(barrier, &b, sizeof b);
}

void mbarrier_arrive(unsigned long long *barrier, int bytes) {
  Unseen unseen;
  mbarrier_at(barrier)->bytes += bytes;
  release(barrier);
  settle(barrier, 1, 0);
}

void mbarrier_wait(unsigned long long *barrier, int parity) {
  Unseen unseen;
  while (mbarrier_at(barrier)->phase == parity) {
    set(me(), AT_MBARRIER);
    schedule();
  }
  acquire(barrier);
}

void tma(void *to, const void *map, unsigned long long *barrier, const int *at, int axes, const int *taps) {
  Unseen unseen;
  Map m;
  memcpy(&m, map, sizeof m);
  if (m.magic != kMap) fail("tma: this is no tensor map");
  if (m.axes != axes || m.im2col != (taps != nullptr)) fail("tma: the map is of another kind than the copy");
  unsigned start = fc::shared_address(to);
  if (start % 128) fail("tma: the address in shared memory is not a multiple of 128");
  const int row = taps ? m.channels : m.box[0], rows = taps ? m.pixels : m.box[1], run = 16 / m.itemsize;
  Bulk b;
  b.barrier = barrier;
  b.bytes = row * rows * m.itemsize;
  int p[5] = {at[0], at[1], axes > 2 ? at[2] : 0, axes > 3 ? at[3] : 0, axes > 4 ? at[4] : 0};
  for (int r = 0; r < rows; r++) {
    for (int c = 0; c < row; c += run) {
      bool valid = true;
      uint64_t offset = 0;
      for (int a = 0; a < axes; a++) {
        int64_t i = a == 0 ? p[0] + c : p[a] + (taps && a < axes - 1 ? taps[a - 1] : 0);
        if (i < 0 || i >= int64_t(m.dims[a])) valid = false;
        offset += valid ? uint64_t(i) * (a == 0 ? m.itemsize : m.strides[a - 1]) : 0;
      }
      unsigned address = start + unsigned((r * row + c) * m.itemsize);
      b.runs.push_back({in_smem(m.swizzle ? swizzled(address) : address, 16),
                        reinterpret_cast<const void *>(m.address + (valid ? offset : 0)), 16, valid});
    }
    if (!taps) {
      p[1]++;
      continue;
    }
    // The next pixel of the box, which stays the same whatever the taps are.
    for (int a = 1; a < axes; a++) {
      p[a] += a < axes - 1 ? m.steps[a] : 1;
      if (a == axes - 1 || p[a] < int(m.dims[a]) + m.upper[a - 1]) break;
      p[a] = m.lower[a - 1];
    }
  }
  bulk.push_back(std::move(b));
  if (block.flags & CP_ASYNC_EAGER)
    while (!bulk.empty()) land_oldest();
}

// ---- products of a warpgroup: what they read is read as late as it may be --------------------------------------------
// All of it is of whole warps: lanes meet at the fence and when the wait is over.
void wgmma_fence() {
  sync_warp("wgmma.fence", nullptr, [](void **) {});
  me()->fenced = true;
}

void wgmma(float *d, int columns, unsigned long long a, unsigned long long b, float (*convert)(uint16_t)) {
  Unseen unseen;
  if (!me()->fenced) fail("wgmma: there is no wgmma.fence before");
  auto &done = group_products[self->warp / 4];
  const size_t number = me()->products++;
  if (done.size() == number)
    done.push_back({a, b});
  else if (done[number] != std::make_pair(a, b))
    fail("wgmma: threads of a warpgroup have different descriptors");
  me()->open_products.push_back({d, columns, a, b, convert});
}

void wgmma_commit() {
  me()->product_groups.push_back(std::move(me()->open_products));
  me()->open_products.clear();
  me()->fenced = false;
}

namespace {
// The 16 elements of a row of an operand, whose rows have 128 bytes.
void operand(unsigned long long descriptor, int row, float (*convert)(uint16_t), float (&values)[16]) {
  const unsigned start = unsigned(descriptor & 0x3fff) << 4, rows_of_8 = unsigned(descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1) fail("wgmma: the emulator knows the 128B swizzle only");
  if ((start >> 7 & 7) || (descriptor >> 49 & 7)) fail("wgmma: an operand does not start with a multiple of 1024 bytes");
  const unsigned address = start + unsigned(row / 8) * rows_of_8 + unsigned(row % 8) * 128;
  for (unsigned run = 0; run < 2; run++) {
    uint16_t bits[8];
    memcpy(bits, in_smem(swizzled(address + run * 16), 16), 16);
    for (int k = 0; k < 8; k++) values[run * 8 + unsigned(k)] = convert(bits[k]);
  }
}
} // namespace

void wgmma_wait(int pending) {
  Unseen unseen;
  auto &groups = me()->product_groups;
  while (int(groups.size()) > pending) {
    for (const Product &p : groups.front()) {
      float a[2][16], b[16];
      for (int h = 0; h < 2; h++) operand(p.a, self->warp % 4 * 16 + self->lane / 4 + h * 8, p.convert, a[h]);
      for (int i = 0; i < p.columns / 4; i++) { // the layout of the result, as the PTX manual gives it
        operand(p.b, i / 2 * 8 + self->lane % 4 * 2 + i % 2, p.convert, b);
        for (int h = 0; h < 2; h++) {
          float sum = 0;
          for (int k = 0; k < 16; k++) sum += a[h][k] * b[k];
          p.d[i / 2 * 4 + h * 2 + i % 2] += sum;
        }
      }
    }
    groups.erase(groups.begin());
  }
  sync_warp("wgmma.wait_group", nullptr, [](void **) {});
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
