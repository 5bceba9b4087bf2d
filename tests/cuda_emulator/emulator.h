// Runs CUDA kernels on the CPU, to find their faults: a block's threads are fibers, blocks run one after the other.
//
// A fiber runs until it has to wait and hands over to one that need not, in an order that can be chosen: with a barrier
// missing, results differ between orders or are NaN. Shared memory begins as NaN, with gaps between its pieces that are
// checked (and poisoned for AddressSanitizer). An asynchronous copy poisons its target and happens only at the wait.
// Under ThreadSanitizer two threads' accesses without a barrier between them are reported with both source lines.
#pragma once

#include <cuda_runtime_api.h>
#include <cxxabi.h>
#include <dlfcn.h>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "counters.h"

// Where the caller is: barriers and operations of a warp are told apart by it.
#define EMULATOR_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulator {

enum class Order { forward, reverse, random };
struct Options {
  Order order = Order::forward;
  uint64_t seed = 1;
  int shared_bytes = 163 * 1024;  // that a block can opt in to; 64 KB on sm_75, 163 on sm_80, 99 on sm_86, 227 on sm_90
  int cache_bytes = 40 * 1024 * 1024;  // L2
  int multiprocessors = 108;
  int architecture = 80;  // 75 for sm_75
  bool counting = false;
  int64_t last_blocks = INT64_MAX;  // run only that many of a grid, for maps that are too large to compute
};
inline Options options;
inline std::string last_error;

// What kernels were launched with, by name
struct Launch {
  int threads, shared_bytes;
};
inline std::map<std::string, Launch> launches;

// Blocks of a launch that have as many of all instructions; `first` is the number of one of them, with its counters.
struct AlikeBlocks {
  uint64_t count, first;
  Counters counters;
};
// A launch that was counted
struct CountedLaunch {
  std::string kernel;
  uint64_t blocks;
  int threads, shared_bytes;
  std::vector<unsigned char> parameters;  // as a GPU's constant bank has them
  Counters counters;
  std::map<std::array<uint64_t, 7>, AlikeBlocks> alike;  // by instructions
};
inline std::vector<CountedLaunch> counted_launches;

struct Error : std::runtime_error {
  using runtime_error::runtime_error;
};
[[noreturn]] inline void fail(const std::string& what) { throw Error("emulated CUDA: " + what); }
inline std::string at(const char* file, int line) { return std::string(file) + ":" + std::to_string(line); }

// ---- state ----

constexpr size_t kStack = 256 * 1024, kArena = 512 * 1024, kGap = 256, kFresh = 32 * 1024;
constexpr unsigned kCopies = 64;

struct PendingCopy {
  void* to;
  const void* from;  // nullptr: zeros
};
struct Fiber {
  Context context{};
  char* stack = nullptr;
  void *fake_stack = nullptr, *tsan = nullptr, *tsan_pool[2] = {};
  uint3 thread{};
  unsigned warp = 0, lane = 0;
  const char* file = nullptr;  // where it waits
  int line = 0;
  PendingCopy copies[kCopies];
  unsigned copies_pending = 0;
  size_t accesses = 0;
};
using LaneFunction = void (*)(void* const* arguments, unsigned mask);
struct WarpOperation {
  unsigned mask = 0, arrived = 0, done = 0;
  char sync_keys[2];
  LaneFunction function = nullptr;
  const char* file;
  int line;
  void* arguments[32];
};
struct Warp {
  unsigned live = 0, runnable = 0;
  WarpOperation operations[32];  // by the lowest lane of the mask
  std::vector<Access> accesses;  // since the last barrier
};
struct Piece {
  size_t offset, begin, bytes;
};
inline struct State {
  Fiber fibers[1024], main;
  char* main_stack = nullptr;
  size_t main_stack_bytes = 0;
  Warp warps[32];
  Fiber* current = nullptr;
  unsigned runnable_warps = 0, live = 0, total = 0, waiting = 0;
  const char* barrier_file = nullptr;
  int barrier_line = 0;
  uint64_t random = 1, blocks = 0, barriers = 0;
  char sync_keys[2];
  std::string error;
  void (*body)(void*) = nullptr;
  void* body_argument = nullptr;
  char* arena = nullptr;
  size_t arena_used = kArena, dynamic_bytes = 0;
  Piece pieces[64];
  unsigned piece_count = 0;
} state;

EMULATOR_INTERNAL inline uint64_t random_bits() {
  state.random ^= state.random << 13;
  state.random ^= state.random >> 7;
  return state.random ^= state.random << 17;
}
// A member of a set of bits that is not empty, in the order that was chosen
EMULATOR_INTERNAL inline unsigned pick(unsigned set) {
  if (options.order == Order::forward) {
    return __builtin_ctz(set);
  }
  if (options.order == Order::reverse) {
    return 31 - __builtin_clz(set);
  }
  for (unsigned n = random_bits() % __builtin_popcount(set); n > 0; --n) {
    set &= set - 1;
  }
  return __builtin_ctz(set);
}

// ---- counting ----

EMULATOR_INTERNAL inline void count_access(Access::Kind kind, const void* p, unsigned bytes, bool valid,
                                           const char* file, int line) {
  if (!options.counting) {
    return;
  }
  Fiber& fiber = *state.current;
  std::vector<Access>& accesses = state.warps[fiber.warp].accesses;
  if (fiber.accesses == accesses.size()) {
    accesses.push_back({kind, file, line, bytes, 0, 0, {}});
  }
  Access& access = accesses[fiber.accesses++];
  if (access.kind != kind || access.line != line || access.bytes != bytes || std::strcmp(access.file, file) != 0) {
    fail("lanes of one warp access memory in different orders: " + at(file, line) + " and " +
         at(access.file, access.line));
  }
  access.arrived |= 1u << fiber.lane;
  access.lanes |= unsigned{valid} << fiber.lane;
  access.address[fiber.lane] = reinterpret_cast<uintptr_t>(p);
}
// Count a warp's instruction, by its first lane.
EMULATOR_INTERNAL inline void count_once(uint64_t& counter, uint64_t times = 1) {
  counter += options.counting && state.current->lane == 0 ? times : 0;
}
EMULATOR_INTERNAL inline void count_accesses_so_far() {
  for (unsigned w = 0; w * 32 < state.total; ++w) {
    Warp& warp = state.warps[w];
    const unsigned n = state.total - w * 32, lanes = n >= 32 ? ~0u : (1u << n) - 1;
    for (const Access& access : warp.accesses) {
      if (access.arrived != lanes) {
        fail("lanes of one warp access memory at " + at(access.file, access.line) + ", others do not");
      }
      access.kind == Access::shared_access ? count_shared(access) : count_global(access);
    }
    warp.accesses.clear();
  }
  for (unsigned t = 0; t < state.total; ++t) {
    state.fibers[t].accesses = 0;
  }
}

// ---- the scheduler ----

EMULATOR_INTERNAL inline void run(Fiber& to, bool dying = false) {
  Fiber& from = *state.current;
  if (&from == &to) {
    return;
  }
  state.current = &to;
  threadIdx = to.thread;
#if defined(__SANITIZE_ADDRESS__)
  const bool to_main = &to == &state.main;
  __sanitizer_start_switch_fiber(dying ? nullptr : &from.fake_stack, to_main ? state.main_stack : to.stack,
                                 to_main ? state.main_stack_bytes : kStack);
#elif defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  (void)dying;
  switch_context(from.context, to.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}
inline std::string who_waits() {
  std::map<std::string, unsigned> where;
  for (unsigned t = 0; t < state.total; ++t) {
    if (state.fibers[t].file != nullptr) {
      ++where[at(state.fibers[t].file, state.fibers[t].line)];
    }
  }
  std::string text;
  for (const auto& [place, count] : where) {
    text += "\n  " + std::to_string(count) + " threads wait at " + place;
  }
  return text;
}
EMULATOR_INTERNAL inline void release_block() {
  if (state.live != state.total) {  // a GPU from Volta on would let it pass; we do not
    fail(std::to_string(state.total - state.live) + " threads returned before a __syncthreads" + who_waits());
  }
  if (options.counting) {
    count_accesses_so_far();
    counters.barriers += (state.total + 31) / 32;
  }
  for (unsigned w = 0; w < 32; ++w) {
    state.warps[w].runnable = state.warps[w].live;
    state.runnable_warps |= unsigned{state.warps[w].live != 0} << w;
  }
  state.waiting = 0;
  ++state.barriers;
}
EMULATOR_INTERNAL inline void hand_over(bool dying = false) {
  if (state.runnable_warps == 0) {
    fail("deadlock: no thread of the block can go on" + who_waits());
  }
  const unsigned w = pick(state.runnable_warps);
  run(state.fibers[w * 32 + pick(state.warps[w].runnable)], dying);
}
// The current thread waits from here on.
EMULATOR_INTERNAL inline void park(const char* file, int line) {
  Fiber& fiber = *state.current;
  Warp& warp = state.warps[fiber.warp];
  fiber.file = file;
  fiber.line = line;
  warp.runnable &= ~(1u << fiber.lane);
  if (warp.runnable == 0) {
    state.runnable_warps &= ~(1u << fiber.warp);
  }
}
EMULATOR_INTERNAL inline void finish_thread() {
  Fiber& fiber = *state.current;
  if (fiber.copies_pending > 0) {
    fail("a thread returned without waiting for its copies");
  }
  park(nullptr, 0);
  state.warps[fiber.warp].live &= ~(1u << fiber.lane);
  --state.live;
  if (state.live > 0 && state.waiting == state.live) {
    release_block();
  }
  if (state.live > 0) {
    hand_over(true);
  }
}
EMULATOR_INTERNAL inline void thread_begins() {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (state.main_stack == nullptr) {  // the first thread comes from there
    state.main_stack = static_cast<char*>(const_cast<void*>(bottom));
    state.main_stack_bytes = bytes;
  }
#elif defined(__SANITIZE_THREAD__)
  __tsan_acquire(&state.body);
#endif
  try {
    state.body(state.body_argument);
#if defined(__SANITIZE_THREAD__)
    __tsan_release(&state.error);
#endif
    finish_thread();
  } catch (const std::exception& error) {
    state.error = error.what();
  }
  run(state.main, true);
}

// ---- barriers and operations of a warp ----

EMULATOR_INTERNAL inline void block_barrier(const char* file, int line) {
  if (state.waiting == 0) {
    state.barrier_file = file;
    state.barrier_line = line;
  } else if (line != state.barrier_line || std::strcmp(file, state.barrier_file) != 0) {
    fail("threads of one block are at different __syncthreads: " + at(file, line) + " and " +
         at(state.barrier_file, state.barrier_line));
  }
#if defined(__SANITIZE_THREAD__)
  void* key = &state.sync_keys[state.barriers & 1];  // two: a fast thread may be a barrier ahead
  __tsan_release(key);
#endif
  park(file, line);
  if (++state.waiting == state.live) {
    release_block();
  }
  hand_over();
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(key);
#endif
}
// All lanes of the mask have to come with the same function; the last to arrive runs it on everyone's arguments.
EMULATOR_INTERNAL inline void warp_operation(unsigned mask, LaneFunction function, void* argument, const char* file,
                                             int line) {
  Fiber& fiber = *state.current;
  Warp& warp = state.warps[fiber.warp];
  if (!(mask >> fiber.lane & 1)) {
    fail("a lane is not in its own mask at " + at(file, line));
  }
  WarpOperation& operation = warp.operations[__builtin_ctz(mask)];
  if (operation.arrived == 0) {
    operation.mask = mask;
    operation.function = function;
    operation.file = file;
    operation.line = line;
  } else if (operation.mask != mask || operation.function != function || operation.line != line) {
    fail("lanes of one warp are at different operations: " + at(operation.file, operation.line) + " and " +
         at(file, line));
  }
  operation.arguments[fiber.lane] = argument;
  operation.arrived |= 1u << fiber.lane;
  park(file, line);
  if (operation.arrived == mask) {
    operation.arrived = 0;
    ++operation.done;
    if (function != nullptr) {
      function(operation.arguments, mask);
    }
    warp.runnable |= mask;
    state.runnable_warps |= 1u << fiber.warp;
  }
  hand_over();
}

// ---- shared memory ----

EMULATOR_INTERNAL inline bool is_shared(const void* p) {
  const char* byte = static_cast<const char*>(p);
  return byte >= state.arena && byte < state.arena + kArena;
}
// The piece of dynamic shared memory at that offset, which every thread asks for with the same size
EMULATOR_INTERNAL inline void* carve(size_t offset, size_t bytes) {
  for (unsigned i = 0; i < state.piece_count; ++i) {
    const Piece& piece = state.pieces[i];
    if (piece.offset == offset && piece.bytes == bytes) {
      return state.arena + piece.begin;
    }
    if (offset < piece.offset + piece.bytes && piece.offset < offset + bytes) {
      fail("pieces of shared memory overlap");
    }
  }
  if (offset + bytes > state.dynamic_bytes) {
    fail("the kernel takes " + std::to_string(offset + bytes) + " bytes of shared memory, the launch gave " +
         std::to_string(state.dynamic_bytes));
  }
  if (state.piece_count == 64 || state.arena_used + bytes + kGap > kArena) {
    fail("too many pieces of shared memory");
  }
  const size_t begin = state.arena_used;
  state.pieces[state.piece_count++] = {offset, begin, bytes};
  state.arena_used = (begin + bytes + kGap + 127) / 128 * 128;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(state.arena + begin, bytes);
#endif
  return state.arena + begin;
}

// ---- asynchronous copies of 16 bytes ----

EMULATOR_INTERNAL inline void note_copy(void* to, const void* from) {
  Fiber& fiber = *state.current;
  if (!is_shared(to) || reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    fail("copy_async: the target is not shared memory, or an address is not a multiple of 16");
  }
  if (fiber.copies_pending == kCopies) {
    fail("copy_async: more than 64 copies of one thread are under way");
  }
  fiber.copies[fiber.copies_pending++] = {to, from};
}
EMULATOR_INTERNAL inline PendingCopy* pending_copy(unsigned i) {
  return i < state.current->copies_pending ? &state.current->copies[i] : nullptr;
}
EMULATOR_INTERNAL inline void forget_copies() { state.current->copies_pending = 0; }
// Assignments of whole vectors: the race detector does not see memset and memcpy.
inline void copy_async(void* to, const void* from) {
  note_copy(to, from);
  *static_cast<uint4*>(to) = make_uint4(~0u, ~0u, ~0u, ~0u);
}
inline void copies_wait() {
  unsigned i = 0;
  while (PendingCopy* copy = pending_copy(i++)) {
    *static_cast<uint4*>(copy->to) =
        copy->from != nullptr ? *static_cast<const uint4*>(copy->from) : make_uint4(0, 0, 0, 0);
  }
  forget_copies();
}

// ---- launching ----

EMULATOR_INTERNAL inline void prepare_block() {
#if defined(__SANITIZE_THREAD__)
  forget_pages(state.arena, kArena);
  state.arena_used = kArena;
#elif defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(state.arena, kArena);
#endif
  std::memset(state.arena, 0xff, state.arena_used);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(state.arena, kArena);
#endif
  state.piece_count = state.waiting = state.runnable_warps = 0;
  state.arena_used = kGap;
  state.live = state.total;
  for (unsigned t = 0; t < state.total; ++t) {
    Fiber& fiber = state.fibers[t];
#if defined(__SANITIZE_THREAD__)
    fiber.tsan = fiber.tsan_pool[state.blocks & 1];  // two sets: a block's threads are not those of the block before
    if (fiber.tsan == nullptr) {
      fiber.tsan = fiber.tsan_pool[state.blocks & 1] = __tsan_create_fiber(0);
    }
    forget_pages(fiber.stack + kStack - kFresh, kFresh);
#elif defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fiber.stack + kStack - kFresh, kFresh);  // the thread before it never unwound
#endif
    fiber.file = nullptr;
    fiber.copies_pending = 0;
    fiber.accesses = 0;
    make_context(fiber.context, fiber.stack, kStack - t % 64 * 192, thread_begins);  // not all in one set of the cache
  }
  for (unsigned w = 0; w < 32; ++w) {
    const unsigned n = state.total > w * 32 ? state.total - w * 32 : 0;
    state.warps[w].live = state.warps[w].runnable = n >= 32 ? ~0u : (1u << n) - 1;
    state.warps[w].accesses.clear();
    for (WarpOperation& operation : state.warps[w].operations) {
      operation.arrived = 0;
    }
    state.runnable_warps |= unsigned{n > 0} << w;
  }
#if defined(__SANITIZE_THREAD__)
  __tsan_release(&state.body);
#endif
  ++state.blocks;
}
EMULATOR_INTERNAL inline void count_block(unsigned block, const Counters& before) {
  Counters own;
  static_assert(sizeof own % sizeof(uint64_t) == 0, "numbers only");
  for (size_t i = 0; i < sizeof own / sizeof(uint64_t); ++i) {
    reinterpret_cast<uint64_t*>(&own)[i] =
        reinterpret_cast<const uint64_t*>(&counters)[i] - reinterpret_cast<const uint64_t*>(&before)[i];
  }
  ++counted_launches.back()
        .alike
        .try_emplace({own.mma, own.ldmatrix, own.copies, own.barriers, own.shuffles, own.loads, own.stores},
                     AlikeBlocks{0, block, own})
        .first->second.count;
}
EMULATOR_INTERNAL inline void run_block(unsigned block) {
  blockIdx = make_uint3(block, 0, 0);
  const Counters before = counters;
  prepare_block();
  hand_over();
  const std::string where = " [block " + std::to_string(block) + "]";
  if (!state.error.empty()) {
    fail(std::exchange(state.error, "").substr(sizeof "emulated CUDA: " - 1) + where);
  }
  if (options.counting) {
    count_accesses_so_far();
    ++counters.blocks;
    count_block(block, before);
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(state.arena, kArena);
#endif
  for (unsigned i = 0; i < state.piece_count; ++i) {
    const size_t end = state.pieces[i].begin + state.pieces[i].bytes;
    for (size_t byte = end; byte < end + kGap; ++byte) {
      if (state.arena[byte] != static_cast<char>(0xff)) {
        fail("a write past the end of a piece of shared memory of " + std::to_string(state.pieces[i].bytes) + " bytes" +
             where);
      }
    }
  }
}
inline void prepare_threads(int threads) {
  if (state.arena == nullptr) {
    state.arena = map_pages(kArena);
  }
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = state.fibers[t];
    if (fiber.stack == nullptr) {
      fiber.stack = map_pages(kStack + 4096);
      mprotect(fiber.stack, 4096, PROT_NONE);
      fiber.stack += 4096;
    }
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fiber.stack, kStack);
#endif
    fiber.thread = make_uint3(t, 0, 0);
    fiber.warp = t / 32;
    fiber.lane = t % 32;
  }
#if defined(__SANITIZE_THREAD__)
  state.main.tsan = __tsan_get_current_fiber();
#endif
}
inline std::string name_of(const void* function) {
  Dl_info info;
  if (dladdr(function, &info) == 0 || info.dli_sname == nullptr) {
    return "a kernel that is not exported";
  }
  char* const name = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr);
  const std::string copy = name;
  std::free(name);
  return copy.substr(0, copy.find('('));
}
// Each at the next multiple of its alignment
template <class T>
void add_parameter(std::vector<unsigned char>& parameters, const T& value) {
  parameters.resize((parameters.size() + alignof(T) - 1) / alignof(T) * alignof(T));
  const auto bytes = reinterpret_cast<const unsigned char*>(&value);
  parameters.insert(parameters.end(), bytes, bytes + sizeof value);
}
template <class... P, class... A>
void launch(void (*kernel)(P...), int64_t blocks, int threads, int shared_bytes, const A&... arguments) {
  static_assert((sizeof(P) + ... + 0) <= 4096, "kernel parameters above 4 KB");
  if (threads < 1 || threads > 1024 || threads % 32 != 0) {
    fail("a block of " + std::to_string(threads) + " threads: expected whole warps, at most 1024 threads");
  }
  if (blocks < 1 || blocks > 0x7fffffff) {
    fail("a grid of " + std::to_string(blocks) + " blocks");
  }
  if (shared_bytes > options.shared_bytes) {
    fail("shared memory of " + std::to_string(shared_bytes) + " bytes is above the device's limit");
  }
  const std::tuple<P...> values(arguments...);
  const std::string name = name_of(reinterpret_cast<const void*>(kernel));
  if (options.counting) {
    counters = {};
    counters.launches = 1;
    l2.resize(options.cache_bytes);
    counted_launches.push_back({name, static_cast<uint64_t>(blocks), threads, shared_bytes, {}, {}, {}});
    std::apply([](const auto&... value) { (add_parameter(counted_launches.back().parameters, value), ...); }, values);
  }
  auto call = [&] { std::apply(kernel, values); };
  state.body = [](void* c) { (*static_cast<decltype(call)*>(c))(); };
  state.body_argument = &call;
  state.total = threads;
  state.dynamic_bytes = shared_bytes;
  state.random = options.seed * 0x9e3779b97f4a7c15ull | 1;
  state.current = &state.main;
  state.error.clear();
  gridDim = dim3(static_cast<unsigned>(blocks));
  blockDim = dim3(threads);
  prepare_threads(threads);
  std::vector<unsigned> order(blocks);
  for (int64_t i = 0; i < blocks; ++i) {
    order[i] = static_cast<unsigned>(options.order == Order::reverse ? blocks - 1 - i : i);
  }
  if (options.order == Order::random) {
    for (int64_t i = blocks; i > 1; --i) {
      std::swap(order[i - 1], order[random_bits() % i]);
    }
  }
  for (unsigned block : order) {
    if (blocks - block <= options.last_blocks) {
      run_block(block);
    }
  }
  if (options.counting) {
    counted_launches.back().counters = counters;
  }
  launches[name] = {threads, shared_bytes};
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&state.error);
#endif
}

}  // namespace emulator
