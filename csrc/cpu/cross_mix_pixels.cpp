// Two attentions over pixels that exchange keys and values, added:
//   out = softmax(scale Q_s K_cᵀ) V_c + softmax(scale Q_c K_sᵀ) V_s,   Q_s, K_s, V_s times the gate.
// Definition and backward formulas: eamnet_kernels/reference/cross_mix_pixels.py.
//
// Floor, per head and branch, with N tokens of d channels:
//   forward   4 d N² operations and N² exponentials; 8 N d values moved for both branches, the gate,
//             and 2 N d + 2 N more written for the backward.
//   backward 10 d N² operations and N² exponentials; 16 N d values moved for both branches.
// N² d dwarfs N d: memory does not count, arithmetic does. An exponential costs about 12 vector
// instructions, as much as 12 of the 2 d (forward) or 5 d (backward) multiply-adds of its score.
//
// Stored for the backward: the log-sum-exp of each score row (N values), from which weights are made
// again instead of N² of them being kept, and both attentions before they are added, because each
// softmax needs its own Δ = rowsum(dO ⊙ O). Scores are computed again: 2 d N² of the 10 d N².
//
// Vectors. Lanes are always the tokens along which nothing is summed: queries in the forward (a row's
// maximum and sum are then one lane, and nothing is ever reduced across lanes), keys in the backward
// (gradients of K and V, two of the three, are then accumulated in lanes).
//
// bfloat16 is widened to float32 as it is packed, except on the level with AMX tiles, whose kernels
// are in cross_mix_pixels_amx.h.
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <span>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/feature_map.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace eamnet {

// (B, h, N, d) where it lies: each head is a map of N pixels and d channels.
struct Heads {
  FeatureMap first;  // of head 0
  int64_t head_stride = 0;

  template <class S>
  FeatureMap at(int64_t h) const {
    FeatureMap map = first;
    map.data = static_cast<const S*>(first.data) + h * head_stride;
    return map;
  }
};

// Branch 0 is softmax(Q_s K_cᵀ) V_c, whose queries are gated; branch 1 is softmax(Q_c K_sᵀ) V_s,
// whose keys and values are.
struct CrossMixPixels {
  Heads q[2], k[2], v[2];
  const void* gate;  // (B, N) or null
  double scale;
  int64_t heads;
  Heads out;
  Heads branches[2];  // data null unless they are kept
  void* lse;          // (2, B, h, N) or null
};
EAMNET_KERNEL(cross_mix_pixels, CrossMixPixels)

struct CrossMixPixelsBackward {
  Heads grad_out;
  Heads q[2], k[2], v[2];
  const void* gate;
  double scale;
  int64_t heads;
  Heads branches[2];
  const void* lse;
  Heads grad_q[2], grad_k[2], grad_v[2];
  void* grad_gate;  // (B, N) where there is a gate
};
EAMNET_KERNEL(cross_mix_pixels_backward, CrossMixPixelsBackward)

namespace EAMNET_LEVEL {
namespace {

// --------------------------------------------------------------------------------------- exponential

// Weights are powers of 2 for float32, of e for float64: scores are multiplied by per_unit first.
template <class T>
constexpr double per_unit = std::is_same_v<T, float> ? 1.44269504088896341 : 1.0;

// The power of x <= 127: 2^x with a relative error below 1.4e-7 and 0 below 2^-126, which is 2^-126 of
// the largest weight of a row, for float32; e^x for float64. -inf gives 0, NaN stays NaN.
EAMNET_INLINE Vec<double> power(Vec<double> x) { return exp(x); }
EAMNET_INLINE Vec<float> power(Vec<float> x) {
  using V = Vec<float>;
  const V magic(0x1.8p23f);  // adding it rounds to an integer
#if !defined(__AVX512F__)
  const V given = x;
  x = select(x < V(-127.0f), V(-127.0f), x);
#endif
  const V shifted = x + magic;
  const V n = shifted - magic;
  const V r = x - n;
  // Minimax on [-1/2, 1/2] with p(0) = 1.
  V p(0x1.5bba14p-10f);
  p = fma(p, r, V(0x1.3cea88p-7f));
  p = fma(p, r, V(0x1.c6b752p-5f));
  p = fma(p, r, V(0x1.ebf9bcp-3f));
  p = fma(p, r, V(0x1.62e42ap-1f));
  p = fma(p, r, V(1.0f));
#if defined(__AVX512F__)
  const __mmask16 counts =
      _mm512_cmp_ps_mask(bit_cast<__m512>(x.v), _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return bit_cast<V::Native>(
      _mm512_maskz_scalef_ps(counts, bit_cast<__m512>(p.v), bit_cast<__m512>(n.v)));
#else
  // n is in the low bits of shifted; at x = -127 all bits cancel and leave 0.
  using Bits = NativeOf<uint32_t>::type;
  const V result =
      bit_cast<V::Native>(Bits(bit_cast<Bits>(p.v) + (bit_cast<Bits>(shifted.v) << 23)));
  return select(isnan(given), given, result);
#endif
}

// The greater of both; where x is NaN, m. A NaN score reaches the result through its weight.
template <class T>
EAMNET_INLINE Vec<T> maximum_so_far(Vec<T> x, Vec<T> m) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    return bit_cast<typename Vec<T>::Native>(
        _mm512_maskz_max_ps(0xffff, bit_cast<__m512>(x.v), bit_cast<__m512>(m.v)));
  }
#endif
  return select(x > m, x, m);
}

// ------------------------------------------------------------------------------------------ operands

// A[i, k] = data[k*stride + i]: the columns of a panel as the left operand of a product. The rows of
// the panel are as long as a multiple of kRowBlock.
template <class T>
struct PanelColumns {
  const T* data;
  int64_t stride;

  struct Block {
    const T* p;
    int64_t stride;
    EAMNET_INLINE T at(int r, int64_t k) const { return p[k * stride + r]; }
  };
  EAMNET_INLINE Block block(int64_t i, int64_t) const { return {data + i, stride}; }
};

// rows[n*stride + c] = factor[n] * x[first + n, c] for n < count; columns up to `stride` are zero.
template <class S, class T, class Factor>
void load_rows(
    const FeatureMap& x, int64_t b, int64_t first, int64_t count, T* rows, int64_t stride,
    Factor factor) {
  constexpr int width = Vec<T>::width;
  const int64_t d = x.channels;
  for (int64_t n = 0; n < count; ++n) {
    const S* from = x.at<S>(b, 0, first + n);
    T* to = rows + n * stride;
    const T times = factor(n);
    int64_t c = 0;
    if (x.channel_stride == 1) {
      for (; c + width <= d; c += width) (Vec<T>::load(from + c) * Vec<T>(times)).store(to + c);
    }
    for (; c < d; ++c) to[c] = T(widen(from[c * x.channel_stride])) * times;
    std::fill(to + d, to + stride, T(0));
  }
}

// Multiplies the columns of a d × count panel by factor(n), n the first column of a vector of them.
template <class T, class Factor>
void scale_columns(T* panel, int64_t stride, int64_t d, int64_t count, Factor factor) {
  constexpr int width = Vec<T>::width;
  for (int64_t n = 0; n < count; n += width) {
    const Vec<T> times = factor(n);
    for (int64_t c = 0; c < d; ++c) {
      T* p = panel + c * stride + n;
      (Vec<T>::load(p) * times).store(p);
    }
  }
}

// to[n] = gate[b, first + n] as T, or 1 without a gate; 1 up to a whole vector.
template <class S, class T>
void load_gate(const void* gate, int64_t tokens, int64_t b, int64_t first, int64_t count, T* to) {
  for (int64_t n = 0; n < count; ++n) {
    to[n] = gate == nullptr ? T(1) : T(widen(static_cast<const S*>(gate)[b * tokens + first + n]));
  }
  std::fill(to + count, to + round_up(count, Vec<T>::width), T(1));
}

// A row of d channels in whole vectors.
template <class T>
int64_t padded(int64_t d) {
  return round_up(d, std::max<int64_t>(Vec<T>::width, kRowBlock));
}

// ------------------------------------------------------------------------------------------- forward
//
// A chunk is a run of queries of one head, for both branches. Keys and values pass by in blocks of
// kKeys, each copied once into panels, gate included; against them kColumnBlock queries at a time make
// kKeys × kColumnBlock scores, turn them into weights and add weights · values, all in the first-level
// cache. The maximum may grow from block to block, so results so far are multiplied by
// 2^(old - new maximum) (Milakov and Gimelshein, arXiv:1805.02867; Dao et al., arXiv:2205.14135).

constexpr int64_t kKeys = 64;
// Chunks to aim for. A longer run copies keys and values less often, which counts where they do not
// fit the second-level cache.
constexpr int64_t kChunks = 64;
template <class T>
int64_t queries_of_chunk(int64_t N, int64_t heads) {
  constexpr int64_t block = kColumnBlock<T>;
  return std::clamp(round_up(ceil_div(N * heads, kChunks), block), 4 * block, 16 * block);
}

// Softmax so far, per query (lane).
template <class T>
struct Softmax {
  T* maximum;  // of the scaled scores
  T* sum;      // of the weights, relative to that maximum
  T* fade;     // what results so far are to be multiplied by after the current block
};

// Turns the scores of `keys` keys (rows) and one vector of queries, at s, into weights.
template <class T>
EAMNET_INLINE void weigh(T* s, int64_t stride, int64_t keys, T unit, const Softmax<T>& softmax, int64_t n) {
  using V = Vec<T>;
  const V before = V::load(softmax.maximum + n);
  V top[4] = {V::load(s), V::load(s), V::load(s), V::load(s)};
  int64_t k = 0;
  for (; k + 4 <= keys; k += 4) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) top[u] = maximum_so_far(V::load(s + (k + u) * stride), top[u]);
  }
  for (; k < keys; ++k) top[0] = maximum_so_far(V::load(s + k * stride), top[0]);
  const V highest =
      maximum_so_far(maximum_so_far(top[0], top[1]), maximum_so_far(top[2], top[3]));
  const V maximum = maximum_so_far(highest * V(unit), before);
  // While every score is -inf any finite reference gives the weights 0.
  const V reference = select(maximum == V(-std::numeric_limits<T>::infinity()), V(T(0)), maximum);
  V sums[2] = {V(T(0)), V(T(0))};
  const auto weight = [&](int64_t key) __attribute__((always_inline)) {
    const V p = power(fma(V::load(s + key * stride), V(unit), -reference));
    p.store(s + key * stride);
    return p;
  };
  for (k = 0; k + 2 <= keys; k += 2) {
    sums[0] += weight(k);
    sums[1] += weight(k + 1);
  }
  if (k < keys) sums[0] += weight(k);
  const V fade = power(before - reference);
  fma(V::load(softmax.sum + n), fade, sums[0] + sums[1]).store(softmax.sum + n);
  maximum.store(softmax.maximum + n);
  fade.store(softmax.fade + n);
}

template <class S, class T = Compute<S>>
void forward(const CrossMixPixels& a) {
  const int64_t N = a.out.first.pixels, d = a.out.first.channels, wide = padded<T>(d);
  const int64_t run = queries_of_chunk<T>(N, a.out.first.batch * a.heads), tiles = ceil_div(N, run);
  const size_t bytes = Scratch::bytes<T>(d * run) + 2 * Scratch::bytes<T>(wide * run) +
      4 * Scratch::bytes<T>(run) + Scratch::bytes<T>(d * kKeys) +
      Scratch::bytes<T>(wide * kKeys) + Scratch::bytes<T>(kKeys) +
      Scratch::bytes<T>(kKeys * kColumnBlock<T>);
  const T unit = static_cast<T>(std::fabs(a.scale) * per_unit<T>);
  const T sign = a.scale < 0 ? T(-1) : T(1);
  parallel_for(a.out.first.batch * a.heads * tiles, bytes, [&](int64_t chunk, Scratch& scratch) {
    const int64_t b = chunk / (a.heads * tiles), h = chunk / tiles % a.heads;
    const int64_t first = chunk % tiles * run;
    const int64_t queries = std::min(run, N - first);
    const int64_t lanes = round_up(queries, Vec<T>::width);
    T* q = scratch.take<T>(d * run);        // d × queries
    T* o = scratch.take<T>(wide * run);     // d × queries, this branch
    T* total = scratch.take<T>(wide * run);
    T* query_gate = scratch.take<T>(run);
    const Softmax<T> softmax{
        scratch.take<T>(run), scratch.take<T>(run), scratch.take<T>(run)};
    T* k = scratch.take<T>(d * kKeys);     // d × keys
    T* v = scratch.take<T>(wide * kKeys);  // keys × d
    T* key_gate = scratch.take<T>(kKeys);
    T* s = scratch.take<T>(kKeys * kColumnBlock<T>);  // keys × queries
    load_gate<S>(a.gate, N, b, first, queries, query_gate);

    for (int branch = 0; branch < 2; ++branch) {
      const FeatureMap keys = a.k[branch].at<S>(h), values = a.v[branch].at<S>(h);
      load_panel<S>(a.q[branch].at<S>(h), b, first, queries, q, run);
      scale_columns(q, run, d, lanes, [&](int64_t n) {
        return branch == 0 ? Vec<T>::load(query_gate + n) * Vec<T>(sign) : Vec<T>(sign);
      });
      std::fill_n(o, wide * run, T(0));
      std::fill_n(softmax.sum, lanes, T(0));
      std::fill_n(softmax.maximum, lanes, -std::numeric_limits<T>::infinity());

      for (int64_t from = 0; from < N; from += kKeys) {
        const int64_t count = std::min(kKeys, N - from);
        load_gate<S>(branch == 1 ? a.gate : nullptr, N, b, from, count, key_gate);
        load_panel<S>(keys, b, from, count, k, kKeys);
        if (branch == 1 && a.gate != nullptr) {
          scale_columns(k, kKeys, d, count, [&](int64_t n) { return Vec<T>::load(key_gate + n); });
        }
        load_rows<S>(values, b, from, count, v, wide, [&](int64_t n) { return key_gate[n]; });
        for (int64_t j = 0; j < lanes; j += kColumnBlock<T>) {
          const int64_t columns = std::min<int64_t>(kColumnBlock<T>, lanes - j);
          gemm<T>(
              count, columns, d, PanelColumns<T>{k, kKeys}, Rows<T>{q + j, run},
              store_to(s, kColumnBlock<T>));
          for (int64_t n = 0; n < columns; n += Vec<T>::width) {
            weigh(s + n, kColumnBlock<T>, count, unit, softmax, j + n);
          }
          const auto fade_and_add = [&](int64_t c, int64_t n, Vec<T> y, auto) __attribute__((always_inline)) {
            T* p = o + c * run + j + n;
            fma(Vec<T>::load(p), Vec<T>::load(softmax.fade + j + n), y).store(p);
          };
          gemm<T>(
              d, columns, count, PanelColumns<T>{v, wide}, Rows<T>{s, kColumnBlock<T>}, fade_and_add);
        }
      }

      scale_columns(o, run, d, lanes, [&](int64_t n) {
        return Vec<T>(T(1)) / Vec<T>::load(softmax.sum + n);
      });
      if (branch == 0) {
        std::copy_n(o, d * run, total);
      } else {
        for (int64_t i = 0; i < d * run; i += Vec<T>::width) {
          (Vec<T>::load(total + i) + Vec<T>::load(o + i)).store(total + i);
        }
      }
      if (a.lse != nullptr) {
        store_panel<S>(a.branches[branch].at<S>(h), b, first, queries, o, run);
        T* lse = static_cast<T*>(a.lse) +
            ((branch * a.out.first.batch + b) * a.heads + h) * N + first;
        for (int64_t n = 0; n < queries; ++n) {
          lse[n] = static_cast<T>(softmax.maximum[n] / per_unit<T> + std::log(double(softmax.sum[n])));
        }
      }
    }
    store_panel<S>(a.out.at<S>(h), b, first, queries, total, run);
  });
}

// ------------------------------------------------------------------------------------------ backward
//
// With P the weights, dO the incoming gradient and Δ = rowsum(dO ⊙ O) of the branch:
//   dV = Pᵀ dO,   dS = P ⊙ (dO Vᵀ - Δ),   dK = scale dSᵀ Q,   dQ = scale dS K.
//
// A task is one branch of one head and a run of its key blocks. It copies Q and dO once, then takes
// every block of queries against every block of keys: S and dO Vᵀ become P and dS as their products
// leave the registers, the gradients of Q, K and V are added to. All five products are made once.
// kBlocksOfPass blocks of keys meet kRun queries at a time, so that what belongs to both, 320 + 160 KB
// at d = 64, stays in the second-level cache. The runs of key blocks each have their own dQ, which are
// added in order at the end: more tasks than heads for the threads, and the same bits for any number
// of them.
// The gate's gradient is rowsum(dQ ⊙ Q + dK ⊙ K + dV ⊙ V) over all heads, with dQ, dK, dV those of the
// gated tensors and Q, K, V without the gate.

template <class T>
constexpr int64_t kKeyBlock = 2 * kColumnBlock<T>;
constexpr int64_t kQueryBlock = 64;
constexpr int64_t kBlocksOfPass = 8;
constexpr int64_t kRun = 2 * kQueryBlock;
// Tasks to aim for, and the fewest keys that are worth a task.
constexpr int64_t kTasks = 8;
constexpr int64_t kKeysOfTask = 512;

// y[i, j] += Σ_k x[i, k] z[k, j] for rows x of contiguous k and few columns j, a multiple of the vector
// width. Reads (and drops) up to 24 rows beyond M in x.
template <class T, int vectors>
EAMNET_INLINE void add_narrow_product(
    int64_t M, int64_t K, const T* x, int64_t x_stride, const T* z, int64_t z_stride, T* y,
    int64_t y_stride) {
  constexpr int rows = kRowBlock * kColumnVectors / vectors;
  constexpr int width = Vec<T>::width;
  for (int64_t i = 0; i < M; i += rows) {
    Vec<T> acc[rows][vectors];
#pragma GCC unroll 24
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int u = 0; u < vectors; ++u) acc[r][u] = Vec<T>(T(0));
    }
    for (int64_t k = 0; k < K; ++k) {
      Vec<T> b[vectors];
#pragma GCC unroll 4
      for (int u = 0; u < vectors; ++u) b[u] = Vec<T>::load(z + k * z_stride + u * width);
#pragma GCC unroll 24
      for (int r = 0; r < rows; ++r) {
        const Vec<T> value(x[(i + r) * x_stride + k]);
#pragma GCC unroll 4
        for (int u = 0; u < vectors; ++u) acc[r][u] = fma(value, b[u], acc[r][u]);
      }
    }
#pragma GCC unroll 24
    for (int r = 0; r < rows; ++r) {
      if (i + r < M) {
#pragma GCC unroll 4
        for (int u = 0; u < vectors; ++u) {
          T* p = y + (i + r) * y_stride + u * width;
          (Vec<T>::load(p) + acc[r][u]).store(p);
        }
      }
    }
  }
}

template <class T>
void add_product(
    int64_t M, int64_t columns, int64_t K, const T* x, int64_t x_stride, const T* z, int64_t z_stride, T* y,
    int64_t y_stride) {
  constexpr int width = Vec<T>::width;
  int64_t j = 0;
  for (; j + 4 * width <= columns; j += 4 * width) {
    add_narrow_product<T, 4>(M, K, x, x_stride, z + j, z_stride, y + j, y_stride);
  }
  if (j + 2 * width <= columns) {
    add_narrow_product<T, 2>(M, K, x, x_stride, z + j, z_stride, y + j, y_stride);
    j += 2 * width;
  }
  if (j < columns) add_narrow_product<T, 1>(M, K, x, x_stride, z + j, z_stride, y + j, y_stride);
}

// Rows that add_product may read beyond the last.
constexpr int64_t kSpareRows = kRowBlock * kColumnVectors;

template <class S, class T = Compute<S>>
struct Backward {
  const CrossMixPixelsBackward& a;
  const int64_t B = a.grad_out.first.batch, H = a.heads, N = a.grad_out.first.pixels,
                d = a.grad_out.first.channels, wide = padded<T>(d);
  const int64_t padded_queries = round_up(N, kQueryBlock);
  const int64_t key_blocks = ceil_div(N, kKeyBlock<T>);
  const int64_t splits = std::clamp<int64_t>(
      ceil_div(kTasks, std::max<int64_t>(1, 2 * B * H)), 1, ceil_div(N, kKeysOfTask));
  const T unit = static_cast<T>(std::fabs(a.scale) * per_unit<T>);
  const T sign = a.scale < 0 ? T(-1) : T(1);
  const T scale = static_cast<T>(a.scale);

  // dQ / scale of each split, branch, sample and head: N × wide.
  std::vector<T> grad_q = std::vector<T>(static_cast<size_t>(splits * 2 * B * H * N * wide));
  // Each head's share of the gate's gradient: as queries (branch 0), as keys and values (branch 1).
  std::vector<T> grad_gate =
      std::vector<T>(a.gate == nullptr ? 0 : static_cast<size_t>(2 * B * H * N));

  T* grad_q_at(int64_t split, int64_t branch, int64_t b, int64_t h) {
    return grad_q.data() + (((split * 2 + branch) * B + b) * H + h) * N * wide;
  }
  T* grad_gate_at(int64_t branch, int64_t b, int64_t h) {
    return grad_gate.data() + ((branch * B + b) * H + h) * N;
  }

  // Copies of Q and dO, each both ways round: as blocks of d × kQueryBlock and as N × wide.
  struct Queries {
    T *q_panels, *q_rows, *g_panels, *g_rows;
    T* lse;  // times per_unit
    T* delta;
  };
  Queries load_queries(int branch, int64_t b, int64_t h, Scratch& scratch) const {
    const Queries to{
        scratch.take<T>(padded_queries * d),    scratch.take<T>(padded_queries * wide),
        scratch.take<T>(padded_queries * d),    scratch.take<T>(padded_queries * wide),
        scratch.take<T>(padded_queries),        scratch.take<T>(padded_queries)};
    const FeatureMap q = a.q[branch].at<S>(h), g = a.grad_out.at<S>(h), o = a.branches[branch].at<S>(h);
    const T* lse = static_cast<const T*>(a.lse) + ((branch * B + b) * H + h) * N;
    T gate[kQueryBlock], correction[kQueryBlock];
    for (int64_t first = 0; first < N; first += kQueryBlock) {
      const int64_t count = std::min(kQueryBlock, N - first);
      load_gate<S>(branch == 0 ? a.gate : nullptr, N, b, first, count, gate);
      for (int64_t n = 0; n < round_up(count, Vec<T>::width); ++n) gate[n] *= sign;
      T* panel = to.q_panels + first * d;
      load_panel<S>(q, b, first, count, panel, kQueryBlock);
      scale_columns(panel, kQueryBlock, d, count, [&](int64_t n) { return Vec<T>::load(gate + n); });
      // lse * per_unit is rounded; what that does to a row's weights is undone on dO, and so on dO Vᵀ,
      // Δ and dV.
      for (int64_t n = 0; n < round_up(count, Vec<T>::width); ++n) {
        const double exact = n < count ? double(lse[first + n]) * per_unit<T> : 0.0;
        to.lse[first + n] = static_cast<T>(exact);
        correction[n] = static_cast<T>(std::exp((to.lse[first + n] - exact) / per_unit<T>));
      }
      T* g_panel = to.g_panels + first * d;
      load_panel<S>(g, b, first, count, g_panel, kQueryBlock);
      scale_columns(g_panel, kQueryBlock, d, count, [&](int64_t n) { return Vec<T>::load(correction + n); });
      load_rows<S>(
          q, b, first, count, to.q_rows + first * wide, wide, [&](int64_t n) { return gate[n]; });
      load_rows<S>(
          g, b, first, count, to.g_rows + first * wide, wide, [&](int64_t n) { return correction[n]; });
      for (int64_t n = first; n < first + count; ++n) {
        const T* row = to.g_rows + n * wide;
        const S* out = o.at<S>(b, 0, n);
        T delta = 0;
        for (int64_t c = 0; c < d; ++c) delta += row[c] * T(widen(out[c]));
        to.delta[n] = delta;
      }
    }
    return to;
  }

  // A block of keys: K and V as d × keys, K as keys × d, gradients as d × keys.
  struct Keys {
    int64_t from, count;
    T *k, *v, *k_rows, *grad_k, *grad_v, *gate;
  };
  static constexpr int64_t keys = kKeyBlock<T>;

  Keys take_keys(Scratch& scratch) const {
    return {0, 0, scratch.take<T>(d * keys), scratch.take<T>(d * keys), scratch.take<T>(keys * wide),
            scratch.take<T>(wide * keys), scratch.take<T>(wide * keys), scratch.take<T>(keys)};
  }

  // Not to be mistaken for the queries of the other branch, which are gated as well.
  bool gates_keys(int branch) const { return branch == 1 && a.gate != nullptr; }

  void load_keys(int branch, int64_t b, int64_t h, int64_t block, Keys& to) const {
    const FeatureMap k_map = a.k[branch].at<S>(h), v_map = a.v[branch].at<S>(h);
    to.from = block * keys;
    to.count = std::min(keys, N - to.from);
    const T* gate = to.gate;
    load_gate<S>(gates_keys(branch) ? a.gate : nullptr, N, b, to.from, to.count, to.gate);
    load_panel<S>(k_map, b, to.from, to.count, to.k, keys);
    load_panel<S>(v_map, b, to.from, to.count, to.v, keys);
    if (gates_keys(branch)) {
      for (T* panel : {to.k, to.v}) {
        scale_columns(panel, keys, d, to.count, [&](int64_t n) { return Vec<T>::load(gate + n); });
      }
    }
    load_rows<S>(k_map, b, to.from, to.count, to.k_rows, wide, [&](int64_t n) { return gate[n]; });
    std::fill_n(to.grad_k, wide * keys, T(0));
    std::fill_n(to.grad_v, wide * keys, T(0));
  }

  // One block of queries against one of keys. P and dS, queries × keys, are of this call.
  void meet(
      const Queries& queries, int64_t first, const Keys& of, T* grad_q, T* weights, T* grad_scores) const {
    const int64_t rows = std::min(kQueryBlock, N - first), lanes = round_up(of.count, Vec<T>::width);
    const T* lse = queries.lse + first;
    const T* delta = queries.delta + first;
    gemm<T>(
        rows, lanes, d, PanelColumns<T>{queries.q_panels + first * d, kQueryBlock}, Rows<T>{of.k, keys},
        [&](int64_t i, int64_t j, Vec<T> y, auto) __attribute__((always_inline)) {
          power(fma(y, Vec<T>(unit), Vec<T>(-lse[i]))).store(weights + i * keys + j);
        });
    gemm<T>(
        rows, lanes, d, PanelColumns<T>{queries.g_panels + first * d, kQueryBlock}, Rows<T>{of.v, keys},
        [&](int64_t i, int64_t j, Vec<T> y, auto) __attribute__((always_inline)) {
          const Vec<T> weight = Vec<T>::load(weights + i * keys + j);
          (weight * (y - Vec<T>(delta[i]))).store(grad_scores + i * keys + j);
        });
    gemm<T>(
        d, lanes, rows, PanelColumns<T>{queries.g_rows + first * wide, wide}, Rows<T>{weights, keys},
        add_to(of.grad_v, keys));
    gemm<T>(
        d, lanes, rows, PanelColumns<T>{queries.q_rows + first * wide, wide}, Rows<T>{grad_scores, keys},
        add_to(of.grad_k, keys));
    add_product<T>(
        rows, wide, of.count, grad_scores, keys, of.k_rows, wide, grad_q + first * wide, wide);
  }

  // dK and dV of the gated keys and values; the gate's factor follows.
  void finish_keys(int branch, int64_t b, int64_t h, const Keys& of) {
    const int64_t lanes = round_up(of.count, Vec<T>::width);
    if (gates_keys(branch)) {
      load_panel<S>(a.k[branch].at<S>(h), b, of.from, of.count, of.k, keys);
      load_panel<S>(a.v[branch].at<S>(h), b, of.from, of.count, of.v, keys);
    }
    const Vec<T> magnitude(std::fabs(scale));
    for (int64_t n = 0; n < lanes; n += Vec<T>::width) {
      const Vec<T> factor = Vec<T>::load(of.gate + n);
      Vec<T> share(T(0));
      for (int64_t c = 0; c < d; ++c) {
        const Vec<T> of_k = Vec<T>::load(of.grad_k + c * keys + n) * magnitude;
        const Vec<T> of_v = Vec<T>::load(of.grad_v + c * keys + n);
        share = fma(of_k, Vec<T>::load(of.k + c * keys + n), share);
        share = fma(of_v, Vec<T>::load(of.v + c * keys + n), share);
        (of_k * factor).store(of.grad_k + c * keys + n);
        (of_v * factor).store(of.grad_v + c * keys + n);
      }
      if (gates_keys(branch)) {
        share.store_partial(
            grad_gate_at(1, b, h) + of.from + n, std::min<int64_t>(Vec<T>::width, of.count - n));
      }
    }
    store_panel<S>(a.grad_k[branch].at<S>(h), b, of.from, of.count, of.grad_k, keys);
    store_panel<S>(a.grad_v[branch].at<S>(h), b, of.from, of.count, of.grad_v, keys);
  }

  void task(int branch, int64_t b, int64_t h, int64_t split, Scratch& scratch) {
    const Queries queries = load_queries(branch, b, h, scratch);
    T* weights = scratch.take<T>((kQueryBlock + kSpareRows) * keys);
    T* grad_scores = scratch.take<T>((kQueryBlock + kSpareRows) * keys);
    T* grad_q = grad_q_at(split, branch, b, h);
    Keys pass[kBlocksOfPass];
    for (Keys& block : pass) block = take_keys(scratch);
    const int64_t end = key_blocks * (split + 1) / splits;
    for (int64_t block = key_blocks * split / splits; block < end; block += kBlocksOfPass) {
      const std::span<Keys> blocks(pass, static_cast<size_t>(std::min(kBlocksOfPass, end - block)));
      for (size_t i = 0; i < blocks.size(); ++i) {
        load_keys(branch, b, h, block + static_cast<int64_t>(i), blocks[i]);
      }
      for (int64_t run = 0; run < N; run += kRun) {
        for (const Keys& of : blocks) {
          for (int64_t first = run; first < std::min(run + kRun, N); first += kQueryBlock) {
            meet(queries, first, of, grad_q, weights, grad_scores);
          }
        }
      }
      for (const Keys& of : blocks) finish_keys(branch, b, h, of);
    }
  }

  // Adds the splits' dQ, in order.
  void finish_queries(int branch, int64_t b, int64_t h, Scratch& scratch) {
    constexpr int width = Vec<T>::width;
    const FeatureMap q = a.q[branch].at<S>(h), to = a.grad_q[branch].at<S>(h);
    const bool gated = branch == 0 && a.gate != nullptr;
    T* sums = grad_q_at(0, branch, b, h);
    for (int64_t split = 1; split < splits; ++split) {
      const T* more = grad_q_at(split, branch, b, h);
      for (int64_t i = 0; i < N * wide; ++i) sums[i] += more[i];
    }
    T* given = scratch.take<T>(wide);
    for (int64_t n = 0; n < N; ++n) {
      if (gated) load_rows<S>(q, b, n, 1, given, wide, [](int64_t) { return T(1); });
      const Vec<T> gate(gated ? T(widen(static_cast<const S*>(a.gate)[b * N + n])) : T(1));
      Vec<T> share(T(0));
      for (int64_t c = 0; c < d; c += width) {
        const Vec<T> gradient = Vec<T>::load(sums + n * wide + c) * Vec<T>(scale);
        if (gated) share = fma(gradient, Vec<T>::load(given + c), share);
        (gradient * gate).store_partial(to.mutable_at<S>(b, c, n), std::min<int64_t>(width, d - c));
      }
      if (gated) grad_gate_at(0, b, h)[n] = sum(share);
    }
  }

  size_t scratch_bytes() const {
    const size_t block = 2 * Scratch::bytes<T>(d * keys) + 3 * Scratch::bytes<T>(wide * keys) +
        Scratch::bytes<T>(keys);
    return 2 * Scratch::bytes<T>(padded_queries * d) + 2 * Scratch::bytes<T>(padded_queries * wide) +
        2 * Scratch::bytes<T>(padded_queries) + kBlocksOfPass * block +
        2 * Scratch::bytes<T>((kQueryBlock + kSpareRows) * keys);
  }

  // Runs work(branch, b, h, split, scratch) for every task, then adds up what tasks share.
  template <class Work>
  void run(size_t bytes, Work work) {
    parallel_for(B * H * 2 * splits, bytes, [&](int64_t chunk, Scratch& scratch) {
      const int64_t head = chunk / (2 * splits);
      work(static_cast<int>(chunk / splits % 2), head / H, head % H, chunk % splits, scratch);
    });
    parallel_for(B * H * 2, Scratch::bytes<T>(wide), [&](int64_t chunk, Scratch& scratch) {
      finish_queries(static_cast<int>(chunk % 2), chunk / 2 / H, chunk / 2 % H, scratch);
    });
    if (a.gate == nullptr) return;
    parallel_for(B, 0, [&](int64_t b, Scratch&) {
      for (int64_t n = 0; n < N; ++n) {
        T sum = 0;
        for (int64_t h = 0; h < H; ++h) sum += grad_gate_at(0, b, h)[n] + grad_gate_at(1, b, h)[n];
        static_cast<S*>(a.grad_gate)[b * N + n] = narrow<S>(sum);
      }
    });
  }
};

}  // namespace
}  // namespace EAMNET_LEVEL
}  // namespace eamnet

#if defined(__AMX_BF16__)
#include "cpu/cross_mix_pixels_amx.h"
#endif

namespace eamnet {
namespace EAMNET_LEVEL {

void cross_mix_pixels(const CrossMixPixels& arguments) {
#if defined(__AMX_BF16__)
  if (arguments.out.first.dtype == DType::bfloat16) return TileForward{arguments}.run();
#endif
  visit(arguments.out.first.dtype, [&]<class S>() { forward<S>(arguments); });
}

void cross_mix_pixels_backward(const CrossMixPixelsBackward& arguments) {
#if defined(__AMX_BF16__)
  if (arguments.grad_out.first.dtype == DType::bfloat16) return TileBackward{{arguments}}.run();
#endif
  visit(arguments.grad_out.first.dtype, [&]<class S>() {
    Backward<S> backward{arguments};
    backward.run(
        backward.scratch_bytes(), [&](int branch, int64_t b, int64_t h, int64_t split, Scratch& scratch) {
          backward.task(branch, b, h, split, scratch);
        });
  });
}

}  // namespace EAMNET_LEVEL
}  // namespace eamnet

#ifdef EAMNET_HOST
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/tensor.h"

namespace eamnet {
namespace {

// (B, h, N, d) with adjacent channels or adjacent tokens.
Heads heads_of(const Tensor& x, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(x.dim() == 4, name, " has ", x.dim(), " dimensions; accepted is (B, h, N, d)");
  for (int64_t i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(x.size(i) == like.size(i), name, " differs from q_s in the size of dimension ", i);
  }
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), name, " differs from q_s in dtype");
  Heads heads;
  FeatureMap& map = heads.first;
  map.data = x.const_data_ptr();
  map.dtype = dtype_of(x, name);
  map.batch = x.size(0);
  map.pixels = x.size(2);
  map.channels = x.size(3);
  map.batch_stride = x.stride(0);
  heads.head_stride = x.stride(1);
  // The stride of a dimension of one element says nothing.
  map.channel_stride = map.channels > 1 ? x.stride(3) : 1;
  map.pixel_stride = map.pixels > 1 ? x.stride(2) : map.channel_stride == 1 ? map.channels : 1;
  STD_TORCH_CHECK(
      map.channel_stride == 1 || map.pixel_stride == 1,
      name, " has neither adjacent channels nor adjacent tokens; make it contiguous first");
  return heads;
}

const void* gate_data(const std::optional<Tensor>& gate, const Tensor& q_s) {
  if (!gate.has_value()) return nullptr;
  check_operand(*gate, "spatial_gate", {q_s.size(0), q_s.size(2)}, q_s.scalar_type());
  return gate->const_data_ptr();
}

ScalarType accumulation_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The halves of a contiguous (2, B, h, N, d).
void set_branches(Heads (&to)[2], const Tensor& branches, const Heads& like) {
  const FeatureMap& map = like.first;
  for (int i = 0; i < 2; ++i) {
    to[i] = like;
    const int64_t offset = i * map.batch * map.batch_stride;
    to[i].first.data = static_cast<const char*>(branches.const_data_ptr()) +
        offset * static_cast<int64_t>(branches.element_size());
  }
}

std::tuple<Tensor, Tensor, Tensor> cross_mix_forward(
    const Tensor& q_s, const Tensor& k_s, const Tensor& v_s, const Tensor& q_c, const Tensor& k_c,
    const Tensor& v_c, const std::optional<Tensor>& spatial_gate, double scale, bool save_for_backward) {
  STD_TORCH_CHECK(q_s.dim() == 4 && q_s.size(2) > 0 && q_s.size(3) > 0, "q_s must be (B, h, N, d)");
  const int64_t B = q_s.size(0), H = q_s.size(1), N = q_s.size(2), d = q_s.size(3);
  const ScalarType dtype = q_s.scalar_type(), accumulate = accumulation_type(q_s);
  CrossMixPixels a{};
  a.q[0] = heads_of(q_s, "q_s", q_s);
  a.k[0] = heads_of(k_c, "k_c", q_s);
  a.v[0] = heads_of(v_c, "v_c", q_s);
  a.q[1] = heads_of(q_c, "q_c", q_s);
  a.k[1] = heads_of(k_s, "k_s", q_s);
  a.v[1] = heads_of(v_s, "v_s", q_s);
  a.gate = gate_data(spatial_gate, q_s);
  a.scale = scale;
  a.heads = H;
  Tensor out = new_tensor({B, H, N, d}, dtype);
  a.out = heads_of(out, "out", q_s);
  Tensor branches = save_for_backward ? new_tensor({2, B, H, N, d}, dtype) : new_tensor({0}, dtype);
  Tensor lse = save_for_backward ? new_tensor({2, B, H, N}, accumulate) : new_tensor({0}, accumulate);
  if (save_for_backward) {
    set_branches(a.branches, branches, a.out);
    a.lse = lse.mutable_data_ptr();
  }
  if (B * H > 0) cross_mix_pixels(a);
  return {out, branches, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cross_mix_backward(
    const Tensor& grad_out, const Tensor& q_s, const Tensor& k_s, const Tensor& v_s, const Tensor& q_c,
    const Tensor& k_c, const Tensor& v_c, const std::optional<Tensor>& spatial_gate,
    const Tensor& branches, const Tensor& lse, double scale) {
  STD_TORCH_CHECK(q_s.dim() == 4 && q_s.size(2) > 0 && q_s.size(3) > 0, "q_s must be (B, h, N, d)");
  const int64_t B = q_s.size(0), H = q_s.size(1), N = q_s.size(2), d = q_s.size(3);
  const ScalarType dtype = q_s.scalar_type();
  check_operand(branches, "branches", {2, B, H, N, d}, dtype);
  check_operand(lse, "lse", {2, B, H, N}, accumulation_type(q_s));
  CrossMixPixelsBackward a{};
  a.grad_out = heads_of(grad_out, "grad_out", q_s);
  a.q[0] = heads_of(q_s, "q_s", q_s);
  a.k[0] = heads_of(k_c, "k_c", q_s);
  a.v[0] = heads_of(v_c, "v_c", q_s);
  a.q[1] = heads_of(q_c, "q_c", q_s);
  a.k[1] = heads_of(k_s, "k_s", q_s);
  a.v[1] = heads_of(v_s, "v_s", q_s);
  a.gate = gate_data(spatial_gate, q_s);
  a.scale = scale;
  a.heads = H;
  a.lse = lse.const_data_ptr();
  Tensor grad_q_s = new_tensor({B, H, N, d}, dtype), grad_k_s = new_tensor({B, H, N, d}, dtype);
  Tensor grad_v_s = new_tensor({B, H, N, d}, dtype), grad_q_c = new_tensor({B, H, N, d}, dtype);
  Tensor grad_k_c = new_tensor({B, H, N, d}, dtype), grad_v_c = new_tensor({B, H, N, d}, dtype);
  a.grad_q[0] = heads_of(grad_q_s, "grad_q_s", q_s);
  a.grad_k[0] = heads_of(grad_k_c, "grad_k_c", q_s);
  a.grad_v[0] = heads_of(grad_v_c, "grad_v_c", q_s);
  a.grad_q[1] = heads_of(grad_q_c, "grad_q_c", q_s);
  a.grad_k[1] = heads_of(grad_k_s, "grad_k_s", q_s);
  a.grad_v[1] = heads_of(grad_v_s, "grad_v_s", q_s);
  set_branches(a.branches, branches, a.grad_q[0]);
  Tensor grad_gate = spatial_gate.has_value() ? new_tensor({B, N}, dtype) : new_tensor({0}, dtype);
  a.grad_gate = grad_gate.mutable_data_ptr();
  if (B * H > 0) {
    cross_mix_pixels_backward(a);
  } else {
    torch::stable::zero_(grad_gate);
  }
  return {grad_q_s, grad_k_s, grad_v_s, grad_q_c, grad_k_c, grad_v_c, grad_gate};
}

}  // namespace
}  // namespace eamnet

STABLE_TORCH_LIBRARY_IMPL(eamnet_kernels_native, CPU, m) {
  m.impl("cross_mix_pixels", TORCH_BOX(&eamnet::cross_mix_forward));
  m.impl("cross_mix_pixels_backward", TORCH_BOX(&eamnet::cross_mix_backward));
}
#endif  // EAMNET_HOST
