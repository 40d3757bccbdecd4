// Parallel loops whose result does not depend on the number of threads.
//
// The caller cuts its work into chunks from the sizes of its operands alone, each chunk writes its
// own part of the output (or its own partial result, combined in order afterwards), and the loop
// only decides which thread runs which chunk. So one thread and many give the same bits.
//
//   parallel_for(chunks, scratch_bytes, [&](int64_t chunk, Scratch& scratch) {
//     float* panel = scratch.take<float>(channels * pixels);
//     ...
//   });
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace eamnet {

// The threads of torch (torch.set_num_threads) run body(context, chunk, scratch) for each chunk, in
// increasing order as threads become free; scratch is 64-byte aligned and belongs to the thread for
// the time of one call. An exception from the body is rethrown in the caller.
void run_chunks(
    int64_t chunks,
    size_t scratch_bytes,
    void (*body)(void* context, int64_t chunk, std::byte* scratch),
    void* context);

// Hands out consecutive 64-byte aligned pieces of a thread's scratch memory; uninitialised.
class Scratch {
 public:
  explicit Scratch(std::byte* begin) : next_(begin) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += bytes<T>(count);
    return piece;
  }
  // What take<T>(count) uses up; the sum over all takes is the scratch_bytes of parallel_for.
  template <class T>
  static constexpr size_t bytes(int64_t count) {
    return (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
  }

 private:
  std::byte* next_;
};

// What the passes of one call leave for each other: 64-byte aligned, uninitialised. The calling thread
// keeps up to 64 MiB of it for its next call, because fresh pages cost more than many a pass.
class Workspace {
 public:
  explicit Workspace(size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  std::byte* begin() const { return begin_; }

 private:
  std::byte* begin_;
  bool own_;
};

// Number of pieces of at most `size` that cover `total`.
constexpr int64_t ceil_div(int64_t total, int64_t size) { return (total + size - 1) / size; }
constexpr int64_t round_up(int64_t total, int64_t size) { return ceil_div(total, size) * size; }

// out[i] += Σ over parts of partials[part*stride + i], i < size, in order and in double precision.
template <class T, class A>
void add_partials(const T* partials, int64_t stride, int64_t parts, int64_t size, A* out) {
  if (parts == 0) return;
  constexpr int64_t piece = 256;
  for (int64_t first = 0; first < size; first += piece) {
    const int64_t count = std::min(piece, size - first);
    double sum[piece];
    for (int64_t i = 0; i < count; ++i) sum[i] = static_cast<double>(out[first + i]);
    for (int64_t part = 0; part < parts; ++part) {
      const T* from = partials + part * stride + first;
      for (int64_t i = 0; i < count; ++i) sum[i] += from[i];
    }
    for (int64_t i = 0; i < count; ++i) out[first + i] = static_cast<A>(sum[i]);
  }
}

template <class Body>
void parallel_for(int64_t chunks, size_t scratch_bytes, Body&& body) {
  using B = std::remove_reference_t<Body>;
  run_chunks(
      chunks,
      scratch_bytes,
      [](void* context, int64_t chunk, std::byte* memory) {
        Scratch scratch(memory);
        (*static_cast<B*>(context))(chunk, scratch);
      },
      const_cast<std::remove_const_t<B>*>(&body));
}

}  // namespace eamnet
