// The gated products of cross_mix_channels for bfloat16 in AMX tiles; included by cross_mix_channels.cpp
// on the level that has them. X and dY are bfloat16; g^p X is taken as the sum of two bfloat16, exactly
// for p = 1 and to 2^-16 for p = 2, because what follows from the Gram matrices would keep the error of
// a single one. So power p >= 1 takes two products, each 1/16 of the time of multiply-adds in float32.
//
// Measured, 4x128x32x32, two cores of a Sapphire Rapids class Xeon, ms, in vectors of float32 and here:
// Gram matrices 1.6 and 0.8, E 1.6 and 0.65. The products alone would take 0.1; splitting, laying out
// tiles, adding up and writing the matrices take the rest.
#pragma once

#include "cpu/amx.h"

namespace eamnet {
namespace EAMNET_LEVEL {
namespace {

inline constexpr int64_t kSide = 32;          // rows and columns of a block of a result: 2x2 tiles
inline constexpr int64_t kPlanePixels = 256;  // of a tile; a block's rows of a plane are then 18 KiB
inline constexpr int64_t kPlaneStride = kPlanePixels + kTileDepth;
inline constexpr int64_t kPlane = kSide * kPlaneStride;

// Block rows of x, which are bfloat16 in float32, or the two parts of factor x in planes kPlane apart.
// Rows beyond `rows` are zero, and pixels beyond `count`, whole vectors, up to whole tiles.
template <int parts>
void split_rows(
    const float* x, int64_t x_stride, const float* factor, int64_t rows, int64_t count, bfloat16* to) {
  // The upper halves of 16 and another 16 lanes: what is above the last 16 bits of a float32.
  alignas(64) static constexpr auto kUpper = [] {
    std::array<uint16_t, 32> lanes{};
    for (int l = 0; l < 32; ++l) lanes[l] = 2 * l + 1;
    return lanes;
  }();
  const __m512i upper = _mm512_load_si512(kUpper.data());
  const int64_t padded = round_up(count, kTileDepth);
  for (int64_t i = 0; i < round_up(rows, kTileRows); ++i, x += x_stride, to += kPlaneStride) {
    for (int64_t n = 0; n < padded; n += kTileDepth) {
      const auto value = [&](int64_t at) __attribute__((always_inline)) {
        if (i >= rows || at >= count) return _mm512_setzero_ps();
        const __m512 loaded = _mm512_loadu_ps(x + at);
        return parts == 1 ? loaded : _mm512_mul_ps(loaded, _mm512_loadu_ps(factor + at));
      };
      const __m512 first = value(n), second = value(n + 16);
      const __m512i high = _mm512_permutex2var_epi16(
          _mm512_castps_si512(first), upper, _mm512_castps_si512(second));
      _mm512_storeu_si512(to + n, high);
      if constexpr (parts == 2) {
        const auto rest = [](__m512 all) __attribute__((always_inline)) {
          const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xffff0000));
          return _mm512_sub_ps(all, _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(all), mask)));
        };
        _mm512_storeu_si512(
            to + kPlane + n, bit_cast<__m512i>(_mm512_cvtne2ps_pbh(rest(second), rest(first))));
      }
    }
  }
}

// out[p, b] of GatedProducts. The sums of kPlanePixels are chains of pairs of pixels; these are added up
// one by one within a slab, then over slabs in float64.
template <int powers>
void products_in_tiles(const GatedProducts& a) {
  using V = Vec<float>;
  const FeatureMap& x = a.x;
  const FeatureMap& z = powers == 3 ? a.x : a.z;
  const int64_t C = x.channels, N = x.pixels;
  const Blocks<powers == 3, kSide, kSide> blocks{C};
  const std::vector<int64_t> offsets = blocks.offsets();
  const int64_t row_blocks = blocks.row_blocks(), total = offsets.back();
  constexpr int64_t block_size = powers * kSide * kSide;
  const Cut cuts = cut(x, powers, 4, kSide);
  const Workspace workspace(sizeof(float) * static_cast<size_t>(x.batch * cuts.slabs * total * block_size));
  float* const partials = reinterpret_cast<float*>(workspace.begin());

  const int64_t rows_size = C * kPlanePixels, right_size = round_up(C, kTileRows) * kPlanePixels;
  const size_t bytes = 2 * Scratch::bytes<float>(rows_size) + Scratch::bytes<float>(powers * kPlanePixels) +
                       Scratch::bytes<bfloat16>(2 * kPlane) + Scratch::bytes<bfloat16>(right_size) +
                       Scratch::bytes<float>(kSide * kSide);
  parallel_for(x.batch * cuts.slabs * cuts.ranges, bytes, [&](int64_t chunk, Scratch& scratch) {
    const int64_t s = chunk / cuts.ranges % cuts.slabs, b = chunk / cuts.ranges / cuts.slabs;
    const auto [begin, end] = blocks.range(offsets, chunk % cuts.ranges, cuts.ranges);
    if (begin == end) return;
    const int64_t first_row = begin * kSide, first_column = blocks.first_column(begin);
    const FeatureMap left = channel_range<bfloat16>(x, first_row, std::min(end * kSide, C) - first_row);
    const FeatureMap right = channel_range<bfloat16>(z, first_column, C - first_column);

    float* gate = scratch.take<float>(powers * kPlanePixels);  // its powers
    float* right_rows = scratch.take<float>(rows_size);
    float* left_rows = scratch.take<float>(rows_size);
    if (blocks.symmetric) left_rows = right_rows + (first_row - first_column) * kPlanePixels;
    bfloat16* split = scratch.take<bfloat16>(2 * kPlane);
    bfloat16* right_tiles = scratch.take<bfloat16>(right_size);
    float* result = scratch.take<float>(kSide * kSide);
    float* partial = partials + (b * cuts.slabs + s) * total * block_size;
    std::fill_n(
        partial + offsets[begin] * block_size, (offsets[end] - offsets[begin]) * block_size, 0.0f);
    const int64_t slab_end = std::min((s + 1) * cuts.slab, N);
    const TileSession session;
    for (int64_t first = s * cuts.slab; first < slab_end; first += kPlanePixels) {
      const int64_t count = std::min(kPlanePixels, slab_end - first);
      const int64_t filled = round_up(count, V::width), steps = ceil_div(count, kTileDepth);
      load_gate(static_cast<const bfloat16*>(a.gate) + b * N + first, count, gate + kPlanePixels);
      for (int64_t n = 0; powers == 3 && n < filled; n += V::width) {
        const V g = V::load(gate + kPlanePixels + n);
        (g * g).store(gate + 2 * kPlanePixels + n);
      }
      load_panel<bfloat16>(right, b, first, count, right_rows, kPlanePixels);
      if (!blocks.symmetric) load_panel<bfloat16>(left, b, first, count, left_rows, kPlanePixels);
      for (int64_t c = 0; c < right.channels; c += kTileRows) {
        const int64_t rows = std::min(kTileRows, right.channels - c);
        split_rows<1>(
            right_rows + c * kPlanePixels, kPlanePixels, nullptr, rows, filled, split);
        pack_transposed_tiles(split, kPlaneStride, 1, steps, right_tiles + c * steps * kTileDepth);
      }
      for (int64_t r = begin; r < end; ++r) {
        const int64_t rows = std::min(kSide, C - r * kSide);
        const float* block_rows = left_rows + (r * kSide - first_row) * kPlanePixels;
        for (int p = 0; p < powers; ++p) {
          (p == 0 ? split_rows<1> : split_rows<2>)(
              block_rows, kPlanePixels, gate + p * kPlanePixels, rows, filled, split);
          float* sums = partial + offsets[r] * block_size + p * kSide * kSide;
          for (int64_t j = blocks.first_column(r); j < C; j += kSide, sums += block_size) {
            const int64_t columns = std::min(kSide / 16, ceil_div(C - j, 16));
            const auto multiply = [&](auto product, const bfloat16* plane) {
              product(
                  ceil_div(rows, kTileRows), columns, steps, plane, kPlaneStride,
                  PackedTiles{right_tiles + (j - first_column) * steps * kTileDepth, kTile, steps * kTile},
                  result, kSide, kTileDepth);
            };
            multiply(tile_product<false, PackedTiles>, split);
            if (p > 0) multiply(tile_product<true, PackedTiles>, split + kPlane);
            for (int64_t i = 0; i < rows; ++i) {
              for (int64_t n = i * kSide; n < i * kSide + columns * 16; n += V::width) {
                (V::load(sums + n) + V::load(result + n)).store(sums + n);
              }
            }
          }
        }
      }
    }
  });

  float* out = static_cast<float*>(a.out);
  parallel_for(x.batch * row_blocks, 0, [&](int64_t chunk, Scratch&) {
    const int64_t b = chunk / row_blocks, r = chunk % row_blocks;
    const float* sums = partials + (b * cuts.slabs * total + offsets[r]) * block_size;
    const int64_t rows = std::min(kSide, C - r * kSide);
    for (int64_t first = blocks.first_column(r); first < C; first += kSide) {
      const int64_t columns = std::min(kSide, C - first);
      for (int p = 0; p < powers; ++p, sums += kSide * kSide) {
        alignas(64) float value[kSide * kSide], mirrored[kSide * kSide];
        std::copy_n(sums, kSide * kSide, value);
        const int64_t slab = total * block_size;
        add_partials(sums + slab, slab, cuts.slabs - 1, kSide * kSide, value);
        float* matrix = out + (p * x.batch + b) * C * C;
        if (blocks.symmetric) {
          transpose_panel(value, kSide, kSide, kSide, mirrored, kSide);
          for (int64_t j = 0; j < columns; ++j) {
            std::copy_n(mirrored + j * kSide, rows, matrix + (first + j) * C + r * kSide);
          }
        }
        for (int64_t i = 0; i < rows; ++i) {
          // Below the diagonal stands what was mirrored: the two halves differ in their last bits.
          const int64_t from = blocks.symmetric && first == r * kSide ? i : 0;
          std::copy(
              value + i * kSide + from, value + i * kSide + columns,
              matrix + (r * kSide + i) * C + first + from);
        }
      }
    }
  });
}

}  // namespace
}  // namespace EAMNET_LEVEL
}  // namespace eamnet
