#include "cpu/parallel.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <memory>
#include <new>
#if defined(__SANITIZE_THREAD__)
#include <thread>
#include <vector>
#endif

namespace eamnet {
namespace {

struct Free {
  void operator()(std::byte* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
using Memory = std::unique_ptr<std::byte[], Free>;

// A thread keeps its scratch memory: fresh pages cost more than many a kernel runs.
struct Arena {
  Memory memory;
  size_t size = 0;
  bool in_use = false;
};
thread_local Arena arena;
thread_local Arena workspace;
constexpr size_t kKeptBytes = size_t(64) << 20;

Memory allocate(size_t size) {
  return Memory(static_cast<std::byte*>(::operator new[](size, std::align_val_t(64))));
}

class Lease {
 public:
  explicit Lease(size_t size) {
    // A loop inside a chunk of another loop finds the arena taken.
    if (arena.in_use) {
      own_ = allocate(size);
      begin_ = own_.get();
      return;
    }
    if (arena.size < size) {
      arena.memory.reset();
      arena.size = 0;
      arena.memory = allocate(size);
      arena.size = size;
    }
    arena.in_use = true;
    begin_ = arena.memory.get();
  }
  ~Lease() {
    if (!own_) arena.in_use = false;
  }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  std::byte* begin() const { return begin_; }

 private:
  Memory own_;
  std::byte* begin_ = nullptr;
};

}  // namespace

Workspace::Workspace(size_t bytes) : own_(workspace.in_use || bytes > kKeptBytes) {
  if (own_) {
    begin_ = allocate(bytes).release();
    return;
  }
  if (workspace.size < bytes) {
    workspace.memory.reset();
    workspace.size = 0;
    workspace.memory = allocate(bytes);
    workspace.size = bytes;
  }
  workspace.in_use = true;
  begin_ = workspace.memory.get();
}

Workspace::~Workspace() {
  if (own_) {
    Free()(begin_);
  } else {
    workspace.in_use = false;
  }
}

void run_chunks(
    int64_t chunks,
    size_t scratch_bytes,
    void (*body)(void* context, int64_t chunk, std::byte* scratch),
    void* context) {
  if (chunks <= 0) return;
  // Never empty, so that a lease of its own can be told from the arena's.
  const size_t bytes = std::max<size_t>(scratch_bytes, 64);
#if defined(__SANITIZE_THREAD__)
  // The sanitizer does not see how torch's OpenMP hands work over; it understands these threads. What
  // it reports are conflicts between threads: no two of 8 consecutive chunks share one, whereas the
  // first to come would have done most loops of the tests before the second has started.
  const int64_t threads = std::min<int64_t>(chunks, 8);
  std::vector<std::thread> running;
  for (int64_t t = 0; t < threads; ++t) {
    running.emplace_back([=] {
      Lease lease(bytes);
      for (int64_t chunk = t; chunk < chunks; chunk += threads) body(context, chunk, lease.begin());
    });
  }
  for (auto& thread : running) thread.join();
#else
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    Lease lease(bytes);
    for (int64_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) {
      body(context, chunk, lease.begin());
    }
  };
  const auto threads = std::min<int64_t>(chunks, torch::stable::get_num_threads());
  if (threads == 1) {
    work(0, 1);
  } else {
    // Called for one or more subranges; whoever comes first takes the chunks.
    torch::stable::parallel_for(0, threads, 1, work);
  }
#endif
}

}  // namespace eamnet
