// Mean and maximum of a feature map over its channels and over its pixels, in one pass, and the
// gradient of all four in one pass. Definition: eamnet_kernels/reference/gate_statistics.py.
//
// A chunk is a tile of the pixels of one sample with all its channels. It finishes the statistics of
// its pixels and leaves, per channel, the tile's sum and maximum; these are combined in the order of
// the tiles. Ties go to the lowest index and the first NaN beats everything, within a tile and
// between tiles.
#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/feature_map.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace eamnet {

struct GateStatistics {
  FeatureMap x;
  void* pixel_mean;         // (B, N) in the dtype of x
  void* pixel_max;          // (B, N)
  void* channel_mean;       // (B, C)
  void* channel_max;        // (B, C)
  int32_t* pixel_argmax;    // (B, N): channel
  int64_t* channel_argmax;  // (B, C): pixel
};
EAMNET_KERNEL(gate_statistics, GateStatistics)

struct GateStatisticsBackward {
  FeatureMap grad_x;
  const void* grad_pixel_mean;
  const void* grad_pixel_max;
  const void* grad_channel_mean;
  const void* grad_channel_max;
  const int32_t* pixel_argmax;
  const int64_t* channel_argmax;
};
EAMNET_KERNEL(gate_statistics_backward, GateStatisticsBackward)

namespace EAMNET_LEVEL {
namespace {

// Pixels of a tile. Contiguous: rows of a few pages, for the prefetcher, while the tile's own
// statistics stay in the first-level cache. Channels-last: as much data. Small maps are cut finer,
// to occupy several threads.
int64_t tile_size(const FeatureMap& x) {
  const int64_t large = x.channels_last() ? std::max<int64_t>(64, 65536 / x.channels) : 2048;
  return std::clamp<int64_t>(round_up(ceil_div(x.pixels, 8), 64), 64, large);
}

// A long sum is made of sums over this many additions: rounding errors grow with the
// length of the longest chain.
constexpr int64_t kRun = 16;

// Whether x takes the place of the maximum m of earlier elements.
template <class T>
EAMNET_INLINE Mask<T> replaces(Vec<T> x, Vec<T> m) {
  return ~(x <= m) & (m == m);
}
template <class T>
EAMNET_INLINE bool replaces(T x, T m) {
  return !(x <= m) && m == m;
}

// A maximum and where it is; of two, the earlier one unless the later replaces it.
template <class T>
struct Best {
  Vec<T> value;
  Vec<IntOf<T>> index;
};
template <class T>
EAMNET_INLINE Best<T> better(Best<T> earlier, Best<T> later) {
  const auto take = replaces(later.value, earlier.value);
  return {select(take, later.value, earlier.value), select(take, later.index, earlier.index)};
}

template <class T>
EAMNET_INLINE Mask<T> equals_or_both_nan(Vec<T> x, Vec<T> m) {
  return (x == m) | (isnan(x) & isnan(m));
}

// A tile's statistics of one channel.
template <class T>
struct Partial {
  T sum;
  T max;
  int64_t argmax;  // pixel of the sample; contiguous: the tile's first pixel until locate()
};

template <class T>
constexpr T kLowest = -std::numeric_limits<T>::infinity();

// ---------------------------------------------------------------------------------------- contiguous

// A tile's statistics of its pixels while the channels go by.
template <class T>
struct PixelState {
  T* sum;
  T* max;
  IntOf<T>* argmax;
};

template <int channels, class S, class T, class Count>
EAMNET_INLINE void accumulate(
    const S* const* rows, int64_t n, int64_t c, const PixelState<T>& state, Vec<T>* sums, Vec<T>* maxima,
    Count count) {
  using V = Vec<T>;
  using I = Vec<IntOf<T>>;
  // The tile's arrays are padded to whole vectors, so only x has a partial last vector.
  V max = V::load(state.max + n);
  I argmax = I::load(state.argmax + n);
  V x[channels];
#pragma GCC unroll 4
  for (int g = 0; g < channels; ++g) {
    if constexpr (std::is_same_v<Count, int64_t>) {
      x[g] = V::load_partial(rows[g] + n, count);
      maxima[g] = maximum(select(first_lanes<T>(count), x[g], V(kLowest<T>)), maxima[g]);
    } else {
      x[g] = V::load(rows[g] + n);
      maxima[g] = maximum(x[g], maxima[g]);
    }
    sums[g] += x[g];
    const auto take = replaces(x[g], max);
    max = select(take, x[g], max);
    argmax = select(take, I(static_cast<IntOf<T>>(c + g)), argmax);
  }
  V sum = x[0];
  if constexpr (channels == 4) sum = (x[0] + x[1]) + (x[2] + x[3]);
  (V::load(state.sum + n) + sum).store(state.sum + n);
  max.store(state.max + n);
  argmax.store(state.argmax + n);
}

template <int channels, class S, class T>
void add_channels(
    const FeatureMap& x, int64_t b, int64_t c, int64_t first, int64_t count, const PixelState<T>& state,
    Partial<T>* partials) {
  constexpr int width = Vec<T>::width;
  const S* rows[channels];
  Vec<T> totals[channels], maxima[channels];
  for (int g = 0; g < channels; ++g) {
    rows[g] = x.at<S>(b, c + g, first);
    totals[g] = Vec<T>(T(0));
    maxima[g] = Vec<T>(kLowest<T>);
  }
  for (int64_t n = 0; n < count;) {
    Vec<T> sums[channels];
    for (int g = 0; g < channels; ++g) sums[g] = Vec<T>(T(0));
    const int64_t end = std::min(n + kRun * width, count);
    for (; n + width <= end; n += width) {
      accumulate<channels>(rows, n, c, state, sums, maxima, AllLanes{});
    }
    if (n < end) {
      accumulate<channels>(rows, n, c, state, sums, maxima, end - n);
      n = end;
    }
    for (int g = 0; g < channels; ++g) totals[g] += sums[g];
  }
  for (int g = 0; g < channels; ++g) partials[c + g] = {sum(totals[g]), max(maxima[g]), first};
}

template <class S, class T>
void tile_contiguous(
    const GateStatistics& a, int64_t b, int64_t first, int64_t count, Scratch& scratch, Partial<T>* partials) {
  using V = Vec<T>;
  const FeatureMap& x = a.x;
  const int64_t padded = round_up(count, V::width);
  const PixelState<T> state{
      scratch.take<T>(padded), scratch.take<T>(padded), scratch.take<IntOf<T>>(padded)};
  T* total = scratch.take<T>(padded);
  std::fill_n(state.max, padded, kLowest<T>);
  std::fill_n(state.argmax, padded, IntOf<T>(0));
  std::fill_n(total, padded, T(0));
  for (int64_t c = 0; c < x.channels;) {
    std::fill_n(state.sum, padded, T(0));
    const int64_t end = std::min(c + kRun * 4, x.channels);
    for (; c + 4 <= end; c += 4) add_channels<4, S>(x, b, c, first, count, state, partials);
    for (; c < end; ++c) add_channels<1, S>(x, b, c, first, count, state, partials);
    for (int64_t n = 0; n < padded; ++n) total[n] += state.sum[n];
  }

  const int64_t at = b * x.pixels + first;
  S* mean = static_cast<S*>(a.pixel_mean) + at;
  S* max = static_cast<S*>(a.pixel_max) + at;
  for (int64_t n = 0; n < count; ++n) {
    mean[n] = narrow<S>(total[n] / static_cast<T>(x.channels));
    max[n] = narrow<S>(state.max[n]);
    a.pixel_argmax[at + n] = static_cast<int32_t>(state.argmax[n]);
  }
}

// The first pixel of the winning tile that has the maximum: this tile alone is read again.
template <class S, class T>
int64_t locate(const FeatureMap& x, int64_t b, int64_t c, int64_t first, T max) {
  using V = Vec<T>;
  const S* row = x.at<S>(b, c, 0);
  for (int64_t n = first;; n += V::width) {
    const int64_t count = std::min<int64_t>(V::width, x.pixels - n);
    const V values = count == V::width ? V::load(row + n) : V::load_partial(row + n, count);
    const auto hit = equals_or_both_nan(values, V(max)) & first_lanes<T>(count);
    if (hit.any()) return n + hit.first();
  }
}

// -------------------------------------------------------------------------------------- channels-last

// A tile's statistics of its channels while the pixels go by.
template <class T>
struct ChannelState {
  T* sum;  // of the pixels since it was last added to the tile's total
  T* max;
  IntOf<T>* argmax;  // pixel of the tile
};

// Pixels at once: as many as stay in registers with all that is known of them.
template <class T>
inline constexpr int kPixels = std::min(4, Vec<T>::width);

template <int pixels, class S, class T>
void add_pixels(
    const GateStatistics& a, int64_t b, int64_t first, int64_t n, const ChannelState<T>& state) {
  using V = Vec<T>;
  using I = Vec<IntOf<T>>;
  const FeatureMap& x = a.x;
  const S* rows[pixels];
  V sums[pixels];
  Best<T> of_pixel[pixels];  // per lane, over the channels of that lane
#pragma GCC unroll 4
  for (int r = 0; r < pixels; ++r) {
    rows[r] = x.at<S>(b, 0, first + n + r);
    sums[r] = V(T(0));
    of_pixel[r] = {V(kLowest<T>), I::lane_index()};
  }
  const auto step = [&](int64_t c, auto count) __attribute__((always_inline)) {
    const I channel = I::lane_index() + I(static_cast<IntOf<T>>(c));
    V total(T(0));
    Best<T> of_channel[pixels];
#pragma GCC unroll 4
    for (int r = 0; r < pixels; ++r) {
      // The order of these loads is not one that the processor prefetches; measured, half the time.
      __builtin_prefetch(rows[r] + c + 2048 / sizeof(S));
      V value = load<T>(rows[r] + c, count);
      sums[r] += value;
      total += value;
      if constexpr (std::is_same_v<decltype(count), int64_t>) {
        value = select(first_lanes<T>(count), value, V(kLowest<T>));
      }
      of_pixel[r] = better(of_pixel[r], {value, channel});
      of_channel[r] = {value, I(static_cast<IntOf<T>>(n + r))};
    }
    // A knock-out tournament: shorter chains of instructions that wait for each other than a queue.
#pragma GCC unroll 2
    for (int half = 1; half < pixels; half *= 2) {
#pragma GCC unroll 2
      for (int r = 0; r < pixels; r += 2 * half) {
        of_channel[r] = better(of_channel[r], of_channel[r + half]);
      }
    }
    const Best<T> all = better({V::load(state.max + c), I::load(state.argmax + c)}, of_channel[0]);
    (V::load(state.sum + c) + total).store(state.sum + c);
    all.value.store(state.max + c);
    all.index.store(state.argmax + c);
  };
  int64_t c = 0;
  for (; c + V::width <= x.channels; c += V::width) step(c, AllLanes{});
  if (c < x.channels) step(c, x.channels - c);

  T mean[V::width], highest[V::width];
  IntOf<T> argmax[V::width];
  V maxima[pixels];
  I candidates[pixels];
#pragma GCC unroll 4
  for (int r = 0; r < pixels; ++r) maxima[r] = of_pixel[r].value;
  (sum_rows(sums) / V(static_cast<T>(x.channels))).store(mean);
  max_rows(maxima).store(highest);
#pragma GCC unroll 4
  for (int r = 0; r < pixels; ++r) {
    // Each lane holds its first maximum, so the first of all is the lowest of the lanes that have it.
    const I none(std::numeric_limits<IntOf<T>>::max());
    candidates[r] = select(equals_or_both_nan(of_pixel[r].value, V(highest[r])), of_pixel[r].index, none);
  }
  min_rows(candidates).store(argmax);
#pragma GCC unroll 4
  for (int r = 0; r < pixels; ++r) {
    const int64_t at = b * x.pixels + first + n + r;
    static_cast<S*>(a.pixel_mean)[at] = narrow<S>(mean[r]);
    static_cast<S*>(a.pixel_max)[at] = narrow<S>(highest[r]);
    a.pixel_argmax[at] = static_cast<int32_t>(argmax[r]);
  }
}

template <class S, class T>
void tile_channels_last(
    const GateStatistics& a, int64_t b, int64_t first, int64_t count, Scratch& scratch, Partial<T>* partials) {
  const int64_t padded = round_up(a.x.channels, Vec<T>::width);
  const ChannelState<T> state{
      scratch.take<T>(padded), scratch.take<T>(padded), scratch.take<IntOf<T>>(padded)};
  std::fill_n(state.max, padded, kLowest<T>);
  std::fill_n(state.argmax, padded, IntOf<T>(0));
  for (int64_t c = 0; c < a.x.channels; ++c) partials[c].sum = T(0);
  for (int64_t n = 0; n < count;) {
    std::fill_n(state.sum, padded, T(0));
    const int64_t end = std::min(n + kRun * kPixels<T>, count);
    for (; n + kPixels<T> <= end; n += kPixels<T>) add_pixels<kPixels<T>, S>(a, b, first, n, state);
    for (; n < end; ++n) add_pixels<1, S>(a, b, first, n, state);
    for (int64_t c = 0; c < a.x.channels; ++c) partials[c].sum += state.sum[c];
  }
  for (int64_t c = 0; c < a.x.channels; ++c) {
    partials[c].max = state.max[c];
    partials[c].argmax = first + state.argmax[c];
  }
}

template <class S, class T = Compute<S>>
void forward(const GateStatistics& a) {
  const FeatureMap& x = a.x;
  const int64_t size = tile_size(x), tiles = ceil_div(x.pixels, size);
  std::vector<Partial<T>> partials(static_cast<size_t>(x.batch * tiles * x.channels));
  const int64_t state = round_up(x.channels_last() ? x.channels : size, Vec<T>::width);
  const size_t bytes = 3 * Scratch::bytes<T>(state) + Scratch::bytes<IntOf<T>>(state);
  parallel_for(x.batch * tiles, bytes, [&](int64_t chunk, Scratch& scratch) {
    const int64_t b = chunk / tiles, first = chunk % tiles * size;
    const int64_t count = std::min(size, x.pixels - first);
    Partial<T>* out = partials.data() + chunk * x.channels;
    if (x.channels_last()) {
      tile_channels_last<S>(a, b, first, count, scratch, out);
    } else {
      tile_contiguous<S>(a, b, first, count, scratch, out);
    }
  });
  constexpr int64_t group = 16;
  const int64_t groups = ceil_div(x.channels, group);
  parallel_for(x.batch * groups, 0, [&](int64_t chunk, Scratch&) {
    const int64_t b = chunk / groups, begin = chunk % groups * group;
    for (int64_t c = begin; c < std::min(begin + group, x.channels); ++c) {
      const Partial<T>* tile = partials.data() + b * tiles * x.channels + c;
      double sum = tile->sum;
      Partial<T> best = *tile;
      for (int64_t t = 1; t < tiles; ++t) {
        tile += x.channels;
        sum += tile->sum;
        if (replaces(tile->max, best.max)) best = *tile;
      }
      const int64_t at = b * x.channels + c;
      static_cast<S*>(a.channel_mean)[at] =
          narrow<S>(static_cast<T>(sum / static_cast<double>(x.pixels)));
      static_cast<S*>(a.channel_max)[at] = narrow<S>(best.max);
      a.channel_argmax[at] =
          x.channels_last() ? best.argmax : locate<S>(x, b, c, best.argmax, best.max);
    }
  });
}

// ------------------------------------------------------------------------------------------- backward

template <class S, class T = Compute<S>>
void backward(const GateStatisticsBackward& a) {
  using V = Vec<T>;
  using I = Vec<IntOf<T>>;
  const FeatureMap& x = a.grad_x;
  const int64_t size = tile_size(x), tiles = ceil_div(x.pixels, size);
  const int64_t padded = round_up(size, V::width), padded_channels = round_up(x.channels, V::width);
  const size_t bytes = 2 * Scratch::bytes<T>(padded) + Scratch::bytes<IntOf<T>>(padded) +
      Scratch::bytes<T>(padded_channels);
  parallel_for(x.batch * tiles, bytes, [&](int64_t chunk, Scratch& scratch) {
    const int64_t b = chunk / tiles, first = chunk % tiles * size;
    const int64_t count = std::min(size, x.pixels - first);
    const int64_t pixel = b * x.pixels + first, channel = b * x.channels;
    T* of_pixel = scratch.take<T>(padded);
    T* of_winner = scratch.take<T>(padded);
    IntOf<T>* winner = scratch.take<IntOf<T>>(padded);
    T* of_channel = scratch.take<T>(padded_channels);
    const S* pixel_mean = static_cast<const S*>(a.grad_pixel_mean) + pixel;
    const S* pixel_max = static_cast<const S*>(a.grad_pixel_max) + pixel;
    const S* channel_mean = static_cast<const S*>(a.grad_channel_mean) + channel;
    for (int64_t n = 0; n < count; ++n) {
      of_pixel[n] = T(widen(pixel_mean[n])) / static_cast<T>(x.channels);
      of_winner[n] = widen(pixel_max[n]);
      winner[n] = a.pixel_argmax[pixel + n];
    }
    for (int64_t c = 0; c < x.channels; ++c) {
      of_channel[c] = T(widen(channel_mean[c])) / static_cast<T>(x.pixels);
    }
    if (x.channels_last()) {
      for (int64_t n = 0; n < count; ++n) {
        S* row = x.mutable_at<S>(b, 0, first + n);
        const V of_this(of_pixel[n]);
        int64_t c = 0;
        for (; c + V::width <= x.channels; c += V::width) {
          (of_this + V::load(of_channel + c)).store(row + c);
        }
        if (c < x.channels) {
          (of_this + V::load(of_channel + c)).store_partial(row + c, x.channels - c);
        }
        const int64_t w = winner[n];
        if (0 <= w && w < x.channels) row[w] = narrow<S>(of_pixel[n] + of_channel[w] + of_winner[n]);
      }
    } else {
      for (int64_t c = 0; c < x.channels; ++c) {
        S* row = x.mutable_at<S>(b, c, first);
        const V of_this(of_channel[c]);
        const I index(static_cast<IntOf<T>>(c));
        const auto value = [&](int64_t n) __attribute__((always_inline)) {
          const V mean = V::load(of_pixel + n) + of_this;
          const auto wins = equal_lanes<T>(I::load(winner + n), index);
          return select(wins, mean + V::load(of_winner + n), mean);
        };
        int64_t n = 0;
        for (; n + V::width <= count; n += V::width) value(n).store(row + n);
        if (n < count) value(n).store_partial(row + n, count - n);
      }
    }
    // The one pixel per channel, from the terms again: adding to what is stored would round twice.
    for (int64_t c = 0; c < x.channels; ++c) {
      const int64_t n = a.channel_argmax[channel + c] - first;
      if (n < 0 || n >= count) continue;
      T sum = of_pixel[n] + of_channel[c];
      if (winner[n] == c) sum += of_winner[n];
      sum += widen(static_cast<const S*>(a.grad_channel_max)[channel + c]);
      *x.mutable_at<S>(b, c, first + n) = narrow<S>(sum);
    }
  });
}

}  // namespace

void gate_statistics(const GateStatistics& arguments) {
  visit(arguments.x.dtype, [&]<class S>() { forward<S>(arguments); });
}

void gate_statistics_backward(const GateStatisticsBackward& arguments) {
  visit(arguments.grad_x.dtype, [&]<class S>() { backward<S>(arguments); });
}

}  // namespace EAMNET_LEVEL
}  // namespace eamnet

#ifdef EAMNET_HOST
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/tensor.h"

namespace eamnet {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x) {
  const FeatureMap map = feature_map(x, "x");
  STD_TORCH_CHECK(map.channels > 0 && map.pixels > 0, "x has no channels or no pixels");
  const int64_t B = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  const ScalarType dtype = x.scalar_type();
  Tensor pixel_mean = new_tensor({B, 1, H, W}, dtype), pixel_max = new_tensor({B, 1, H, W}, dtype);
  Tensor channel_mean = new_tensor({B, C}, dtype), channel_max = new_tensor({B, C}, dtype);
  Tensor pixel_argmax = new_tensor({B, 1, H, W}, ScalarType::Int);
  Tensor channel_argmax = new_tensor({B, C}, ScalarType::Long);
  gate_statistics({
      map, pixel_mean.mutable_data_ptr(), pixel_max.mutable_data_ptr(),
      channel_mean.mutable_data_ptr(), channel_max.mutable_data_ptr(),
      pixel_argmax.mutable_data_ptr<int32_t>(), channel_argmax.mutable_data_ptr<int64_t>()});
  return {pixel_mean, pixel_max, channel_mean, channel_max, pixel_argmax, channel_argmax};
}

Tensor backward(
    const Tensor& grad_pixel_mean, const Tensor& grad_pixel_max, const Tensor& grad_channel_mean,
    const Tensor& grad_channel_max, const Tensor& pixel_argmax, const Tensor& channel_argmax,
    bool channels_last) {
  STD_TORCH_CHECK(grad_pixel_mean.dim() == 4, "grad_pixel_mean must be (B, 1, H, W)");
  STD_TORCH_CHECK(grad_channel_mean.dim() == 2, "grad_channel_mean must be (B, C)");
  const ScalarType dtype = grad_pixel_mean.scalar_type();
  const int64_t B = grad_channel_mean.size(0), C = grad_channel_mean.size(1);
  const int64_t H = grad_pixel_mean.size(2), W = grad_pixel_mean.size(3);
  check_operand(grad_pixel_mean, "grad_pixel_mean", {B, 1, H, W}, dtype);
  check_operand(grad_pixel_max, "grad_pixel_max", {B, 1, H, W}, dtype);
  check_operand(grad_channel_mean, "grad_channel_mean", {B, C}, dtype);
  check_operand(grad_channel_max, "grad_channel_max", {B, C}, dtype);
  check_operand(pixel_argmax, "pixel_argmax", {B, 1, H, W}, ScalarType::Int);
  check_operand(channel_argmax, "channel_argmax", {B, C}, ScalarType::Long);
  Tensor grad_x = new_tensor({B, C, H, W}, dtype, channels_last);
  gate_statistics_backward({
      feature_map(grad_x, "grad_x"), grad_pixel_mean.const_data_ptr(),
      grad_pixel_max.const_data_ptr(), grad_channel_mean.const_data_ptr(),
      grad_channel_max.const_data_ptr(), pixel_argmax.const_data_ptr<int32_t>(),
      channel_argmax.const_data_ptr<int64_t>()});
  return grad_x;
}

}  // namespace
}  // namespace eamnet

STABLE_TORCH_LIBRARY_IMPL(eamnet_kernels_native, CPU, m) {
  m.impl("gate_statistics", TORCH_BOX(&eamnet::forward));
  m.impl("gate_statistics_backward", TORCH_BOX(&eamnet::backward));
}
#endif  // EAMNET_HOST
