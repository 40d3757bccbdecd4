// 3x3 convolutions of several dilations over groups of channels and the 1x1 convolution that mixes them.
// Definition: eamnet_kernels/reference/multi_dilation_conv.py.
//
// With n branches of c channels, C = (n+1) c, per pixel and in multiply-adds:
//   forward    pointwise C^2; branches 9 n c^2 dense, 9 n c depthwise, less for taps outside the picture
//   backward   twice that: each product is needed once for its input and once for its weights
// and in values moved: forward reads x and writes the result, 2 C (and n c for the preactivation where
// a backward will follow); backward reads grad_out, x and the preactivation and writes grad_x,
// 3 C + n c. These are the floor.
//
// Forward. A tile of pixels with all its channels stays in the second-level cache: each branch is
// convolved from its surroundings (halo.h) into the tile, activated there, and the tile is multiplied by
// the 1x1 weight. The concatenation is never written. Beyond the floor, the surroundings of a tile are
// read with it (they mostly lie in a cache from the tile before).
//
// Backward, in two passes, because the surroundings of a tile of grad_x need the gradient of the
// preactivation there, whose every value costs C multiply-adds:
//   1. per pixel: that gradient, act'(z) W^T g, is written once (n c values, the one intermediate) and
//      the gradients of w_point and bias are summed;
//   2. per branch and tile, from one panel of it, grad_x and the branch weights' gradient:
//         grad_x[i, m] = sum_{o,t} w[o,i,t] gz[o, m - t]    grad_w[o,i,t] = sum_m gz[o, m - t] x[i, m]
//      both read gz shifted and x in place. grad_w is nine products over pixels where a group fills two
//      vectors (correlate_gemm), else nine dot products at once (correlate).
// Memory beyond the results: n/(n+1) of an activation between the passes, partial sums of the weights'
// gradients of at most a sixth of one, and per thread what fits the second-level cache.
// z is stored by the forward: to convolve again would cost the dense backward half as much again, and
// the depthwise one as many bytes (x of the branches is read instead of z) and 9 n c operations more.
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/feature_map.h"
#include "cpu/gemm.h"
#include "cpu/halo.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace eamnet {

enum class Activation { relu, silu, identity };

struct MultiDilationConv {
  FeatureMap x;
  int64_t height, width;
  std::vector<int64_t> dilations;
  std::vector<const void*> w_branches;  // (c, c, 3, 3) or (c, 1, 3, 3) each
  bool depthwise;
  const void* w_point;  // (C, C)
  Activation activation;
  FeatureMap preactivation;  // n c channels; no data where it is not wanted

  int64_t branches() const { return static_cast<int64_t>(dilations.size()); }
  int64_t group() const { return x.channels / (branches() + 1); }  // c
};

struct MultiDilationConvForward : MultiDilationConv {
  const void* bias;  // (C) or null
  FeatureMap out;
};
EAMNET_KERNEL(multi_dilation_conv, MultiDilationConvForward)

struct MultiDilationConvBackward : MultiDilationConv {
  FeatureMap grad_out;
  FeatureMap grad_x;
  FeatureMap grad_preactivation;  // n c channels, contiguous: between the passes
  std::vector<void*> grad_branches;
  void* grad_point;
  void* grad_bias;  // (C) or null
};
EAMNET_KERNEL(multi_dilation_conv_backward, MultiDilationConvBackward)

namespace EAMNET_LEVEL {
namespace {

constexpr int kTaps = 9;

template <class T>
EAMNET_INLINE Vec<T> activate(Activation activation, Vec<T> z) {
  switch (activation) {
    case Activation::relu:
      return maximum(z, Vec<T>(T(0)));
    case Activation::silu:
      return z / (Vec<T>(T(1)) + exp(-z));
    case Activation::identity:
      break;
  }
  return z;
}

// The gradient of the preactivation z from that of the activation's result.
template <class T>
EAMNET_INLINE Vec<T> activation_backward(Activation activation, Vec<T> z, Vec<T> grad) {
  const Vec<T> zero(T(0)), one(T(1));
  switch (activation) {
    case Activation::relu:
      return select(z <= zero, zero, grad);
    case Activation::silu: {
      const Vec<T> sigmoid = one / (one + exp(-z));
      return grad * sigmoid * (one + z * (one - sigmoid));
    }
    case Activation::identity:
      break;
  }
  return grad;
}

// f(n, count) for the vectors of a row of `size` values; count is AllLanes for all but the last.
template <class T, class F>
EAMNET_INLINE void for_vectors(int64_t size, F&& f) {
  int64_t n = 0;
  for (; n + Vec<T>::width <= size; n += Vec<T>::width) f(n, AllLanes{});
  if (n < size) f(n, size - n);
}

// Copies all channels of a tile into rows of `stride`, or back.
template <class S, class T>
void load_tile(const FeatureMap& x, const Tiling& tiling, const Tile& tile, T* rows, int64_t stride) {
  tiling.for_each_run(tile, [&](int64_t first, int64_t count, int64_t offset) {
    load_panel<S>(x, tile.batch, first, count, rows + offset, stride);
  });
}
template <class S, class T>
void store_tile(const FeatureMap& x, const Tiling& tiling, const Tile& tile, const T* rows, int64_t stride) {
  tiling.for_each_run(tile, [&](int64_t first, int64_t count, int64_t offset) {
    store_panel<S>(x, tile.batch, first, count, rows + offset, stride);
  });
}

// A block of pixels with their channels adjacent, in memory of a kernel's own.
template <class T>
FeatureMap pixel_major(T* data, int64_t channels, int64_t pixels) {
  constexpr DType dtype = sizeof(T) == 8 ? DType::float64 : DType::float32;
  return {data, dtype, 1, channels, pixels, 0, 1, round_up(channels, Vec<T>::width)};
}

// ------------------------------------------------------------------------------------ convolutions

// The weight of output i for input k at a tap, from those (c, c, 3, 3) of a dense branch; for the
// transposed convolution, `mirrored`, the other way round.
template <class S>
EAMNET_INLINE S dense_weight(const S* w, int64_t c, bool mirrored, int64_t i, int64_t k, int64_t tap) {
  return mirrored ? w[(k * c + i) * kTaps + kTaps - 1 - tap] : w[(i * c + k) * kTaps + tap];
}

// The weights (c, c, 3, 3) of a dense branch as the left operand of convolve_dense, A[i, (ky*c + k)*3 + kx]
// for output i and input k.
template <class Left, class S>
Left pack_dense(const S* w, int64_t c, bool mirrored, typename Left::Value* packed) {
  std::vector<S> matrix;
  matrix.reserve(static_cast<size_t>(c * c * kTaps));
  for (int64_t i = 0; i < c; ++i) {
    for (int64_t ky = 0; ky < 3; ++ky) {
      for (int64_t k = 0; k < c; ++k) {
        for (int64_t kx = 0; kx < 3; ++kx) {
          matrix.push_back(dense_weight(w, c, mirrored, i, k, 3 * ky + kx));
        }
      }
    }
  }
  return Left::pack(c, kTaps * c, matrix.data(), kTaps * c, 1, packed);
}

// Where in the panel the taps of all channels are, in the order of pack_dense.
template <class T>
void dense_offsets(const Halo<T>& halo, int64_t c, int64_t* offset) {
  for (int64_t ky = 0; ky < 3; ++ky) {
    for (int64_t k = 0; k < c; ++k) {
      for (int64_t kx = 0; kx < 3; ++kx) *offset++ = k * halo.channel_stride + halo.tap(ky, kx);
    }
  }
}

// sink(i, r, j, y, count) for the rows r of the tile and y[j] = sum_k A[i, k] panel[offset[k] + ...j],
// i < c. Taps above and below the picture are left out: of a dilation of 7 at 32x32 one in seven.
template <class T, class Left, class Sink>
void convolve_dense(
    int64_t c, int64_t height, const Tile& tile, const Halo<T>& halo, const Left& weights, const T* panel,
    const int64_t* offset, Sink&& sink) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    const auto [first, last] = halo.taps_inside(tile.y + r, height);
    const int64_t skipped = first * 3 * c;
    gemm<T>(
        c, tile.columns, (last - first) * 3 * c, weights.from(skipped),
        ShiftedRows<T>{panel + r * halo.row_stride, offset + skipped},
        [&](int64_t i, int64_t j, auto y, auto count) __attribute__((always_inline)) {
          sink(i, r, j, y, count);
        });
  }
}

// The same for one channel of a depthwise convolution: sink(r, j, y, count).
template <class T, class Sink>
EAMNET_INLINE void convolve_depthwise(
    const Tile& tile, const Halo<T>& halo, const T* weight, const T* panel, const int64_t* offset,
    Sink&& sink) {
  Vec<T> w[kTaps];
#pragma GCC unroll 9
  for (int t = 0; t < kTaps; ++t) w[t] = Vec<T>(weight[t]);
  for (int64_t r = 0; r < tile.rows; ++r) {
    for_vectors<T>(tile.columns, [&](int64_t j, auto count) __attribute__((always_inline)) {
      // Lanes beyond the row read what follows it in the panel, and are dropped.
      const T* at = panel + r * halo.row_stride + j;
      Vec<T> y = w[0] * Vec<T>::load(at + offset[0]);
#pragma GCC unroll 8
      for (int t = 1; t < kTaps; ++t) y = fma(w[t], Vec<T>::load(at + offset[t]), y);
      sink(r, j, y, count);
    });
  }
}

// Adds sums of gz[m - t] x_u[m] over the tile to sums[u*9 + t], for one channel of gz and `inputs` of x.
template <int inputs, class T>
void correlate(
    const Tile& tile, const Halo<T>& halo, const T* gz, const int64_t* offset, const T* x,
    int64_t x_stride, T* sums) {
  constexpr int width = Vec<T>::width, products = inputs * kTaps;
  // Rows between additions to the total: rounding errors grow with the length of a chain of additions.
  const int64_t run = ceil_div(64, ceil_div(tile.columns, width));
  Vec<T> total[round_up(products, width)];
  for (auto& t : total) t = Vec<T>(T(0));
  for (int64_t begin = 0; begin < tile.rows; begin += run) {
    Vec<T> acc[products];
#pragma GCC unroll 32
    for (int p = 0; p < products; ++p) acc[p] = Vec<T>(T(0));
    for (int64_t r = begin; r < std::min(begin + run, tile.rows); ++r) {
      for_vectors<T>(tile.columns, [&](int64_t j, auto count) __attribute__((always_inline)) {
        const T* at = gz + r * halo.row_stride + j;
        Vec<T> v[inputs];
#pragma GCC unroll 4
        for (int u = 0; u < inputs; ++u) v[u] = load<T>(x + u * x_stride + r * tile.columns + j, count);
#pragma GCC unroll 9
        for (int t = 0; t < kTaps; ++t) {
          const Vec<T> g = load<T>(at + offset[t], count);
#pragma GCC unroll 4
          for (int u = 0; u < inputs; ++u) acc[u * kTaps + t] = fma(g, v[u], acc[u * kTaps + t]);
        }
      });
    }
#pragma GCC unroll 32
    for (int p = 0; p < products; ++p) total[p] += acc[p];
  }
  for (int p = 0; p < products; p += width) {
    Vec<T> block[width];
    for (int q = 0; q < width; ++q) block[q] = total[p + q];
    const int64_t count = std::min(width, products - p);
    store(load<T>(sums + p, count) + sum_rows(block), sums + p, count);
  }
}

// The same sums for all channels, as nine products over the pixels of a row: sums[(t*c + o)*c + i].
// x holds the pixels of the tile with their channels adjacent. The fewer loads, given enough channels.
template <class T>
void correlate_gemm(
    const Tile& tile, const Halo<T>& halo, int64_t height, const T* gz, const int64_t* offset,
    const FeatureMap& x, T* sums) {
  const int64_t c = x.channels;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const Rows<T> pixels{x.at<T>(0, 0, r * tile.columns), x.pixel_stride};
    const auto [first, last] = halo.taps_inside(tile.y + r, height);
    // `offset` is mirrored: tap t reads the rows of the panel of 2 - ky.
    for (int64_t t = 3 * (3 - last); t < 3 * (3 - first); ++t) {
      const StridedLeft<T> shifted{gz + r * halo.row_stride + offset[t], halo.channel_stride, 1};
      gemm<T>(c, c, tile.columns, shifted, pixels, add_to(sums + t * c * c, c));
    }
  }
}

// How dense branches of c channels are multiplied: in vectors. DenseInTiles takes its place where there are
// matrix tiles. A panel has at most `channel_stride` values for a channel, a tile `rows` x `columns` pixels.
template <class T>
class DenseInVectors {
 public:
  using Left = PackedLeft<T>;
  DenseInVectors(int64_t c, int64_t /*channel_stride*/, int64_t /*rows*/, int64_t /*columns*/) : c_(c) {}

  int64_t weights_size() const { return Left::size(c_, kTaps * c_); }
  // The weights (c, c, 3, 3) as convolve takes them; for the transposed convolution `mirrored`.
  template <class S>
  Left pack(const S* w, bool mirrored, T* packed) const {
    return pack_dense<Left>(w, c_, mirrored, packed);
  }

  size_t convolve_bytes() const { return Scratch::bytes<int64_t>(kTaps * c_); }
  template <class Sink>
  void convolve(
      int64_t height, const Tile& tile, const Halo<T>& halo, const Left& weights, const T* panel,
      Scratch scratch, Sink&& sink) const {
    int64_t* offset = scratch.take<int64_t>(kTaps * c_);
    dense_offsets(halo, c_, offset);
    convolve_dense(c_, height, tile, halo, weights, panel, offset, sink);
  }

  // Whether `correlate` takes so few channels.
  bool correlates() const { return c_ >= 2 * Vec<T>::width; }
  size_t correlate_bytes() const { return 0; }
  void correlate(
      int64_t height, const Tile& tile, const Halo<T>& halo, const T* gz, const int64_t* offset,
      const FeatureMap& x, T* sums, Scratch) const {
    correlate_gemm(tile, halo, height, gz, offset, x, sums);
  }

 private:
  int64_t c_;
};

}  // namespace
}  // namespace EAMNET_LEVEL
}  // namespace eamnet

#if defined(__AMX_BF16__)
#include "cpu/multi_dilation_conv_amx.h"
#endif

namespace eamnet {
namespace EAMNET_LEVEL {
namespace {

#if !defined(__AMX_BF16__)
template <class S>
using Dense = DenseInVectors<Compute<S>>;
#endif

// --------------------------------------------------------------------------------------------- forward

// offset[3 ky + kx] of tap (ky, kx) of a channel; `mirrored` for the transposed convolution.
template <class T>
void tap_offsets(const Halo<T>& halo, bool mirrored, int64_t* offset) {
  for (int64_t t = 0; t < kTaps; ++t) {
    const int64_t tap = mirrored ? kTaps - 1 - t : t;
    offset[t] = halo.tap(tap / 3, tap % 3);
  }
}

// The branches' weights as they are multiplied by.
template <class S>
struct BranchWeights {
  using T = Compute<S>;
  using Left = typename Dense<S>::Left;
  std::vector<Left> dense;

  BranchWeights(const MultiDilationConv& a, const Dense<S>& products, bool mirrored)
      : channels_(a.group()) {
    const int64_t c = channels_, n = a.branches(), size = products.weights_size();
    const auto weights = [&](int64_t i) { return static_cast<const S*>(a.w_branches[i]); };
    if (a.depthwise) {
      per_channel_.reserve(static_cast<size_t>(n * c * kTaps));
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t k = 0; k < c * kTaps; ++k) per_channel_.push_back(widen(weights(i)[k]));
      }
      return;
    }
    packed_.resize(static_cast<size_t>(n * size));
    dense.resize(static_cast<size_t>(n));
    parallel_for(n, 0, [&](int64_t i, Scratch&) {
      dense[i] = products.pack(weights(i), mirrored, packed_.data() + i * size);
    });
  }
  BranchWeights(const BranchWeights&) = delete;  // `dense` points into `packed_`

  const T* depthwise(int64_t branch, int64_t channel) const {
    return per_channel_.data() + (branch * channels_ + channel) * kTaps;
  }

 private:
  int64_t channels_;
  std::vector<typename Left::Value> packed_;
  std::vector<T> per_channel_;
};

// Pixels of a tile: its channels and the panel of a branch share the second-level cache.
int64_t tile_pixels(int64_t channels) { return std::clamp<int64_t>(131072 / channels, 512, 8192); }

// The forward's tiles: of at most 16 rows, beyond which fewer rows of surroundings are read again but the
// cache is full (4x128x32x32: 5 % slower with 32), and of fewer where a small batch has less than eight.
Tiling forward_tiling(const MultiDilationConv& a) {
  const int64_t rows = std::clamp<int64_t>(a.height * a.x.batch / 8, 4, 16);
  return Tiling(a.height, a.width, std::min(tile_pixels(a.x.channels), rows * a.width));
}

// The channels whose surroundings are copied at once. Dense: a group, all of which every output needs.
// Depthwise: one, for the first-level cache; channels-last, where neighbours share cache lines: a vector.
template <class T>
int64_t panel_channels(const MultiDilationConv& a) {
  if (!a.depthwise) return a.group();
  return a.x.channels_last() ? std::min<int64_t>(a.group(), Vec<T>::width) : 1;
}

// Elements of the panel of the branch that needs the largest.
template <class T>
int64_t panel_size(const MultiDilationConv& a, const Tiling& tiling) {
  int64_t size = 0;
  for (const int64_t d : a.dilations) {
    size = std::max(size, Halo<T>(tiling.rows(), tiling.columns(), d).channel_stride);
  }
  return size * panel_channels<T>(a);
}

template <class S, class T = Compute<S>>
void forward(const MultiDilationConvForward& a) {
  const int64_t C = a.x.channels, c = a.group(), n = a.branches();
  using Left = LeftOf<S>;
  std::vector<typename Left::Value> point(Left::size(C, C));
  const Left w_point = Left::pack(C, C, static_cast<const S*>(a.w_point), C, 1, point.data());
  std::vector<T> bias(C, T(0));
  if (a.bias) {
    for (int64_t i = 0; i < C; ++i) bias[i] = widen(static_cast<const S*>(a.bias)[i]);
  }
  const Tiling tiling = forward_tiling(a);
  const int64_t stride = panel_stride<T>(tiling.rows() * tiling.columns());
  const int64_t at_once = panel_channels<T>(a);
  const Dense<S> dense(c, panel_size<T>(a, tiling) / at_once, tiling.rows(), tiling.columns());
  const BranchWeights<S> w_branches(a, dense, false);
  const bool save = a.preactivation.data, channels_last = a.out.channels_last();
  // Channels-last results are turned a few pixels at a time.
  constexpr int64_t strip = 2 * kColumnBlock<T>;
  const size_t bytes = Scratch::bytes<T>(C * stride) + Scratch::bytes<T>(panel_size<T>(a, tiling)) +
      (a.depthwise ? Scratch::bytes<int64_t>(kTaps) : dense.convolve_bytes()) +
      Scratch::bytes<T>(channels_last ? C * strip : 0);

  parallel_for(a.x.batch * tiling.per_sample(), bytes, [&](int64_t chunk, Scratch& scratch) {
    const Tile tile = tiling[chunk];
    T* mixed = scratch.take<T>(C * stride);  // [x0; act(z1); ...; act(zn)] of the tile
    T* panel = scratch.take<T>(panel_size<T>(a, tiling));
    int64_t* offset = a.depthwise ? scratch.take<int64_t>(kTaps) : nullptr;
    load_tile<S>(slice_channels(a.x, 0, c), tiling, tile, mixed, stride);

    for (int64_t i = 0; i < n; ++i) {
      const Halo<T> halo(tile.rows, tile.columns, a.dilations[i]);
      if (a.depthwise) tap_offsets(halo, false, offset);
      // Channels-last, z is stored from the whole tile below and only then activated.
      const bool store_z = save && !a.preactivation.channels_last(), turn_z = save && !store_z;
      const auto finish = [&](int64_t o, int64_t r, int64_t j, auto z, auto count)
                              __attribute__((always_inline)) {
        if (store_z) {
          const int64_t pixel = (tile.y + r) * a.width + tile.x + j;
          store(z, a.preactivation.mutable_at<S>(tile.batch, i * c + o, pixel), count);
        }
        store(
            turn_z ? z : activate(a.activation, z),
            mixed + (c + i * c + o) * stride + r * tile.columns + j, count);
      };
      for (int64_t k = 0; k < c; k += at_once) {
        const int64_t channels = std::min(at_once, c - k);
        load_halo<S>(
            slice_channels(a.x, c + i * c + k, channels), a.height, a.width, tile, halo, panel);
        if (!a.depthwise) {
          dense.convolve(a.height, tile, halo, w_branches.dense[i], panel, scratch, finish);
          continue;
        }
        for (int64_t q = 0; q < channels; ++q) {
          convolve_depthwise(
              tile, halo, w_branches.depthwise(i, k + q), panel + q * halo.channel_stride, offset,
              [&](int64_t r, int64_t j, auto z, auto count) __attribute__((always_inline)) {
                finish(k + q, r, j, z, count);
              });
        }
      }
    }
    if (save && a.preactivation.channels_last()) {
      store_tile<S>(a.preactivation, tiling, tile, mixed + c * stride, stride);
      for (int64_t k = c; k < C; ++k) {
        T* row = mixed + k * stride;
        for_vectors<T>(tile.pixels(), [&](int64_t j, auto count) {
          store(activate(a.activation, load<T>(row + j, count)), row + j, count);
        });
      }
    }

    T* turned = channels_last ? scratch.take<T>(C * strip) : nullptr;
    tiling.for_each_run(tile, [&](int64_t first, int64_t count, int64_t at) {
      const int64_t step = channels_last ? strip : count;
      for (int64_t j0 = 0; j0 < count; j0 += step) {
        const int64_t pixels = std::min(step, count - j0);
        gemm<T>(
            C, pixels, C, w_point, Rows<T>{mixed + at + j0, stride},
            [&](int64_t o, int64_t j, auto y, auto lanes) __attribute__((always_inline)) {
              y += Vec<T>(bias[o]);
              if (channels_last) return store(y, turned + o * strip + j, lanes);
              store(y, a.out.mutable_at<S>(tile.batch, o, first + j0 + j), lanes);
            });
        if (channels_last) store_panel<S>(a.out, tile.batch, first + j0, pixels, turned, strip);
      }
    });
  });
}

// -------------------------------------------------------------------------------------------- backward

// to[place(i)] = sum over `parts` consecutive partial results of value i of `size`, in their order.
template <class S, class T, class Place>
void sum_parts(const T* partials, int64_t parts, int64_t size, S* to, Place place) {
  std::vector<double> total(static_cast<size_t>(size));
  add_partials(partials, size, parts, size, total.data());
  for (int64_t i = 0; i < size; ++i) to[place(i)] = narrow<S>(static_cast<T>(total[i]));
}

// How many parts to sum `size` values per part over B·N pixels in: enough for many threads, but the
// partial sums take at most 1/divisor of the memory of an activation of `channels`.
int64_t parts_of(int64_t tiles, int64_t pixels, int64_t channels, int64_t size, int64_t divisor) {
  const int64_t fit = pixels * channels / (divisor * size);
  return std::clamp<int64_t>(fit, std::min<int64_t>(tiles, 4), std::min<int64_t>(tiles, 64));
}

// Pass 1: grad_x of the channels that pass unchanged, gradients of the preactivation, w_point and bias.
template <class S, class T = Compute<S>>
void backward_pointwise(const MultiDilationConvBackward& a) {
  const int64_t C = a.x.channels, c = a.group(), N = a.x.pixels;
  using Left = LeftOf<S>;
  std::vector<typename Left::Value> transposed(Left::size(C, C));
  const Left w = Left::pack(C, C, static_cast<const S*>(a.w_point), 1, C, transposed.data());

  const int64_t size = std::min(round_up(N, kColumnBlock<T>), round_up(tile_pixels(C) / 2, kColumnBlock<T>));
  const int64_t per_sample = ceil_div(N, size), tiles = a.x.batch * per_sample;
  const int64_t parts = parts_of(tiles, a.x.batch * N, C, C * C, 6), stride = panel_stride<T>(size);
  const bool channels_last = a.grad_x.channels_last();
  std::vector<T> point(parts * C * C, T(0)), bias(parts * C, T(0));
  const size_t bytes = 2 * Scratch::bytes<T>(C * stride) + Scratch::bytes<T>(c * stride) +
      Scratch::bytes<T>(size * round_up(C, Vec<T>::width)) +
      Scratch::bytes<typename Left::Value>(Left::rows_size(C, size));
  // Rounding errors grow with the length of a chain of additions; operands rounded to bfloat16 have
  // larger ones.
  constexpr int64_t kRun = kInTiles<S> ? 512 : 64;

  parallel_for(parts, bytes, [&](int64_t part, Scratch& scratch) {
    T* grad = scratch.take<T>(C * stride);
    T* mixed = scratch.take<T>(C * stride);   // [x0; z], then [x0; act(z)]
    T* turned = scratch.take<T>(c * stride);  // channels-last: grad_x of the first group
    T* transposed_mixed = scratch.take<T>(size * round_up(C, Vec<T>::width));
    auto* grad_rows = scratch.take<typename Left::Value>(Left::rows_size(C, size));
    T* grad_point = point.data() + part * C * C;
    T* grad_bias = bias.data() + part * C;
    for (int64_t t = part * tiles / parts; t < (part + 1) * tiles / parts; ++t) {
      const int64_t b = t / per_sample, first = t % per_sample * size;
      const int64_t count = std::min(size, N - first);
      load_panel<S>(a.grad_out, b, first, count, grad, stride);
      load_panel<S>(slice_channels(a.x, 0, c), b, first, count, mixed, stride);
      load_panel<S>(a.preactivation, b, first, count, mixed + c * stride, stride);
      gemm<T>(
          C, count, C, w, Rows<T>{grad, stride},
          [&](int64_t i, int64_t j, auto y, auto lanes) __attribute__((always_inline)) {
            if (i >= c) {
              const Vec<T> z = Vec<T>::load(mixed + i * stride + j);
              store(
                  activation_backward(a.activation, z, y),
                  a.grad_preactivation.mutable_at<S>(b, i - c, first + j), lanes);
            } else if (channels_last) {
              store(y, turned + i * stride + j, lanes);
            } else {
              store(y, a.grad_x.mutable_at<S>(b, i, first + j), lanes);
            }
          });
      if (channels_last) store_panel<S>(slice_channels(a.grad_x, 0, c), b, first, count, turned, stride);
      for (int64_t i = c; i < C; ++i) {
        T* row = mixed + i * stride;
        for (int64_t j = 0; j < count; j += Vec<T>::width) {
          activate(a.activation, Vec<T>::load(row + j)).store(row + j);
        }
      }
      // g [x0; act(z)]^T, in runs of pixels
      const FeatureMap by_pixel = pixel_major(transposed_mixed, C, size);
      store_panel<T>(by_pixel, 0, 0, count, mixed, stride);
      const auto grad_left = Left::of_rows(C, count, grad, stride, grad_rows);
      for (int64_t begin = 0; begin < count; begin += kRun) {
        gemm<T>(
            C, C, std::min(kRun, count - begin), grad_left.from(begin),
            Rows<T>{by_pixel.at<T>(0, 0, begin), by_pixel.pixel_stride}, add_to(grad_point, C));
      }
      for (int64_t i = 0; i < C && a.grad_bias; ++i) {
        // In runs, because rounding errors grow with the length of a chain of additions.
        constexpr int64_t run = 16 * Vec<T>::width;
        Vec<T> total(T(0));
        for (int64_t begin = 0; begin < count; begin += run) {
          Vec<T> sum(T(0));
          // load_panel filled the last vector with zeros.
          for (int64_t j = begin; j < std::min(begin + run, count); j += Vec<T>::width) {
            sum += Vec<T>::load(grad + i * stride + j);
          }
          total += sum;
        }
        grad_bias[i] += sum(total);
      }
    }
  });
  const auto in_order = [](int64_t i) { return i; };
  sum_parts(point.data(), parts, C * C, static_cast<S*>(a.grad_point), in_order);
  if (a.grad_bias) sum_parts(bias.data(), parts, C, static_cast<S*>(a.grad_bias), in_order);
}

// Rows of x that `correlate` takes at once: nine sums for each have to fit the registers.
inline constexpr int kInputs = kRowBlock == 8 ? 3 : 1;

// Pass 2: grad_x of the branches and the gradients of their weights.
template <class S, class T = Compute<S>>
void backward_branches(const MultiDilationConvBackward& a) {
  const int64_t C = a.x.channels, c = a.group(), n = a.branches(), K = a.depthwise ? kTaps : kTaps * c;

  // Twice the pixels: the tile holds two groups, not all channels.
  const Tiling tiling(a.height, a.width, 2 * tile_pixels(C));
  const int64_t stride = panel_stride<T>(tiling.rows() * tiling.columns());
  const int64_t at_once = panel_channels<T>(a), weights = c * K;
  const int64_t tiles = a.x.batch * tiling.per_sample();
  if (n == 0) return;
  const Dense<S> dense(c, panel_size<T>(a, tiling) / at_once, tiling.rows(), tiling.columns());
  const BranchWeights<S> w_branches(a, dense, true);
  const int64_t parts = parts_of(tiles, a.x.batch * a.x.pixels, C, n * weights, 8);
  const bool channels_last = a.grad_x.channels_last();
  const bool correlates = !a.depthwise && dense.correlates();
  std::vector<T> partials(n * parts * weights, T(0));
  const int64_t pixels = tiling.rows() * tiling.columns();
  const size_t bytes = 2 * Scratch::bytes<T>(at_once * stride) +
      Scratch::bytes<T>(panel_size<T>(a, tiling)) + Scratch::bytes<int64_t>(kTaps) +
      Scratch::bytes<T>(correlates ? pixels * round_up(c, Vec<T>::width) : 0) +
      (a.depthwise ? 0 : std::max(dense.convolve_bytes(), dense.correlate_bytes()));

  parallel_for(n * parts, bytes, [&](int64_t chunk, Scratch& scratch) {
    const int64_t i = chunk / parts, part = chunk % parts;
    T* x = scratch.take<T>(at_once * stride);
    T* turned = scratch.take<T>(at_once * stride);  // channels-last: grad_x
    T* panel = scratch.take<T>(panel_size<T>(a, tiling));
    int64_t* offset = scratch.take<int64_t>(kTaps);
    T* transposed_x = correlates ? scratch.take<T>(pixels * round_up(c, Vec<T>::width)) : nullptr;
    T* grad_w = partials.data() + chunk * weights;
    for (int64_t t = part * tiles / parts; t < (part + 1) * tiles / parts; ++t) {
      const Tile tile = tiling[t];
      const Halo<T> halo(tile.rows, tile.columns, a.dilations[i]);
      tap_offsets(halo, true, offset);
      for (int64_t k = 0; k < c; k += at_once) {
        const int64_t channels = std::min(at_once, c - k), first = c + i * c + k;
        load_halo<S>(
            slice_channels(a.grad_preactivation, i * c + k, channels), a.height, a.width, tile, halo, panel);
        load_tile<S>(slice_channels(a.x, first, channels), tiling, tile, x, stride);
        const FeatureMap grad_x = slice_channels(a.grad_x, first, channels);
        const auto finish = [&](int64_t q, int64_t r, int64_t j, auto y, auto count)
                                __attribute__((always_inline)) {
          if (channels_last) return store(y, turned + q * stride + r * tile.columns + j, count);
          const int64_t pixel = (tile.y + r) * a.width + tile.x + j;
          store(y, grad_x.mutable_at<S>(tile.batch, q, pixel), count);
        };
        if (a.depthwise) {
          for (int64_t q = 0; q < channels; ++q) {
            const T* gz = panel + q * halo.channel_stride;
            convolve_depthwise(
                tile, halo, w_branches.depthwise(i, k + q), gz, offset,
                [&](int64_t r, int64_t j, auto y, auto count) __attribute__((always_inline)) {
                  finish(q, r, j, y, count);
                });
            correlate<1>(tile, halo, gz, offset, x + q * stride, stride, grad_w + (k + q) * kTaps);
          }
        } else {
          dense.convolve(a.height, tile, halo, w_branches.dense[i], panel, scratch, finish);
          if (correlates) {
            const FeatureMap by_pixel = pixel_major(transposed_x, c, pixels);
            store_panel<T>(by_pixel, 0, 0, tile.pixels(), x, stride);
            dense.correlate(a.height, tile, halo, panel, offset, by_pixel, grad_w, scratch);
          }
          for (int64_t o = 0; o < c && !correlates; ++o) {
            const T* gz = panel + o * halo.channel_stride;
            T* sums = grad_w + o * K;
            int64_t q = 0;
            for (; q + kInputs <= c; q += kInputs) {
              correlate<kInputs>(tile, halo, gz, offset, x + q * stride, stride, sums + q * kTaps);
            }
            for (; q < c; ++q) {
              correlate<1>(tile, halo, gz, offset, x + q * stride, stride, sums + q * kTaps);
            }
          }
        }
        if (channels_last) store_tile<S>(grad_x, tiling, tile, turned, stride);
      }
    }
  });
  for (int64_t i = 0; i < n; ++i) {
    T* sums = partials.data() + i * parts * weights;
    S* grad_w = static_cast<S*>(a.grad_branches[i]);
    if (!correlates) {
      sum_parts(sums, parts, weights, grad_w, [](int64_t k) { return k; });
    } else {
      sum_parts(sums, parts, weights, grad_w, [c](int64_t k) { return k % (c * c) * kTaps + k / (c * c); });
    }
  }
}

}  // namespace

void multi_dilation_conv(const MultiDilationConvForward& arguments) {
  visit(arguments.x.dtype, [&]<class S>() { forward<S>(arguments); });
}

void multi_dilation_conv_backward(const MultiDilationConvBackward& arguments) {
  visit(arguments.x.dtype, [&]<class S>() {
    backward_pointwise<S>(arguments);
    backward_branches<S>(arguments);
  });
}

}  // namespace EAMNET_LEVEL
}  // namespace eamnet

#ifdef EAMNET_HOST
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "cpu/tensor.h"

namespace eamnet {
namespace {

Activation activation_of(const std::string& name) {
  if (name == "relu") return Activation::relu;
  if (name == "silu") return Activation::silu;
  STD_TORCH_CHECK(name == "identity", "activation is '", name, "'; accepted: relu, silu, identity");
  return Activation::identity;
}

// Checks the operands that forward and backward share.
void set_operands(
    MultiDilationConv& a, const Tensor& x, const std::vector<Tensor>& w_branches, const Tensor& w_point,
    std::vector<int64_t> dilations, const std::string& activation) {
  a.x = feature_map(x, "x");
  const int64_t C = x.size(1), n = static_cast<int64_t>(dilations.size());
  STD_TORCH_CHECK(C > 0 && a.x.pixels > 0, "x has no channels or no pixels");
  STD_TORCH_CHECK(C % (n + 1) == 0, "x has ", C, " channels, which do not divide into ", n + 1, " groups");
  STD_TORCH_CHECK(
      static_cast<int64_t>(w_branches.size()) == n, "w_branches has ", w_branches.size(), " weights for ",
      n, " dilations");
  const int64_t c = C / (n + 1), inputs = n ? w_branches[0].size(1) : 1;
  STD_TORCH_CHECK(inputs == c || inputs == 1, "w_branches are neither dense nor depthwise");
  for (const Tensor& w : w_branches) {
    check_operand(w, "w_branches", {c, inputs, 3, 3}, x.scalar_type());
    a.w_branches.push_back(w.const_data_ptr());
  }
  check_operand(w_point, "w_point", {C, C}, x.scalar_type());
  for (const int64_t d : dilations) STD_TORCH_CHECK(d >= 1, "a dilation is ", d, "; accepted: at least 1");
  // A dilation of the size of the picture moves every tap but the middle one out of it.
  const int64_t largest = std::max(x.size(2), x.size(3));
  for (int64_t& d : dilations) d = std::min(d, largest);
  a.height = x.size(2);
  a.width = x.size(3);
  a.dilations = std::move(dilations);
  a.depthwise = inputs == 1;
  a.w_point = w_point.const_data_ptr();
  a.activation = activation_of(activation);
}

std::tuple<Tensor, Tensor> forward(
    const Tensor& x, std::vector<Tensor> w_branches, const Tensor& w_point, std::optional<Tensor> bias,
    std::vector<int64_t> dilations, const std::string& activation, bool save_for_backward,
    bool channels_last) {
  MultiDilationConvForward a;
  set_operands(a, x, w_branches, w_point, std::move(dilations), activation);
  const int64_t B = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  if (bias) check_operand(*bias, "bias", {C}, x.scalar_type());
  a.bias = bias ? bias->const_data_ptr() : nullptr;
  Tensor out = new_tensor({B, C, H, W}, x.scalar_type(), channels_last);
  a.out = feature_map(out, "out");
  Tensor preactivation;
  if (save_for_backward) {
    preactivation = new_tensor({B, C - a.group(), H, W}, x.scalar_type(), channels_last);
    a.preactivation = feature_map(preactivation, "preactivation");
  } else {
    preactivation = new_tensor({0}, x.scalar_type());
  }
  multi_dilation_conv(a);
  return {out, preactivation};
}

std::tuple<Tensor, std::vector<Tensor>, Tensor, Tensor> backward(
    const Tensor& grad_out, const Tensor& x, std::vector<Tensor> w_branches, const Tensor& w_point,
    bool has_bias, std::vector<int64_t> dilations, const std::string& activation,
    const Tensor& preactivation, bool channels_last) {
  MultiDilationConvBackward a;
  set_operands(a, x, w_branches, w_point, std::move(dilations), activation);
  const int64_t B = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3), convolved = C - a.group();
  const ScalarType dtype = x.scalar_type();
  a.grad_out = feature_map(grad_out, "grad_out");
  a.preactivation = feature_map(preactivation, "preactivation");
  STD_TORCH_CHECK(
      a.grad_out.dtype == a.x.dtype && a.grad_out.batch == B && a.grad_out.channels == C &&
          grad_out.size(2) == H && grad_out.size(3) == W,
      "grad_out must have the shape and dtype of x");
  STD_TORCH_CHECK(
      a.preactivation.dtype == a.x.dtype && a.preactivation.batch == B &&
          a.preactivation.channels == convolved && preactivation.size(2) == H && preactivation.size(3) == W,
      "preactivation must be (B, n*c, H, W) in the dtype of x");
  Tensor grad_x = new_tensor({B, C, H, W}, dtype, channels_last);
  Tensor grad_preactivation = new_tensor({B, convolved, H, W}, dtype);
  a.grad_x = feature_map(grad_x, "grad_x");
  a.grad_preactivation = feature_map(grad_preactivation, "grad_preactivation");
  std::vector<Tensor> grad_branches;
  for (int64_t i = 0; i < a.branches(); ++i) {
    grad_branches.push_back(new_tensor({a.group(), a.depthwise ? 1 : a.group(), 3, 3}, dtype));
    a.grad_branches.push_back(grad_branches.back().mutable_data_ptr());
  }
  Tensor grad_point = new_tensor({C, C}, dtype), grad_bias = new_tensor({has_bias ? C : 0}, dtype);
  a.grad_point = grad_point.mutable_data_ptr();
  a.grad_bias = has_bias ? grad_bias.mutable_data_ptr() : nullptr;
  multi_dilation_conv_backward(a);
  return {grad_x, grad_branches, grad_point, grad_bias};
}

}  // namespace
}  // namespace eamnet

STABLE_TORCH_LIBRARY_IMPL(eamnet_kernels_native, CPU, m) {
  m.impl("multi_dilation_conv", TORCH_BOX(&eamnet::forward));
  m.impl("multi_dilation_conv_backward", TORCH_BOX(&eamnet::backward));
}
#endif  // EAMNET_HOST
