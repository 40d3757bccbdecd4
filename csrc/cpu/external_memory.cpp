// Attention to an external memory, and its gradient. Definition and algebra:
// eamnet_kernels/reference/external_memory.py, docs/algebra.md sections 3 and 4.
//
//   L = K X                    logits (S x N)            E = exp(L - lse), lse per slot over pixels
//   A = E / (1e-9 + Σ_s E)     attention, its divisor per pixel
//   F = M_vᵀ A                 features (C x N); Σ_n |F| decides which `top_k` channels are kept
//   Y = R A, or W_kept F       R = W_out diag(kept) M_vᵀ, C x S per sample; W_kept C x top_k
//   dR = dY Aᵀ                 dA = Rᵀ dY, dE = (dA - Σ_s dA A) / (1e-9 + Σ_s E)
//   row = Σ_n E dE             dL = E (dE - row)
//   dX = Kᵀ dL                 dK = dL Xᵀ
//
// The softmax runs over pixels and the division over slots, so each needs a pass of its own, and the
// choice of channels another. Per pixel, in multiples of S C multiply-adds: L 1, F 1 (only where
// channels are chosen), Y 1, or top_k / S by way of F where that is less; dA, dR, dX, dK and L again 5.
// The direct form takes 3 S C with C² for Y, and writes L, A and F of the whole batch.
//
// Kept between the passes, for as many samples at a time as fit the cache and in blocks of one tile of
// pixels: E, which A then overwrites, and F where Y is made from it; in the backward E and E dE. Each
// exponential is computed once: relative to the largest logit of its tile in the first pass, and
// brought to the sample's lse by one factor per tile and slot in the second. Computed again in the
// backward: L and E, whose storage over the whole batch is up to twice that of X.
//
// Sums over pixels are made per lane within a tile and over tiles, or slabs of tiles, in order and in
// double precision; tiles depend on the sizes alone, so any number of threads gives the same bits.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/feature_map.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace eamnet {

// Pointers are to T, the type that x is computed in, or else as it says.
struct MemoryForward {
  FeatureMap x;
  int64_t slots;
  int64_t top_k;
  const void* key;    // (S, C)
  const void* value;  // (S, C)
  const void* w_out;  // (C, C)
  FeatureMap y;
  void* lse;   // (B, S)
  bool* kept;  // (B, C)
};
struct MemoryBackward {
  FeatureMap grad_y;
  FeatureMap x;
  int64_t slots;
  const void* key;      // (S, C)
  const void* readout;  // (B, C, S): R
  const void* lse;      // (B, S)
  FeatureMap grad_x;
  void* grad_key;      // (S, C)
  void* grad_readout;  // (B, C, S)
};
EAMNET_KERNEL(memory_forward, MemoryForward)
EAMNET_KERNEL(memory_backward, MemoryBackward)

namespace EAMNET_LEVEL {
namespace {

constexpr double kEpsilon = 1e-9;  // EANet's, reference/external_memory.py: EPSILON

// A tile's panels together: about this many bytes, of a second-level cache of 512 KiB or more.
constexpr int64_t kPanelBytes = 256 << 10;
// What the passes leave for each other, where one sample does not need more.
constexpr int64_t kGroupBytes = 8 << 20;

// How the pixels are cut: tiles that fit the cache, slabs of tiles that sum by themselves, groups of
// samples of which all tiles are kept.
template <class T>
struct Cut {
  int64_t pixels, tile, tiles, stride, group, slab_tiles, slabs;

  // `panels`: rows of all panels of a tile; `kept`: those of them that stay between the passes.
  Cut(const FeatureMap& x, int64_t panels, int64_t kept) : pixels(x.pixels) {
    constexpr int64_t block = kColumnBlock<T>;
    const int64_t fits = kPanelBytes / static_cast<int64_t>(sizeof(T)) / panels / block;
    tile = std::min(std::clamp<int64_t>(fits, 1, 1024 / block) * block,
                    round_up(std::max<int64_t>(x.pixels, 1), Vec<T>::width));
    tiles = ceil_div(x.pixels, tile);
    // Not a power of two, whose rows would evict one another.
    stride = round_up(tile, 64 / sizeof(T)) + 64 / sizeof(T);
    const int64_t sample = tiles * kept * stride * static_cast<int64_t>(sizeof(T));
    group = std::clamp<int64_t>(kGroupBytes / sample, 1, std::max<int64_t>(x.batch, 1));
    slab_tiles = std::max<int64_t>(1, ceil_div(tiles * group, 16));
    slabs = ceil_div(tiles, slab_tiles);
  }
  int64_t first(int64_t t) const { return t * tile; }
  int64_t count(int64_t t) const { return std::min(tile, pixels - t * tile); }
  int64_t padded(int64_t t) const { return round_up(count(t), Vec<T>::width); }
  size_t bytes(int64_t kept) const {
    return Scratch::bytes<T>(group * tiles * kept * stride);
  }
};

template <class T, class Left, class Right, class Sink>
void product(int64_t M, int64_t N, int64_t K, const Left& left, const Right& right, Sink&& sink) {
  gemm<T, Loop::apart>(M, N, K, left, right, sink);
}

template <class Left, class T>
Left packed(int64_t M, int64_t K, const T* a, int64_t row_stride, int64_t depth_stride,
            std::vector<typename Left::Value>& storage) {
  storage.resize(static_cast<size_t>(Left::size(M, K)));
  return Left::pack(M, K, a, row_stride, depth_stride, storage.data());
}

// 1 / (1e-9 + Σ_s rows[s, j..]) for a vector of pixels. In runs of eight, whose sums lose less than
// one long chain.
template <class T>
EAMNET_INLINE Vec<T> inverse_total(const T* rows, int64_t stride, int64_t slots) {
  using V = Vec<T>;
  V total = V(T(kEpsilon));
  for (int64_t s = 0; s < slots; s += 8) {
    V run = V::load(rows + s * stride);
    for (int64_t i = s + 1; i < std::min(s + 8, slots); ++i) run += V::load(rows + i * stride);
    total += run;
  }
  return V(T(1)) / total;
}

// ---------------------------------------------------------------------------------------------- forward

// Logits (slots x padded) to their exponentials relative to the largest of each slot, with zeros
// beyond `count`; the largest and the sums, one per slot.
template <class T>
void exponentials(
    T* e, int64_t stride, int64_t slots, int64_t count, int64_t padded, T* top, T* total) {
  using V = Vec<T>;
  constexpr T none = -std::numeric_limits<T>::infinity();
  for (int64_t s = 0; s < slots; ++s) {
    T* row = e + s * stride;
    std::fill(row + count, row + padded, none);
    V high = V::load(row);
    for (int64_t j = V::width; j < padded; j += V::width) high = maximum(high, V::load(row + j));
    top[s] = max(high);
    if (top[s] == none) {  // no weight in this tile; -inf less itself would be NaN
      std::fill(row, row + padded, T(0));
      total[s] = 0;
      continue;
    }
    const V reference(top[s]);
    V run(T(0));
    for (int64_t j = 0; j < padded; j += V::width) {
      const V value = exp_weight(V::load(row + j) - reference);
      value.store(row + j);
      run += value;
    }
    total[s] = sum(run);
  }
}

// The lse of each slot of one sample, from the largest logits and sums of its tiles, (tiles x slots)
// each; the former become the factors that bring the tiles' exponentials to it. NaN where a logit is
// infinite, as the softmax is NaN for all pixels there.
template <class T>
void normalize(int64_t tiles, int64_t slots, T* top, const T* total, T* lse) {
  std::vector<double> weight(static_cast<size_t>(tiles));
  for (int64_t s = 0; s < slots; ++s) {
    T highest = -std::numeric_limits<T>::infinity();
    for (int64_t t = 0; t < tiles; ++t) highest = maximum_scalar(highest, top[t * slots + s]);
    double sum = 0;
    for (int64_t t = 0; t < tiles; ++t) {
      weight[t] = std::exp(double(top[t * slots + s]) - double(highest));
      sum += weight[t] * double(total[t * slots + s]);
    }
    lse[s] = static_cast<T>(double(highest) + std::log(sum));
    for (int64_t t = 0; t < tiles; ++t) top[t * slots + s] = static_cast<T>(weight[t] / sum);
  }
}

// A from the exponentials of a tile and the factors of its slots.
template <class T>
void attend(T* e, int64_t stride, int64_t slots, int64_t padded, const T* factor, T* inverse) {
  using V = Vec<T>;
  for (int64_t s = 0; s < slots; ++s) {
    const V f(factor[s]);
    for (int64_t j = 0; j < padded; j += V::width) {
      (V::load(e + s * stride + j) * f).store(e + s * stride + j);
    }
  }
  for (int64_t j = 0; j < padded; j += V::width) {
    inverse_total(e + j, stride, slots).store(inverse + j);
  }
  for (int64_t s = 0; s < slots; ++s) {
    for (int64_t j = 0; j < padded; j += V::width) {
      (V::load(e + s * stride + j) * V::load(inverse + j)).store(e + s * stride + j);
    }
  }
}

// The `top_k` channels of largest score, in increasing order, and as a mask. Ties go to the lower
// channel; NaN is largest.
template <class T>
void choose(const std::vector<T>& score, int64_t top_k, bool* kept, int64_t* channels) {
  std::vector<int64_t> order(score.size());
  std::iota(order.begin(), order.end(), int64_t(0));
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    if (score[a] != score[a] || score[b] != score[b]) return score[b] == score[b];
    return score[a] > score[b];
  });
  std::copy_n(order.begin(), top_k, channels);
  std::sort(channels, channels + top_k);
  std::fill(kept, kept + score.size(), false);
  for (int64_t k = 0; k < top_k; ++k) kept[channels[k]] = true;
}

// W_out's kept columns (C x top_k). A NaN or an infinity in a dropped one makes its row NaN: a dropped
// feature is zero, and zero times either is NaN.
template <class A, class T>
void kept_columns(
    const T* w_out, int64_t C, const bool* kept, const int64_t* channels, int64_t top_k, A* out) {
  for (int64_t i = 0; i < C; ++i) {
    T dropped(0);
    for (int64_t c = 0; c < C; ++c) dropped += kept[c] ? T(0) : w_out[i * C + c] * T(0);
    for (int64_t k = 0; k < top_k; ++k) out[i * top_k + k] = w_out[i * C + channels[k]] + dropped;
  }
}

template <class S, class T = Compute<S>>
void forward(const MemoryForward& m) {
  using V = Vec<T>;
  const int64_t C = m.x.channels, slots = m.slots, top_k = m.top_k;
  const bool select = top_k < C;
  // Y by way of F, which is there already, where it has fewer rows to read than A.
  const bool by_features = select && top_k <= slots;
  const int64_t rows = slots + (by_features ? C : 0), depth = by_features ? top_k : slots;
  const T* w_out = static_cast<const T*>(m.w_out);
  const T* value = static_cast<const T*>(m.value);
  using Left = LeftOf<S>;
  std::vector<typename Left::Value> key_storage, value_storage;
  const Left key = packed<Left>(slots, C, static_cast<const T*>(m.key), C, 1, key_storage);
  const Left features = packed<Left>(C, slots, value, 1, C, value_storage);

  const Cut<T> cut(m.x, C + slots, rows);
  const int64_t tiles = cut.tiles, stride = cut.stride;
  const Workspace workspace(cut.bytes(rows));
  T* const blocks = reinterpret_cast<T*>(workspace.begin());
  std::vector<T> top(static_cast<size_t>(cut.group * tiles * slots)), total(top.size());
  std::vector<T> scores(static_cast<size_t>(select ? cut.group * tiles * C : 0));
  std::vector<int64_t> channels(static_cast<size_t>(cut.group * top_k));
  const int64_t left_size = Left::size(C, depth);
  std::vector<typename Left::Value> left(static_cast<size_t>(cut.group * left_size));
  // Without selection R is the same for all samples and made once.
  bool left_ready = false;

  for (int64_t b0 = 0; b0 < m.x.batch; b0 += cut.group) {
    const int64_t samples = std::min(cut.group, m.x.batch - b0);

    parallel_for(samples * tiles, Scratch::bytes<T>(C * stride), [&](int64_t chunk, Scratch& scratch) {
      const int64_t b = chunk / tiles, t = chunk % tiles;
      T* x = scratch.take<T>(C * stride);
      T* e = blocks + chunk * rows * stride;
      load_panel<S>(m.x, b0 + b, cut.first(t), cut.count(t), x, stride);
      product<T>(slots, cut.padded(t), C, key, Rows<T>{x, stride}, store_to(e, stride));
      exponentials(e, stride, slots, cut.count(t), cut.padded(t), top.data() + chunk * slots,
                   total.data() + chunk * slots);
    });
    parallel_for(samples, 0, [&](int64_t b, Scratch&) {
      normalize(tiles, slots, top.data() + b * tiles * slots, total.data() + b * tiles * slots,
                static_cast<T*>(m.lse) + (b0 + b) * slots);
    });

    if (select) {
      const size_t bytes = Scratch::bytes<T>(stride) + Scratch::bytes<T>(C * V::width);
      parallel_for(samples * tiles, bytes, [&](int64_t chunk, Scratch& scratch) {
        const int64_t padded = cut.padded(chunk % tiles);
        T* e = blocks + chunk * rows * stride;
        T* f = e + slots * stride;
        T* inverse = scratch.take<T>(stride);
        T* sums = scratch.take<T>(C * V::width);
        attend(e, stride, slots, padded, top.data() + chunk * slots, inverse);
        std::fill(sums, sums + C * V::width, T(0));
        const auto score = [&](int64_t c, V feature) __attribute__((always_inline)) {
          T* at = sums + c * V::width;
          (V::load(at) + abs(feature)).store(at);
        };
        const Rows<T> attention{e, stride};
        if (by_features) {
          product<T>(C, padded, slots, features, attention, [&](int64_t c, int64_t j, V feature, auto) {
            feature.store(f + c * stride + j);
            score(c, feature);
          });
        } else {
          product<T>(C, padded, slots, features, attention,
                  [&](int64_t c, int64_t, V feature, auto) { score(c, feature); });
        }
        for (int64_t c = 0; c < C; ++c) scores[chunk * C + c] = sum(V::load(sums + c * V::width));
      });
    }

    parallel_for(select ? samples : left_ready ? 0 : 1, 0, [&](int64_t b, Scratch&) {
      bool* kept = m.kept + (b0 + b) * C;
      int64_t* chosen = channels.data() + b * top_k;
      std::vector<T> score(static_cast<size_t>(C));
      for (int64_t c = 0; c < C && select; ++c) {
        double over_tiles = 0;
        for (int64_t t = 0; t < tiles; ++t) over_tiles += scores[(b * tiles + t) * C + c];
        score[c] = static_cast<T>(over_tiles);
      }
      choose(score, top_k, kept, chosen);
      auto* to = left.data() + b * left_size;
      if (by_features) {
        std::vector<T> w(static_cast<size_t>(C * top_k));
        kept_columns(w_out, C, kept, chosen, top_k, w.data());
        Left::pack(C, top_k, w.data(), top_k, 1, to);
        return;
      }
      // R is small, and its errors would add up over the slots: in double precision, then rounded once.
      std::vector<double> w(static_cast<size_t>(C * top_k)), v(static_cast<size_t>(top_k * slots));
      kept_columns(w_out, C, kept, chosen, top_k, w.data());
      for (int64_t k = 0; k < top_k; ++k) {
        for (int64_t s = 0; s < slots; ++s) v[k * slots + s] = value[s * C + chosen[k]];
      }
      std::vector<double> w_packed, r(static_cast<size_t>(C * slots));
      gemm<double>(C, slots, top_k, packed<PackedLeft<double>>(C, top_k, w.data(), top_k, 1, w_packed),
                   Rows<double>{v.data(), slots}, store_to(r.data(), slots));
      Left::pack(C, slots, r.data(), slots, 1, to);
    });
    left_ready = true;

    const size_t bytes = Scratch::bytes<T>(C * stride) + Scratch::bytes<T>(stride) +
        Scratch::bytes<const T*>(depth);
    parallel_for(samples * tiles, bytes, [&](int64_t chunk, Scratch& scratch) {
      const int64_t b = chunk / tiles, t = chunk % tiles, padded = cut.padded(t);
      T* e = blocks + chunk * rows * stride;
      T* y = scratch.take<T>(C * stride);
      T* inverse = scratch.take<T>(stride);
      const T** right = scratch.take<const T*>(depth);
      if (!select) attend(e, stride, slots, padded, top.data() + chunk * slots, inverse);
      for (int64_t k = 0; k < depth; ++k) {
        right[k] = e + (by_features ? slots + channels[b * top_k + k] : k) * stride;
      }
      const auto matrix = Left::at(left.data() + (select ? b : 0) * left_size, depth);
      product<T>(C, padded, depth, matrix, RowTable<T>{right}, store_to(y, stride));
      store_panel<S>(m.y, b0 + b, cut.first(t), cut.count(t), y, stride);
    });
  }
  if (!select) std::fill(m.kept, m.kept + m.x.batch * C, true);
}

// --------------------------------------------------------------------------------------------- backward

template <class S, class T = Compute<S>>
void backward(const MemoryBackward& m) {
  using V = Vec<T>;
  const int64_t C = m.x.channels, slots = m.slots, size = C * slots;
  const T* key_rows = static_cast<const T*>(m.key);
  const T* lse = static_cast<const T*>(m.lse);
  using Left = LeftOf<S>;
  std::vector<typename Left::Value> key_storage, transposed_storage;
  const Left key = packed<Left>(slots, C, key_rows, C, 1, key_storage);
  const Left key_transposed = packed<Left>(C, slots, key_rows, 1, C, transposed_storage);

  // Sums over pixels are made as products by a matrix of S columns, a tile of E or dL turned over: twice
  // the speed of dot products of rows (measured on AVX2: 75 and 40 GFLOP/s).
  const int64_t turned_stride = round_up(slots, V::width);
  const Cut<T> cut(m.x, C + 3 * slots, 2 * slots);
  const int64_t tiles = cut.tiles, stride = cut.stride, slabs = cut.slabs;
  const Workspace workspace(cut.bytes(2 * slots));
  T* const blocks = reinterpret_cast<T*>(workspace.begin());
  std::vector<T> products(static_cast<size_t>(cut.group * slabs * size));
  std::vector<T> row_parts(static_cast<size_t>(cut.group * slabs * slots));
  std::vector<T> row(static_cast<size_t>(cut.group * slots));
  std::vector<double> grad_key(static_cast<size_t>(size));  // dKᵀ
  std::vector<std::vector<typename Left::Value>> readout_storage(static_cast<size_t>(cut.group));

  for (int64_t b0 = 0; b0 < m.x.batch; b0 += cut.group) {
    const int64_t samples = std::min(cut.group, m.x.batch - b0);
    std::vector<Left> readout(static_cast<size_t>(samples));  // Rᵀ
    parallel_for(samples, 0, [&](int64_t b, Scratch&) {
      const T* from = static_cast<const T*>(m.readout) + (b0 + b) * size;
      readout[b] = packed<Left>(slots, C, from, 1, slots, readout_storage[b]);
    });

    const int64_t rows_size = Left::rows_size(C, round_up(cut.tile, V::width));
    const size_t panels = Scratch::bytes<T>(C * stride) + Scratch::bytes<T>(cut.tile * turned_stride) +
        Scratch::bytes<typename Left::Value>(rows_size);
    parallel_for(samples * slabs, panels + 2 * Scratch::bytes<T>(stride), [&](int64_t chunk, Scratch& scratch) {
      const int64_t b = chunk / slabs, slab = chunk % slabs;
      T* panel = scratch.take<T>(C * stride);
      T* turned = scratch.take<T>(cut.tile * turned_stride);
      auto* rows = scratch.take<typename Left::Value>(rows_size);
      T* inverse = scratch.take<T>(stride);
      T* dot = scratch.take<T>(stride);
      T* sums = products.data() + chunk * size;
      T* row_part = row_parts.data() + chunk * slots;
      std::fill_n(sums, size, T(0));
      std::fill_n(row_part, slots, T(0));
      const T* reference = lse + (b0 + b) * slots;
      const int64_t end = std::min((slab + 1) * cut.slab_tiles, tiles);
      for (int64_t t = slab * cut.slab_tiles; t < end; ++t) {
        const int64_t first = cut.first(t), count = cut.count(t), padded = cut.padded(t);
        T* e = blocks + (b * tiles + t) * 2 * slots * stride;
        T* ede = e + slots * stride;
        load_panel<S>(m.x, b0 + b, first, count, panel, stride);
        product<T>(slots, padded, C, key, Rows<T>{panel, stride},
                [&](int64_t s, int64_t j, V logit, auto) {
                  exp_weight(logit - V(reference[s])).store(e + s * stride + j);
                });
        for (int64_t s = 0; s < slots; ++s) {
          std::fill(e + s * stride + count, e + s * stride + padded, T(0));
        }
        for (int64_t j = 0; j < padded; j += V::width) {
          inverse_total(e + j, stride, slots).store(inverse + j);
        }
        // ede = dA, dot = Σ_s dA A
        load_panel<S>(m.grad_y, b0 + b, first, count, panel, stride);
        std::fill(dot, dot + stride, T(0));
        product<T>(slots, padded, C, readout[b], Rows<T>{panel, stride},
                [&](int64_t s, int64_t j, V value, auto) {
                  value.store(ede + s * stride + j);
                  fma(value, V::load(e + s * stride + j), V::load(dot + j)).store(dot + j);
                });
        for (int64_t j = 0; j < padded; j += V::width) {
          (V::load(dot + j) * V::load(inverse + j)).store(dot + j);
        }
        for (int64_t s = 0; s < slots; ++s) {
          V total(T(0));
          for (int64_t j = 0; j < padded; j += V::width) {
            const int64_t at = s * stride + j;
            const V de = (V::load(ede + at) - V::load(dot + j)) * V::load(inverse + j);
            const V value = V::load(e + at) * de;
            value.store(ede + at);
            total += value;
          }
          row_part[s] += sum(total);
        }
        // dR: the divisor goes to dY, which nothing else needs any more, and E stays.
        for (int64_t c = 0; c < C; ++c) {
          for (int64_t j = 0; j < padded; j += V::width) {
            T* value = panel + c * stride + j;
            (V::load(value) * V::load(inverse + j)).store(value);
          }
        }
        transpose_panel(e, stride, slots, padded, turned, turned_stride);
        product<T>(C, slots, padded, Left::of_rows(C, padded, panel, stride, rows),
                Rows<T>{turned, turned_stride}, add_to(sums, slots));
      }
    });
    parallel_for(samples, 0, [&](int64_t b, Scratch&) {
      T* out = static_cast<T*>(m.grad_readout) + (b0 + b) * size;
      T* of_row = row.data() + b * slots;
      std::fill_n(out, size, T(0));
      std::fill_n(of_row, slots, T(0));
      add_partials(products.data() + b * slabs * size, size, slabs, size, out);
      add_partials(row_parts.data() + b * slabs * slots, slots, slabs, slots, of_row);
    });

    parallel_for(samples * slabs, panels, [&](int64_t chunk, Scratch& scratch) {
      const int64_t b = chunk / slabs, slab = chunk % slabs;
      T* panel = scratch.take<T>(C * stride);
      T* turned = scratch.take<T>(cut.tile * turned_stride);
      auto* rows = scratch.take<typename Left::Value>(rows_size);
      T* sums = products.data() + chunk * size;
      std::fill_n(sums, size, T(0));
      const int64_t end = std::min((slab + 1) * cut.slab_tiles, tiles);
      for (int64_t t = slab * cut.slab_tiles; t < end; ++t) {
        const int64_t first = cut.first(t), count = cut.count(t), padded = cut.padded(t);
        T* e = blocks + (b * tiles + t) * 2 * slots * stride;
        T* ede = e + slots * stride;
        // dL = E dE - row E
        for (int64_t s = 0; s < slots; ++s) {
          const V r(row[b * slots + s]);
          for (int64_t j = 0; j < padded; j += V::width) {
            T* value = ede + s * stride + j;
            (V::load(value) - r * V::load(e + s * stride + j)).store(value);
          }
        }
        const Rows<T> grad_logits{ede, stride};
        load_panel<S>(m.x, b0 + b, first, count, panel, stride);
        transpose_panel(ede, stride, slots, padded, turned, turned_stride);
        product<T>(C, slots, padded, Left::of_rows(C, padded, panel, stride, rows),
                Rows<T>{turned, turned_stride}, add_to(sums, slots));
        product<T>(C, padded, slots, key_transposed, grad_logits, store_to(panel, stride));
        store_panel<S>(m.grad_x, b0 + b, first, count, panel, stride);
      }
    });
    parallel_for(C, 0, [&](int64_t c, Scratch&) {
      add_partials(products.data() + c * slots, size, samples * slabs, slots, grad_key.data() + c * slots);
    });
  }
  T* out = static_cast<T*>(m.grad_key);
  for (int64_t s = 0; s < slots; ++s) {
    for (int64_t c = 0; c < C; ++c) out[s * C + c] = static_cast<T>(grad_key[c * slots + s]);
  }
}

}  // namespace

void memory_forward(const MemoryForward& m) {
  visit(m.x.dtype, [&]<class S>() { forward<S>(m); });
}
void memory_backward(const MemoryBackward& m) {
  visit(m.x.dtype, [&]<class S>() { backward<S>(m); });
}

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

int64_t slots_of(const Tensor& key, const FeatureMap& x) {
  STD_TORCH_CHECK(key.dim() == 2, "key has ", key.dim(), " dimensions; accepted is (S, C)");
  STD_TORCH_CHECK(key.size(0) > 0 && x.pixels > 0, "key has ", key.size(0), " slots and x ", x.pixels,
                  " pixels; accepted is one or more of each");
  return key.size(0);
}

Tensor map_like(const Tensor& x, bool channels_last) {
  return new_tensor({x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type(), channels_last);
}

// x (B, C, H, W), key and value (S, C), w_out (C, C) -> the result, lse (B, S), kept (B, C).
std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& x, const Tensor& key, const Tensor& value, const Tensor& w_out, int64_t top_k,
    bool channels_last) {
  MemoryForward m{};
  m.x = feature_map(x, "x");
  m.slots = slots_of(key, m.x);
  m.top_k = top_k;
  const int64_t B = x.size(0), C = x.size(1);
  STD_TORCH_CHECK(1 <= top_k && top_k <= C, "top_k is ", top_k, "; accepted is 1 to ", C);
  check_operand(key, "key", {m.slots, C}, memory_dtype(x));
  check_operand(value, "value", {m.slots, C}, memory_dtype(x));
  check_operand(w_out, "w_out", {C, C}, memory_dtype(x));
  Tensor out = map_like(x, channels_last);
  Tensor lse = new_tensor({B, m.slots}, memory_dtype(x));
  Tensor kept = new_tensor({B, C}, ScalarType::Bool);
  m.key = key.const_data_ptr();
  m.value = value.const_data_ptr();
  m.w_out = w_out.const_data_ptr();
  m.y = feature_map(out, "out");
  m.lse = lse.mutable_data_ptr();
  m.kept = static_cast<bool*>(kept.mutable_data_ptr());
  memory_forward(m);
  return {out, lse, kept};
}

// grad_out and x (B, C, H, W), key (S, C), readout (B, C, S), lse (B, S) -> the gradients of x, key
// and readout.
std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad_out, const Tensor& x, const Tensor& key, const Tensor& readout,
    const Tensor& lse, bool channels_last) {
  MemoryBackward m{};
  m.x = feature_map(x, "x");
  m.slots = slots_of(key, m.x);
  const int64_t B = x.size(0), C = x.size(1);
  bool same = grad_out.scalar_type() == x.scalar_type() && grad_out.dim() == 4;
  for (int d = 0; d < 4 && same; ++d) same = grad_out.size(d) == x.size(d);
  STD_TORCH_CHECK(same, "grad_out must have the shape and dtype of x");
  m.grad_y = feature_map(grad_out, "grad_out");
  check_operand(key, "key", {m.slots, C}, memory_dtype(x));
  check_operand(readout, "readout", {B, C, m.slots}, memory_dtype(x));
  check_operand(lse, "lse", {B, m.slots}, memory_dtype(x));
  Tensor grad_x = map_like(x, channels_last);
  Tensor grad_key = new_tensor({m.slots, C}, memory_dtype(x));
  Tensor grad_readout = new_tensor({B, C, m.slots}, memory_dtype(x));
  m.key = key.const_data_ptr();
  m.readout = readout.const_data_ptr();
  m.lse = lse.const_data_ptr();
  m.grad_x = feature_map(grad_x, "grad_x");
  m.grad_key = grad_key.mutable_data_ptr();
  m.grad_readout = grad_readout.mutable_data_ptr();
  memory_backward(m);
  return {grad_x, grad_key, grad_readout};
}

}  // namespace
}  // namespace eamnet

STABLE_TORCH_LIBRARY_IMPL(eamnet_kernels_native, CPU, m) {
  m.impl("external_memory", TORCH_BOX(&eamnet::forward));
  m.impl("external_memory_backward", TORCH_BOX(&eamnet::backward));
}
#endif  // EAMNET_HOST
