// How a call becomes launches: shared by the library and by the tests that run the kernels on a CPU.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "common.h"
#include "stencil_tile.h"

namespace eamnet::cuda {

struct Grid {
  int64_t x = 1, y = 1, z = 1;
};

// What the card allows. `shared_bytes` is the most that a block can have.
struct Limits {
  int shared_bytes, multiprocessors, threads;
};

enum class Type : int32_t { float32, bfloat16, float16 };

// visit(type, [&]<class T>() { ... }) runs the body with T = float, bfloat16 or float16.
template <class Body>
auto visit(Type type, Body&& body) {
  switch (type) {
    case Type::bfloat16:
      return body.template operator()<bfloat16>();
    case Type::float16:
      return body.template operator()<float16>();
    default:
      return body.template operator()<float>();
  }
}

struct TensorRef {
  void* data;
  std::array<int64_t, 4> strides;  // in elements
};

// A (B, C, H, W) tensor as kernels see it. 16 bytes of channels can be taken at once where channels
// are adjacent and every group of `group` channels begins at a multiple of 16 bytes.
template <class T>
Map<T> make_map(const TensorRef& tensor, const std::array<int64_t, 4>& sizes, int group) {
  std::array<int64_t, 4> strides = tensor.strides;
  for (int d = 0; d < 4; ++d) {
    if (sizes[d] <= 1) strides[d] = d == 1 ? 1 : 0;  // says nothing, and could be odd
  }
  constexpr int v = kVec<T>;
  const bool aligned = reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 && group % v == 0 &&
      strides[0] % v == 0 && strides[2] % v == 0 && strides[3] % v == 0;
  return {static_cast<T*>(tensor.data), strides[0], strides[1], strides[2], strides[3],
          aligned && strides[1] == 1};
}

inline std::array<int64_t, 4> dense_strides(const std::array<int64_t, 4>& n, bool channels_last) {
  if (channels_last) return {n[1] * n[2] * n[3], 1, n[3] * n[1], n[1]};
  return {n[1] * n[2] * n[3], n[2] * n[3], n[3], 1};
}

inline Tiling make_tiling(int rows, int log_columns, int height, int width) {
  return {rows, log_columns, ceil_div(height, rows), ceil_div(width, 1 << log_columns), height, width};
}

inline constexpr int kSmallestTile = 64;

// The tile for one kernel: the largest that leaves room for a second block and that gives every
// multiprocessor a block; no wider than the picture needs. `bytes(tiling)` is what a block then takes.
template <class Bytes>
Tiling choose_tiling(
    int64_t batch, int height, int width, const Limits& limits, int64_t blocks_per_tile, Bytes&& bytes) {
  const int log_columns = width <= 8 ? 3 : width <= 16 ? 4 : 5;
  Tiling best{};
  for (int pixels = 256; pixels >= kSmallestTile; pixels /= 2) {
    // Nearly square tiles have the least halo; 32 columns are for the largest only.
    const int log = std::min(log_columns, pixels >= 256 ? 5 : pixels >= 128 ? 4 : 3);
    best = make_tiling(pixels >> log, log, height, width);
    const bool fits = bytes(best) <= limits.shared_bytes / 2;
    if (fits && batch * best.down * best.across * blocks_per_tile >= limits.multiprocessors) break;
  }
  return best;
}

inline int threads_for(const Tiling& tiling, const Limits& limits) {
  return std::min(limits.threads, 2 * tiling.pixels());
}

// Instead of launching: three numbers for each launch, for the audit (eamnet_kernels/cuda/audit.py).
struct Recorder {
  std::vector<int64_t>& launches;  // blocks, threads of each, bytes of shared memory of each

  template <class... Parameters, class... Arguments>
  void operator()(
      void (*)(Parameters...), const Grid& grid, int threads, int64_t shared_bytes,
      const Arguments&...) const {
    launches.push_back(grid.x * grid.y * grid.z);
    launches.push_back(threads);
    launches.push_back(shared_bytes);
  }
};

}  // namespace eamnet::cuda
