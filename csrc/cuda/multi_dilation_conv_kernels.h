// multi_dilation_conv on the GPU. Definition: eamnet_kernels/reference/multi_dilation_conv.py.
//
// Forward, one kernel: a block makes all C channels that enter the 1x1 product for one tile of pixels
// in shared memory (`fused`), each branch from a window loaded once, then multiplies; the concatenation
// never leaves the chip. Backward: a kernel for the product's input (and through the activation), one
// for the branches' input, which is the forward's stencil with weights turned around, and one for each
// kind of weight, whose sums over pixels are made in two stages of fixed order: no atomics, the same
// bits in every run. The gradient of the preactivation goes through global memory, because a stencil
// over it in the same kernel would repeat the 1x1 product on the halo: 4 times, at dilation 7.
#pragma once

#include "common.h"
#include "stencil_tile.h"
#include "tile_product.h"

namespace eamnet::cuda {

inline constexpr int kMaxBranches = 8;
// Two blocks of 256 threads leave 128 registers to each.
inline constexpr int kMaxThreads = 256;

enum class Activation { relu, silu, identity };

EAMNET_DEVICE float activate(Activation activation, float z) {
  // As torch: NaN stays.
  if (activation == Activation::relu) return z <= 0.f ? 0.f : z;
  if (activation == Activation::silu) return z / (1.f + expf(-z));
  return z;
}
EAMNET_DEVICE float activation_slope(Activation activation, float z) {
  if (activation == Activation::relu) return z <= 0.f ? 0.f : 1.f;
  if (activation == Activation::silu) {
    const float sigmoid = 1.f / (1.f + expf(-z));
    return sigmoid * (1.f + z * (1.f - sigmoid));
  }
  return 1.f;
}

// The call as every kernel gets it; c = channels / (branches + 1).
template <class T>
struct Conv {
  int batch, channels, group, branches, height, width;
  int dilation[kMaxBranches];
  Activation activation;
  bool depthwise;
  Tiling tiling;
  Map<T> x, out, preactivation;                // (B,C,H,W), (B,C,H,W), (B,n*c,H,W)
  Map<T> grad_out, grad_x, grad_preactivation;
  const T* branch[kMaxBranches];               // (c,c,3,3) or (c,1,3,3)
  const T* point;                              // (C,C)
  const T* bias;                               // (C) or null
  void* packed_branches;                       // [n][branch_size]
  T* packed_point;
  float* branch_partials;                      // [splits][n][c][c or 1][9]
  float* point_partials;                       // [splits][C*C + C], the last C for the bias

  // Groups start at multiples of kVec channels in shared memory and in the packed 1x1 matrix.
  EAMNET_HOST_DEVICE int padded_group() const { return round_up(group, kVec<T>); }
  EAMNET_HOST_DEVICE int grouped_channels() const { return (branches + 1) * padded_group(); }
  EAMNET_HOST_DEVICE int64_t branch_elements() const {
    return int64_t(9) * group * (depthwise ? 1 : group);
  }
};

// ------------------------------------------------------------------------------------------ packing

// The weights in the order in which the products read them, zeros in the padding. `backward`: those of
// the gradients of the inputs, transposed, the taps turned around.
template <class T, bool depthwise, bool backward>
__global__ void __launch_bounds__(256) pack_weights(Conv<T> a) {
  const int c = a.group, padded = a.padded_group();
  const int rows = round_up(c, 16), columns = round_up(c, kStep<T>), steps = columns / kStep<T>;
  const int64_t size = branch_size<T, depthwise>(c);
  auto* branches = static_cast<typename BranchWeight<T, depthwise>::type*>(a.packed_branches);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = first; i < a.branches * size; i += stride) {
    const int g = static_cast<int>(i / size);
    int64_t j = i % size;
    if constexpr (depthwise) {
      const int tap = static_cast<int>(j / padded), channel = static_cast<int>(j % padded);
      branches[i] = channel < c ? widen(a.branch[g][channel * 9 + (backward ? 8 - tap : tap)]) : 0.f;
    } else {
      const int k = static_cast<int>(j % columns), m = static_cast<int>(j / columns % rows);
      const int tap = static_cast<int>(j / columns / rows);
      T value = narrow<T>(0.f);
      if (m < c && k < c) {
        value = backward ? a.branch[g][(static_cast<int64_t>(k) * c + m) * 9 + 8 - tap]
                         : a.branch[g][(static_cast<int64_t>(m) * c + k) * 9 + tap];
      }
      branches[g * size + tap * (static_cast<int64_t>(rows) * columns) + packed_index<T>(m, k, steps)] =
          value;
    }
  }
  const int C = a.channels, grouped = a.grouped_channels();
  const int point_rows = round_up(backward ? grouped : C, 16);
  const int point_columns = round_up(backward ? C : grouped, kStep<T>);
  for (int64_t i = first; i < static_cast<int64_t>(point_rows) * point_columns; i += stride) {
    const int m = static_cast<int>(i / point_columns), k = static_cast<int>(i % point_columns);
    const int plain = backward ? k : m, slot = backward ? m : k, within = slot % padded;
    const bool valid = plain < C && slot < grouped && within < c;
    const int64_t at = static_cast<int64_t>(plain) * C + slot / padded * c + within;
    a.packed_point[packed_index<T>(m, k, point_columns / kStep<T>)] =
        valid ? a.point[at] : narrow<T>(0.f);
  }
}

// ------------------------------------------------------------------------------------------ forward

// Elements of one warp's outputs of a product, on their way to global memory.
template <class T>
inline constexpr int kStageStride = kProductRows + kVec<T>;
template <class T>
inline constexpr int kStageSize = kProductColumns * kStageStride<T>;

// rows x pixels outputs: matrix (packed) times fused[pixel * stride + k]. offset(row) is added;
// emit(pixel, row, vec) gets kVec rows at a time. `by_rows`: neighbouring threads get neighbouring
// rows, else neighbouring pixels.
template <class T, class Offset, class Emit>
EAMNET_DEVICE void point_product(
    const T* matrix, int rows, int steps, const T* fused, int stride, int pixels, T* stage_memory,
    bool by_rows, Offset&& offset, Emit&& emit) {
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32;
  const int spans = pixels / kProductColumns;
  T* stage = stage_memory + warp * kStageSize<T>;
  for (int product = warp; product < ceil_div(rows, kProductRows) * spans; product += warps) {
    const int row_block = product / spans, first = product % spans * kProductColumns;
    const T* packed = matrix + static_cast<int64_t>(row_block) * steps * 16 * kStep<T>;
    Accumulator acc;
    acc.clear();
#pragma unroll(kUnroll<T>)
    for (int step = 0; step < steps; ++step) {
      inner_step(
          acc, packed + step * 16 * kStep<T>,
          [&](int eight) { return fused + (first + eight * 8) * stride + step * kStep<T>; }, stride);
    }
    each_output<T>(acc, [&](int row, int eight, int column, float value) {
      stage[(eight * 8 + column) * kStageStride<T> + row] =
          narrow<T>(value + offset(row_block * kProductRows + row));
    });
    __syncwarp();  // the outputs are staged
    constexpr int parts = kProductRows / kVec<T>;
#pragma unroll 1
    for (int i = lane; i < kProductColumns * parts; i += 32) {
      const int pixel = by_rows ? i / parts : i % kProductColumns;
      const int part = (by_rows ? i % parts : i / kProductColumns) * kVec<T>;
      emit(
          first + pixel, row_block * kProductRows + part,
          *reinterpret_cast<const Vec<T>*>(stage + pixel * kStageStride<T> + part));
    }
    __syncwarp();  // the stage may be written again
  }
}

// Zeros in the columns that a product reads beyond the `used` ones.
template <class T>
EAMNET_DEVICE void clear_tail(T* fused, int stride, int pixels, int used) {
  if (used == round_up(used, kStep<T>)) return;
  for (int pixel = threadIdx.x; pixel < pixels; pixel += blockDim.x) {
    *reinterpret_cast<Vec<T>*>(fused + pixel * stride + used) = Vec<T>{};
  }
}

template <class T, bool depthwise>
__global__ void __launch_bounds__(kMaxThreads, 2) conv_forward(Conv<T> a) {
  const Tile tile(a.tiling, blockIdx.x);
  const int c = a.group, padded = a.padded_group(), grouped = a.grouped_channels();
  const int pixels = a.tiling.pixels(), stride = row_length<T>(grouped);
  T* fused = shared_memory<T>();
  T* window = fused + pixels * stride;  // afterwards the stages of the product
  const auto* weights = static_cast<const typename BranchWeight<T, depthwise>::type*>(a.packed_branches);
  clear_tail(fused, stride, pixels, grouped);
  load_tile(fused, stride, a.x, tile, 0, c, padded / kVec<T>);
  for (int g = 0; g < a.branches; ++g) {
    stencil<T, depthwise>(
        fused + (g + 1) * padded, stride, window, a.x, tile, a.dilation[g], (g + 1) * c, c,
        weights + g * branch_size<T, depthwise>(c));
  }
  copies_done();
  __syncthreads();  // the branches are written
  const int vectors = a.branches * padded / kVec<T>;
  const bool by_channels = a.preactivation.vectors;
#pragma unroll 1
  for (int i = threadIdx.x; i < pixels * vectors; i += blockDim.x) {
    const int pixel = by_channels ? i / vectors : i % pixels;
    const int slot = (by_channels ? i % vectors : i / pixels) * kVec<T>;
    auto* at = reinterpret_cast<Vec<T>*>(fused + pixel * stride + padded + slot);
    Vec<T> z = *at;
    if (a.preactivation.data != nullptr && tile.inside(pixel)) {
      const int g = slot / padded;
      store(
          a.preactivation, tile.b, g * c + slot % padded, (g + 1) * c, tile.y + tile.row(pixel),
          tile.x + tile.column(pixel), z);
    }
#pragma unroll
    for (int j = 0; j < kVec<T>; ++j) z.lane[j] = narrow<T>(activate(a.activation, widen(z.lane[j])));
    *at = z;
  }
  __syncthreads();  // what enters the product is written
  point_product(
      a.packed_point, a.channels, ceil_div(grouped, kStep<T>), fused, stride, pixels, window,
      a.out.vectors,
      [&](int row) { return a.bias != nullptr && row < a.channels ? widen(a.bias[row]) : 0.f; },
      [&](int pixel, int row, const Vec<T>& values) {
        if (row >= a.channels || !tile.inside(pixel)) return;
        store(
            a.out, tile.b, row, a.channels, tile.y + tile.row(pixel), tile.x + tile.column(pixel),
            values);
      });
}

// ----------------------------------------------------------------------------------------- backward

// Through the 1x1 product and the activation: the gradients of the first group of x and of the
// preactivation.
template <class T>
__global__ void __launch_bounds__(kMaxThreads, 2) point_backward(Conv<T> a) {
  const Tile tile(a.tiling, blockIdx.x);
  const int c = a.group, padded = a.padded_group(), pixels = a.tiling.pixels();
  const int used = round_up(a.channels, kVec<T>), stride = row_length<T>(a.channels);
  T* fused = shared_memory<T>();
  clear_tail(fused, stride, pixels, used);
  load_tile(fused, stride, a.grad_out, tile, 0, a.channels, used / kVec<T>);
  copies_done();
  __syncthreads();  // the gradients are loaded
  point_product(
      a.packed_point, a.grouped_channels(), ceil_div(a.channels, kStep<T>), fused, stride, pixels,
      fused + pixels * stride, a.grad_x.vectors, [](int) { return 0.f; },
      [&](int pixel, int slot, Vec<T> values) {
        if (slot >= a.grouped_channels() || !tile.inside(pixel)) return;
        const int g = slot / padded, within = slot % padded;
        const int y = tile.y + tile.row(pixel), x = tile.x + tile.column(pixel);
        if (g == 0) {
          store(a.grad_x, tile.b, within, c, y, x, values);
          return;
        }
        const int channel = (g - 1) * c + within;
        const Vec<T> z = load(a.preactivation, tile.b, channel, g * c, y, x);
#pragma unroll
        for (int j = 0; j < kVec<T>; ++j) {
          // Not a product with 0 where relu is flat: an infinite gradient stops there.
          const float slope = activation_slope(a.activation, widen(z.lane[j]));
          values.lane[j] = narrow<T>(slope == 0.f ? 0.f : widen(values.lane[j]) * slope);
        }
        store(a.grad_preactivation, tile.b, channel, g * c, y, x, values);
      });
}

// Gradients of the groups of x that a branch reads; blockIdx.y is the branch.
template <class T, bool depthwise>
__global__ void __launch_bounds__(kMaxThreads, 2) stencil_backward(Conv<T> a) {
  const Tile tile(a.tiling, blockIdx.x);
  const int g = blockIdx.y, c = a.group, padded = a.padded_group();
  const int pixels = a.tiling.pixels(), stride = row_length<T>(padded);
  T* sums = shared_memory<T>();
  const auto* weights = static_cast<const typename BranchWeight<T, depthwise>::type*>(a.packed_branches);
  stencil<T, depthwise>(
      sums, stride, sums + pixels * stride, a.grad_preactivation, tile, a.dilation[g], g * c, c,
      weights + g * branch_size<T, depthwise>(c));
  __syncthreads();  // the sums are written
  const int vectors = padded / kVec<T>;
  for (int i = threadIdx.x; i < pixels * vectors; i += blockDim.x) {
    const int pixel = a.grad_x.vectors ? i / vectors : i % pixels;
    const int part = (a.grad_x.vectors ? i % vectors : i / pixels) * kVec<T>;
    if (!tile.inside(pixel)) continue;
    store(
        a.grad_x, tile.b, (g + 1) * c + part, (g + 2) * c, tile.y + tile.row(pixel),
        tile.x + tile.column(pixel), *reinterpret_cast<const Vec<T>*>(sums + pixel * stride + part));
  }
}

// Dense branch weights. blockIdx.x takes every gridDim.x-th tile, whose sums stay in registers;
// blockIdx.y is a branch, 32 of its outputs and kStep of its inputs. A warp has 16 outputs and eight
// columns of eight inputs under one tap.
inline constexpr int kGradientRows = 32;
template <class T>
inline constexpr int kGradientSpans = (9 * kStep<T> / 8 + 7) / 8;

template <class T>
__global__ void __launch_bounds__(kMaxThreads, 2) dense_gradient(Conv<T> a, int tiles) {
  constexpr int eights = kStep<T> / 8, spans = kGradientSpans<T>, stride = row_length<T>(kGradientRows);
  const int c = a.group, pixels = a.tiling.pixels();
  const int inputs = ceil_div(c, kStep<T>), outputs = ceil_div(c, kGradientRows);
  const int g = blockIdx.y / (inputs * outputs);
  const int first_output = blockIdx.y / inputs % outputs * kGradientRows;
  const int first_input = blockIdx.y % inputs * kStep<T>;
  const int rows = threadIdx.x / 32 / spans * kProductRows, span = threadIdx.x / 32 % spans;
  T* grads = shared_memory<T>();
  T* inputs_window = grads + pixels * stride;
  const Window window(a.tiling, a.dilation[g]);
  Accumulator acc;
  acc.clear();
  for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
    const Tile tile(a.tiling, index);
    __syncthreads();  // the tile before has been read
    load_tile(
        grads, stride, a.grad_preactivation, tile, g * c + first_output, (g + 1) * c,
        kGradientRows / kVec<T>);
    load_window(inputs_window, a.x, tile, window, (g + 1) * c + first_input, (g + 2) * c);
    copies_done();
    __syncthreads();  // the tile is loaded
    for (int p = 0; p < pixels; p += kProductPixels) {
      outer_step(
          acc, grads + p * stride + rows, stride,
          [&](int eight, int next) {
            const int column = at_most(span * 8 + eight, 9 * eights - 1);
            const int at = window.at(tile.row(p + next), tile.column(p + next), column / eights);
            return inputs_window + at * kWindowStride<T> + column % eights * 8;
          },
          kWindowStride<T>);
    }
  }
  float* out = a.branch_partials + (static_cast<int64_t>(blockIdx.x) * a.branches + g) * a.branch_elements();
  each_output<T>(acc, [&](int row, int eight, int column, float value) {
    const int output = first_output + rows + row, block = span * 8 + eight;
    const int input = first_input + block % eights * 8 + column;
    if (output < c && input < c && block < 9 * eights) {
      out[(static_cast<int64_t>(output) * c + input) * 9 + block / eights] = value;
    }
  });
}

// The same for depthwise branches; blockIdx.y is a branch and kStep of its channels. A warp has kVec
// channels, a thread every 32nd pixel of every other warp.
template <class T>
__global__ void __launch_bounds__(kMaxThreads, 2) depthwise_gradient(Conv<T> a, int tiles) {
  constexpr int sums = 9 * kVec<T>;
  const int c = a.group, pixels = a.tiling.pixels(), stride = kWindowStride<T>;
  const int blocks = ceil_div(c, kStep<T>), g = blockIdx.y / blocks;
  const int first = blockIdx.y % blocks * kStep<T>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int part = warp % 2 * kVec<T>;
  T* grads = shared_memory<T>();
  T* inputs_window = grads + pixels * stride;
  const Window window(a.tiling, a.dilation[g]);
  float sum[sums] = {};
  for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
    const Tile tile(a.tiling, index);
    __syncthreads();  // the tile before has been read
    load_tile(grads, stride, a.grad_preactivation, tile, g * c + first, (g + 1) * c, 2);
    load_window(inputs_window, a.x, tile, window, (g + 1) * c + first, (g + 2) * c);
    copies_done();
    __syncthreads();  // the tile is loaded
    for (int pixel = warp / 2 * 32 + lane; pixel < pixels; pixel += warps / 2 * 32) {
      const auto grad = *reinterpret_cast<const Vec<T>*>(grads + pixel * stride + part);
#pragma unroll
      for (int tap = 0; tap < 9; ++tap) {
        const auto value = *reinterpret_cast<const Vec<T>*>(
            inputs_window + window.at(tile.row(pixel), tile.column(pixel), tap) * stride + part);
#pragma unroll
        for (int j = 0; j < kVec<T>; ++j) {
          sum[tap * kVec<T> + j] += widen(grad.lane[j]) * widen(value.lane[j]);
        }
      }
    }
  }
  __syncthreads();  // the last tile has been read: its memory holds the warps' sums now
  auto* of_warp = shared_memory<float>();
#pragma unroll
  for (int i = 0; i < sums; ++i) {
    for (int distance = 16; distance > 0; distance /= 2) {
      sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], distance);
    }
    if (lane == 0) of_warp[warp * sums + i] = sum[i];
  }
  __syncthreads();  // every warp's sums are there
  float* out = a.branch_partials + (static_cast<int64_t>(blockIdx.x) * a.branches + g) * a.branch_elements();
  for (int i = threadIdx.x; i < 2 * sums; i += blockDim.x) {
    const int tap = i % sums / kVec<T>, channel = first + i / sums * kVec<T> + i % kVec<T>;
    float total = 0.f;
    for (int w = i / sums; w < warps; w += 2) total += of_warp[w * sums + i % sums];
    if (channel < c) out[channel * 9 + tap] = total;
  }
}

// The 1x1 product's weight and bias. blockIdx.x takes every gridDim.x-th run of 64 pixels; blockIdx.y
// has 64 outputs, a warp 16 of them; blockIdx.z has 64 inputs.
inline constexpr int kPointPixels = 64, kPointSize = 64;

template <class T>
__global__ void __launch_bounds__(kMaxThreads, 2) point_gradient(Conv<T> a, int64_t runs) {
  constexpr int stride = row_length<T>(kPointSize), vectors = kPointSize / kVec<T>;
  const int c = a.group, C = a.channels, padded = a.padded_group(), pixels = a.height * a.width;
  const int per_sample = ceil_div(pixels, kPointPixels);
  const int first_output = blockIdx.y * kPointSize, first_slot = blockIdx.z * kPointSize;
  const int warp = threadIdx.x / 32;
  T* grads = shared_memory<T>();
  T* inputs = grads + kPointPixels * stride;
  Accumulator acc;
  acc.clear();
  float bias = 0.f;
  for (int64_t run = blockIdx.x; run < runs; run += gridDim.x) {
    const int64_t b = run / per_sample;
    const int first = static_cast<int>(run % per_sample) * kPointPixels;
    __syncthreads();  // the run before has been read
    for (int i = threadIdx.x; i < kPointPixels * vectors; i += blockDim.x) {
      const int pixel = a.x.vectors ? i / vectors : i % kPointPixels;
      const int part = (a.x.vectors ? i % vectors : i / kPointPixels) * kVec<T>;
      const int n = first + pixel, y = n / a.width, x = n % a.width;
      copy(
          grads + pixel * stride + part, a.grad_out, b, first_output + part, C, y, x, n < pixels);
      // The slots are those of the first group of x, filled up to whole vectors, then the branches.
      const int slot = first_slot + part, of_branch = slot - padded;
      Vec<T> values{};
      if (n < pixels && slot < padded) {
        values = load(a.x, b, slot, c, y, x);
      } else if (n < pixels && of_branch < C - c) {
        values = load(a.preactivation, b, of_branch, C - c, y, x);
#pragma unroll
        for (int j = 0; j < kVec<T>; ++j) {
          values.lane[j] = narrow<T>(activate(a.activation, widen(values.lane[j])));
        }
      }
      *reinterpret_cast<Vec<T>*>(inputs + pixel * stride + part) = values;
    }
    copies_done();
    __syncthreads();  // the run is loaded
    for (int p = 0; p < kPointPixels; p += kProductPixels) {
      outer_step(
          acc, grads + p * stride + warp * kProductRows, stride,
          [&](int eight, int next) { return inputs + (p + next) * stride + eight * 8; }, stride);
    }
    if (blockIdx.z == 0 && threadIdx.x < kPointSize) {
      for (int p = 0; p < kPointPixels; ++p) bias += widen(grads[p * stride + threadIdx.x]);
    }
  }
  float* out = a.point_partials + static_cast<int64_t>(blockIdx.x) * (static_cast<int64_t>(C) * C + C);
  each_output<T>(acc, [&](int row, int eight, int column, float value) {
    const int output = first_output + warp * kProductRows + row;
    const int slot = first_slot + eight * 8 + column;
    const int input = slot < padded ? slot : slot - padded + c;
    const bool valid = slot < padded ? slot < c : input < C;
    if (output < C && valid) out[static_cast<int64_t>(output) * C + input] = value;
  });
  if (blockIdx.z == 0 && threadIdx.x < kPointSize && first_output + static_cast<int>(threadIdx.x) < C) {
    out[static_cast<int64_t>(C) * C + first_output + threadIdx.x] = bias;
  }
}

// The second stage of the sums, in the order of the splits. blockIdx.y is a segment.
template <class T>
struct Segment {
  T* out;
  const float* partials;
  int64_t size, split_stride;
  int splits;
};
template <class T>
struct Segments {
  Segment<T> segment[kMaxBranches + 2];
};

template <class T>
__global__ void __launch_bounds__(256) sum_partials(Segments<T> segments) {
  const Segment<T>& s = segments.segment[blockIdx.y];
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < s.size;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    float sum = 0.f;
    for (int split = 0; split < s.splits; ++split) sum += s.partials[split * s.split_stride + i];
    s.out[i] = narrow<T>(sum);
  }
}

}  // namespace eamnet::cuda
