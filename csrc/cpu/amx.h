// Matrix products of bfloat16 in AMX tiles, accumulated in float32. Empty unless the level has AMX.
//
// A tile is 16 rows of 64 bytes. For C += A B the hardware takes
//   A: 16 rows × 32 values, as rows lie in memory;
//   B: 32 rows × 16 columns as 16 rows of pairs: row p holds B[2p, j], B[2p+1, j] for j = 0..15;
//   C: 16 × 16 float32.
// Here A is a row-major matrix of any row length, B mostly a sequence of whole tiles made by one of the
// packers below, and all sizes are in tiles: operands are padded with zeros.
#pragma once

#if defined(__AMX_BF16__)

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

#include "cpu/feature_map.h"
#include "cpu/simd.h"

namespace eamnet {
namespace EAMNET_LEVEL {

inline constexpr int64_t kTileRows = 16;
inline constexpr int64_t kTileDepth = 32;               // bfloat16 values of a row of A
inline constexpr int64_t kTile = 16 * kTileDepth;       // bfloat16 values of a tile

// Tile registers are usable in a thread while one of these lives in it.
class TileSession {
 public:
  TileSession() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } configuration;
    static_assert(sizeof(configuration) == 64);
    _tile_loadconfig(&configuration);
  }
  ~TileSession() { _tile_release(); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

namespace detail {

// rows × columns (1 or 2 each) tiles of C in registers 0 to 3, A in 4 and 5, B in 6 and 7.
template <int rows, int columns, bool accumulate, class Right>
EAMNET_INLINE void tile_block(
    int64_t steps, const bfloat16* a, int64_t a_stride, int64_t a_step, const Right& b, int64_t column,
    float* c, int64_t c_stride) {
  const int64_t a_bytes = a_stride * 2, c_bytes = c_stride * 4;
  float* below = c + kTileRows * c_stride;
  if constexpr (accumulate) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (columns == 2) _tile_loadd(1, c + 16, c_bytes);
    if constexpr (rows == 2) _tile_loadd(2, below, c_bytes);
    if constexpr (rows == 2 && columns == 2) _tile_loadd(3, below + 16, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (columns == 2) _tile_zero(1);
    if constexpr (rows == 2) _tile_zero(2);
    if constexpr (rows == 2 && columns == 2) _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; ++s) {
    const bfloat16* left = a + s * a_step;
    _tile_loadd(4, left, a_bytes);
    _tile_loadd(6, b.at(s, column), b.row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (columns == 2) {
      _tile_loadd(7, b.at(s, column + 1), b.row_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (rows == 2) {
      _tile_loadd(5, left + kTileRows * a_stride, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (columns == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (columns == 2) _tile_stored(1, c + 16, c_bytes);
  if constexpr (rows == 2) _tile_stored(2, below, c_bytes);
  if constexpr (rows == 2 && columns == 2) _tile_stored(3, below + 16, c_bytes);
}

}  // namespace detail

// B as whole tiles: tile (step, column) starts at data + step*step_stride + column*column_stride.
struct PackedTiles {
  const bfloat16* data;
  int64_t step_stride, column_stride;
  static constexpr int64_t row_bytes = 64;
  EAMNET_INLINE const void* at(int64_t step, int64_t column) const {
    return data + step * step_stride + column * column_stride;
  }
};

// C (+)= A B of `rows` × `columns` tiles over `steps` tiles of depth. The first row of A's tile of a step
// is at a + step*a_step; B says where its tiles are (`at`) and how far apart their rows (`row_bytes`).
template <bool accumulate, class Right>
inline void tile_product(
    int64_t rows, int64_t columns, int64_t steps, const bfloat16* a, int64_t a_stride, const Right& b,
    float* c, int64_t c_stride, int64_t a_step = kTileDepth) {
  for (int64_t i = 0; i < rows; i += 2) {
    const bfloat16* left = a + i * kTileRows * a_stride;
    for (int64_t j = 0; j < columns; j += 2) {
      float* to = c + i * kTileRows * c_stride + j * 16;
      const auto block = [&]<int r, int w>() __attribute__((always_inline)) {
        detail::tile_block<r, w, accumulate>(steps, left, a_stride, a_step, b, j, to, c_stride);
      };
      if (i + 1 < rows) {
        j + 1 < columns ? block.template operator()<2, 2>() : block.template operator()<2, 1>();
      } else {
        j + 1 < columns ? block.template operator()<1, 2>() : block.template operator()<1, 1>();
      }
    }
  }
}

// ----------------------------------------------------------------------------------------- packing

// Rows of x as a row-major `padded_rows` × `stride` matrix, zero beyond; times factor[n] and rounded
// unless that is null. stride is a multiple of kTileDepth.
inline void pack_rows(
    const FeatureMap& x, int64_t b, int64_t first, int64_t count, int64_t padded_rows, int64_t stride,
    bfloat16* to, const float* factor) {
  constexpr int64_t kAhead = 16;  // rows lie too far apart for the hardware to foresee them
  const int64_t d = x.channels;
  for (int64_t n = 0; n < count; ++n, to += stride) {
    const bfloat16* from = x.at<bfloat16>(b, 0, first + n);
    if (x.channel_stride != 1) {
      for (int64_t c = 0; c < d; ++c) to[c] = from[c * x.channel_stride];
      std::fill(to + d, to + stride, bfloat16{0});
      from = to;
    }
    const bfloat16* ahead = from + (n + kAhead < count ? kAhead * x.pixel_stride : 0);
    for (int64_t c = 0; c < stride; c += kTileDepth) {
      __builtin_prefetch(ahead + c);
      const int64_t valid = std::clamp<int64_t>(d - c, 0, kTileDepth);
      const auto lanes = static_cast<__mmask32>((uint64_t(1) << valid) - 1);
      __m512i values = _mm512_maskz_loadu_epi16(lanes, from + c);
      if (factor != nullptr) {
        const auto halves = bit_cast<std::array<detail::HalfBits, 2>>(values);
        const Vec<float> times(factor[n]);
        values = bit_cast<__m512i>(std::array<detail::HalfBits, 2>{
            detail::narrow(Vec<float>(detail::widen(halves[0])) * times),
            detail::narrow(Vec<float>(detail::widen(halves[1])) * times)});
      }
      _mm512_storeu_si512(to + c, values);
    }
  }
  std::fill_n(to, (padded_rows - count) * stride, bfloat16{0});
}

// The tiles of Mᵀ as B for a row-major M (16 `row_tiles` × 32 `steps`): depth runs along the rows of
// M. Tile (step, column) at (column*steps + step) * kTile.
inline void pack_transposed_tiles(
    const bfloat16* m, int64_t stride, int64_t row_tiles, int64_t steps, bfloat16* to) {
  for (int64_t i = 0; i < row_tiles; ++i) {
    for (int64_t s = 0; s < steps; ++s, to += kTile) {
      // A pair of values moves as one 32-bit word.
      Vec<float> words[16];
      const bfloat16* from = m + i * kTileRows * stride + s * kTileDepth;
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) std::memcpy(&words[r].v, from + r * stride, 64);
      transpose(words);
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) std::memcpy(to + r * kTileDepth, &words[r].v, 64);
    }
  }
}

// The tiles of M as B for a row-major M (32 `steps` × 16 `columns`): depth runs down the columns of M.
// Tile (step, column) at (step*columns + column) * kTile.
inline void pack_tiles(
    const bfloat16* m, int64_t stride, int64_t steps, int64_t columns, bfloat16* to) {
  for (int64_t s = 0; s < steps; ++s) {
    for (int64_t j = 0; j < columns; ++j, to += kTile) {
      const bfloat16* from = m + s * kTileDepth * stride + j * 16;
      for (int64_t p = 0; p < 16; ++p, from += 2 * stride) {
        const auto half = [](const bfloat16* row) __attribute__((always_inline)) {
          return _mm512_maskz_cvtepu16_epi32(
              0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
        };
        const __m512i pairs =
            _mm512_or_si512(half(from), _mm512_maskz_slli_epi32(0xffff, half(from + stride), 16));
        _mm512_storeu_si512(to + p * kTileDepth, pairs);
      }
    }
  }
}

}  // namespace EAMNET_LEVEL
}  // namespace eamnet

#endif  // __AMX_BF16__
