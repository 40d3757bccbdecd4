// The passes over pixels of CMAM's cross mix over channels, and their gradients. Definition and the
// algebra between the passes: eamnet_kernels/reference/cross_mix_channels.py.
//
//   G_p = X diag(g^p) Xᵀ, p = 0, 1, 2                              gated Gram matrices
//   Y   = X + A_1 X + g A_2 X                                      apply
//   E_p = dY diag(g^p) Xᵀ, p = 0, 1                                gradients of A_1 and A_2
//   dX  = dY + A_1ᵀ dY + D_0 X + g (A_2ᵀ dY + D_1 X + g D_2 X)     D_p: twice the gradient of G_p
//   dg  = Σ_c X (A_2ᵀ dY + D_1 X / 2 + g D_2 X)
//
// Floor, per pixel: multiply-adds, and numbers read (r) or written (w).
//   G   1.5 C² (three symmetric halves)     C r
//   Y   2 C²                                C r + C w        forward   3.5 C², 3 C
//   E   2 C²                                2 C r
//   dX  5 C²                                2 C r + C w      backward  7 C², 5 C
// and between the passes, per sample, 8 C³ forward and 20 C³ backward (eamnet_kernels/mixing.py).
// The direct form takes 7 C² + 4 C d forward and twice that backward.
//
// Stored: the Gram matrices (3 C/N of X), which save the backward one pass over X. Recomputed: A_1 and
// A_2, C x C matrices from C x C matrices. Nothing of the size of X is written but Y and dX: a tile of
// pixels is copied into a panel that stays in the second-level cache while all that needs it is done.
//
// A sum over pixels is made per lane within a tile of kTilePixels pixels, then tile by tile within a slab,
// then over slabs in float64: its rounding error does not grow with N beyond the last bits.
#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/feature_map.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace eamnet {

// out[p, b] = Σ_n g[b, n]^p x[b, :, n] z[b, :, n]ᵀ for p < powers: (powers, B, C, C).
struct GatedProducts {
  FeatureMap x;
  FeatureMap z;      // not read where powers is 3: the Gram matrices of x
  const void* gate;  // (B, N) in the dtype of x
  int powers;        // 3: symmetric, z = x; 2: of any x and z
  void* out;         // in the dtype that x is computed in
};
EAMNET_KERNEL(gated_products, GatedProducts)

struct ApplyMix {
  FeatureMap x;
  const void* gate;
  const void* matrices;  // (2, B, C, C): A_1, A_2
  FeatureMap y;
};
EAMNET_KERNEL(apply_mix, ApplyMix)

struct ApplyMixBackward {
  FeatureMap grad_y;
  FeatureMap x;
  const void* gate;
  const void* matrices;  // (2, B, C, C): A_1, A_2
  const void* doubled;   // (3, B, C, C): D_0, D_1, D_2, symmetric
  FeatureMap grad_x;
  void* grad_gate;  // (B, N)
};
EAMNET_KERNEL(apply_mix_backward, ApplyMixBackward)

namespace EAMNET_LEVEL {
namespace {

// The channels first .. first + count - 1 of a feature map.
template <class S>
FeatureMap channel_range(FeatureMap x, int64_t first, int64_t count) {
  x.data = x.at<S>(0, first, 0);
  x.channels = count;
  return x;
}

// The gate of `count` pixels as T; zero up to the next multiple of the vector width.
template <class S, class T>
void load_gate(const S* gate, int64_t count, T* out) {
  using V = Vec<T>;
  int64_t n = 0;
  for (; n + V::width <= count; n += V::width) V::load(gate + n).store(out + n);
  if (n < count) V::load_partial(gate + n, count - n).store(out + n);
}

// Keeps a value that several operations use in a register. Left to itself GCC loads it anew for each
// of them, and there are more loads then than the processor can make.
template <class T>
EAMNET_INLINE Vec<T> keep(Vec<T> x) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(x.v));
#elif defined(__x86_64__)
  __asm__("" : "+x"(x.v));
#endif
  return x;
}

// Panels' rows lie this far apart: not a power of two, whose rows would evict one another.
template <class T>
constexpr int64_t panel_stride(int64_t pixels) {
  return round_up(pixels, 64 / sizeof(T)) + 64 / sizeof(T);
}

// ------------------------------------------------------------------------------------ gated products
//
// A block of the result is kLeft rows g^p x_i times kRight rows z_j; the sums over pixels of all
// their products stay in kLeft * kRight registers. Three Gram matrices take three powers of fewer
// rows of x, so every vector of z is loaded once for all of them.

#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kLeft = 12;
#else
inline constexpr int kLeft = 6;
#endif
inline constexpr int kRight = 2;
inline constexpr int kBlock = kLeft * kRight;

// Pixels of a tile: kLeft rows and kRight rows of z share the first-level cache.
inline constexpr int64_t kTilePixels = 512;

// Rows of all panels here lie this far apart, which the compiler puts into the addresses.
template <class T>
constexpr int64_t kStride = panel_stride<T>(kTilePixels);

// sums[q .. kBlock-1] += the sum over the lanes of each accumulator.
template <int q, class T>
EAMNET_INLINE void add_lane_sums(const Vec<T>* accumulators, T* sums) {
  constexpr int width = Vec<T>::width, rest = kBlock - q;
  if constexpr (rest > 0) {
    constexpr int count = rest >= width ? width : rest >= 8 ? 8 : rest >= 4 ? 4 : 2;
    Vec<T> rows[count];
#pragma GCC unroll 16
    for (int i = 0; i < count; ++i) rows[i] = accumulators[q + i];
    const Vec<T> total = sum_rows(rows);
    if constexpr (count == width) {
      (Vec<T>::load(sums + q) + total).store(sums + q);
    } else {
      (Vec<T>::load_partial(sums + q, count) + total).store_partial(sums + q, count);
    }
    add_lane_sums<q + count>(accumulators, sums);
  }
}

// sums[c * kLeft + p * rows + i] += Σ_n g^p x_i[n] z_c[n] over `vectors` vectors, of rows x_i and z_c
// kStride apart and g^p x_i, p >= 1, likewise in `scaled`.
template <int rows, class T>
EAMNET_INLINE void product_block(
    const T* x, const T* scaled, const T* z, int64_t vectors, T* sums) {
  using V = Vec<T>;
  V accumulators[kBlock];
#pragma GCC unroll 32
  for (int q = 0; q < kBlock; ++q) accumulators[q] = V(T(0));
  for (int64_t n = 0; n < vectors * V::width; n += V::width) {
    V right[kRight];
#pragma GCC unroll 4
    for (int c = 0; c < kRight; ++c) right[c] = V::load(z + c * kStride<T> + n);
#pragma GCC unroll 16
    for (int l = 0; l < kLeft; ++l) {
      const T* row = l < rows ? x + l * kStride<T> : scaled + (l - rows) * kStride<T>;
      const V left = keep(V::load(row + n));
#pragma GCC unroll 4
      for (int c = 0; c < kRight; ++c) {
        accumulators[c * kLeft + l] = fma(left, right[c], accumulators[c * kLeft + l]);
      }
    }
  }
  add_lane_sums<0>(accumulators, sums);
}

// The blocks of rows x columns of a C x C product, in the order in which they are computed and kept.
template <bool is_symmetric, int64_t rows, int64_t columns>
struct Blocks {
  static constexpr bool symmetric = is_symmetric;
  int64_t channels;

  int64_t row_blocks() const { return ceil_div(channels, rows); }
  // First column of a row block; a symmetric product is made from the diagonal on.
  int64_t first_column(int64_t row_block) const {
    return symmetric ? row_block * rows / columns * columns : 0;
  }
  // How many blocks come before each row block, and at the end, how many there are.
  std::vector<int64_t> offsets() const {
    std::vector<int64_t> before{0};
    for (int64_t r = 0; r < row_blocks(); ++r) {
      before.push_back(before.back() + ceil_div(channels - first_column(r), columns));
    }
    return before;
  }
  // The row blocks of one of several ranges: those of which the first block lies in its share.
  std::pair<int64_t, int64_t> range(
      const std::vector<int64_t>& offsets, int64_t index, int64_t ranges) const {
    const auto first = [&](int64_t share) {
      int64_t r = 0;
      while (r < row_blocks() && offsets[r] * ranges < share * offsets.back()) ++r;
      return r;
    };
    return {first(index), first(index + 1)};
  }
};

// How the work of one sample is cut: slabs of pixels, each of which leaves partial sums, and ranges
// of row blocks.
struct Cut {
  int64_t slab, slabs, ranges;
};

// A slab's partial sums are at most a small part of its pixels' values. Fewer than `chunks` chunks are
// cut by rows too, at least `least_rows` each; each range loads the tiles again, which is little beside
// its products.
Cut cut(const FeatureMap& x, int powers, int64_t chunks, int64_t least_rows) {
  const int64_t slab = round_up(std::max<int64_t>(2048, 8 * powers * x.channels), kTilePixels);
  const int64_t slabs = std::max<int64_t>(1, ceil_div(x.pixels, slab));
  const int64_t there = std::max<int64_t>(1, x.batch * slabs);
  const int64_t ranges =
      std::clamp<int64_t>(ceil_div(chunks, there), 1, ceil_div(x.channels, least_rows));
  return {slab, slabs, ranges};
}

}  // namespace
}  // namespace EAMNET_LEVEL
}  // namespace eamnet

#if defined(__AMX_BF16__)
#include "cpu/cross_mix_channels_amx.h"
#endif

namespace eamnet {
namespace EAMNET_LEVEL {
namespace {

template <int powers, class S, class T = Compute<S>>
void products(const GatedProducts& a) {
#if defined(__AMX_BF16__)
  if constexpr (kInTiles<S>) return products_in_tiles<powers>(a);
#endif
  using V = Vec<T>;
  const FeatureMap& x = a.x;
  const FeatureMap& z = powers == 3 ? a.x : a.z;
  const int64_t C = x.channels, N = x.pixels;
  constexpr int rows = kLeft / powers;
  const Blocks<powers == 3, rows, kRight> blocks{C};
  const Cut cuts = cut(x, powers, 16, 32);
  const int64_t slab = cuts.slab, slabs = cuts.slabs, ranges = cuts.ranges;
  const std::vector<int64_t> offsets = blocks.offsets();
  const int64_t row_blocks = blocks.row_blocks(), total = offsets.back();
  std::vector<T> partials(static_cast<size_t>(x.batch * slabs * total * kBlock));

  // Blocks reach beyond the last channel, into rows of zeros.
  static_assert(kRight <= rows);
  const int64_t panel = (C + rows) * kStride<T>;
  const size_t bytes =
      2 * Scratch::bytes<T>(panel) + Scratch::bytes<T>(kLeft * kStride<T>) + Scratch::bytes<T>(kTilePixels);
  parallel_for(x.batch * slabs * ranges, bytes, [&](int64_t chunk, Scratch& scratch) {
    const int64_t range = chunk % ranges, s = chunk / ranges % slabs, b = chunk / ranges / slabs;
    const auto [begin, end] = blocks.range(offsets, range, ranges);
    if (begin == end) return;
    const int64_t first_row = begin * rows, last_row = std::min(end * rows, C);
    const int64_t first_column = blocks.first_column(begin);
    const FeatureMap right = channel_range<S>(z, first_column, C - first_column);
    const FeatureMap left = channel_range<S>(x, first_row, last_row - first_row);

    T* gate = scratch.take<T>(kTilePixels);
    T* scaled = scratch.take<T>(kLeft * kStride<T>);
    T* right_panel = scratch.take<T>(panel);
    T* left_panel = right_panel + (first_row - first_column) * kStride<T>;
    std::fill_n(right_panel + right.channels * kStride<T>, rows * kStride<T>, T(0));
    if (!blocks.symmetric) {
      left_panel = scratch.take<T>(panel);
      std::fill_n(left_panel + left.channels * kStride<T>, rows * kStride<T>, T(0));
    }
    T* partial = partials.data() + (b * slabs + s) * total * kBlock;
    const int64_t slab_end = std::min((s + 1) * slab, N);
    for (int64_t first = s * slab; first < slab_end; first += kTilePixels) {
      const int64_t count = std::min(kTilePixels, slab_end - first);
      const int64_t vectors = ceil_div(count, V::width);
      load_gate(static_cast<const S*>(a.gate) + b * N + first, count, gate);
      load_panel<S>(right, b, first, count, right_panel, kStride<T>);
      if (!blocks.symmetric) load_panel<S>(left, b, first, count, left_panel, kStride<T>);
      for (int64_t r = begin; r < end; ++r) {
        const T* x_rows = left_panel + (r * rows - first_row) * kStride<T>;
        for (int i = 0; i < rows; ++i) {
          for (int64_t n = 0; n < vectors * V::width; n += V::width) {
            const V g = V::load(gate + n);
            V value = V::load(x_rows + i * kStride<T> + n);
            for (int p = 1; p < powers; ++p) {
              value *= g;
              value.store(scaled + ((p - 1) * rows + i) * kStride<T> + n);
            }
          }
        }
        T* sums = partial + offsets[r] * kBlock;
        for (int64_t j = blocks.first_column(r); j < C; j += kRight, sums += kBlock) {
          const T* z_rows = right_panel + (j - first_column) * kStride<T>;
          product_block<rows>(x_rows, scaled, z_rows, vectors, sums);
        }
      }
    }
  });

  T* out = static_cast<T*>(a.out);
  parallel_for(x.batch * row_blocks, 0, [&](int64_t chunk, Scratch&) {
    const int64_t b = chunk / row_blocks, r = chunk % row_blocks;
    const T* sums = partials.data() + (b * slabs * total + offsets[r]) * kBlock;
    for (int64_t j = blocks.first_column(r); j < C; j += kRight, sums += kBlock) {
      double value[kBlock] = {};
      for (int64_t s = 0; s < slabs; ++s) {
        for (int q = 0; q < kBlock; ++q) value[q] += sums[s * total * kBlock + q];
      }
      for (int p = 0; p < powers; ++p) {
        T* matrix = out + (p * x.batch + b) * C * C;
        for (int64_t column = j; column < std::min(j + kRight, C); ++column) {
          const double* rows_of = value + (column - j) * kLeft + p * rows;
          for (int64_t i = r * rows; i < std::min((r + 1) * rows, C); ++i) {
            const T v = static_cast<T>(rows_of[i - r * rows]);
            if (!blocks.symmetric) {
              matrix[i * C + column] = v;
            } else if (i <= column) {
              matrix[i * C + column] = matrix[column * C + i] = v;
            }
          }
        }
      }
    }
  });
}

// --------------------------------------------------------------------------------------------- apply
//
// `matrices` of the same C x C, packed for blocks of `rows` rows: for each block and column k,
// matrices x rows values; rows beyond C are zero. M[i, k] = m[i*row_stride + k*column_stride].

template <class T, int rows, int matrices>
void pack_rows(
    int64_t C, int64_t block, const T* const (&m)[matrices], const int64_t (&row_stride)[matrices],
    const int64_t (&column_stride)[matrices], T* packed) {
  packed += block * rows * matrices * C;
  for (int64_t k = 0; k < C; ++k) {
    for (int q = 0; q < matrices; ++q) {
      for (int r = 0; r < rows; ++r) {
        const int64_t i = block * rows + r;
        *packed++ = i < C ? m[q][i * row_stride[q] + k * column_stride[q]] : T(0);
      }
    }
  }
}

// Pixels of a tile: the panels of about this many values, a multiple of the register block's width.
inline int64_t apply_tile(const FeatureMap& x, int64_t values, int64_t block) {
  const int64_t largest = std::clamp<int64_t>(values / std::max<int64_t>(x.channels, 1), block, 1024);
  return std::max(largest / block, int64_t(1)) * block;
}

#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kForwardRows = 4, kForwardVectors = 3;
inline constexpr int kBackwardRows = 2, kBackwardVectors = 3;
#else
inline constexpr int kForwardRows = 3, kForwardVectors = 2;
inline constexpr int kBackwardRows = 3, kBackwardVectors = 1;
#endif

// y[r] = x_{i+r} + (A_1 x)_{i+r} + g (A_2 x)_{i+r} for kForwardRows rows and `vectors` vectors.
template <int vectors, class T>
EAMNET_INLINE void mix_block(
    int64_t C, int64_t i, const T* packed, const T* panel, int64_t stride, const T* gate, T* out) {
  using V = Vec<T>;
  constexpr int rows = kForwardRows;
  V by_a1[rows][vectors], by_a2[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) by_a1[r][v] = by_a2[r][v] = V(T(0));
  }
  const T* row = panel;
  const T* a = packed + i * 2 * C;
  for (int64_t k = 0; k < C; ++k, row += stride, a += 2 * rows) {
    V x[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) x[v] = V::load(row + v * V::width);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const V a1 = keep(V(a[r]));
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) by_a1[r][v] = fma(a1, x[v], by_a1[r][v]);
      const V a2 = keep(V(a[rows + r]));
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) by_a2[r][v] = fma(a2, x[v], by_a2[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    if (i + r < C) {
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        const int64_t n = v * V::width;
        const V x = V::load(panel + (i + r) * stride + n);
        (x + fma(by_a2[r][v], V::load(gate + n), by_a1[r][v])).store(out + (i + r) * stride + n);
      }
    }
  }
}

// Matrices of C x C below each other as the left operand of gemm, (matrices C) x C: what matrix tiles
// (gemm_amx.h) take in place of pack_rows.
template <class Left, int matrices, class T>
Left stack(
    int64_t C, const T* const (&m)[matrices], int64_t row_stride, int64_t column_stride,
    std::vector<typename Left::Value>& storage) {
  std::vector<T> rows;
  rows.reserve(static_cast<size_t>(matrices * C * C));
  for (int q = 0; q < matrices; ++q) {
    for (int64_t i = 0; i < C; ++i) {
      for (int64_t k = 0; k < C; ++k) rows.push_back(m[q][i * row_stride + k * column_stride]);
    }
  }
  storage.resize(static_cast<size_t>(Left::size(matrices * C, C)));
  return Left::pack(matrices * C, C, rows.data(), C, 1, storage.data());
}

template <class S, class T = Compute<S>>
void apply(const ApplyMix& a) {
  using V = Vec<T>;
  using Left = LeftOf<S>;
  constexpr int rows = kForwardRows, block = kForwardVectors * V::width;
  const FeatureMap& x = a.x;
  const int64_t C = x.channels, N = x.pixels, row_blocks = ceil_div(C, rows);
  std::vector<T> packed(static_cast<size_t>(kInTiles<S> ? 0 : x.batch * row_blocks * rows * 2 * C));
  const auto packed_of = [&](int64_t b) { return packed.data() + b * row_blocks * rows * 2 * C; };
  std::vector<std::vector<typename Left::Value>> storage(static_cast<size_t>(x.batch));
  std::vector<Left> stacked(storage.size());
  parallel_for(x.batch, 0, [&](int64_t b, Scratch&) {
    const T* a1 = static_cast<const T*>(a.matrices) + b * C * C;
    const T* a2 = a1 + x.batch * C * C;
    if constexpr (kInTiles<S>) {
      stacked[b] = stack<Left, 2>(C, {a1, a2}, C, 1, storage[b]);
    } else {
      for (int64_t r = 0; r < row_blocks; ++r) {
        pack_rows<T, rows, 2>(C, r, {a1, a2}, {C, C}, {1, 1}, packed_of(b));
      }
    }
  });

  const int64_t tile = apply_tile(x, 65536, block), tiles = ceil_div(N, tile);
  const int64_t stride = panel_stride<T>(tile);
  const size_t bytes = 2 * Scratch::bytes<T>(C * stride) + Scratch::bytes<T>(stride);
  parallel_for(x.batch * tiles, bytes, [&](int64_t chunk, Scratch& scratch) {
    const int64_t b = chunk / tiles, first = chunk % tiles * tile;
    const int64_t count = std::min(tile, N - first);
    T* gate = scratch.take<T>(stride);
    T* panel = scratch.take<T>(C * stride);
    T* out = scratch.take<T>(C * stride);
    load_gate(static_cast<const S*>(a.gate) + b * N + first, count, gate);
    load_panel<S>(x, b, first, count, panel, stride);
    if constexpr (kInTiles<S>) {
      gemm<T>(
          2 * C, round_up(count, V::width), C, stacked[b], Rows<T>{panel, stride},
          [&](int64_t i, int64_t n, V y, auto) __attribute__((always_inline)) {
            const bool second = i >= C;
            const int64_t at = (second ? i - C : i) * stride + n;
            (second ? fma(y, V::load(gate + n), V::load(out + at)) : V::load(panel + at) + y)
                .store(out + at);
          });
    } else {
      int64_t n = 0;
      for (; n + block <= round_up(count, V::width); n += block) {
        for (int64_t i = 0; i < C; i += rows) {
          mix_block<kForwardVectors>(C, i, packed_of(b), panel + n, stride, gate + n, out + n);
        }
      }
      for (; n < count; n += V::width) {
        for (int64_t i = 0; i < C; i += rows) {
          mix_block<1>(C, i, packed_of(b), panel + n, stride, gate + n, out + n);
        }
      }
    }
    store_panel<S>(a.y, b, first, count, out, stride);
  });
}

// The same for dX; adds the rows' part of the gate's gradient to grad_gate.
template <int vectors, class T>
EAMNET_INLINE void mix_backward_block(
    int64_t C, int64_t i, const T* packed, const T* grad_panel, const T* panel, int64_t stride,
    const T* gate, T* out, T* grad_gate) {
  using V = Vec<T>;
  constexpr int rows = kBackwardRows;
  // A_1ᵀ dY + D_0 X, A_2ᵀ dY, D_1 X, D_2 X
  V plain[rows][vectors], by_a2[rows][vectors], by_d1[rows][vectors], by_d2[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      plain[r][v] = by_a2[r][v] = by_d1[r][v] = by_d2[r][v] = V(T(0));
    }
  }
  const T* a = packed + i * 5 * C;
  for (int64_t k = 0; k < C; ++k, a += 5 * rows) {
    V dy[vectors], x[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      dy[v] = V::load(grad_panel + k * stride + v * V::width);
      x[v] = V::load(panel + k * stride + v * V::width);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const auto add = [&](int matrix, const V(&z)[vectors], V(&sum)[vectors])
                           __attribute__((always_inline)) {
        const V value = keep(V(a[matrix * rows + r]));
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) sum[v] = fma(value, z[v], sum[v]);
      };
      add(0, dy, plain[r]);
      add(1, dy, by_a2[r]);
      add(2, x, plain[r]);
      add(3, x, by_d1[r]);
      add(4, x, by_d2[r]);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) {
    const int64_t n = v * V::width;
    const V g = V::load(gate + n);
    V sum = V::load(grad_gate + n);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      if (i + r < C) {
        const int64_t at = (i + r) * stride + n;
        const V gated = fma(g, by_d2[r][v], by_a2[r][v]);
        sum = fma(V::load(panel + at), fma(V(T(0.5)), by_d1[r][v], gated), sum);
        const V dy = V::load(grad_panel + at);
        (dy + fma(g, gated + by_d1[r][v], plain[r][v])).store(out + at);
      }
    }
    sum.store(grad_gate + n);
  }
}

template <class S, class T = Compute<S>>
void apply_backward(const ApplyMixBackward& a) {
  using V = Vec<T>;
  constexpr int rows = kBackwardRows, block = kBackwardVectors * V::width;
  const FeatureMap& x = a.x;
  const int64_t C = x.channels, N = x.pixels, row_blocks = ceil_div(C, rows);
  std::vector<T> packed(static_cast<size_t>(kInTiles<S> ? 0 : x.batch * row_blocks * rows * 5 * C));
  const auto packed_of = [&](int64_t b) { return packed.data() + b * row_blocks * rows * 5 * C; };
  using Left = LeftOf<S>;
  std::vector<std::vector<typename Left::Value>> by_grad_storage(static_cast<size_t>(x.batch));
  std::vector<std::vector<typename Left::Value>> by_x_storage(by_grad_storage.size());
  std::vector<Left> by_grad(by_grad_storage.size()), by_x(by_grad_storage.size());
  parallel_for(x.batch, 0, [&](int64_t b, Scratch&) {
    const int64_t next = x.batch * C * C;
    const T* a1 = static_cast<const T*>(a.matrices) + b * C * C;
    const T* d0 = static_cast<const T*>(a.doubled) + b * C * C;
    // Transposes of A; the D are symmetric.
    if constexpr (kInTiles<S>) {
      by_grad[b] = stack<Left, 2>(C, {a1, a1 + next}, 1, C, by_grad_storage[b]);
      by_x[b] = stack<Left, 3>(C, {d0, d0 + next, d0 + 2 * next}, 1, C, by_x_storage[b]);
    } else {
      for (int64_t r = 0; r < row_blocks; ++r) {
        pack_rows<T, rows, 5>(
            C, r, {a1, a1 + next, d0, d0 + next, d0 + 2 * next}, {1, 1, 1, 1, 1}, {C, C, C, C, C},
            packed_of(b));
      }
    }
  });

  const int64_t tile = apply_tile(x, 32768, block), tiles = ceil_div(N, tile);
  const int64_t stride = panel_stride<T>(tile);
  const size_t bytes = 3 * Scratch::bytes<T>(C * stride) + 2 * Scratch::bytes<T>(stride);
  parallel_for(x.batch * tiles, bytes, [&](int64_t chunk, Scratch& scratch) {
    const int64_t b = chunk / tiles, first = chunk % tiles * tile;
    const int64_t count = std::min(tile, N - first);
    T* gate = scratch.take<T>(stride);
    T* grad_gate = scratch.take<T>(stride);
    T* panel = scratch.take<T>(C * stride);
    T* grad_panel = scratch.take<T>(C * stride);
    T* out = scratch.take<T>(C * stride);
    load_gate(static_cast<const S*>(a.gate) + b * N + first, count, gate);
    load_panel<S>(x, b, first, count, panel, stride);
    load_panel<S>(a.grad_y, b, first, count, grad_panel, stride);
    std::fill_n(grad_gate, stride, T(0));
    if constexpr (kInTiles<S>) {
      const int64_t padded = round_up(count, V::width);
      gemm<T>(
          2 * C, padded, C, by_grad[b], Rows<T>{grad_panel, stride},
          [&](int64_t i, int64_t n, V y, auto) __attribute__((always_inline)) {
            if (i < C) {
              (V::load(grad_panel + i * stride + n) + y).store(out + i * stride + n);
              return;
            }
            const int64_t at = (i - C) * stride + n;
            fma(V::load(gate + n), y, V::load(out + at)).store(out + at);
            fma(V::load(panel + at), y, V::load(grad_gate + n)).store(grad_gate + n);
          });
      gemm<T>(
          3 * C, padded, C, by_x[b], Rows<T>{panel, stride},
          [&](int64_t i, int64_t n, V y, auto) __attribute__((always_inline)) {
            const int64_t power = i < C ? 0 : i < 2 * C ? 1 : 2, at = (i - power * C) * stride + n;
            const V g = V::load(gate + n);
            V in_out = y, in_gate = y;  // times the power of the gate, and its derivative's half
            if (power == 1) in_out *= g, in_gate *= V(T(0.5));
            if (power == 2) in_gate *= g, in_out = in_gate * g;
            (V::load(out + at) + in_out).store(out + at);
            if (power > 0) fma(V::load(panel + at), in_gate, V::load(grad_gate + n)).store(grad_gate + n);
          });
    } else {
      int64_t n = 0;
      for (; n + block <= round_up(count, V::width); n += block) {
        for (int64_t i = 0; i < C; i += rows) {
          mix_backward_block<kBackwardVectors>(
              C, i, packed_of(b), grad_panel + n, panel + n, stride, gate + n, out + n, grad_gate + n);
        }
      }
      for (; n < count; n += V::width) {
        for (int64_t i = 0; i < C; i += rows) {
          mix_backward_block<1>(
              C, i, packed_of(b), grad_panel + n, panel + n, stride, gate + n, out + n, grad_gate + n);
        }
      }
    }
    store_panel<S>(a.grad_x, b, first, count, out, stride);
    S* to = static_cast<S*>(a.grad_gate) + b * N + first;
    for (int64_t n = 0; n < count; ++n) to[n] = narrow<S>(grad_gate[n]);
  });
}

}  // namespace

void gated_products(const GatedProducts& arguments) {
  visit(arguments.x.dtype, [&]<class S>() {
    arguments.powers == 3 ? products<3, S>(arguments) : products<2, S>(arguments);
  });
}
void apply_mix(const ApplyMix& arguments) {
  visit(arguments.x.dtype, [&]<class S>() { apply<S>(arguments); });
}
void apply_mix_backward(const ApplyMixBackward& arguments) {
  visit(arguments.x.dtype, [&]<class S>() { apply_backward<S>(arguments); });
}

}  // namespace EAMNET_LEVEL
}  // namespace eamnet

#ifdef EAMNET_HOST
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/tensor.h"

namespace eamnet {
namespace {

ScalarType compute_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_gate(const Tensor& gate, const Tensor& x) {
  check_operand(gate, "spatial_gate", {x.size(0), 1, x.size(2), x.size(3)}, x.scalar_type());
}

void check_matrices(const Tensor& matrices, const char* name, int64_t count, const Tensor& x) {
  check_operand(matrices, name, {count, x.size(0), x.size(1), x.size(1)}, compute_dtype(x));
}

FeatureMap second_map(const Tensor& second, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(
      second.scalar_type() == x.scalar_type() && second.dim() == 4 && second.size(0) == x.size(0) &&
          second.size(1) == x.size(1) && second.size(2) == x.size(2) && second.size(3) == x.size(3),
      name, " must have the shape and dtype of x");
  return feature_map(second, name);
}

Tensor grams(const Tensor& x, const Tensor& spatial_gate) {
  const FeatureMap map = feature_map(x, "x");
  check_gate(spatial_gate, x);
  Tensor out = new_tensor({3, x.size(0), x.size(1), x.size(1)}, compute_dtype(x));
  gated_products({map, map, spatial_gate.const_data_ptr(), 3, out.mutable_data_ptr()});
  return out;
}

Tensor grad_matrices(const Tensor& grad_out, const Tensor& x, const Tensor& spatial_gate) {
  const FeatureMap map = feature_map(x, "x"), grad = second_map(grad_out, "grad_out", x);
  check_gate(spatial_gate, x);
  Tensor out = new_tensor({2, x.size(0), x.size(1), x.size(1)}, compute_dtype(x));
  gated_products({grad, map, spatial_gate.const_data_ptr(), 2, out.mutable_data_ptr()});
  return out;
}

Tensor apply(
    const Tensor& x, const Tensor& spatial_gate, const Tensor& matrices, bool channels_last) {
  const FeatureMap map = feature_map(x, "x");
  check_gate(spatial_gate, x);
  check_matrices(matrices, "matrices", 2, x);
  Tensor out =
      new_tensor({x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type(), channels_last);
  apply_mix({map, spatial_gate.const_data_ptr(), matrices.const_data_ptr(), feature_map(out, "out")});
  return out;
}

std::tuple<Tensor, Tensor> apply_backward(
    const Tensor& grad_out, const Tensor& x, const Tensor& spatial_gate, const Tensor& matrices,
    const Tensor& doubled, bool channels_last) {
  const FeatureMap map = feature_map(x, "x"), grad = second_map(grad_out, "grad_out", x);
  check_gate(spatial_gate, x);
  check_matrices(matrices, "matrices", 2, x);
  check_matrices(doubled, "doubled", 3, x);
  const int64_t B = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  Tensor grad_x = new_tensor({B, C, H, W}, x.scalar_type(), channels_last);
  Tensor grad_gate = new_tensor({B, 1, H, W}, x.scalar_type());
  apply_mix_backward({
      grad, map, spatial_gate.const_data_ptr(), matrices.const_data_ptr(), doubled.const_data_ptr(),
      feature_map(grad_x, "grad_x"), grad_gate.mutable_data_ptr()});
  return {grad_x, grad_gate};
}

}  // namespace
}  // namespace eamnet

STABLE_TORCH_LIBRARY_IMPL(eamnet_kernels_native, CPU, m) {
  m.impl("cross_mix_channels_grams", TORCH_BOX(&eamnet::grams));
  m.impl("cross_mix_channels_apply", TORCH_BOX(&eamnet::apply));
  m.impl("cross_mix_channels_grad_matrices", TORCH_BOX(&eamnet::grad_matrices));
  m.impl("cross_mix_channels_apply_backward", TORCH_BOX(&eamnet::apply_backward));
}
#endif  // EAMNET_HOST
