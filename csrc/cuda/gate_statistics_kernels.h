// gate_statistics on the GPU. Definition: eamnet_kernels/reference/gate_statistics.py.
//
// Forward: a block loads a tile of pixels once, kStep channels at a time, and reduces it in both
// directions: a thread owns a pixel across all channels, and for each set of channels the threads
// divide the tile's pixels. What concerns a channel goes, per tile, to a second kernel, which combines
// the tiles in a fixed order. Backward: one write of the gradient, computed from what was saved.
#pragma once

#include <climits>

#include "common.h"
#include "stencil_tile.h"

namespace eamnet::cuda {

// Whether value v at index i comes before the best so far: NaN is largest, of equals the first wins.
EAMNET_DEVICE bool replaces(float v, int i, float best, int best_index) {
  if (v != v) return best == best || i < best_index;
  return best == best && (v > best || (v == best && i < best_index));
}

struct Extreme {
  float sum, max;
  int index;

  EAMNET_DEVICE void clear() {
    sum = 0.f;
    max = -__builtin_huge_valf();
    index = INT_MAX;
  }
  EAMNET_DEVICE void add(const Extreme& other) {
    sum += other.sum;
    if (replaces(other.max, other.index, max, index)) {
      max = other.max;
      index = other.index;
    }
  }
};

template <class T>
struct GateStatistics {
  int batch, channels, height, width;
  Tiling tiling;
  Map<T> x;
  T *pixel_mean, *pixel_max, *channel_mean, *channel_max;  // (B,1,H,W) twice, (B,C) twice
  int32_t* pixel_argmax;
  int64_t* channel_argmax;
  Extreme* partials;  // [B][C][tiles of a picture]
};

// As many threads as the tile has pixels.
template <class T>
__global__ void __launch_bounds__(256) gate_tiles(GateStatistics<T> a) {
  const Tile tile(a.tiling, blockIdx.x);
  const int pixels = a.tiling.pixels(), slices = blockDim.x / kStep<T>;
  T* values = shared_memory<T>();
  auto* of_slice = reinterpret_cast<Extreme*>(values + pixels * kWindowStride<T>);
  const int own = threadIdx.x, channel = threadIdx.x % kStep<T>, slice = threadIdx.x / kStep<T>;
  Extreme of_pixel;
  of_pixel.clear();
  for (int c = 0; c < a.channels; c += kStep<T>) {
    __syncthreads();  // the channels before have been read
    load_tile(values, kWindowStride<T>, a.x, tile, c, a.channels, 2);
    copies_done();
    __syncthreads();  // the channels are loaded
    // Apart first: one sum over all channels loses more digits than plain PyTorch's, from 64 on.
    Extreme of_step;
    of_step.clear();
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const auto vec = *reinterpret_cast<const Vec<T>*>(
          values + own * kWindowStride<T> + part * kVec<T>);
#pragma unroll
      for (int i = 0; i < kVec<T>; ++i) {
        const float v = widen(vec.lane[i]);
        const int at = c + part * kVec<T> + i;
        if (at < a.channels) of_step.add({v, v, at});
      }
    }
    of_pixel.add(of_step);
    Extreme sum;
    sum.clear();
    for (int p = slice; p < pixels; p += slices) {
      if (!tile.inside(p)) continue;
      const float v = widen(values[p * kWindowStride<T> + channel]);
      sum.add({v, v, (tile.y + tile.row(p)) * a.width + tile.x + tile.column(p)});
    }
    of_slice[threadIdx.x] = sum;
    __syncthreads();  // every slice is there
    if (slice == 0 && c + channel < a.channels) {
      for (int s = 1; s < slices; ++s) sum.add(of_slice[s * kStep<T> + channel]);
      const int per_picture = a.tiling.down * a.tiling.across;
      const int64_t at = (tile.b * a.channels + c + channel) * per_picture + blockIdx.x % per_picture;
      a.partials[at] = sum;
    }
  }
  if (tile.inside(own)) {
    const int64_t at =
        (tile.b * a.height + tile.y + tile.row(own)) * a.width + tile.x + tile.column(own);
    a.pixel_mean[at] = narrow<T>(of_pixel.sum / static_cast<float>(a.channels));
    a.pixel_max[at] = narrow<T>(of_pixel.max);
    a.pixel_argmax[at] = of_pixel.index;
  }
}

// One warp per sample and channel.
template <class T>
__global__ void __launch_bounds__(256) gate_channels(GateStatistics<T> a) {
  const int lane = threadIdx.x % 32, per_picture = a.tiling.down * a.tiling.across;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (at >= static_cast<int64_t>(a.batch) * a.channels) return;
  Extreme total;
  total.clear();
  for (int t = lane; t < per_picture; t += 32) total.add(a.partials[at * per_picture + t]);
  for (int distance = 16; distance > 0; distance /= 2) {
    total.add({
        __shfl_xor_sync(0xffffffffu, total.sum, distance),
        __shfl_xor_sync(0xffffffffu, total.max, distance),
        __shfl_xor_sync(0xffffffffu, total.index, distance)});
  }
  if (lane != 0) return;
  const float pixels = static_cast<float>(static_cast<int64_t>(a.height) * a.width);
  a.channel_mean[at] = narrow<T>(total.sum / pixels);
  a.channel_max[at] = narrow<T>(total.max);
  a.channel_argmax[at] = total.index;
}

template <class T>
struct GateStatisticsBackward {
  int64_t batch, channels, pixels;
  bool channels_last;
  T* grad_x;  // dense in either layout
  const T *grad_pixel_mean, *grad_pixel_max, *grad_channel_mean, *grad_channel_max;
  const int32_t* pixel_argmax;
  const int64_t* channel_argmax;
};

// A thread writes 16 bytes: kVec elements that follow each other in memory.
template <class T>
__global__ void __launch_bounds__(256) gate_backward(GateStatisticsBackward<T> a) {
  const int64_t inner = a.channels_last ? a.channels : a.pixels;
  const int64_t outer = a.channels_last ? a.pixels : a.channels;
  const int64_t vectors = (inner + kVec<T> - 1) / kVec<T>, count = a.batch * outer * vectors;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t row = i / vectors, first = i % vectors * kVec<T>;
    const int64_t b = row / outer, across = row % outer;
    Vec<T> result;
#pragma unroll
    for (int j = 0; j < kVec<T>; ++j) {
      if (first + j >= inner) break;
      const int64_t c = a.channels_last ? first + j : across, n = a.channels_last ? across : first + j;
      const int64_t pixel = b * a.pixels + n, channel = b * a.channels + c;
      float sum = widen(a.grad_pixel_mean[pixel]) / static_cast<float>(a.channels) +
          widen(a.grad_channel_mean[channel]) / static_cast<float>(a.pixels);
      if (a.pixel_argmax[pixel] == c) sum += widen(a.grad_pixel_max[pixel]);
      if (a.channel_argmax[channel] == n) sum += widen(a.grad_channel_max[channel]);
      result.lane[j] = narrow<T>(sum);
    }
    T* to = a.grad_x + row * inner + first;
    if (inner % kVec<T> == 0) {
      *reinterpret_cast<Vec<T>*>(to) = result;
    } else {
#pragma unroll
      for (int j = 0; j < kVec<T>; ++j) {
        if (first + j < inner) to[j] = result.lane[j];
      }
    }
  }
}

}  // namespace eamnet::cuda
