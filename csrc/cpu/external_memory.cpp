// The passes over pixels of attention to an external memory, and of its gradient. Definition and
// algebra: eamnet_kernels/reference/external_memory.py, docs/algebra.md sections 3 and 4.
//
//   L = K X                    logits (S x N)            E = exp(L - lse), lse per slot over pixels
//   A = E / (1e-9 + Σ_s E)     attention, its divisor per pixel
//   lse     log-sum-exp of L over the pixels of each slot
//   scores  Σ_n |M_vᵀ A|       per channel, from which the kept channels are chosen
//   Y       R A                R = W_out diag(kept) M_vᵀ, C x S per sample
//   dR      dY Aᵀ              dA = Rᵀ dY, dE = (dA - Σ_s dA A) / (1e-9 + Σ_s E)
//   row     Σ_n E dE           dL = E (dE - row)
//   dX      Kᵀ dL              dK = dL Xᵀ
//
// Per pixel, in multiples of S C multiply-adds, and numbers read or written (r + w):
//   lse 1, C r; scores 2, C r; Y 2, C r + C w             forward  5, 4 C
//   dR and row 3, 2 C r; dX and dK 4, 2 C r + C w         backward 7, 5 C
// The softmax runs over pixels and the division over slots, so each needs a pass of its own, and the
// choice of channels another. The direct form takes 3 S C + C² forward, but writes L, A and F.
//
// Recomputed: E in every pass, and L, unless it is small beside X: storing it saves the forward two
// products of five and the reading of X, and costs S/C of X in memory and 3 S numbers of traffic. It
// is kept for the duration of the forward where that is at most half of X (see the host part). A and
// F are never written.
//
// Sums over pixels are made per lane within a tile, tile after tile within a slab, and over slabs in
// double precision; slabs depend on the sizes alone, so any number of threads gives the same bits.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/feature_map.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace eamnet {

// Pointers are to T, the type that x is computed in, or else as it says. Fields that a pass does not use are null.
struct Memory {
  FeatureMap x;
  int64_t slots;
  const void* key;      // (S, C)
  const double* lse;    // (B, S), whatever T is
  const void* readout;  // (B, C, S): R; for the scores (C, S): M_vᵀ, the same for all samples
  FeatureMap grad_y;
  const void* row;  // (B, S)
  FeatureMap y;     // the map that is written: Y or dX
  void* logits;     // (B, S, N) L, written by the first pass and read by the others; or null
  void* sums;       // lse (B, S) double; scores (B, C); dR (B, C, S); dK (S, C)
  void* row_sums;   // (B, S)
};
EAMNET_KERNEL(memory_lse, Memory)
EAMNET_KERNEL(memory_scores, Memory)
EAMNET_KERNEL(memory_read, Memory)
EAMNET_KERNEL(memory_backward_sums, Memory)
EAMNET_KERNEL(memory_backward, Memory)

namespace EAMNET_LEVEL {
namespace {

constexpr double kEpsilon = 1e-9;  // EANet's, reference/external_memory.py: EPSILON

// A tile's panels together: about this many bytes, of a second-level cache of 1 to 2 MiB.
constexpr int64_t kPanelBytes = 512 << 10;

// How the pixels of a sample are cut: tiles that fit the cache, slabs of tiles that sum by themselves.
template <class T>
struct Cut {
  int64_t tile, tiles, stride, slab_tiles, slabs;

  // `rows`: of all panels of a tile.
  Cut(const FeatureMap& x, int64_t rows) {
    constexpr int64_t block = kColumnBlock<T>;
    const int64_t fits = kPanelBytes / static_cast<int64_t>(sizeof(T)) / rows / block;
    tile = std::min(std::clamp<int64_t>(fits, 1, 1024 / block) * block,
                    round_up(std::max<int64_t>(x.pixels, 1), Vec<T>::width));
    tiles = ceil_div(x.pixels, tile);
    // Not a power of two, whose rows would evict one another.
    stride = round_up(tile, 64 / sizeof(T)) + 64 / sizeof(T);
    slab_tiles = std::max<int64_t>(1, tiles * std::max<int64_t>(x.batch, 1) / 32);
    slabs = ceil_div(tiles, slab_tiles);
  }
};

// One tile of pixels: the logits, their exponentials and what divides them.
template <class S, class T>
struct Tile {
  using V = Vec<T>;
  int64_t C, slots, stride, count = 0, padded = 0;
  T *x, *e, *inverse, *high, *low;

  static size_t bytes(int64_t C, int64_t slots, int64_t stride) {
    return Scratch::bytes<T>(C * stride) + Scratch::bytes<T>(slots * stride) +
        Scratch::bytes<T>(stride) + 2 * Scratch::bytes<T>(slots);
  }
  Tile(Scratch& scratch, int64_t C, int64_t slots, int64_t stride)
      : C(C), slots(slots), stride(stride) {
    x = scratch.take<T>(C * stride);
    e = scratch.take<T>(slots * stride);
    inverse = scratch.take<T>(stride);
    high = scratch.take<T>(slots);
    low = scratch.take<T>(slots);
  }

  // x and the logits, in the panel of e; columns from count to padded are those of x = 0.
  template <class Sink>
  void logits(const FeatureMap& map, int64_t b, int64_t first, int64_t n, const PackedLeft<T>& key,
              Sink&& sink) {
    count = n;
    padded = round_up(n, V::width);
    load_panel<S>(map, b, first, n, x, stride);
    gemm<T>(slots, padded, C, key, Rows<T>{x, stride}, sink);
  }

  // e = exp(logits - lse), inverse = 1 / (1e-9 + sum over slots); e is 0 in padded columns. x is
  // loaded only where the logits were not kept.
  void attend(const Memory& m, int64_t b, int64_t first, int64_t n, const PackedLeft<T>& key) {
    const double* lse = m.lse + b * slots;
    // In two parts: rounded to float32, lse alone would cost as much precision as all the rest.
    for (int64_t s = 0; s < slots; ++s) {
      high[s] = static_cast<T>(lse[s]);
      low[s] = static_cast<T>(lse[s] - double(high[s]));
    }
    if (m.logits == nullptr) {
      logits(m.x, b, first, n, key, [&](int64_t s, int64_t j, V value, auto) {
        weight(s, value).store(e + s * stride + j);
      });
    } else {
      count = n;
      padded = round_up(n, V::width);
      for (int64_t s = 0; s < slots; ++s) {
        const T* row = static_cast<const T*>(m.logits) + (b * slots + s) * m.x.pixels + first;
        int64_t j = 0;
        for (; j + V::width <= n; j += V::width) {
          weight(s, V::load(row + j)).store(e + s * stride + j);
        }
        if (j < n) weight(s, V::load_partial(row + j, n - j)).store(e + s * stride + j);
      }
    }
    if (padded > count) {
      for (int64_t s = 0; s < slots; ++s) {
        std::fill(e + s * stride + count, e + s * stride + padded, T(0));
      }
    }
    // In runs of eight, whose sums lose less than one long chain.
    for (int64_t j = 0; j < padded; j += V::width) {
      V total = V(T(kEpsilon));
      for (int64_t s = 0; s < slots; s += 8) {
        V run = V::load(e + s * stride + j);
        for (int64_t i = s + 1; i < std::min(s + 8, slots); ++i) run += V::load(e + i * stride + j);
        total += run;
      }
      (V(T(1)) / total).store(inverse + j);
    }
  }

 private:
  EAMNET_INLINE V weight(int64_t s, V logit) const { return exp((logit - V(high[s])) - V(low[s])); }
};

// dA of a tile (S x n), turned into E dE; `row`, where given, gets the sums of E dE over the tile.
template <class S, class T>
struct TileGradient {
  using V = Vec<T>;
  T *grad_y, *ede, *dot;

  static size_t bytes(int64_t C, int64_t slots, int64_t stride) {
    return Tile<S, T>::bytes(C, slots, stride);
  }
  TileGradient(Scratch& scratch, int64_t C, int64_t slots, int64_t stride) {
    grad_y = scratch.take<T>(C * stride);
    ede = scratch.take<T>(slots * stride);
    dot = scratch.take<T>(stride);
  }

  void compute(const FeatureMap& map, int64_t b, int64_t first, const Tile<S, T>& tile,
               const PackedLeft<T>& readout_transposed, T* row) {
    const int64_t stride = tile.stride, padded = tile.padded;
    load_panel<S>(map, b, first, tile.count, grad_y, stride);
    std::fill(dot, dot + stride, T(0));
    gemm<T>(tile.slots, padded, tile.C, readout_transposed, Rows<T>{grad_y, stride},
            [&](int64_t s, int64_t j, V value, auto) {
              value.store(ede + s * stride + j);
              fma(value, V::load(tile.e + s * stride + j), V::load(dot + j)).store(dot + j);
            });
    // dot = Σ_s dA A
    for (int64_t j = 0; j < padded; j += V::width) {
      (V::load(dot + j) * V::load(tile.inverse + j)).store(dot + j);
    }
    for (int64_t s = 0; s < tile.slots; ++s) {
      V total(T(0));
      for (int64_t j = 0; j < padded; j += V::width) {
        const V de = (V::load(ede + s * stride + j) - V::load(dot + j)) * V::load(tile.inverse + j);
        const V value = V::load(tile.e + s * stride + j) * de;
        value.store(ede + s * stride + j);
        total += value;
      }
      if (row != nullptr) row[s] += sum(total);
    }
  }
};

template <class T>
PackedLeft<T> packed_key(const Memory& m, std::vector<T>& storage) {
  const int64_t C = m.x.channels;
  storage.resize(static_cast<size_t>(PackedLeft<T>::size(m.slots, C)));
  return pack_left<T>(m.slots, C, static_cast<const T*>(m.key), C, 1, storage.data());
}

// The C x S matrices at m.readout, `matrices` of them, as the left operand of R A; transposed: of
// Rᵀ dY.
template <class T>
std::vector<PackedLeft<T>> packed_readout(
    const Memory& m, int64_t matrices, bool transposed, std::vector<T>& storage) {
  const int64_t C = m.x.channels, S = m.slots;
  const int64_t size = transposed ? PackedLeft<T>::size(S, C) : PackedLeft<T>::size(C, S);
  storage.resize(static_cast<size_t>(size * matrices));
  std::vector<PackedLeft<T>> packed;
  for (int64_t b = 0; b < matrices; ++b) {
    const T* from = static_cast<const T*>(m.readout) + b * C * S;
    T* to = storage.data() + b * size;
    packed.push_back(transposed ? pack_left<T>(S, C, from, 1, S, to)
                                : pack_left<T>(C, S, from, S, 1, to));
  }
  return packed;
}

// out[i] = Σ over slabs of partials[slab, i], for `size` values of each of `groups` groups of slabs.
template <class T>
void sum_slabs(const std::vector<T>& partials, int64_t groups, int64_t slabs, int64_t size, T* out) {
  constexpr int64_t piece = 4096;
  const int64_t pieces = ceil_div(size, piece);
  parallel_for(groups * pieces, 0, [&](int64_t chunk, Scratch&) {
    const int64_t g = chunk / pieces, begin = chunk % pieces * piece;
    for (int64_t i = begin; i < std::min(begin + piece, size); ++i) {
      double total = 0;
      for (int64_t s = 0; s < slabs; ++s) total += partials[(g * slabs + s) * size + i];
      out[g * size + i] = static_cast<T>(total);
    }
  });
}

// ---------------------------------------------------------------------------------------------- passes

template <class S, class T = Compute<S>>
void lse(const Memory& m) {
  using V = Vec<T>;
  const FeatureMap& x = m.x;
  const int64_t slots = m.slots;
  std::vector<T> storage;
  const PackedLeft<T> key = packed_key<T>(m, storage);
  const Cut<T> cut(x, x.channels + slots);
  // Of each slab and slot: the largest logit, and the sum of the exponentials relative to it.
  std::vector<T> largest(static_cast<size_t>(x.batch * cut.slabs * slots));
  std::vector<double> sums(largest.size());
  parallel_for(
      x.batch * cut.slabs, Tile<S, T>::bytes(x.channels, slots, cut.stride),
      [&](int64_t chunk, Scratch& scratch) {
        const int64_t b = chunk / cut.slabs, slab = chunk % cut.slabs;
        Tile<S, T> tile(scratch, x.channels, slots, cut.stride);
        T* top = largest.data() + chunk * slots;
        double* weight = sums.data() + chunk * slots;
        std::fill(top, top + slots, -std::numeric_limits<T>::infinity());
        const int64_t end = std::min((slab + 1) * cut.slab_tiles, cut.tiles);
        for (int64_t t = slab * cut.slab_tiles; t < end; ++t) {
          const int64_t first = t * cut.tile;
          tile.logits(x, b, first, std::min(cut.tile, x.pixels - first), key,
                      [&](int64_t s, int64_t j, V value, auto) {
                        value.store(tile.e + s * cut.stride + j);
                      });
          for (int64_t s = 0; s < slots; ++s) {
            T* row = tile.e + s * cut.stride;
            if (m.logits != nullptr) {
              std::copy(row, row + tile.count,
                        static_cast<T*>(m.logits) + (b * slots + s) * x.pixels + first);
            }
            std::fill(row + tile.count, row + tile.padded, -std::numeric_limits<T>::infinity());
            V high = V::load(row);
            for (int64_t j = V::width; j < tile.padded; j += V::width) {
              high = maximum(high, V::load(row + j));
            }
            const T before = top[s];
            top[s] = maximum_scalar(before, max(high));
            if (top[s] == -std::numeric_limits<T>::infinity()) continue;  // no weight so far
            V total(T(0));
            for (int64_t j = 0; j < tile.padded; j += V::width) {
              total += exp(V::load(row + j) - V(top[s]));
            }
            weight[s] = weight[s] * std::exp(double(before) - double(top[s])) + double(sum(total));
          }
        }
      });
  double* out = static_cast<double*>(m.sums);
  for (int64_t b = 0; b < x.batch; ++b) {
    for (int64_t s = 0; s < slots; ++s) {
      T top = -std::numeric_limits<T>::infinity();
      double sum = 0;
      for (int64_t k = b * cut.slabs; k < (b + 1) * cut.slabs; ++k) {
        top = maximum_scalar(top, largest[k * slots + s]);
      }
      for (int64_t k = b * cut.slabs; k < (b + 1) * cut.slabs; ++k) {
        sum += sums[k * slots + s] * std::exp(double(largest[k * slots + s]) - double(top));
      }
      out[b * slots + s] = double(top) + std::log(sum);
    }
  }
}

template <class S, class T = Compute<S>>
void scores(const Memory& m) {
  using V = Vec<T>;
  const FeatureMap& x = m.x;
  const int64_t C = x.channels, slots = m.slots;
  std::vector<T> key_storage, readout_storage;
  const PackedLeft<T> key = packed_key<T>(m, key_storage);
  const PackedLeft<T> value = packed_readout<T>(m, 1, false, readout_storage)[0];
  const Cut<T> cut(x, C + slots);
  std::vector<T> partials(static_cast<size_t>(x.batch * cut.slabs * C));
  const size_t bytes = Tile<S, T>::bytes(C, slots, cut.stride) + Scratch::bytes<T>(C * V::width);
  parallel_for(x.batch * cut.slabs, bytes, [&](int64_t chunk, Scratch& scratch) {
    const int64_t b = chunk / cut.slabs, slab = chunk % cut.slabs;
    Tile<S, T> tile(scratch, C, slots, cut.stride);
    T* sums = scratch.take<T>(C * V::width);
    std::fill(sums, sums + C * V::width, T(0));
    const int64_t end = std::min((slab + 1) * cut.slab_tiles, cut.tiles);
    for (int64_t t = slab * cut.slab_tiles; t < end; ++t) {
      const int64_t first = t * cut.tile;
      tile.attend(m, b, first, std::min(cut.tile, x.pixels - first), key);
      gemm<T>(C, tile.padded, slots, value, Rows<T>{tile.e, cut.stride},
              [&](int64_t c, int64_t j, V feature, auto) {
                T* at = sums + c * V::width;
                (V::load(at) + abs(feature * V::load(tile.inverse + j))).store(at);
              });
    }
    for (int64_t c = 0; c < C; ++c) {
      partials[chunk * C + c] = sum(V::load(sums + c * V::width));
    }
  });
  sum_slabs(partials, x.batch, cut.slabs, C, static_cast<T*>(m.sums));
}

template <class S, class T = Compute<S>>
void read(const Memory& m) {
  using V = Vec<T>;
  const FeatureMap& x = m.x;
  const int64_t C = x.channels, slots = m.slots;
  std::vector<T> key_storage, readout_storage;
  const PackedLeft<T> key = packed_key<T>(m, key_storage);
  const auto readout = packed_readout<T>(m, x.batch, false, readout_storage);
  const Cut<T> cut(x, C + slots);
  parallel_for(
      x.batch * cut.tiles, Tile<S, T>::bytes(C, slots, cut.stride),
      [&](int64_t chunk, Scratch& scratch) {
        const int64_t b = chunk / cut.tiles, first = chunk % cut.tiles * cut.tile;
        Tile<S, T> tile(scratch, C, slots, cut.stride);
        tile.attend(m, b, first, std::min(cut.tile, x.pixels - first), key);
        // x is not needed any more: its panel takes the result.
        gemm<T>(C, tile.padded, slots, readout[b], Rows<T>{tile.e, cut.stride},
                [&](int64_t c, int64_t j, V value, auto) {
                  (value * V::load(tile.inverse + j)).store(tile.x + c * cut.stride + j);
                });
        store_panel<S>(m.y, b, first, tile.count, tile.x, cut.stride);
      });
}

template <class S, class T = Compute<S>>
void backward_sums(const Memory& m) {
  using V = Vec<T>;
  const FeatureMap& x = m.x;
  const int64_t C = x.channels, slots = m.slots;
  std::vector<T> key_storage, readout_storage;
  const PackedLeft<T> key = packed_key<T>(m, key_storage);
  const auto readout = packed_readout<T>(m, x.batch, true, readout_storage);
  const Cut<T> cut(x, 2 * (C + slots));
  std::vector<T> products(static_cast<size_t>(x.batch * cut.slabs * C * slots));
  std::vector<T> rows(static_cast<size_t>(x.batch * cut.slabs * slots));
  const size_t bytes =
      Tile<S, T>::bytes(C, slots, cut.stride) + TileGradient<S, T>::bytes(C, slots, cut.stride);
  parallel_for(x.batch * cut.slabs, bytes, [&](int64_t chunk, Scratch& scratch) {
    const int64_t b = chunk / cut.slabs, slab = chunk % cut.slabs;
    Tile<S, T> tile(scratch, C, slots, cut.stride);
    TileGradient<S, T> gradient(scratch, C, slots, cut.stride);
    T* product = products.data() + chunk * C * slots;
    const int64_t end = std::min((slab + 1) * cut.slab_tiles, cut.tiles);
    for (int64_t t = slab * cut.slab_tiles; t < end; ++t) {
      const int64_t first = t * cut.tile;
      tile.attend(m, b, first, std::min(cut.tile, x.pixels - first), key);
      gradient.compute(m.grad_y, b, first, tile, readout[b], rows.data() + chunk * slots);
      for (int64_t s = 0; s < slots; ++s) {
        for (int64_t j = 0; j < tile.padded; j += V::width) {
          T* weight = tile.e + s * cut.stride + j;
          (V::load(weight) * V::load(tile.inverse + j)).store(weight);
        }
      }
      gemm_transposed<T>(C, slots, tile.padded, Rows<T>{gradient.grad_y, cut.stride},
                         Rows<T>{tile.e, cut.stride},
                         [&](int64_t c, int64_t s, T value) { product[c * slots + s] += value; });
    }
  });
  sum_slabs(products, x.batch, cut.slabs, C * slots, static_cast<T*>(m.sums));
  sum_slabs(rows, x.batch, cut.slabs, slots, static_cast<T*>(m.row_sums));
}

template <class S, class T = Compute<S>>
void backward(const Memory& m) {
  using V = Vec<T>;
  const FeatureMap& x = m.x;
  const int64_t C = x.channels, slots = m.slots;
  std::vector<T> key_storage, transposed_storage, readout_storage;
  const PackedLeft<T> key = packed_key<T>(m, key_storage);
  transposed_storage.resize(static_cast<size_t>(PackedLeft<T>::size(C, slots)));
  const PackedLeft<T> key_transposed =
      pack_left<T>(C, slots, static_cast<const T*>(m.key), 1, C, transposed_storage.data());
  const auto readout = packed_readout<T>(m, x.batch, true, readout_storage);
  const Cut<T> cut(x, 2 * (C + slots));
  std::vector<T> products(static_cast<size_t>(x.batch * cut.slabs * slots * C));
  const size_t bytes =
      Tile<S, T>::bytes(C, slots, cut.stride) + TileGradient<S, T>::bytes(C, slots, cut.stride);
  parallel_for(x.batch * cut.slabs, bytes, [&](int64_t chunk, Scratch& scratch) {
    const int64_t b = chunk / cut.slabs, slab = chunk % cut.slabs;
    Tile<S, T> tile(scratch, C, slots, cut.stride);
    TileGradient<S, T> gradient(scratch, C, slots, cut.stride);
    const T* row = static_cast<const T*>(m.row) + b * slots;
    T* product = products.data() + chunk * slots * C;
    const int64_t end = std::min((slab + 1) * cut.slab_tiles, cut.tiles);
    for (int64_t t = slab * cut.slab_tiles; t < end; ++t) {
      const int64_t first = t * cut.tile;
      tile.attend(m, b, first, std::min(cut.tile, x.pixels - first), key);
      gradient.compute(m.grad_y, b, first, tile, readout[b], nullptr);
      // dL = E dE - row E
      for (int64_t s = 0; s < slots; ++s) {
        const V r(row[s]);
        for (int64_t j = 0; j < tile.padded; j += V::width) {
          T* value = gradient.ede + s * cut.stride + j;
          (V::load(value) - r * V::load(tile.e + s * cut.stride + j)).store(value);
        }
      }
      const Rows<T> grad_logits{gradient.ede, cut.stride};
      gemm_transposed<T>(slots, C, tile.padded, grad_logits, Rows<T>{tile.x, cut.stride},
                         [&](int64_t s, int64_t c, T value) { product[s * C + c] += value; });
      // dY is no longer needed: its panel takes dX.
      gemm<T>(C, tile.padded, slots, key_transposed, grad_logits,
              store_to(gradient.grad_y, cut.stride));
      store_panel<S>(m.y, b, first, tile.count, gradient.grad_y, cut.stride);
    }
  });
  sum_slabs(products, 1, x.batch * cut.slabs, slots * C, static_cast<T*>(m.sums));
}

}  // namespace

#define EAMNET_PASS(name, pass)                                     \
  void name(const Memory& m) {                                      \
    visit(m.x.dtype, [&]<class S>() { pass<S>(m); });               \
  }
EAMNET_PASS(memory_lse, lse)
EAMNET_PASS(memory_scores, scores)
EAMNET_PASS(memory_read, read)
EAMNET_PASS(memory_backward_sums, backward_sums)
EAMNET_PASS(memory_backward, backward)
#undef EAMNET_PASS

}  // namespace EAMNET_LEVEL
}  // namespace eamnet

#ifdef EAMNET_HOST
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/tensor.h"

namespace eamnet {
namespace {

ScalarType memory_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Memory memory_of(const Tensor& x, const Tensor& key) {
  Memory m{};
  m.x = feature_map(x, "x");
  STD_TORCH_CHECK(key.dim() == 2, "key has ", key.dim(), " dimensions; accepted is (S, C)");
  m.slots = key.size(0);
  check_operand(key, "key", {m.slots, x.size(1)}, memory_dtype(x));
  m.key = key.const_data_ptr();
  return m;
}

// What a pass after the first needs in addition.
Memory memory_of(const Tensor& x, const Tensor& key, const Tensor& readout, const Tensor& lse) {
  Memory m = memory_of(x, key);
  check_operand(readout, "readout", {x.size(0), x.size(1), m.slots}, memory_dtype(x));
  check_operand(lse, "lse", {x.size(0), m.slots}, ScalarType::Double);
  m.readout = readout.const_data_ptr();
  m.lse = static_cast<const double*>(lse.const_data_ptr());
  return m;
}

FeatureMap gradient_map(const Tensor& grad, const Tensor& x) {
  bool same = grad.scalar_type() == x.scalar_type() && grad.dim() == 4;
  for (int d = 0; d < 4 && same; ++d) same = grad.size(d) == x.size(d);
  STD_TORCH_CHECK(same, "grad_out must have the shape and dtype of x");
  return feature_map(grad, "grad_out");
}

// Logits that the first pass leaves for the others: (B, S, N), or empty where they are recomputed.
void take_logits(Memory& m, const Tensor& x, const Tensor& logits) {
  if (logits.numel() == 0) return;
  check_operand(logits, "logits", {x.size(0), m.slots, m.x.pixels}, memory_dtype(x));
  m.logits = logits.mutable_data_ptr();
}

std::tuple<Tensor, Tensor> lse(const Tensor& x, const Tensor& key) {
  Memory m = memory_of(x, key);
  Tensor out = new_tensor({x.size(0), m.slots}, ScalarType::Double);
  const bool keep = 2 * m.slots <= x.size(1);
  Tensor logits = new_tensor({keep ? x.size(0) : 0, m.slots, m.x.pixels}, memory_dtype(x));
  take_logits(m, x, logits);
  m.sums = out.mutable_data_ptr();
  memory_lse(m);
  return {out, logits};
}

Tensor scores(
    const Tensor& x, const Tensor& key, const Tensor& value, const Tensor& lse,
    const Tensor& logits) {
  Memory m = memory_of(x, key);
  take_logits(m, x, logits);
  check_operand(value, "value", {x.size(1), m.slots}, memory_dtype(x));
  check_operand(lse, "lse", {x.size(0), m.slots}, ScalarType::Double);
  m.readout = value.const_data_ptr();
  m.lse = static_cast<const double*>(lse.const_data_ptr());
  Tensor out = new_tensor({x.size(0), x.size(1)}, memory_dtype(x));
  m.sums = out.mutable_data_ptr();
  memory_scores(m);
  return out;
}

Tensor map_like(const Tensor& x, bool channels_last) {
  return new_tensor({x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type(), channels_last);
}

Tensor read(
    const Tensor& x, const Tensor& key, const Tensor& readout, const Tensor& lse,
    const Tensor& logits, bool channels_last) {
  Memory m = memory_of(x, key, readout, lse);
  take_logits(m, x, logits);
  Tensor out = map_like(x, channels_last);
  m.y = feature_map(out, "out");
  memory_read(m);
  return out;
}

std::tuple<Tensor, Tensor> backward_sums(
    const Tensor& grad_out, const Tensor& x, const Tensor& key, const Tensor& readout,
    const Tensor& lse) {
  Memory m = memory_of(x, key, readout, lse);
  m.grad_y = gradient_map(grad_out, x);
  Tensor grad_readout = new_tensor({x.size(0), x.size(1), m.slots}, memory_dtype(x));
  Tensor row = new_tensor({x.size(0), m.slots}, memory_dtype(x));
  m.sums = grad_readout.mutable_data_ptr();
  m.row_sums = row.mutable_data_ptr();
  memory_backward_sums(m);
  return {grad_readout, row};
}

std::tuple<Tensor, Tensor> backward(
    const Tensor& grad_out, const Tensor& x, const Tensor& key, const Tensor& readout,
    const Tensor& lse, const Tensor& row, bool channels_last) {
  Memory m = memory_of(x, key, readout, lse);
  m.grad_y = gradient_map(grad_out, x);
  check_operand(row, "row", {x.size(0), m.slots}, memory_dtype(x));
  m.row = row.const_data_ptr();
  Tensor grad_x = map_like(x, channels_last);
  Tensor grad_key = new_tensor({m.slots, x.size(1)}, memory_dtype(x));
  m.y = feature_map(grad_x, "grad_x");
  m.sums = grad_key.mutable_data_ptr();
  memory_backward(m);
  return {grad_x, grad_key};
}

}  // namespace
}  // namespace eamnet

STABLE_TORCH_LIBRARY_IMPL(eamnet_kernels_native, CPU, m) {
  m.impl("external_memory_lse", TORCH_BOX(&eamnet::lse));
  m.impl("external_memory_scores", TORCH_BOX(&eamnet::scores));
  m.impl("external_memory_read", TORCH_BOX(&eamnet::read));
  m.impl("external_memory_backward_sums", TORCH_BOX(&eamnet::backward_sums));
  m.impl("external_memory_backward", TORCH_BOX(&eamnet::backward));
}
#endif  // EAMNET_HOST
