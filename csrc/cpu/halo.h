// Tiles of a picture, and the surroundings that the taps of a dilated 3x3 convolution read.
//
// A tile is a rectangle of pixels. For a branch of dilation d its surroundings are copied into a
// panel in which tap (ky, kx) of pixel (r, j) of channel c stands at
//     c*channel_stride + (r + ky*shift_y)*row_stride + j + kx*shift_x,
// zeros where that is outside the picture. So the taps of a row are nine shifted rows of the panel,
// and the convolution is a matrix product whose right operand is ShiftedRows. The copy costs a load and
// a store where the product has 9c multiplications, and in return every layout and dtype of the
// feature map looks the same, no tap needs a mask, and rows do not evict one another.
//
// Where the dilation exceeds the tile, the rows that taps read do not touch: the panel then holds
// three bands of the tile's height (and width) instead of everything between them. So a panel is at
// most nine tiles however large the dilation.
#pragma once

#include "cpu/gemm.h"

namespace eamnet {
namespace EAMNET_LEVEL {

struct Tile {
  int64_t batch, y, x, rows, columns;
  int64_t pixels() const { return rows * columns; }
};

// Tiles of about `pixels` pixels that cover pictures of height × width. They are as wide as the picture
// unless that would make them much wider than high.
class Tiling {
 public:
  Tiling(int64_t height, int64_t width, int64_t pixels) : height_(height), width_(width) {
    int64_t side = 1;
    while ((side + 1) * (side + 1) <= pixels) ++side;
    if (width > 4 * side) columns_ = round_up(ceil_div(width, ceil_div(width, 3 * side)), 48);
    else columns_ = width;
    rows_ = std::clamp<int64_t>(pixels / columns_, 1, height);
    rows_ = ceil_div(height, ceil_div(height, rows_));
    down_ = ceil_div(height, rows_);
    across_ = ceil_div(width, columns_);
  }
  int64_t rows() const { return rows_; }        // of the largest tile
  int64_t columns() const { return columns_; }  // of the largest tile
  int64_t per_sample() const { return down_ * across_; }

  // Tile t of all samples', in the order of samples, rows, columns.
  Tile operator[](int64_t t) const {
    const int64_t b = t / per_sample(), y = t % per_sample() / across_ * rows_;
    const int64_t x = t % across_ * columns_;
    return {b, y, x, std::min(rows_, height_ - y), std::min(columns_, width_ - x)};
  }

  // visit(first, count, offset) for each longest run of pixels that are consecutive both in the picture
  // (from `first`) and in the tile (from `offset`).
  template <class Visit>
  void for_each_run(const Tile& tile, Visit&& visit) const {
    if (tile.columns == width_) return visit(tile.y * width_, tile.pixels(), int64_t(0));
    for (int64_t r = 0; r < tile.rows; ++r) {
      visit((tile.y + r) * width_ + tile.x, tile.columns, r * tile.columns);
    }
  }

 private:
  int64_t height_, width_, rows_, columns_, down_, across_;
};

// `channels` channels of x from `first` on.
inline FeatureMap slice_channels(FeatureMap x, int64_t first, int64_t channels) {
  const int64_t size = x.dtype == DType::float64 ? 8 : x.dtype == DType::float32 ? 4 : 2;
  // An output that nobody wants has no memory.
  if (x.data) x.data = static_cast<const char*>(x.data) + first * x.channel_stride * size;
  x.channels = channels;
  return x;
}

// A stride of at least `count` + one vector whose rows do not all fall into one set of the cache.
template <class T>
constexpr int64_t panel_stride(int64_t count) {
  const int64_t stride = round_up(count, Vec<T>::width) + Vec<T>::width;
  return stride * static_cast<int64_t>(sizeof(T)) % 1024 == 0 ? stride + Vec<T>::width : stride;
}

// The layout of a panel, see above.
template <class T>
struct Halo {
  int64_t dilation, shift_y, shift_x, row_stride, channel_stride;

  Halo(int64_t rows, int64_t columns, int64_t dilation)
      : dilation(dilation),
        shift_y(std::min(dilation, rows)),
        shift_x(std::min(dilation, columns)),
        row_stride(columns + 2 * shift_x),
        channel_stride(panel_stride<T>((rows + 2 * shift_y) * row_stride)) {}

  int64_t tap(int64_t ky, int64_t kx) const { return ky * shift_y * row_stride + kx * shift_x; }

  // Which ky of row y of a picture read rows of it, and not of the zeros above and below: [first, last).
  struct Taps {
    int64_t first, last;
  };
  Taps taps_inside(int64_t y, int64_t height) const {
    return {y < dilation ? 1 : 0, y + dilation < height ? 3 : 2};
  }
};

// Fills the panel of a tile: all channels of x, whose pictures are height × width.
template <class S, class T = Compute<S>>
inline void load_halo(
    const FeatureMap& x, int64_t height, int64_t width, const Tile& tile, const Halo<T>& halo, T* panel) {
  const auto fill_zero = [&](int64_t at, int64_t count) {
    for (int64_t c = 0; c < x.channels && count > 0; ++c) {
      std::fill_n(panel + c * halo.channel_stride + at, count, T(0));
    }
  };
  const int64_t d = halo.dilation;
  // Bands that touch are one: the surroundings are then contiguous.
  const bool one_band = d <= tile.columns;
  const int64_t band_columns = one_band ? halo.row_stride : tile.columns;
  for (int64_t p = 0; p < tile.rows + 2 * halo.shift_y; ++p) {
    const int64_t y = d <= tile.rows ? tile.y - d + p
                                     : tile.y + (p / tile.rows - 1) * d + p % tile.rows;
    const int64_t at = p * halo.row_stride;
    if (y < 0 || y >= height) {
      fill_zero(at, halo.row_stride);
      continue;
    }
    for (int64_t band = 0; band * band_columns < halo.row_stride; ++band) {
      const int64_t begin = tile.x + (band - 1) * d, start = at + band * band_columns;
      const int64_t before = std::clamp<int64_t>(-begin, 0, band_columns);
      const int64_t inside = std::max<int64_t>(0, std::min(begin + band_columns, width) - begin - before);
      fill_zero(start, before);
      // Writes zeros up to the next whole vector; what follows in the panel is written after it.
      if (inside > 0) {
        load_panel<S>(
            x, tile.batch, y * width + begin + before, inside, panel + start + before,
            halo.channel_stride);
      }
      fill_zero(start + before + inside, band_columns - before - inside);
    }
  }
}

// Right operand of gemm: row k is base[offset[k] ..].
template <class T>
struct ShiftedRows {
  const T* base;
  const int64_t* offset;
  EAMNET_INLINE const T* row(int64_t k) const { return base + offset[k]; }
};

}  // namespace EAMNET_LEVEL
}  // namespace eamnet
