// A tile of pixels and what lies around it: geometry, loads into shared memory, the dilated stencil.
#pragma once

#include "common.h"
#include "tile_product.h"

namespace eamnet::cuda {

// A tile is `rows` x 2^log_columns pixels, a multiple of 64 in all and a power of two. Blocks take the
// tiles of the batch in row-major order.
struct Tiling {
  int rows, log_columns, down, across, height, width;

  EAMNET_HOST_DEVICE int columns() const { return 1 << log_columns; }
  EAMNET_HOST_DEVICE int pixels() const { return rows << log_columns; }
};

struct Tile {
  Tiling tiling;
  int64_t b;
  int y, x;

  EAMNET_DEVICE Tile(const Tiling& t, int64_t index) : tiling(t) {
    const int per_picture = t.down * t.across, within = static_cast<int>(index % per_picture);
    b = index / per_picture;
    y = within / t.across * t.rows;
    x = within % t.across << t.log_columns;
  }
  EAMNET_DEVICE int row(int pixel) const { return pixel >> tiling.log_columns; }
  EAMNET_DEVICE int column(int pixel) const { return pixel & (tiling.columns() - 1); }
  EAMNET_DEVICE bool inside(int pixel) const {
    return y + row(pixel) < tiling.height && x + column(pixel) < tiling.width;
  }
};

// What one dilation reads of a tile's surroundings. Up to the size of the tile that is the tile with a
// halo. A larger dilation reads three (three times three) pieces of the tile's size, which are stored
// side by side: the window's size is bounded whatever the dilation, and a tap is `step` away in both.
struct Window {
  int dilation, step_y, step_x, rows, columns;

  EAMNET_HOST_DEVICE Window(const Tiling& t, int d)
      : dilation(d),
        step_y(at_most(d, t.rows)),
        step_x(at_most(d, t.columns())),
        rows(t.rows + 2 * step_y),
        columns(t.columns() + 2 * step_x) {}

  // Where row or column i of the window lies in the picture, from the tile's first on.
  EAMNET_DEVICE int source(int i, int tile_size) const {
    return dilation <= tile_size ? i - dilation : (i / tile_size - 1) * dilation + i % tile_size;
  }
  // The stored pixel that tap (ky, kx) of the tile's pixel (row, column) reads.
  EAMNET_DEVICE int at(int row, int column, int tap) const {
    return (row + tap / 3 * step_y) * columns + column + tap % 3 * step_x;
  }
};

// Elements between the pixels of a window: 32 bytes of channels and 16 that keep banks apart.
template <class T>
inline constexpr int kWindowStride = 3 * kVec<T>;

// Channels [c, c + kStep) of the window; zeros outside of the picture and from channel `end` on.
template <class T>
EAMNET_DEVICE void load_window(
    T* to, const Map<T>& map, const Tile& tile, const Window& window, int c, int end) {
  const int count = window.rows * window.columns;
#pragma unroll 1  // kVec loads on the way are enough
  for (int i = threadIdx.x; i < 2 * count; i += blockDim.x) {
    // Neighbouring threads read neighbouring addresses: channels of one pixel or pixels of one row.
    const int pixel = map.vectors ? i / 2 : i < count ? i : i - count;
    const int part = (map.vectors ? i % 2 : i >= count) * kVec<T>;
    const int y = tile.y + window.source(pixel / window.columns, tile.tiling.rows);
    const int x = tile.x + window.source(pixel % window.columns, tile.tiling.columns());
    const bool inside = 0 <= y && y < tile.tiling.height && 0 <= x && x < tile.tiling.width;
    copy(to + pixel * kWindowStride<T> + part, map, tile.b, c + part, end, y, x, inside);
  }
}

// `vectors` * kVec channels from c on of the tile's own pixels, `stride` elements from one to the next.
template <class T>
EAMNET_DEVICE void load_tile(
    T* to, int stride, const Map<T>& map, const Tile& tile, int c, int end, int vectors) {
  const int pixels = tile.tiling.pixels();
#pragma unroll 1
  for (int i = threadIdx.x; i < pixels * vectors; i += blockDim.x) {
    const int pixel = map.vectors ? i / vectors : i % pixels;
    const int part = (map.vectors ? i % vectors : i / pixels) * kVec<T>;
    copy(
        to + pixel * stride + part, map, tile.b, c + part, end, tile.y + tile.row(pixel),
        tile.x + tile.column(pixel), tile.inside(pixel));
  }
}

// Weights of one group's branch as the stencil reads them. Depthwise: float32 [9][channels], channels
// rounded up to kVec. Dense: [9] packed matrices of round_up(channels, 16) x round_up(channels, kStep).
template <class T, bool depthwise>
EAMNET_HOST_DEVICE int64_t branch_size(int channels) {
  if constexpr (depthwise) return 9 * round_up(channels, kVec<T>);
  return int64_t(9) * round_up(channels, 16) * round_up(channels, kStep<T>);
}
template <class T, bool depthwise>
struct BranchWeight {
  using type = T;
};
template <class T>
struct BranchWeight<T, true> {
  using type = float;
};

// out[pixel * stride + j] = sum over taps (and input channels) of map's channels [first, first + c)
// around the tile, for j < round_up(c, kVec). The whole block takes part; `out` is complete after the
// next barrier.
template <class T, bool depthwise>
EAMNET_DEVICE void stencil(
    T* out, int stride, T* window_memory, const Map<T>& map, const Tile& tile, int dilation, int first,
    int c, const typename BranchWeight<T, depthwise>::type* weights) {
  const Window window(tile.tiling, dilation);
  const int pixels = tile.tiling.pixels(), padded = round_up(c, kVec<T>);
  if constexpr (depthwise) {
    for (int begin = 0; begin < c; begin += kStep<T>) {
      __syncthreads();  // the window before has been read
      load_window(window_memory, map, tile, window, first + begin, first + c);
      copies_done();
      __syncthreads();  // the window is written
      const int vectors = at_most(2, (padded - begin) / kVec<T>);
      for (int i = threadIdx.x; i < pixels * vectors; i += blockDim.x) {
        const int pixel = i % pixels, part = i / pixels * kVec<T>;
        const float* weight = weights + begin + part;
        float sum[kVec<T>] = {};
#pragma unroll
        for (int tap = 0; tap < 9; ++tap) {
          const auto value = *reinterpret_cast<const Vec<T>*>(
              window_memory + window.at(tile.row(pixel), tile.column(pixel), tap) * kWindowStride<T> +
              part);
#pragma unroll
          for (int j = 0; j < kVec<T>; j += 4) {
            const auto w = *reinterpret_cast<const Vec<float>*>(weight + tap * padded + j);
#pragma unroll
            for (int l = 0; l < 4; ++l) sum[j + l] += w.lane[l] * widen(value.lane[j + l]);
          }
        }
        Vec<T> result;
#pragma unroll
        for (int j = 0; j < kVec<T>; ++j) result.lane[j] = narrow<T>(sum[j]);
        *reinterpret_cast<Vec<T>*>(out + pixel * stride + begin + part) = result;
      }
    }
  } else {
    // Each warp has one product at a time, its sums in registers while the windows of all input
    // channels pass; where there are more products than warps the windows are read again.
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int spans = pixels / kProductColumns, products = ceil_div(c, kProductRows) * spans;
    const int steps = ceil_div(c, kStep<T>);
    const int64_t tap_size = static_cast<int64_t>(round_up(c, 16)) * steps * kStep<T>;
    for (int done = 0; done < products; done += warps) {
      const int product = done + warp, rows = product / spans, span = product % spans;
      Accumulator acc;
      acc.clear();
      for (int step = 0; step < steps; ++step) {
        __syncthreads();  // the window before has been read
        load_window(window_memory, map, tile, window, first + step * kStep<T>, first + c);
        copies_done();
        __syncthreads();  // the window is written
        if (product >= products) continue;
        const T* matrix = weights + (static_cast<int64_t>(rows) * steps + step) * 16 * kStep<T>;
#pragma unroll(kUnroll<T>)
        for (int tap = 0; tap < 9; ++tap) {
          inner_step(
              acc, matrix + tap * tap_size,
              [&](int eight) {
                const int pixel = span * kProductColumns + eight * 8;
                return window_memory +
                    window.at(tile.row(pixel), tile.column(pixel), tap) * kWindowStride<T>;
              },
              kWindowStride<T>);
        }
      }
      if (product >= products) continue;
      each_output<T>(acc, [&](int row, int eight, int column, float sum) {
        const int channel = rows * kProductRows + row;
        const int pixel = span * kProductColumns + eight * 8 + column;
        if (channel < padded) out[pixel * stride + channel] = narrow<T>(sum);
      });
    }
  }
}

}  // namespace eamnet::cuda
