// Dense branches of multi_dilation_conv for bfloat16 in AMX tiles; included by multi_dilation_conv.cpp on
// the level that has them. Operands are rounded to bfloat16, sums are float32.
//
// Convolution: a tap of 32 channels is a step. The panel's channels are rounded and paired once, so the
// tile of a step is 16 rows of the pairs, read where the tap begins; nothing is packed for a tap. Fewer
// channels than a multiple of 32 are filled up with zeros.
// Gradient of the weights: a row of 32 pixels is a step, a tap is a place of gz to start from.
//
// Measured, forward of 4x128x32x32, one core of a Sapphire Rapids class Xeon: 1.9 ms where the panel's
// rows were packed for every tap (gemm), 1.2 so, in channels-last 1.9 and 1.4.
#pragma once

#include "cpu/amx.h"
#include "cpu/gemm_amx.h"
#include "cpu/halo.h"

namespace eamnet {
namespace EAMNET_LEVEL {
namespace {

// Tiles of a panel of pairs: step s begins at words + offset[s], its column tiles 16 words apart.
struct ShiftedTiles {
  const uint32_t* words;
  const int64_t* offset;
  int64_t row_bytes;
  EAMNET_INLINE const void* at(int64_t step, int64_t column) const {
    return words + offset[step] + column * 16;
  }
};

class DenseInTiles {
 public:
  using Left = TileLeft;
  DenseInTiles(int64_t c, int64_t channel_stride, int64_t rows, int64_t columns)
      : c_(c), channel_stride_(channel_stride), rows_(rows), steps_(ceil_div(columns, kTileDepth)) {}

  int64_t weights_size() const { return TileLeft::size(c_, kTaps * padded()); }
  template <class S>
  TileLeft pack(const S* w, bool mirrored, bfloat16* packed) const {
    std::vector<S> matrix(static_cast<size_t>(c_ * kTaps * padded()));
    for (int64_t i = 0; i < c_; ++i) {
      for (int64_t t = 0; t < kTaps; ++t) {
        S* to = matrix.data() + (i * kTaps + t) * padded();
        for (int64_t k = 0; k < c_; ++k) to[k] = dense_weight(w, c_, mirrored, i, k, t);
      }
    }
    return TileLeft::pack(c_, kTaps * padded(), matrix.data(), kTaps * padded(), 1, packed);
  }

  size_t convolve_bytes() const {
    return Scratch::bytes<uint32_t>(padded() / 2 * channel_stride_) +
        Scratch::bytes<int64_t>(kTaps * padded() / kTileDepth) + Scratch::bytes<float>(out_rows() * 32);
  }
  template <class Sink>
  void convolve(
      int64_t height, const Tile& tile, const Halo<float>& halo, const TileLeft& weights,
      const float* panel, Scratch scratch, Sink&& sink) const {
    using V = Vec<float>;
    const int64_t stride = halo.channel_stride, depth = padded() / kTileDepth;
    uint32_t* words = scratch.take<uint32_t>(padded() / 2 * channel_stride_);
    int64_t* offset = scratch.take<int64_t>(kTaps * depth);
    float* result = scratch.take<float>(out_rows() * 32);
    // A tile may end beyond its row of pixels; what it gives there is dropped.
    const int64_t valid = round_up((tile.rows + 2 * halo.shift_y) * halo.row_stride, V::width);
    for (int64_t k = 0; k < padded(); k += 2) {
      const auto row = [&](int64_t channel, int64_t j) __attribute__((always_inline)) {
        return channel < c_ ? V::load(panel + channel * stride + j) : V(0.0f);
      };
      for (int64_t j = 0; j < valid; j += V::width) {
        _mm512_storeu_si512(words + k / 2 * stride + j, detail::pair(row(k, j), row(k + 1, j)));
      }
    }
    for (int64_t t = 0; t < kTaps; ++t) {
      for (int64_t s = 0; s < depth; ++s) {
        offset[t * depth + s] = halo.tap(t / 3, t % 3) + s * kTileDepth / 2 * stride;
      }
    }

    const TileSession session;
    for (int64_t r = 0; r < tile.rows; ++r) {
      const auto [first, last] = halo.taps_inside(tile.y + r, height);
      for (int64_t j = 0; j < tile.columns; j += 32) {
        const int64_t columns = tile.columns - j > 16 ? 2 : 1;
        const ShiftedTiles right{
            words + r * halo.row_stride + j, offset + 3 * first * depth, stride * int64_t(sizeof(*words))};
        tile_product<false>(
            out_rows() / kTileRows, columns, 3 * (last - first) * depth,
            weights.data + 3 * first * padded(), weights.stride, right, result, 32);
        detail::hand_out(
            c_, j, tile.columns, result,
            [&](int64_t o, int64_t at, V value, auto count) __attribute__((always_inline)) {
              sink(o, r, at, value, count);
            });
      }
    }
  }

  bool correlates() const { return true; }
  size_t correlate_bytes() const {
    return Scratch::bytes<bfloat16>(panel_values()) + Scratch::bytes<bfloat16>(tile_values()) +
        Scratch::bytes<float>(out_rows() * 32);
  }
  // Adds to sums[(t*c + o)*c + i]; x holds the pixels of the tile with their channels adjacent, and
  // `offset` the places of the taps in gz, mirrored.
  void correlate(
      int64_t, const Tile& tile, const Halo<float>& halo, const float* gz, const int64_t* offset,
      const FeatureMap& x, float* sums, Scratch scratch) const {
    const int64_t c = c_;
    bfloat16* panel = scratch.take<bfloat16>(panel_values());
    bfloat16* tiles = scratch.take<bfloat16>(tile_values());
    float* result = scratch.take<float>(out_rows() * 32);
    const int64_t stride = halo.channel_stride;
    const int64_t valid = (tile.rows + 2 * halo.shift_y) * halo.row_stride;
    for (int64_t k = 0; k < c; ++k) {
      for_vectors<float>(valid, [&](int64_t j, auto count) __attribute__((always_inline)) {
        store(load<float>(gz + k * stride + j, count), panel + k * stride + j, count);
      });
      // Read with a weight of zero, so no NaN may be there.
      std::fill(panel + k * stride + valid, panel + (k + 1) * stride, bfloat16{0});
    }
    std::fill(panel + c * stride, panel + out_rows() * stride + 2 * kTileDepth, bfloat16{0});

    const TileSession session;
    const int64_t now = ceil_div(tile.columns, kTileDepth);
    for (int64_t q = 0; q < c; q += 32) {
      const int64_t columns = c - q > 16 ? 2 : 1;
      for (int64_t s = 0; s < now; ++s) {
        for (int64_t r = 0; r < tile.rows; ++r) {
          const int64_t first = s * kTileDepth, pixel = r * tile.columns + first;
          detail::pack_right(
              0, std::min(kTileDepth, tile.columns - first), q, c,
              Rows<float>{x.at<float>(0, 0, pixel), x.pixel_stride}, tiles + (s * tile.rows + r) * 2 * kTile);
        }
      }
      for (int64_t t = 0; t < kTaps; ++t) {
        for (int64_t s = 0; s < now; ++s) {
          (s == 0 ? tile_product<false, PackedTiles> : tile_product<true, PackedTiles>)(
              out_rows() / kTileRows, columns, tile.rows, panel + offset[t] + s * kTileDepth, stride,
              {tiles + s * tile.rows * 2 * kTile, 2 * kTile, kTile}, result, 32, halo.row_stride);
        }
        for (int64_t o = 0; o < c; ++o) {
          float* to = sums + (t * c + o) * c + q;
          for_vectors<float>(std::min<int64_t>(32, c - q), [&](int64_t i, auto count) {
            store(load<float>(to + i, count) + load<float>(result + o * 32 + i, count), to + i, count);
          });
        }
      }
    }
  }

 private:
  int64_t padded() const { return round_up(c_, kTileDepth); }
  int64_t out_rows() const { return round_up(c_, kTileRows); }
  // Of gz in bfloat16. A tile that ends beyond its row of pixels, or beyond the last channel's, is read
  // all the same.
  int64_t panel_values() const { return out_rows() * channel_stride_ + 2 * kTileDepth; }
  int64_t tile_values() const { return steps_ * rows_ * 2 * kTile; }  // of 32 channels of x at a time

  int64_t c_, channel_stride_, rows_, steps_;  // steps: tiles that cover a row of pixels
};

template <class S>
using Dense = std::conditional_t<kInTiles<S>, DenseInTiles, DenseInVectors<Compute<S>>>;

}  // namespace
}  // namespace EAMNET_LEVEL
}  // namespace eamnet
