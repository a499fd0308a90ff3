// The kernels on the CPU, for tests on machines without a GPU: compile with the host compiler, as
// C++, with -DLLM2VEC_FAST_EMULATE. Every CUDA thread is a coroutine. One runs at a time, until it
// reaches a barrier or a shuffle; there the order is LLM2VEC_FAST_EMULATE_ORDER: forward (default),
// backward, or a number that seeds a new random order for each turn. A kernel whose result depends
// on the order has a race. A barrier or shuffle that not all threads reach is an error; dynamic
// shared memory starts as NaN. What this cannot show: the rounding of the hardware's fast
// exponential and division, races at a finer grain than whole stretches between two barriers, reads
// and writes out of bounds, and whatever concerns speed.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#undef __global__
#undef __device__
#undef __shared__
#undef __launch_bounds__
#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

namespace llm2vec_fast {
namespace emulated {

enum class State { kReady, kAtBarrier, kAtShuffle, kDone };

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  uint3 index;
  State state;
  unsigned shuffles;
};

struct Machine {
  static constexpr size_t kStack = 64 * 1024;
  std::vector<Thread> threads;
  ucontext_t scheduler;
  size_t current = 0;
  dim3 block_dim, grid_dim;
  uint3 block;
  uint32_t lanes[2][32][32];  // what the lanes of a warp show each other, for two shuffles in turn
  std::vector<unsigned char> dynamic;
  void (*body)(const void*) = nullptr;
  const void* argument = nullptr;
  std::mt19937 random;

  Thread& thread() { return threads[current]; }
};

inline Machine machine;

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "emulated kernel: %s\n", why);
  std::abort();
}

inline void wait(State state) {
  machine.thread().state = state;
  swapcontext(&machine.thread().context, &machine.scheduler);
}

inline void enter() {
  machine.body(machine.argument);
  wait(State::kDone);
}

inline std::vector<size_t> order(size_t count) {
  std::vector<size_t> turn(count);
  std::iota(turn.begin(), turn.end(), size_t(0));
  const char* wish = std::getenv("LLM2VEC_FAST_EMULATE_ORDER");
  if (wish == nullptr || std::strcmp(wish, "forward") == 0) return turn;
  if (std::strcmp(wish, "backward") == 0) return {turn.rbegin(), turn.rend()};
  std::shuffle(turn.begin(), turn.end(), machine.random);
  return turn;
}

// Lets threads [from, to) go on if every one of them waits in `state`.
inline bool release(size_t from, size_t to, State state) {
  size_t waiting = 0;
  for (size_t t = from; t < to; ++t) waiting += machine.threads[t].state == state;
  if (waiting == 0) return false;
  if (waiting != to - from) return false;
  for (size_t t = from; t < to; ++t) machine.threads[t].state = State::kReady;
  return true;
}

inline void run_block() {
  const size_t count = machine.threads.size();
  for (size_t t = 0; t < count; ++t) {
    Thread& thread = machine.threads[t];
    const unsigned x = machine.block_dim.x;
    thread.index = {unsigned(t % x), unsigned(t / x), 0};
    thread.state = State::kReady;
    thread.shuffles = 0;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = Machine::kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
  }
  std::fill(machine.dynamic.begin(), machine.dynamic.end(), 0xff);
  for (;;) {
    bool moved = false;
    for (size_t t : order(count)) {
      if (machine.threads[t].state != State::kReady) continue;
      machine.current = t;
      swapcontext(&machine.scheduler, &machine.threads[t].context);
      moved = true;
    }
    for (size_t warp = 0; warp < count; warp += 32) {
      moved |= release(warp, std::min(warp + 32, count), State::kAtShuffle);
    }
    moved |= release(0, count, State::kAtBarrier);
    if (moved) continue;
    for (const Thread& thread : machine.threads) {
      if (thread.state != State::kDone) fail("a barrier or shuffle that not all threads reach");
    }
    return;
  }
}

template <class Call>
void run(void (*kernel)(Call), dim3 grid, dim3 block, int shared, const Call& call) {
  struct Bound {
    void (*kernel)(Call);
    const Call* call;
  };
  const Bound bound{kernel, &call};
  machine.body = [](const void* b) {
    const auto* bound = static_cast<const Bound*>(b);
    bound->kernel(*bound->call);
  };
  machine.argument = &bound;
  machine.block_dim = block;
  machine.grid_dim = grid;
  machine.dynamic.assign(size_t(shared), 0xff);
  const char* seed = std::getenv("LLM2VEC_FAST_EMULATE_ORDER");
  machine.random.seed(seed ? unsigned(std::atoi(seed)) : 0u);
  machine.threads.resize(size_t(block.x) * block.y);
  for (Thread& thread : machine.threads) {
    if (!thread.stack) thread.stack.reset(new char[Machine::kStack]);
  }
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      machine.block = {x, y, 0};
      run_block();
    }
  }
}

inline uint32_t* show(uint32_t value) {
  Thread& thread = machine.thread();
  uint32_t* lanes = machine.lanes[thread.shuffles++ % 2][machine.current / 32];
  lanes[machine.current % 32] = value;
  wait(State::kAtShuffle);
  return lanes;
}

}  // namespace emulated

#define threadIdx (::llm2vec_fast::emulated::machine.thread().index)
#define blockIdx (::llm2vec_fast::emulated::machine.block)
#define blockDim (::llm2vec_fast::emulated::machine.block_dim)
#define gridDim (::llm2vec_fast::emulated::machine.grid_dim)

inline void __syncthreads() { emulated::wait(emulated::State::kAtBarrier); }

inline uint32_t __float_as_uint(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
inline float __shfl_xor_sync(unsigned, float v, int step) {
  const size_t lane = emulated::machine.current % 32;
  return __uint_as_float(emulated::show(__float_as_uint(v))[lane ^ size_t(step)]);
}
inline unsigned __reduce_max_sync(unsigned, unsigned v) {
  const uint32_t* lanes = emulated::show(v);
  return *std::max_element(lanes, lanes + 32);
}
template <class V>
V __ldg(const V* from) { return *from; }
inline float __frsqrt_rn(float v) { return float(1.0 / std::sqrt(double(v))); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float v) { return std::exp(v); }
inline int __float2int_rn(float v) { return int(std::nearbyint(v)); }
using std::fmaf;
using std::max;
using std::min;

template <class V>
V* dynamic_shared() { return reinterpret_cast<V*>(emulated::machine.dynamic.data()); }

template <class Call>
cudaError_t launch_checked(void (*kernel)(Call), dim3 grid, dim3 block, int shared, void*,
                           const Call& call) {
  emulated::run(kernel, grid, block, shared, call);
  return cudaSuccess;
}

}  // namespace llm2vec_fast

// There is no CUDA runtime to link.
#define cudaGetErrorString(error) "emulated"
