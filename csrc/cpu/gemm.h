// Matrix products of the shapes that pixel-wise operators need: a small matrix times a tile of pixels.
//
//   Y = A X         gemm(M, N, K, packed A, rows of X, sink)          N contiguous in X
//   Y = A X Bᵀ ...  gemm_transposed(M, M2, N, rows of X, rows of Z, sink)   X Zᵀ, summed over pixels
//
// Operands. The left operand is read one value at a time and is best packed (PackedLeft::pack takes any
// strides: a transpose is a swap of strides); StridedLeft reads a matrix where it lies. What an operator
// multiplies maps stored as S by is a LeftOf<S>: for bfloat16 where there are matrix tiles a TileLeft
// (gemm_amx.h), with which both operands are rounded to bfloat16, else a PackedLeft. The right operand
// is anything with row(k), a pointer to N contiguous values: Rows (base and stride) or RowTable (one
// pointer per row: shifted rows of a convolution). Either may hold bfloat16, widened to float32 as it is
// read. But for tiles everything is computed in T = float or double.
//
// Sinks receive the result a vector at a time, so that whatever follows (bias, activation, residual,
// rounding to bfloat16) happens in registers:
//   sink(i, j, y, count): y holds Y[i, j .. j+count-1]; write with store(y, p, count).
// store_to(p, stride) and add_to(p, stride) are the plain ones.
//
// Blocking. gemm keeps kRowBlock × kColumnBlock results in registers over all of K, so a tile of the
// right operand should fit the second-level cache: pixels of a feature map are first copied into a
// contiguous panel (load_panel), because their rows lie a power of two apart and would evict one
// another. Tiles of a multiple of kColumnBlock<T> columns have no slower rest.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/feature_map.h"
#include "cpu/gemm_amx.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace eamnet {
namespace EAMNET_LEVEL {

// ------------------------------------------------------------------------------- register blocking
// AVX-512 and 64-bit Arm have 32 vector registers, the others 16.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kRowBlock = 8;
inline constexpr int kColumnVectors = 3;
inline constexpr int kDotColumns = 4;
#elif defined(__AVX2__)
inline constexpr int kRowBlock = 4;
inline constexpr int kColumnVectors = 3;
inline constexpr int kDotColumns = 2;
#else
inline constexpr int kRowBlock = 4;
inline constexpr int kColumnVectors = 2;
inline constexpr int kDotColumns = 2;
#endif
inline constexpr int kDotRows = 4;
template <class T>
inline constexpr int kColumnBlock = kColumnVectors * Vec<T>::width;

// ------------------------------------------------------------------------------------------ operands

// Row k is data[k*stride ..].
template <class S>
struct Rows {
  const S* data;
  int64_t stride;
  EAMNET_INLINE const S* row(int64_t k) const { return data + k * stride; }
};

// Row k is data[k][..].
template <class S>
struct RowTable {
  const S* const* data;
  EAMNET_INLINE const S* row(int64_t k) const { return data[k]; }
};

// A[i, k] = data[i*row_stride + k*depth_stride], not copied.
template <class T, class S = T>
struct StridedLeft {
  const S* data;
  int64_t row_stride;
  int64_t depth_stride;

  struct Block {
    const S* row[kRowBlock];
    int64_t depth_stride;
    EAMNET_INLINE T at(int r, int64_t k) const { return widen(row[r][k * depth_stride]); }
  };
  EAMNET_INLINE Block block(int64_t i, int64_t M) const {
    Block b;
    // Rows beyond M repeat the last one; their results are dropped.
    for (int r = 0; r < kRowBlock; ++r) b.row[r] = data + std::min(i + r, M - 1) * row_stride;
    b.depth_stride = depth_stride;
    return b;
  }

  // Without the columns before k.
  StridedLeft from(int64_t k) const { return {data + k * depth_stride, row_stride, depth_stride}; }
};

// A (M×K) as blocks of kRowBlock rows, each block K × kRowBlock; rows beyond M are zero.
template <class T>
struct PackedLeft {
  using Value = T;
  const T* data;
  int64_t depth;

  static constexpr int64_t size(int64_t M, int64_t K) { return round_up(M, kRowBlock) * K; }

  // A[i, k] = a[i*row_stride + k*depth_stride] into size(M, K) values at `packed`.
  template <class S>
  static PackedLeft pack(
      int64_t M, int64_t K, const S* a, int64_t row_stride, int64_t depth_stride, T* packed) {
    T* out = packed;
    for (int64_t i = 0; i < M; i += kRowBlock) {
      for (int64_t k = 0; k < K; ++k) {
        for (int64_t r = i; r < i + kRowBlock; ++r) {
          *out++ = r < M ? T(widen(a[r * row_stride + k * depth_stride])) : T(0);
        }
      }
    }
    return {packed, K};
  }
  // What pack left at `packed`.
  static PackedLeft at(const T* packed, int64_t K) { return {packed, K}; }

  // A matrix of which the rows lie in memory, for one product; no buffer is needed.
  static constexpr int64_t rows_size(int64_t, int64_t) { return 0; }
  template <class S>
  static StridedLeft<T, S> of_rows(int64_t, int64_t, const S* a, int64_t row_stride, T*) {
    return {a, row_stride, 1};
  }

  // Without the columns before k.
  EAMNET_INLINE PackedLeft from(int64_t k) const { return {data + k * kRowBlock, depth}; }

  struct Block {
    const T* p;
    EAMNET_INLINE T at(int r, int64_t k) const { return p[k * kRowBlock + r]; }
  };
  EAMNET_INLINE Block block(int64_t i, int64_t) const { return {data + i * depth}; }
};

#if defined(__AMX_BF16__)
template <class S>
using LeftOf = std::conditional_t<std::is_same_v<S, bfloat16>, TileLeft, PackedLeft<Compute<S>>>;
#else
template <class S>
using LeftOf = PackedLeft<Compute<S>>;
#endif
template <class S>
inline constexpr bool kInTiles = !std::is_same_v<LeftOf<S>, PackedLeft<Compute<S>>>;

// --------------------------------------------------------------------------------------------- sinks

template <class S>
EAMNET_INLINE auto store_to(S* y, int64_t stride) {
  return [=](int64_t i, int64_t j, auto value, auto count) {
    store(value, y + i * stride + j, count);
  };
}
template <class S>
EAMNET_INLINE auto add_to(S* y, int64_t stride) {
  return [=](int64_t i, int64_t j, auto value, auto count) {
    S* p = y + i * stride + j;
    using T = std::remove_reference_t<decltype(value[0])>;
    store(load<T>(p, count) + value, p, count);
  };
}

// ---------------------------------------------------------------------------------------------- gemm

// Where the loop over K stands: within the caller's code, or apart. On AVX2 it uses all 16 registers, and
// within some callers GCC 12 keeps two results in memory and waits for its own stores (external_memory,
// forward, C = 128: 24 ms for 20); apart it passes the results through memory once, which costs the
// convolutions 3 %.
enum class Loop { within, apart };

namespace detail {

// out[r][v] = Σ_k A[i + r, k] B[k, j + v width ..]
template <class T, int vectors, class Block, class Right, class Count>
EAMNET_INLINE void gemm_loop(
    const Block& a, int64_t j, int64_t K, const Right& right, Count last, Vec<T> (&out)[kRowBlock][vectors]) {
  constexpr int width = Vec<T>::width;
  Vec<T> acc[kRowBlock][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRowBlock; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) acc[r][v] = Vec<T>(T(0));
  }
  for (int64_t k = 0; k < K; ++k) {
    const auto* row = right.row(k) + j;
    Vec<T> b[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors - 1; ++v) b[v] = Vec<T>::load(row + v * width);
    b[vectors - 1] = load<T>(row + (vectors - 1) * width, last);
#pragma GCC unroll 8
    for (int r = 0; r < kRowBlock; ++r) {
      const Vec<T> x(a.at(r, k));
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) acc[r][v] = fma(x, b[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRowBlock; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) out[r][v] = acc[r][v];
  }
}

// On AVX2 a function of its own, which does not change with what surrounds it.
template <class T, int vectors, class Block, class Right, class Count>
#if defined(__AVX2__) && !defined(__AVX512F__)
__attribute__((noinline))
#else
EAMNET_INLINE
#endif
void gemm_loop_apart(
    const Block& a, int64_t j, int64_t K, const Right& right, Count last, Vec<T> (&out)[kRowBlock][vectors]) {
  gemm_loop<T, vectors>(a, j, K, right, last, out);
}

template <class T, int vectors, Loop loop, class Left, class Right, class Sink, class Count>
EAMNET_INLINE void gemm_block(
    int64_t M, int64_t i, int64_t j, int64_t K, const Left& left, const Right& right, Sink&& sink,
    Count last) {
  constexpr int width = Vec<T>::width;
  Vec<T> acc[kRowBlock][vectors];
  if constexpr (loop == Loop::apart) {
    gemm_loop_apart<T, vectors>(left.block(i, M), j, K, right, last, acc);
  } else {
    gemm_loop<T, vectors>(left.block(i, M), j, K, right, last, acc);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRowBlock; ++r) {
    if (i + r < M) {
#pragma GCC unroll 8
      for (int v = 0; v < vectors - 1; ++v) sink(i + r, j + v * width, acc[r][v], AllLanes{});
      sink(i + r, j + (vectors - 1) * width, acc[r][vectors - 1], last);
    }
  }
}

template <class T, int vectors, Loop loop, class Left, class Right, class Sink, class Count>
inline void gemm_columns(
    int64_t M, int64_t j, int64_t K, const Left& left, const Right& right, Sink&& sink, Count last) {
  for (int64_t i = 0; i < M; i += kRowBlock) {
    gemm_block<T, vectors, loop>(M, i, j, K, left, right, sink, last);
  }
}

}  // namespace detail

// sink(i, j, Y[i, j..]) for Y = A·B, A (M×K) on the left, B (K×N) on the right. Reads only the N
// columns of B. K may be 0.
template <class T, Loop loop = Loop::within, class Left, class Right, class Sink>
inline void gemm(int64_t M, int64_t N, int64_t K, const Left& left, const Right& right, Sink&& sink) {
  constexpr int width = Vec<T>::width;
  int64_t j = 0, vectors = N / width;
  if constexpr (kColumnVectors == 3) {
    // Four vectors are better taken as two pairs than as three and one.
    for (; vectors >= 3 && vectors != 4; vectors -= 3, j += 3 * width) {
      detail::gemm_columns<T, 3, loop>(M, j, K, left, right, sink, AllLanes{});
    }
  }
  for (; vectors >= 2; vectors -= 2, j += 2 * width) {
    detail::gemm_columns<T, 2, loop>(M, j, K, left, right, sink, AllLanes{});
  }
  for (; vectors > 0; --vectors, j += width) {
    detail::gemm_columns<T, 1, loop>(M, j, K, left, right, sink, AllLanes{});
  }
  if (j < N) detail::gemm_columns<T, 1, loop>(M, j, K, left, right, sink, N - j);
}

#if defined(__AMX_BF16__)
template <class T, Loop loop = Loop::within, class Right, class Sink>
inline void gemm(
    int64_t M, int64_t N, int64_t K, const TileLeft& left, const Right& right, Sink&& sink) {
  static_assert(std::is_same_v<T, float>);
  detail::gemm_tiles(M, N, K, left, right, sink);
}
#endif

// ------------------------------------------------------------------------------------ sums over pixels

// Which blocks of a product are wanted.
enum class Part { all, upper };

// sink(i, j, Σ_n A[i, n] B[j, n]) for A (M×N) and B (M2×N), both as rows of contiguous n. With
// Part::upper (a symmetric product) only i <= j is handed out. Partial sums over n are kept per lane,
// so the rounding error of a tile grows with N / width; sum over tiles in a wider type if it matters.
template <class T, Part part = Part::all, class A, class B, class Sink>
inline void gemm_transposed(int64_t M, int64_t M2, int64_t N, const A& a, const B& b, Sink&& sink) {
  constexpr int width = Vec<T>::width;
  constexpr int total = kDotRows * kDotColumns;
  static_assert(total % width == 0);
  for (int64_t i = 0; i < M; i += kDotRows) {
    const int64_t first = part == Part::upper ? i / kDotColumns * kDotColumns : 0;
    for (int64_t j = first; j < M2; j += kDotColumns) {
      // Rows beyond the end repeat the last one; their results are dropped.
      decltype(a.row(0)) x[kDotRows];
      decltype(b.row(0)) y[kDotColumns];
      for (int r = 0; r < kDotRows; ++r) x[r] = a.row(std::min(i + r, M - 1));
      for (int c = 0; c < kDotColumns; ++c) y[c] = b.row(std::min(j + c, M2 - 1));
      Vec<T> acc[total / width][width];
#pragma GCC unroll 16
      for (int q = 0; q < total; ++q) acc[q / width][q % width] = Vec<T>(T(0));
      const auto step = [&](int64_t n, auto count) __attribute__((always_inline)) {
        Vec<T> u[kDotRows];
#pragma GCC unroll 8
        for (int r = 0; r < kDotRows; ++r) u[r] = load<T>(x[r] + n, count);
#pragma GCC unroll 8
        for (int c = 0; c < kDotColumns; ++c) {
          const Vec<T> w = load<T>(y[c] + n, count);
#pragma GCC unroll 8
          for (int r = 0; r < kDotRows; ++r) {
            auto& sum = acc[(r * kDotColumns + c) / width][(r * kDotColumns + c) % width];
            sum = fma(u[r], w, sum);
          }
        }
      };
      int64_t n = 0;
      for (; n + width <= N; n += width) step(n, AllLanes{});
      if (n < N) step(n, N - n);
      T sums[total];
#pragma GCC unroll 16
      for (int g = 0; g < total / width; ++g) sum_rows(acc[g]).store(sums + g * width);
      for (int r = 0; r < kDotRows && i + r < M; ++r) {
        for (int c = 0; c < kDotColumns && j + c < M2; ++c) {
          if (part == Part::all || i + r <= j + c) sink(i + r, j + c, sums[r * kDotColumns + c]);
        }
      }
    }
  }
}

// --------------------------------------------------------------------------------------------- panels

// panel[c*stride + n] = x[b, c, first + n] for n < count; columns up to the next multiple of the
// vector width are zero. stride >= round_up(count, Vec<T>::width).
template <class S, class T = Compute<S>>
inline void load_panel(
    const FeatureMap& x, int64_t b, int64_t first, int64_t count, T* panel, int64_t stride) {
  constexpr int width = Vec<T>::width;
  if (!x.channels_last()) {
    for (int64_t c = 0; c < x.channels; ++c) {
      const S* from = x.at<S>(b, c, first);
      // Rows lie on different pages, beyond which the processor does not prefetch by itself.
      const S* next = x.at<S>(b, std::min(c + 1, x.channels - 1), first);
      T* to = panel + c * stride;
      int64_t n = 0;
      for (; n + width <= count; n += width) {
        __builtin_prefetch(next + n);
        Vec<T>::load(from + n).store(to + n);
      }
      if (n < count) Vec<T>::load_partial(from + n, count - n).store(to + n);
    }
    return;
  }
  for (int64_t n = 0; n < count; n += width) {
    const int64_t pixels = std::min<int64_t>(width, count - n);
    for (int64_t c = 0; c < x.channels; c += width) {
      const int64_t channels = std::min<int64_t>(width, x.channels - c);
      Vec<T> block[width];
      if (channels == width && pixels == width) {
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) block[i] = Vec<T>::load(x.at<S>(b, c, first + n + i));
      } else {
        for (int i = 0; i < width; ++i) {
          block[i] = i < pixels ? Vec<T>::load_partial(x.at<S>(b, c, first + n + i), channels)
                                : Vec<T>(T(0));
        }
      }
      transpose(block);
      if (channels == width) {
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) block[i].store(panel + (c + i) * stride + n);
      } else {
        for (int64_t i = 0; i < channels; ++i) block[i].store(panel + (c + i) * stride + n);
      }
    }
  }
}

// to[n*to_stride + i] = panel[i*stride + n] for i < rows and n < columns. `columns` and `to_stride` are
// multiples of the vector width; what lies between `rows` and the next one becomes zero.
template <class T>
inline void transpose_panel(
    const T* panel, int64_t stride, int64_t rows, int64_t columns, T* to, int64_t to_stride) {
  constexpr int width = Vec<T>::width;
  for (int64_t i = 0; i < rows; i += width) {
    for (int64_t n = 0; n < columns; n += width) {
      Vec<T> block[width];
#pragma GCC unroll 16
      for (int r = 0; r < width; ++r) {
        block[r] = i + r < rows ? Vec<T>::load(panel + (i + r) * stride + n) : Vec<T>(T(0));
      }
      transpose(block);
#pragma GCC unroll 16
      for (int r = 0; r < width; ++r) block[r].store(to + (n + r) * to_stride + i);
    }
  }
}

// x[b, c, first + n] = panel[c*stride + n] for n < count, rounded to S.
template <class S, class T = Compute<S>>
inline void store_panel(
    const FeatureMap& x, int64_t b, int64_t first, int64_t count, const T* panel, int64_t stride) {
  constexpr int width = Vec<T>::width;
  if (!x.channels_last()) {
    for (int64_t c = 0; c < x.channels; ++c) {
      S* to = x.mutable_at<S>(b, c, first);
      const T* from = panel + c * stride;
      int64_t n = 0;
      for (; n + width <= count; n += width) Vec<T>::load(from + n).store(to + n);
      if (n < count) Vec<T>::load(from + n).store_partial(to + n, count - n);
    }
    return;
  }
  for (int64_t n = 0; n < count; n += width) {
    const int64_t pixels = std::min<int64_t>(width, count - n);
    for (int64_t c = 0; c < x.channels; c += width) {
      const int64_t channels = std::min<int64_t>(width, x.channels - c);
      Vec<T> block[width];
      if (channels == width) {
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) block[i] = Vec<T>::load(panel + (c + i) * stride + n);
      } else {
        for (int i = 0; i < width; ++i) {
          block[i] = i < channels ? Vec<T>::load(panel + (c + i) * stride + n) : Vec<T>(T(0));
        }
      }
      transpose(block);
      if (channels == width && pixels == width) {
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) block[i].store(x.mutable_at<S>(b, c, first + n + i));
      } else {
        for (int64_t i = 0; i < pixels; ++i) {
          block[i].store_partial(x.mutable_at<S>(b, c, first + n + i), channels);
        }
      }
    }
  }
}

}  // namespace EAMNET_LEVEL
}  // namespace eamnet
