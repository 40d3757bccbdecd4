// The names of CUDA that csrc/cuda uses, with a meaning on the CPU. For tests only.
//
// Every thread of a block is a thread of the system; blocks follow each other. Shared memory is a heap
// block of exactly the size that the launch asked for, filled with NaN, so that AddressSanitizer sees
// an access beyond it and a result shows an element read before it was written. Barriers are those of
// pthreads, which ThreadSanitizer understands.
#pragma once

#include <pthread.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __launch_bounds__(...)

namespace cuda_host {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

class Barrier {
 public:
  explicit Barrier(unsigned threads) { pthread_barrier_init(&barrier_, nullptr, threads); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  Barrier(const Barrier&) = delete;
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

struct Warp {
  Barrier barrier{32};
  uint64_t exchange[32];
};

struct Block {
  explicit Block(unsigned threads) : barrier(threads), warps(threads / 32) {}
  Barrier barrier;
  std::vector<Warp> warps;
  unsigned char* memory = nullptr;
};

inline thread_local Block* block = nullptr;
inline unsigned char* shared_memory() { return block->memory; }

}  // namespace cuda_host

inline thread_local cuda_host::Index threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { cuda_host::block->barrier.wait(); }
inline void __syncwarp() { cuda_host::block->warps[threadIdx.x / 32].barrier.wait(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  cuda_host::Warp& warp = cuda_host::block->warps[threadIdx.x / 32];
  const unsigned lane = threadIdx.x % 32;
  std::memcpy(&warp.exchange[lane], &value, sizeof(T));
  warp.barrier.wait();
  std::memcpy(&value, &warp.exchange[lane ^ static_cast<unsigned>(mask)], sizeof(T));
  warp.barrier.wait();
  return value;
}

namespace cuda_host {

// kernel<<<grid, threads, shared_bytes>>>(arguments...), to the end.
struct Launch {
  template <class Grid, class... Parameters, class... Arguments>
  void operator()(
      void (*kernel)(Parameters...), const Grid& grid, int threads, int64_t shared_bytes,
      const Arguments&... arguments) const {
    Block state(static_cast<unsigned>(threads));
    const auto run = [&](unsigned thread) {
      block = &state;
      threadIdx = {thread};
      blockDim = {static_cast<unsigned>(threads), 1, 1};
      gridDim = {unsigned(grid.x), unsigned(grid.y), unsigned(grid.z)};
      for (unsigned z = 0; z < gridDim.z; ++z) {
        for (unsigned y = 0; y < gridDim.y; ++y) {
          for (unsigned x = 0; x < gridDim.x; ++x) {
            if (thread == 0) {
              state.memory = static_cast<unsigned char*>(std::malloc(static_cast<size_t>(shared_bytes)));
              std::memset(state.memory, 0xff, static_cast<size_t>(shared_bytes));
            }
            state.barrier.wait();
            blockIdx = {x, y, z};
            kernel(arguments...);
            state.barrier.wait();
            if (thread == 0) std::free(state.memory);
          }
        }
      }
    };
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; ++t) pool.emplace_back(run, static_cast<unsigned>(t));
    for (std::thread& thread : pool) thread.join();
  }
};

}  // namespace cuda_host
