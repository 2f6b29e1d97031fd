// CUDA's words for a C++ compiler. Blocks run one after the other, so that what their threads share may be static. One
// thread of a block runs at a time: to its end, or, in kernels whose threads wait for each other, until it waits.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(threads)

struct Dim3 {
  unsigned x = 0, y = 0, z = 0;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline thread_local Dim3 threadIdx, blockIdx, blockDim, gridDim;

inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}

inline double __longlong_as_double(long long bits) {
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float half_to_float(unsigned short bits) {
  _Float16 h;
  std::memcpy(&h, &bits, sizeof h);
  return h;
}

inline unsigned short float_to_half(float x) {
  const _Float16 h = static_cast<_Float16>(x);
  unsigned short bits;
  std::memcpy(&bits, &h, sizeof h);
  return bits;
}

/// The threads of a block that wait for each other. Each has a stack of its own; after the first switch onto it
/// (ucontext), setjmp and longjmp switch without system calls.
class Block {
 public:
  explicit Block(unsigned threads) : threads_(threads) {
    for (auto &t : threads_) t.stack = std::make_unique<char[]>(kStack);
  }

  /// Runs `body()` once per thread, with threadIdx set.
  template <class Body>
  void run(const Body &body) {
    current() = this;
    body_ = [](const void *b) { (*static_cast<const Body *>(b))(); };
    argument_ = &body;
    for (auto &t : threads_) t.begun = t.done = false;
    for (bool more = true; more;) {
      more = false;
      for (running_ = 0; running_ < threads_.size(); running_++) {
        if (threads_[running_].done) continue;
        resume(threads_[running_]);
        more |= !threads_[running_].done;
      }
    }
    current() = nullptr;
  }

  /// This thread goes on when all others have come as far or ended.
  void wait() {
    Thread &self = threads_[running_];
    if (!_setjmp(self.place)) _longjmp(scheduler_, 1);
    threadIdx.x = static_cast<unsigned>(running_);
  }

  static Block *&current() {
    static thread_local Block *block = nullptr;
    return block;
  }

 private:
  static constexpr size_t kStack = 64 * 1024;

  struct Thread {
    jmp_buf place;
    std::unique_ptr<char[]> stack;
    bool begun = false, done = false;
  };

  void resume(Thread &thread) {
    threadIdx.x = static_cast<unsigned>(running_);
    if (_setjmp(scheduler_)) return;
    if (thread.begun) _longjmp(thread.place, 1);
    thread.begun = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = thread.stack.get();
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, &Block::enter, 0);
    setcontext(&context);
  }

  static void enter() {
    Block *block = current();
    block->body_(block->argument_);
    block->threads_[block->running_].done = true;
    _longjmp(block->scheduler_, 1);
  }

  std::vector<Thread> threads_;
  jmp_buf scheduler_;
  size_t running_ = 0;
  void (*body_)(const void *) = nullptr;
  const void *argument_ = nullptr;
};

inline void __syncthreads() {
  if (Block::current()) return Block::current()->wait();
  std::fprintf(stderr, "fake CUDA: a kernel that was not announced as one whose threads wait for each other\n");
  std::abort();
}

/// Calls `kernel` with the arguments that `pointers` points to, for every thread of every block.
template <class... Args, size_t... I>
void launch(void (*kernel)(Args...), void **pointers, bool waits, std::index_sequence<I...>) {
  auto body = [&] { kernel(*static_cast<std::remove_const_t<Args> *>(pointers[I])...); };
  Block block(waits ? blockDim.x : 0);
  for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++) {
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++) {
      if (waits) {
        block.run(body);
      } else {
        for (threadIdx.x = 0; threadIdx.x < blockDim.x; threadIdx.x++) body();
      }
    }
  }
}

template <class... Args>
void launch(void (*kernel)(Args...), void **pointers, bool waits) {
  launch(kernel, pointers, waits, std::index_sequence_for<Args...>());
}
