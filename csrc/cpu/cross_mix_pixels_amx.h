// cross_mix_pixels for bfloat16 in AMX tiles; included by cross_mix_pixels.cpp on the level that has
// them. Products are made of bfloat16 operands: inputs exactly (rounded once if gated), weights and
// score gradients rounded once. Everything else is float32.
//
// Floor, in cycles per score: products 4 d / 1024 (forward) and 10 d / 1024 (backward), d rounded up
// to whole tiles; the softmax about 11 vector instructions per 16 scores (backward: 14), two to a
// cycle. At d = 32 that is 0.13 and 0.34 in the forward: the exponential decides, not the tiles. Each
// score is also stored and loaded once as float32 and once as bfloat16, in the first-level cache.
#pragma once

#include "cpu/amx.h"

namespace eamnet {
namespace EAMNET_LEVEL {
namespace {

constexpr float kOneStep = 0x1p23f;  // the distance of exponents in the bits of a float32

// 2^(s*unit + offset), relative error below 1e-4: enough for a result that is rounded to bfloat16.
// Both arguments are times 2^23, and 127 * 2^23 was added to the offset, so that the sum, as an
// integer, is the exponent's bits followed by the fraction f, from which a cubic makes 2^f (Schraudolph,
// Neural Computation 11, 1999, with a correction). Below 2^-126 the result is 0. NaN gives -0.0, which
// no number does.
EAMNET_INLINE __m512i weight_bits(__m512 s, __m512 unit, __m512 offset) {
  const __m512 sum = _mm512_maskz_max_ps(0xffff, _mm512_setzero_ps(), _mm512_fmadd_ps(s, unit, offset));
  const __m512i whole = _mm512_maskz_cvtps_epi32(0xffff, sum);
  const __m512i fraction = _mm512_set1_epi32(0x7fffff);
  // 1 + f
  const __m512 m = _mm512_castsi512_ps(
      _mm512_ternarylogic_epi32(whole, fraction, _mm512_set1_epi32(0x3f800000), 0xEA));
  // 2^f for f in [0, 1), in terms of 1 + f; from 1.000002 to 1.99983, so that it never leaves [1, 2).
  __m512 p = _mm512_set1_ps(0.07706706866f);
  p = _mm512_fmadd_ps(p, m, _mm512_set1_ps(-0.003556244138f));
  p = _mm512_fmadd_ps(p, m, _mm512_set1_ps(0.471028075485f));
  p = _mm512_fmadd_ps(p, m, _mm512_set1_ps(0.455463f));
  return _mm512_ternarylogic_epi32(fraction, _mm512_castps_si512(p), whole, 0xCA);
}
EAMNET_INLINE __m512 weight(__m512 s, __m512 unit, __m512 offset) {
  return _mm512_castsi512_ps(weight_bits(s, unit, offset));
}

// 32 values, `low` first.
EAMNET_INLINE __m512i round_pair(__m512 low, __m512 high) {
  return bit_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// ------------------------------------------------------------------------------------------- forward
//
// Rows are queries, kGroup at a time; columns are keys, so that weights are rounded into the rows of
// the left operand that the product with the values takes. A chunk packs the keys and values of a head
// once for all its queries; they stream from the second-level cache, everything else of a group stays
// in the first.

constexpr int64_t kGroup = 32;
constexpr int64_t kTileKeys = 64;
// Weights relative to such a bound are at least 2^-80.
constexpr float kLargestBound = 40;
// Floats between rows of scores; the extra line keeps rows from evicting one another.
constexpr int64_t kScoreStride = kTileKeys + 16;

struct TileForward {
  const CrossMixPixels& a;
  const int64_t B = a.out.first.batch, H = a.heads, N = a.out.first.pixels, d = a.out.first.channels;
  const int64_t depth = round_up(d, kTileDepth), steps = depth / kTileDepth;
  const int64_t columns = ceil_div(d, 16), wide = columns * 16;
  const float unit = static_cast<float>(std::fabs(a.scale) * per_unit<float>);
  const float sign = a.scale < 0 ? -1.0f : 1.0f;

  // Chunks to aim for, for the threads, and the fewest queries worth packing the keys for.
  static constexpr int64_t kChunks = 4, kQueriesOfChunk = 1024;
  const int64_t chunks_of_head = std::clamp<int64_t>(
      ceil_div(kChunks, std::max<int64_t>(1, B * H)), 1, ceil_div(N, kQueriesOfChunk));
  const int64_t chunk_queries = round_up(ceil_div(N, chunks_of_head), kGroup);

  // Of one group in one branch.
  struct State {
    float* maximum;  // of the scaled scores
    float* sums;     // of the weights, 16 partial sums per query
    float* o;        // queries × wide
  };

  // How the queries of a group (16 to a vector) go into a block: weights are relative to their maximum
  // so far, what was added up before is multiplied by `fade`.
  struct References {
    float offset[kGroup];
    float fade[kGroup];
    bool fading = false;
  };

  // From the scores of `keys` keys.
  void raise_references(const float* s, int64_t keys, const State& state, References& to) const {
    using V = Vec<float>;
    const auto greater = [](V x, V m) __attribute__((always_inline)) { return maximum_so_far(x, m); };
    to.fading = false;
    for (int64_t first = 0; first < kGroup; first += 16) {
      V rows[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) {
        const float* row = s + (first + r) * kScoreStride;
        V top[2] = {V::load(row), V::load(row + 16)};
        for (int64_t k = 32; k < keys; k += 32) {
          top[0] = maximum_so_far(V::load(row + k), top[0]);
          top[1] = maximum_so_far(V::load(row + k + 16), top[1]);
        }
        rows[r] = maximum_so_far(top[0], top[1]);
      }
      const V highest = fold_rows(rows, greater);
      const V before = V::load(state.maximum + first);
      const V maximum = maximum_so_far(highest * V(unit), before);
      // While every score is -inf any finite reference gives the weights 0.
      const V reference = select(maximum == V(-std::numeric_limits<float>::infinity()), V(0.0f), maximum);
      maximum.store(state.maximum + first);
      ((V(127.0f) - reference) * V(kOneStep)).store(to.offset + first);
      const V fade = power(before - reference);
      fade.store(to.fade + first);
      to.fading |= (~(fade == V(1.0f))).any();
    }
  }

  static void fade(float* rows, int64_t width, const References& by) {
    for (int64_t r = 0; r < kGroup; ++r) {
      const Vec<float> factor(by.fade[r]);
      for (float* p = rows + r * width; p < rows + (r + 1) * width; p += 16) {
        (Vec<float>::load(p) * factor).store(p);
      }
    }
  }

  // Scores of half a group, from row `first` on, become weights in place.
  EAMNET_INLINE void weigh(
      float* s, int64_t keys, int64_t first, const References& references, const State& state) const {
    const __m512 step = _mm512_set1_ps(unit * kOneStep);
    __m512i signs = _mm512_setzero_si512();
    for (int64_t r = first; r < first + kGroup / 2; ++r) {
      const __m512 offset = _mm512_set1_ps(references.offset[r]);
      float* row = s + r * kScoreStride;
      bfloat16* weights = reinterpret_cast<bfloat16*>(row);
      __m512 sums[2] = {_mm512_loadu_ps(state.sums + r * 16), _mm512_setzero_ps()};
#pragma GCC unroll 4
      for (int64_t k = 0; k < keys; k += 32) {
        const __m512 low = weight(_mm512_loadu_ps(row + k), step, offset);
        const __m512 high = weight(_mm512_loadu_ps(row + k + 16), step, offset);
        const __m512i pair = round_pair(low, high);
        signs = _mm512_or_si512(signs, pair);
        sums[0] += low;
        sums[1] += high;
        _mm512_storeu_si512(weights + k, pair);
      }
      _mm512_storeu_ps(state.sums + r * 16, sums[0] + sums[1]);
    }
    if (_mm512_movepi16_mask(signs) == 0) return;
    // There were NaN among the scores: the sums of their rows, and with them the results, are NaN.
    for (int64_t r = first; r < first + kGroup / 2; ++r) {
      const bfloat16* weights = reinterpret_cast<const bfloat16*>(s + r * kScoreStride);
      if (std::any_of(weights, weights + keys, [](bfloat16 w) { return w.bits >> 15; })) {
        state.sums[r * 16] = std::numeric_limits<float>::quiet_NaN();
      }
    }
  }

  // The largest of the squared norms of the rows (a multiple of 16 of them); NaN if one is NaN.
  float largest_norm(const bfloat16* m, int64_t rows) const {
    using V = Vec<float>;
    V largest(0.0f);
    for (int64_t n = 0; n < rows; n += 16) {
      V squares[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) {
        squares[r] = V(0.0f);
        for (int64_t c = 0; c < depth; c += 16) {
          const V x = V::load(m + (n + r) * depth + c);
          squares[r] = fma(x, x, squares[r]);
        }
      }
      largest = maximum(largest, sum_rows(squares));
    }
    return max(largest);
  }

  // Returns the largest squared norm of a key.
  float pack_keys(int branch, int64_t b, int64_t h, bfloat16* rows, bfloat16* k, bfloat16* v) const {
    const FeatureMap keys = a.k[branch].at<bfloat16>(h), values = a.v[branch].at<bfloat16>(h);
    float gate[kTileKeys], largest = 0;
    const float* factor = branch == 1 && a.gate != nullptr ? gate : nullptr;
    for (int64_t from = 0; from < N; from += kTileKeys) {
      const int64_t count = std::min(kTileKeys, N - from), padded = round_up(count, kTileDepth);
      load_gate<bfloat16>(a.gate, N, b, from, count, gate);
      pack_rows(keys, b, from, count, padded, depth, rows, factor);
      largest = maximum_scalar(largest, largest_norm(rows, padded));
      pack_transposed_tiles(rows, depth, padded / 16, steps, k + from * depth);
      pack_rows(values, b, from, count, padded, depth, rows, factor);
      pack_tiles(rows, depth, padded / kTileDepth, columns, v + from * wide);
    }
    return largest;
  }

  // One group over all keys. The tiles multiply while the vectors weigh: the scores of the next block
  // and the results of the previous one are made around the weights of the present one.
  void attend(
      const bfloat16* q, const bfloat16* k, const bfloat16* v, float* const (&s)[3], bool bounded,
      References& references, const State& state) const {
    const auto keys_of = [&](int64_t block) {
      return std::min(kTileKeys, round_up(N - block * kTileKeys, kTileDepth));
    };
    const auto score = [&](int64_t block) {
      const int64_t from = block * kTileKeys, keys = keys_of(block);
      tile_product<false>(
          kGroup / 16, keys / 16, steps, q, depth, PackedTiles{k + from * depth, kTile, steps * kTile},
          s[block % 3], kScoreStride);
      for (int64_t r = 0; r < kGroup && from + keys > N; ++r) {
        float* row = s[block % 3] + r * kScoreStride;
        std::fill(row + N - from, row + keys, -std::numeric_limits<float>::infinity());
      }
    };
    const auto add_values = [&](int64_t block) {
      tile_product<true>(
          kGroup / 16, columns, keys_of(block) / kTileDepth, reinterpret_cast<const bfloat16*>(s[block % 3]),
          2 * kScoreStride, PackedTiles{v + block * kTileKeys * wide, columns * kTile, kTile}, state.o, wide);
    };
    const int64_t blocks = ceil_div(N, kTileKeys);
    score(0);
    for (int64_t block = 0; block < blocks; ++block) {
      float* scores = s[block % 3];
      const int64_t keys = keys_of(block);
      if (block + 1 < blocks) score(block + 1);
      if (!bounded) {
        raise_references(scores, keys, state, references);
        if (references.fading) fade(state.sums, 16, references);
      }
      weigh(scores, keys, 0, references, state);
      if (block > 0) add_values(block - 1);
      weigh(scores, keys, kGroup / 2, references, state);
      if (references.fading) fade(state.o, wide, references);
    }
    add_values(blocks - 1);
  }

  void chunk(int64_t b, int64_t h, int64_t begin, Scratch& scratch) const {
    using V = Vec<float>;
    const int64_t end = std::min(begin + chunk_queries, N), padded_keys = round_up(N, kTileDepth);
    bfloat16* rows = scratch.take<bfloat16>(kTileKeys * depth);
    bfloat16* k = scratch.take<bfloat16>(padded_keys * depth);
    bfloat16* v = scratch.take<bfloat16>(padded_keys * wide);
    bfloat16* q = scratch.take<bfloat16>(kGroup * depth);
    float* const s[] = {
        scratch.take<float>(kGroup * kScoreStride), scratch.take<float>(kGroup * kScoreStride),
        scratch.take<float>(kGroup * kScoreStride)};
    float* total = scratch.take<float>(chunk_queries * wide);
    const State state{
        scratch.take<float>(kGroup), scratch.take<float>(kGroup * 16), scratch.take<float>(kGroup * wide)};
    float factor[kGroup];

    for (int branch = 0; branch < 2; ++branch) {
      const float largest_key = pack_keys(branch, b, h, rows, k, v);
      const FeatureMap queries = a.q[branch].at<bfloat16>(h), kept = a.branches[branch].at<bfloat16>(h);
      const FeatureMap out = a.out.at<bfloat16>(h);
      float* lse =
          a.lse == nullptr ? nullptr : static_cast<float*>(a.lse) + ((branch * B + b) * H + h) * N;
      for (int64_t first = begin; first < end; first += kGroup) {
        const int64_t count = std::min(kGroup, end - first);
        load_gate<bfloat16>(branch == 0 ? a.gate : nullptr, N, b, first, count, factor);
        for (float& x : factor) x *= sign;
        pack_rows(queries, b, first, count, kGroup, depth, q, factor);
        // No score exceeds the product of the norms. Where that is small enough, weights relative to
        // it instead of to the maximum neither overflow nor vanish: nobody looks for a maximum.
        const float bound = std::sqrt(largest_norm(q, kGroup)) * std::sqrt(largest_key) * unit;
        const bool bounded = bound <= kLargestBound;
        References references;
        std::fill_n(references.offset, kGroup, (127.0f - bound) * kOneStep);
        std::fill_n(state.maximum, kGroup, bounded ? bound : -std::numeric_limits<float>::infinity());
        std::fill_n(state.sums, kGroup * 16, 0.0f);
        std::fill_n(state.o, kGroup * wide, 0.0f);
        attend(q, k, v, s, bounded, references, state);
        for (int64_t n = 0; n < count; ++n) {
          const float weights = sum(V::load(state.sums + n * 16));
          const V inverse(1.0f / weights);
          float* so_far = total + (first - begin + n) * wide;
          for (int64_t c = 0; c < wide; c += 16) {
            const V o = V::load(state.o + n * wide + c) * inverse;
            const int64_t valid = std::min<int64_t>(16, d - c);
            if (lse != nullptr) o.store_partial(kept.mutable_at<bfloat16>(b, c, first + n), valid);
            if (branch == 0) {
              o.store(so_far + c);
            } else {
              (V::load(so_far + c) + o).store_partial(out.mutable_at<bfloat16>(b, c, first + n), valid);
            }
          }
          if (lse != nullptr) {
            lse[first + n] =
                static_cast<float>(state.maximum[n] / per_unit<float> + std::log(double(weights)));
          }
        }
      }
    }
  }

  void run() const {
    const size_t bytes = Scratch::bytes<bfloat16>(kTileKeys * depth) +
        Scratch::bytes<bfloat16>(round_up(N, kTileDepth) * depth) +
        Scratch::bytes<bfloat16>(round_up(N, kTileDepth) * wide) +
        Scratch::bytes<bfloat16>(kGroup * depth) + 3 * Scratch::bytes<float>(kGroup * kScoreStride) +
        Scratch::bytes<float>(chunk_queries * wide) + Scratch::bytes<float>(kGroup) +
        Scratch::bytes<float>(kGroup * 16) + Scratch::bytes<float>(kGroup * wide);
    const int64_t per_head = ceil_div(N, chunk_queries);
    parallel_for(B * H * per_head, bytes, [&](int64_t i, Scratch& scratch) {
      const TileSession session;
      chunk(i / (H * per_head), i / per_head % H, i % per_head * chunk_queries, scratch);
    });
  }
};

// ------------------------------------------------------------------------------------------ backward
//
// Rows are keys and columns queries: S = K Qᵀ and dO Vᵀ are made as K Qᵀ and V dOᵀ for kSlice keys at a
// time, and rounded P and dS are left operands of dV = Pᵀ dO and dK = dSᵀ Q as they come. dQᵀ = Kᵀ dSᵀ
// takes pairs of rows of dS, which two instructions per 64 values interleave in 128-bit lanes: the
// columns of dQᵀ are permuted accordingly (query_of) and put in order once, at the end.

constexpr int64_t kBlockKeys = 128;
constexpr int64_t kBlockQueries = 64;
constexpr int64_t kSlice = 32;
constexpr int64_t kSliceStride = kBlockQueries + 16;

// The query in the place `column` of 32.
constexpr int64_t query_of(int64_t column) {
  const int64_t in_tile = column % 16;
  return in_tile / 4 * 8 + column / 16 * 4 + in_tile % 4;
}

struct TileBackward {
  Backward<bfloat16> base;

  const CrossMixPixelsBackward& a = base.a;
  const int64_t N = base.N, d = base.d, wide = base.wide, columns = wide / 16;
  const int64_t depth = round_up(d, kTileDepth), steps = depth / kTileDepth;
  const int64_t padded = round_up(N, kBlockQueries);
  const int64_t blocks = ceil_div(N, kBlockKeys);

  // Q and dO of a branch as right operands: of S and dO Vᵀ (depth along d), of dK and dV (along
  // queries).
  struct Queries {
    bfloat16 *q, *g, *q_pairs, *g_pairs;
    float* offset;  // of weight(): from lse; of a query beyond the last such that its weights are 0
    float* delta;
  };

  // Rounded P and dS of a block, as left operands and, for dQ, as right one.
  struct Panels {
    bfloat16 *weights, *grad_scores;  // kBlockKeys × kBlockQueries
    bfloat16* pairs;                  // tiles (key / 32, query / 16)
  };

  Queries load_queries(int branch, int64_t b, int64_t h, Scratch& scratch) const {
    const Queries to{
        scratch.take<bfloat16>(padded * depth), scratch.take<bfloat16>(padded * depth),
        scratch.take<bfloat16>(padded * wide),  scratch.take<bfloat16>(padded * wide),
        scratch.take<float>(padded),            scratch.take<float>(padded)};
    bfloat16* rows = scratch.take<bfloat16>(kBlockQueries * depth);
    const FeatureMap q = a.q[branch].at<bfloat16>(h), g = a.grad_out.at<bfloat16>(h);
    const FeatureMap o = a.branches[branch].at<bfloat16>(h);
    const float* lse = lse_of(branch, b, h);
    float gate[kBlockQueries];
    for (int64_t first = 0; first < N; first += kBlockQueries) {
      const int64_t count = std::min(kBlockQueries, N - first);
      load_gate<bfloat16>(branch == 0 ? a.gate : nullptr, N, b, first, count, gate);
      for (float& factor : gate) factor *= base.sign;
      pack_rows(q, b, first, count, kBlockQueries, depth, rows, gate);
      pack_transposed_tiles(rows, depth, kBlockQueries / 16, steps, to.q + first * depth);
      pack_tiles(rows, depth, kBlockQueries / kTileDepth, columns, to.q_pairs + first * wide);
      pack_rows(g, b, first, count, kBlockQueries, depth, rows, nullptr);
      pack_transposed_tiles(rows, depth, kBlockQueries / 16, steps, to.g + first * depth);
      pack_tiles(rows, depth, kBlockQueries / kTileDepth, columns, to.g_pairs + first * wide);
      for (int64_t n = 0; n < kBlockQueries; ++n) {
        float delta = 0, offset = -0x1p40f;
        if (n < count) {
          const bfloat16* out = o.at<bfloat16>(b, 0, first + n);
          for (int64_t c = 0; c < d; ++c) delta += widen(rows[n * depth + c]) * widen(out[c]);
          offset = static_cast<float>((127.0 - lse[first + n] * per_unit<float>) * kOneStep);
        }
        to.delta[first + n] = delta;
        to.offset[first + n] = offset;
      }
    }
    return to;
  }

  const float* lse_of(int branch, int64_t b, int64_t h) const {
    return static_cast<const float*>(a.lse) + ((branch * base.B + b) * base.H + h) * N;
  }

  // P and dS of `count` keys (at most kSlice, the first of them key `first` of the block) and the
  // block's queries from their scores s and products dO Vᵀ p.
  EAMNET_INLINE void differentiate(
      const float* s, const float* p, int64_t first, int64_t count, const float* offset, const float* delta,
      const Panels& to) const {
    const __m512 unit = _mm512_set1_ps(base.unit * kOneStep);
    for (int64_t i = 0; i < count; i += 2) {
      for (int64_t j = 0; j < kBlockQueries; j += 32) {
        __m512i grad[2];
        const auto row = [&](int64_t r) __attribute__((always_inline)) {
          __m512 w[2], g[2];
#pragma GCC unroll 2
          for (int u = 0; u < 2; ++u) {
            const int64_t at = (i + r) * kSliceStride + j + u * 16, n = j + u * 16;
            w[u] = weight(_mm512_loadu_ps(s + at), unit, _mm512_loadu_ps(offset + n));
            g[u] = w[u] * (_mm512_loadu_ps(p + at) - _mm512_loadu_ps(delta + n));
          }
          const int64_t out = (first + i + r) * kBlockQueries + j;
          _mm512_storeu_si512(to.weights + out, round_pair(w[0], w[1]));
          grad[r] = round_pair(g[0], g[1]);
          _mm512_storeu_si512(to.grad_scores + out, grad[r]);
        };
        row(0);
        if (i + 1 < count) {
          row(1);
        } else {
          grad[1] = _mm512_setzero_si512();
        }
        const int64_t key = first + i;
        bfloat16* tile = to.pairs +
            (key / kTileDepth * (kBlockQueries / 16) + j / 16) * kTile + key % kTileDepth * 16;
        _mm512_storeu_si512(tile, _mm512_unpacklo_epi16(grad[0], grad[1]));
        _mm512_storeu_si512(tile + kTile, _mm512_unpackhi_epi16(grad[0], grad[1]));
      }
    }
  }

  void task(int branch, int64_t b, int64_t h, int64_t split, Scratch& scratch) {
    const TileSession session;
    const Queries queries = load_queries(branch, b, h, scratch);
    bfloat16* k = scratch.take<bfloat16>(kBlockKeys * depth);   // keys × d
    bfloat16* v = scratch.take<bfloat16>(kBlockKeys * depth);   // keys × d
    bfloat16* k_t = scratch.take<bfloat16>(wide * kBlockKeys);  // d × keys
    float* panel = scratch.take<float>(wide * kBlockKeys);
    float* s = scratch.take<float>(kSlice * kSliceStride);
    float* p = scratch.take<float>(kSlice * kSliceStride);
    const Panels panels{
        scratch.take<bfloat16>(kBlockKeys * kBlockQueries),
        scratch.take<bfloat16>(kBlockKeys * kBlockQueries),
        scratch.take<bfloat16>(kBlockKeys * kBlockQueries)};
    float* grad_k = scratch.take<float>(kBlockKeys * wide);  // keys × d
    float* grad_v = scratch.take<float>(kBlockKeys * wide);
    float* gate = scratch.take<float>(kBlockKeys);
    float* grad_q = scratch.take<float>(padded * wide);  // blocks of d × kBlockQueries
    std::fill_n(grad_q, padded * wide, 0.0f);
    const FeatureMap k_map = a.k[branch].at<bfloat16>(h), v_map = a.v[branch].at<bfloat16>(h);
    const bool gated = branch == 1 && a.gate != nullptr;

    for (int64_t block = blocks * split / base.splits; block < blocks * (split + 1) / base.splits; ++block) {
      const int64_t from = block * kBlockKeys, count = std::min(kBlockKeys, N - from);
      const int64_t keys = round_up(count, kTileDepth);
      load_gate<bfloat16>(gated ? a.gate : nullptr, N, b, from, count, gate);
      // Rounded exactly as in the forward: lse belongs to these keys.
      pack_rows(k_map, b, from, count, keys, depth, k, gated ? gate : nullptr);
      pack_rows(v_map, b, from, count, keys, depth, v, gated ? gate : nullptr);
      std::fill_n(panel, wide * kBlockKeys, 0.0f);
      load_panel<bfloat16>(k_map, b, from, count, panel, kBlockKeys);
      scale_columns(panel, kBlockKeys, d, count, [&](int64_t n) { return Vec<float>::load(gate + n); });
      for (int64_t i = 0; i < wide * kBlockKeys; i += 16) Vec<float>::load(panel + i).store(k_t + i);
      std::fill_n(grad_k, kBlockKeys * wide, 0.0f);
      std::fill_n(grad_v, kBlockKeys * wide, 0.0f);
      if (count < keys) {
        for (bfloat16* m : {panels.weights, panels.grad_scores, panels.pairs}) {
          std::fill_n(m, kBlockKeys * kBlockQueries, bfloat16{0});
        }
      }

      for (int64_t first = 0; first < N; first += kBlockQueries) {
        for (int64_t i = 0; i < keys; i += kSlice) {
          tile_product<false>(
              2, kBlockQueries / 16, steps, k + i * depth, depth,
              PackedTiles{queries.q + first * depth, kTile, steps * kTile}, s, kSliceStride);
          tile_product<false>(
              2, kBlockQueries / 16, steps, v + i * depth, depth,
              PackedTiles{queries.g + first * depth, kTile, steps * kTile}, p, kSliceStride);
          differentiate(
              s, p, i, std::min(kSlice, count - i), queries.offset + first, queries.delta + first, panels);
        }
        tile_product<true>(
            keys / 16, columns, kBlockQueries / kTileDepth, panels.weights, kBlockQueries,
            PackedTiles{queries.g_pairs + first * wide, columns * kTile, kTile}, grad_v, wide);
        tile_product<true>(
            keys / 16, columns, kBlockQueries / kTileDepth, panels.grad_scores, kBlockQueries,
            PackedTiles{queries.q_pairs + first * wide, columns * kTile, kTile}, grad_k, wide);
        tile_product<true>(
            columns, kBlockQueries / 16, keys / kTileDepth, k_t, kBlockKeys,
            PackedTiles{panels.pairs, kBlockQueries / 16 * kTile, kTile}, grad_q + first * wide,
            kBlockQueries);
      }

      const float magnitude = std::fabs(base.scale);
      const FeatureMap to_k = a.grad_k[branch].at<bfloat16>(h), to_v = a.grad_v[branch].at<bfloat16>(h);
      if (gated) {
        // The gate's gradient needs K and V without it.
        pack_rows(k_map, b, from, count, keys, depth, k, nullptr);
        pack_rows(v_map, b, from, count, keys, depth, v, nullptr);
      }
      for (int64_t n = 0; n < count; ++n) {
        Vec<float> share(0.0f);
        for (int64_t c = 0; c < wide; c += 16) {
          const Vec<float> of_k = Vec<float>::load(grad_k + n * wide + c) * Vec<float>(magnitude);
          const Vec<float> of_v = Vec<float>::load(grad_v + n * wide + c);
          share = fma(of_k, Vec<float>::load(k + n * depth + c), share);
          share = fma(of_v, Vec<float>::load(v + n * depth + c), share);
          const int64_t valid = std::min<int64_t>(16, d - c);
          (of_k * Vec<float>(gate[n])).store_partial(to_k.mutable_at<bfloat16>(b, c, from + n), valid);
          (of_v * Vec<float>(gate[n])).store_partial(to_v.mutable_at<bfloat16>(b, c, from + n), valid);
        }
        if (gated) base.grad_gate_at(1, b, h)[from + n] = sum(share);
      }
    }

    float* to = base.grad_q_at(split, branch, b, h);
    for (int64_t first = 0; first < round_up(N, 32); first += 16) {
      // 16 columns of a block, turned into the rows of as many queries.
      const int64_t column = first % kBlockQueries;
      const float* from = grad_q + (first - column) * wide + column;
      for (int64_t c = 0; c < wide; c += 16) {
        Vec<float> tile[16];
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r) tile[r] = Vec<float>::load(from + (c + r) * kBlockQueries);
        transpose(tile);
        for (int r = 0; r < 16; ++r) {
          const int64_t n = first - first % 32 + query_of(first % 32 + r);
          if (n < N) tile[r].store(to + n * wide + c);
        }
      }
    }
  }

  void run() {
    const size_t bytes = 2 * Scratch::bytes<bfloat16>(padded * depth) +
        2 * Scratch::bytes<bfloat16>(padded * wide) + 2 * Scratch::bytes<float>(padded) +
        Scratch::bytes<bfloat16>(kBlockQueries * depth) + 2 * Scratch::bytes<bfloat16>(kBlockKeys * depth) +
        Scratch::bytes<bfloat16>(wide * kBlockKeys) + 3 * Scratch::bytes<float>(wide * kBlockKeys) +
        2 * Scratch::bytes<float>(kSlice * kSliceStride) +
        3 * Scratch::bytes<bfloat16>(kBlockKeys * kBlockQueries) + Scratch::bytes<float>(kBlockKeys) +
        Scratch::bytes<float>(padded * wide);
    const auto work = [&](int branch, int64_t b, int64_t h, int64_t split, Scratch& scratch) {
      // NaN would be lost in weight(); a score that is NaN has made its row's lse NaN.
      const float* lse = lse_of(branch, b, h);
      if (std::all_of(lse, lse + N, [](float x) { return std::isfinite(x); })) {
        task(branch, b, h, split, scratch);
      } else {
        base.task(branch, b, h, split, scratch);
      }
    };
    base.run(std::max(bytes, base.scratch_bytes()), work);
  }
};

}  // namespace
}  // namespace EAMNET_LEVEL
}  // namespace eamnet
