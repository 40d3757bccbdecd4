// A short vector type over GCC's and Clang's vector extensions.
//
// Every kernel file is compiled once per instruction set ("level", see dispatch.h) with
// EAMNET_LEVEL naming the level. All of this header lives in namespace eamnet::EAMNET_LEVEL, so that
// a function compiled for AVX-512 can never be merged by the linker with its baseline namesake.
// Kernels must do the same with whatever they define.
//
//   Vec<float> x = Vec<float>::load(p);               // unaligned; p: float or bfloat16
//   Vec<float> y = fma(x, x, Vec<float>(1.0f));       // x*x + 1
//   y = select(x > y, x, y);
//   y.store(q);                                       // unaligned; q: float or bfloat16
//   load_partial / store_partial                      // the first `count` lanes only
//
// The file is compiled with -ffp-contract=fast: a*b + c becomes one fused multiply-add wherever the
// level has it. It is not compiled with -ffast-math: NaN, infinities and signed zeros are kept.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cpu/feature_map.h"

#ifndef EAMNET_LEVEL
#error "compile kernel files with -DEAMNET_LEVEL=<level>; setup.py and tests/packaging do"
#endif

namespace eamnet {

namespace EAMNET_LEVEL {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

#define EAMNET_INLINE inline __attribute__((always_inline))

template <class To, class From>
EAMNET_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// Signed integer and unsigned integer of the width of T; float32 carries int32 indices, float64 int64.
template <class T>
using IntOf = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
template <class T>
using UintOf = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

// GCC ignores the attribute on a type that depends on a template parameter, hence the list.
template <class T>
struct NativeOf;
#define EAMNET_NATIVE(T)                                   \
  template <>                                              \
  struct NativeOf<T> {                                     \
    typedef T type __attribute__((vector_size(kVectorBytes))); \
  };
EAMNET_NATIVE(float)
EAMNET_NATIVE(double)
EAMNET_NATIVE(int32_t)
EAMNET_NATIVE(int64_t)
EAMNET_NATIVE(uint32_t)
EAMNET_NATIVE(uint64_t)
#undef EAMNET_NATIVE

template <class T>
struct Vec;

// One truth value per lane of a Vec<T>; the same type serves Vec<T> and Vec<IntOf<T>>.
template <class T>
struct Mask {
#if defined(__AVX512F__)
  // Left to itself GCC widens comparison results to whole vectors, hence the explicit mask register.
  using Native = std::conditional_t<sizeof(T) == 8, __mmask8, __mmask16>;
#else
  using Native = typename NativeOf<IntOf<T>>::type;
#endif
  Native m;

  friend EAMNET_INLINE Mask operator&(Mask a, Mask b) { return {Native(a.m & b.m)}; }
  friend EAMNET_INLINE Mask operator|(Mask a, Mask b) { return {Native(a.m | b.m)}; }
  friend EAMNET_INLINE Mask operator~(Mask a) { return {Native(~a.m)}; }

  // Bit i is lane i.
  EAMNET_INLINE uint32_t bits() const {
#if defined(__AVX512F__)
    return static_cast<uint32_t>(m);
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 8) {
      return static_cast<uint32_t>(_mm256_movemask_pd(bit_cast<__m256d>(m)));
    } else {
      return static_cast<uint32_t>(_mm256_movemask_ps(bit_cast<__m256>(m)));
    }
#else
    uint32_t out = 0;
    for (int i = 0; i < kVectorBytes / static_cast<int>(sizeof(T)); ++i) {
      out |= static_cast<uint32_t>(m[i] & 1) << i;
    }
    return out;
#endif
  }
  EAMNET_INLINE bool any() const { return bits() != 0; }
  // Lowest lane that is true; call only if any().
  EAMNET_INLINE int first() const { return __builtin_ctz(bits()); }
};

// Lanes 0 .. count-1 true; 0 <= count <= width.
template <class T>
EAMNET_INLINE Mask<T> first_lanes(int64_t count) {
  using M = Mask<T>;
#if defined(__AVX512F__)
  return {static_cast<typename M::Native>((1u << count) - 1u)};
#else
  typename M::Native lane;
  for (int i = 0; i < kVectorBytes / static_cast<int>(sizeof(T)); ++i) lane[i] = i;
  return {lane < static_cast<IntOf<T>>(count)};
#endif
}

template <class T>
struct Vec {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  using Native = typename NativeOf<T>::type;
  static constexpr int width = kVectorBytes / static_cast<int>(sizeof(T));

  Native v;

  Vec() = default;
  EAMNET_INLINE Vec(Native native) : v(native) {}
  // Subtracting zero keeps the sign of -0.0 where adding it would not.
  EAMNET_INLINE Vec(T scalar) : v(scalar - Native{}) {}

  static EAMNET_INLINE Vec load(const T* p) {
    Vec out;
    std::memcpy(&out.v, p, sizeof(Native));
    return out;
  }
  // The first `count` lanes from memory, the others `fill`; reads nothing beyond p[count - 1].
  static EAMNET_INLINE Vec load_partial(const T* p, int64_t count, T fill = T(0)) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<T, float>) {
      return bit_cast<Native>(
          _mm512_mask_loadu_ps(bit_cast<__m512>(Vec(fill).v), first_lanes<T>(count).m, p));
    } else if constexpr (std::is_same_v<T, double>) {
      return bit_cast<Native>(
          _mm512_mask_loadu_pd(bit_cast<__m512d>(Vec(fill).v), first_lanes<T>(count).m, p));
    }
#endif
    Vec out(fill);
    std::memcpy(&out.v, p, static_cast<size_t>(count) * sizeof(T));
    return out;
  }
  EAMNET_INLINE void store(T* p) const { std::memcpy(p, &v, sizeof(Native)); }
  EAMNET_INLINE void store_partial(T* p, int64_t count) const {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<T, float>) {
      return _mm512_mask_storeu_ps(p, first_lanes<T>(count).m, bit_cast<__m512>(v));
    } else if constexpr (std::is_same_v<T, double>) {
      return _mm512_mask_storeu_pd(p, first_lanes<T>(count).m, bit_cast<__m512d>(v));
    }
#endif
    std::memcpy(p, &v, static_cast<size_t>(count) * sizeof(T));
  }

  // float32 lanes from bfloat16 memory (exact) and back (to nearest, ties to even; NaN stays NaN).
  static EAMNET_INLINE Vec load(const bfloat16* p);
  static EAMNET_INLINE Vec load_partial(const bfloat16* p, int64_t count, T fill = T(0));
  EAMNET_INLINE void store(bfloat16* p) const;
  EAMNET_INLINE void store_partial(bfloat16* p, int64_t count) const;

  // 0, 1, 2, ...
  static EAMNET_INLINE Vec lane_index() {
    Vec out;
    for (int i = 0; i < width; ++i) out.v[i] = static_cast<T>(i);
    return out;
  }

  EAMNET_INLINE T operator[](int lane) const { return v[lane]; }

  friend EAMNET_INLINE Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  friend EAMNET_INLINE Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  friend EAMNET_INLINE Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  friend EAMNET_INLINE Vec operator/(Vec a, Vec b) { return a.v / b.v; }
  friend EAMNET_INLINE Vec operator-(Vec a) { return -a.v; }
  EAMNET_INLINE Vec& operator+=(Vec b) { return *this = *this + b; }
  EAMNET_INLINE Vec& operator-=(Vec b) { return *this = *this - b; }
  EAMNET_INLINE Vec& operator*=(Vec b) { return *this = *this * b; }

  // Ordered comparisons: false where either side is NaN.
#if defined(__AVX512F__)
#define EAMNET_COMPARE(op, predicate)                                              \
  friend EAMNET_INLINE Mask<T> operator op(Vec a, Vec b) {                         \
    if constexpr (std::is_same_v<T, float>) {                                      \
      return {_mm512_cmp_ps_mask(bit_cast<__m512>(a.v), bit_cast<__m512>(b.v), predicate)};   \
    } else {                                                                       \
      static_assert(std::is_same_v<T, double>);                                    \
      return {_mm512_cmp_pd_mask(bit_cast<__m512d>(a.v), bit_cast<__m512d>(b.v), predicate)}; \
    }                                                                              \
  }
  EAMNET_COMPARE(>, _CMP_GT_OQ)
  EAMNET_COMPARE(<, _CMP_LT_OQ)
  EAMNET_COMPARE(>=, _CMP_GE_OQ)
  EAMNET_COMPARE(<=, _CMP_LE_OQ)
  EAMNET_COMPARE(==, _CMP_EQ_OQ)
#undef EAMNET_COMPARE
#else
  friend EAMNET_INLINE Mask<T> operator>(Vec a, Vec b) { return {a.v > b.v}; }
  friend EAMNET_INLINE Mask<T> operator<(Vec a, Vec b) { return {a.v < b.v}; }
  friend EAMNET_INLINE Mask<T> operator>=(Vec a, Vec b) { return {a.v >= b.v}; }
  friend EAMNET_INLINE Mask<T> operator<=(Vec a, Vec b) { return {a.v <= b.v}; }
  friend EAMNET_INLINE Mask<T> operator==(Vec a, Vec b) { return {a.v == b.v}; }
#endif
};

// Integer comparison as a mask over the lanes of T, for indices that go with values.
template <class T>
EAMNET_INLINE Mask<T> equal_lanes(Vec<IntOf<T>> a, Vec<IntOf<T>> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 8) {
    return {_mm512_cmpeq_epi64_mask(bit_cast<__m512i>(a.v), bit_cast<__m512i>(b.v))};
  } else {
    return {_mm512_cmpeq_epi32_mask(bit_cast<__m512i>(a.v), bit_cast<__m512i>(b.v))};
  }
#else
  return {a.v == b.v};
#endif
}

// a where the mask is true, b elsewhere. T: float, double, int32_t or int64_t.
template <class M, class T>
EAMNET_INLINE Vec<T> select(Mask<M> mask, Vec<T> a, Vec<T> b) {
  static_assert(sizeof(M) == sizeof(T));
  using Native = typename Vec<T>::Native;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 8) {
    return bit_cast<Native>(
        _mm512_mask_blend_epi64(mask.m, bit_cast<__m512i>(b.v), bit_cast<__m512i>(a.v)));
  } else {
    return bit_cast<Native>(
        _mm512_mask_blend_epi32(mask.m, bit_cast<__m512i>(b.v), bit_cast<__m512i>(a.v)));
  }
#else
  return Native(mask.m ? a.v : b.v);
#endif
}

template <class T>
EAMNET_INLINE Mask<T> isnan(Vec<T> a) {
#if defined(__AVX512F__)
  // One instruction; GCC does not join the comparison with its negation.
  if constexpr (sizeof(T) == 8) {
    return {_mm512_cmp_pd_mask(bit_cast<__m512d>(a.v), bit_cast<__m512d>(a.v), _CMP_UNORD_Q)};
  } else {
    return {_mm512_cmp_ps_mask(bit_cast<__m512>(a.v), bit_cast<__m512>(a.v), _CMP_UNORD_Q)};
  }
#else
  return {a.v != a.v};
#endif
}

// a*b + c, fused where the level has fused multiply-add.
template <class T>
EAMNET_INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  return a.v * b.v + c.v;
}

// The greater of both; NaN if either is NaN (as torch.maximum).
template <class T>
EAMNET_INLINE Vec<T> maximum(Vec<T> a, Vec<T> b) {
  // The instruction gives b where either is NaN, which leaves the case of a.
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 8) {
    const Vec<T> m = bit_cast<typename Vec<T>::Native>(
        _mm512_maskz_max_pd(0xff, bit_cast<__m512d>(a.v), bit_cast<__m512d>(b.v)));
    return select(isnan(a), a, m);
  } else {
    const Vec<T> m = bit_cast<typename Vec<T>::Native>(
        _mm512_maskz_max_ps(0xffff, bit_cast<__m512>(a.v), bit_cast<__m512>(b.v)));
    return select(isnan(a), a, m);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 8) {
    const Vec<T> m = bit_cast<typename Vec<T>::Native>(
        _mm256_max_pd(bit_cast<__m256d>(a.v), bit_cast<__m256d>(b.v)));
    return select(isnan(a), a, m);
  } else {
    const Vec<T> m = bit_cast<typename Vec<T>::Native>(
        _mm256_max_ps(bit_cast<__m256>(a.v), bit_cast<__m256>(b.v)));
    return select(isnan(a), a, m);
  }
#else
  return select((a > b) | isnan(a), a, b);
#endif
}
template <class T>
EAMNET_INLINE Vec<T> minimum(Vec<T> a, Vec<T> b) {
  if constexpr (std::is_integral_v<T>) {
    return typename Vec<T>::Native(a.v < b.v ? a.v : b.v);
  } else {
    return select((a < b) | isnan(a), a, b);
  }
}
template <class T>
EAMNET_INLINE Vec<T> abs(Vec<T> a) {
  using Bits = typename NativeOf<UintOf<T>>::type;
  constexpr auto keep = static_cast<UintOf<T>>(-1) >> 1;
  return bit_cast<typename Vec<T>::Native>(bit_cast<Bits>(a.v) & keep);
}

// Scalar twins, so that a kernel template can be written once for a lane and for a vector.
template <class T>
EAMNET_INLINE T maximum_scalar(T a, T b) {
  return (a > b || a != a) ? a : b;
}

// ------------------------------------------------------------------------------------ permutations

namespace detail {

// Lane i of the result is lane i ^ step of the argument.
template <int step, class T, size_t... lane>
EAMNET_INLINE Vec<T> swap_lanes(Vec<T> a, std::index_sequence<lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a.v, a.v, static_cast<int>(lane ^ step)...);
#else
  using Index = typename NativeOf<IntOf<T>>::type;
  return __builtin_shuffle(a.v, Index{static_cast<IntOf<T>>(lane ^ step)...});
#endif
}

template <int step, class T, class F>
EAMNET_INLINE T fold(Vec<T> a, F combine) {
  if constexpr (step == 0) {
    return a[0];
  } else {
    return fold<step / 2>(
        combine(a, swap_lanes<step>(a, std::make_index_sequence<Vec<T>::width>{})), combine);
  }
}

// One step of a butterfly transposition: swaps the off-diagonal blocks of `step` lanes of two rows.
template <int step, class T, size_t... lane>
EAMNET_INLINE void exchange(Vec<T>& a, Vec<T>& b, std::index_sequence<lane...>) {
  constexpr int width = Vec<T>::width;
#if defined(__clang__)
  auto low = __builtin_shufflevector(
      a.v, b.v, ((lane & step) ? width + static_cast<int>(lane) - step : static_cast<int>(lane))...);
  auto high = __builtin_shufflevector(
      a.v, b.v, ((lane & step) ? width + static_cast<int>(lane) : static_cast<int>(lane) + step)...);
#else
  using Index = typename NativeOf<IntOf<T>>::type;
  auto low = __builtin_shuffle(
      a.v, b.v, Index{((lane & step) ? width + static_cast<int>(lane) - step : static_cast<int>(lane))...});
  auto high = __builtin_shuffle(
      a.v, b.v, Index{((lane & step) ? width + static_cast<int>(lane) : static_cast<int>(lane) + step)...});
#endif
  a.v = low;
  b.v = high;
}

template <int step, class T>
EAMNET_INLINE void transpose_steps(Vec<T> (&rows)[Vec<T>::width]) {
  constexpr int width = Vec<T>::width;
  if constexpr (step > 0) {
#pragma GCC unroll 64
    for (int i = 0; i < width; ++i) {
      if ((i & step) == 0) {
        exchange<step>(rows[i], rows[i + step], std::make_index_sequence<width>{});
      }
    }
    transpose_steps<step / 2>(rows);
  }
}

}  // namespace detail

// Transposes a width × width block in registers: afterwards rows[i][j] is the former rows[j][i].
template <class T>
EAMNET_INLINE void transpose(Vec<T> (&rows)[Vec<T>::width]) {
  detail::transpose_steps<Vec<T>::width / 2>(rows);
}

// Over all lanes, as a balanced tree; maximum over lanes propagates NaN.
template <class T>
EAMNET_INLINE T sum(Vec<T> a) {
  return detail::fold<Vec<T>::width / 2>(a, [](Vec<T> x, Vec<T> y) { return x + y; });
}
template <class T>
EAMNET_INLINE T max(Vec<T> a) {
  return detail::fold<Vec<T>::width / 2>(a, [](Vec<T> x, Vec<T> y) { return maximum(x, y); });
}
template <class T>
EAMNET_INLINE T min(Vec<T> a) {
  return detail::fold<Vec<T>::width / 2>(a, [](Vec<T> x, Vec<T> y) { return minimum(x, y); });
}

namespace detail {

template <int step, int count, class T, class F>
EAMNET_INLINE void fold_rows_steps(Vec<T> (&rows)[count], F combine) {
  if constexpr (step > 0) {
#pragma GCC unroll 64
    for (int i = 0; i < step; ++i) {
      exchange<step>(rows[i], rows[i + step], std::make_index_sequence<Vec<T>::width>{});
      rows[i] = combine(rows[i], rows[i + step]);
    }
    fold_rows_steps<step / 2>(rows, combine);
  }
}

template <int step, class T, class F>
EAMNET_INLINE Vec<T> fold_lanes(Vec<T> a, F combine) {
  if constexpr (step < Vec<T>::width) {
    a = combine(a, swap_lanes<step>(a, std::make_index_sequence<Vec<T>::width>{}));
    return fold_lanes<step * 2>(a, combine);
  }
  return a;
}

}  // namespace detail

// Lane r of the result combines all lanes of rows[r], for `count` rows at once; count is a power of
// two and at most the width. Overwrites rows.
template <int count, class T, class F>
EAMNET_INLINE Vec<T> fold_rows(Vec<T> (&rows)[count], F combine) {
  static_assert(count <= Vec<T>::width);
  detail::fold_rows_steps<count / 2>(rows, combine);
  return detail::fold_lanes<count>(rows[0], combine);
}
template <int count, class T>
EAMNET_INLINE Vec<T> sum_rows(Vec<T> (&rows)[count]) {
  return fold_rows(rows, [](Vec<T> x, Vec<T> y) { return x + y; });
}
template <int count, class T>
EAMNET_INLINE Vec<T> max_rows(Vec<T> (&rows)[count]) {
  return fold_rows(rows, [](Vec<T> x, Vec<T> y) { return maximum(x, y); });
}
template <int count, class T>
EAMNET_INLINE Vec<T> min_rows(Vec<T> (&rows)[count]) {
  return fold_rows(rows, [](Vec<T> x, Vec<T> y) { return minimum(x, y); });
}

// --------------------------------------------------------------------------------------- bfloat16

EAMNET_INLINE float widen(bfloat16 x) {
  return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}
EAMNET_INLINE float widen(float x) { return x; }
EAMNET_INLINE double widen(double x) { return x; }

// Rounds to nearest, ties to even. A NaN is made quiet; plain rounding could carry it to infinity.
template <class T, class A>
EAMNET_INLINE T narrow(A x) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    const auto bits = bit_cast<uint32_t>(static_cast<float>(x));
    if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
  } else {
    return static_cast<T>(x);
  }
}

namespace detail {

typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));
using FloatBits = NativeOf<uint32_t>::type;

EAMNET_INLINE Vec<float> widen(HalfBits half) {
#if defined(__AVX512F__)
  const auto wide = bit_cast<FloatBits>(_mm512_maskz_cvtepu16_epi32(0xffff, bit_cast<__m256i>(half)));
#elif defined(__AVX2__)
  const auto wide = bit_cast<FloatBits>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(half)));
#else
  const auto wide = __builtin_convertvector(half, FloatBits);
#endif
  return bit_cast<Vec<float>::Native>(wide << 16);
}

EAMNET_INLINE HalfBits narrow(Vec<float> x) {
  // Not vcvtneps2bf16, although the highest level has it: it flushes subnormal numbers.
  const auto bits = bit_cast<FloatBits>(x.v);
  const FloatBits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const FloatBits quiet = (bits >> 16) | 0x40u;
  const auto out = select(isnan(x), Vec<uint32_t>(quiet), Vec<uint32_t>(rounded));
#if defined(__AVX512F__)
  return bit_cast<HalfBits>(_mm512_maskz_cvtepi32_epi16(0xffff, bit_cast<__m512i>(out.v)));
#else
  return __builtin_convertvector(out.v, HalfBits);
#endif
}

}  // namespace detail

template <class T>
EAMNET_INLINE Vec<T> Vec<T>::load(const bfloat16* p) {
  static_assert(std::is_same_v<T, float>);
  detail::HalfBits half;
  std::memcpy(&half, p, sizeof(half));
  return detail::widen(half);
}
template <class T>
EAMNET_INLINE Vec<T> Vec<T>::load_partial(const bfloat16* p, int64_t count, T fill) {
  static_assert(std::is_same_v<T, float>);
  detail::HalfBits half{};
  std::memcpy(&half, p, static_cast<size_t>(count) * sizeof(bfloat16));
  return select(first_lanes<float>(count), detail::widen(half), Vec(fill));
}
template <class T>
EAMNET_INLINE void Vec<T>::store(bfloat16* p) const {
  static_assert(std::is_same_v<T, float>);
  const auto half = detail::narrow(*this);
  std::memcpy(p, &half, sizeof(half));
}
template <class T>
EAMNET_INLINE void Vec<T>::store_partial(bfloat16* p, int64_t count) const {
  static_assert(std::is_same_v<T, float>);
  const auto half = detail::narrow(*this);
  std::memcpy(p, &half, static_cast<size_t>(count) * sizeof(bfloat16));
}

// Number of valid lanes known at compile time: all.
struct AllLanes {};

template <class T, class P>
EAMNET_INLINE void store(Vec<T> y, P* p, AllLanes) {
  y.store(p);
}
template <class T, class P>
EAMNET_INLINE void store(Vec<T> y, P* p, int64_t count) {
  y.store_partial(p, count);
}
template <class T, class P>
EAMNET_INLINE Vec<T> load(const P* p, AllLanes) {
  return Vec<T>::load(p);
}
template <class T, class P>
EAMNET_INLINE Vec<T> load(const P* p, int64_t count) {
  return Vec<T>::load_partial(p, count);
}

// The type that values stored as T are computed in: float32 for bfloat16, otherwise T itself.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, bfloat16>, float, T>;

// ------------------------------------------------------------------------------------ exponential

namespace detail {

// e^x = p 2^n: x = n ln2 + r with |r| <= ln2 / 2, p = e^r by its Taylor polynomial. ln2 is split in two
// so that n ln2 is exact.
template <class T>
struct Exponential {
  using V = Vec<T>;
  using U = UintOf<T>;
  using UV = typename NativeOf<U>::type;
  static constexpr bool single = std::is_same_v<T, float>;
  static_assert(single || std::is_same_v<T, double>);
  static constexpr int mantissa = single ? 23 : 52;
  static constexpr U bias = single ? 127 : 1023;

  V p;
  UV n;

  explicit EAMNET_INLINE Exponential(V x) {
    constexpr T log2e = T(1.4426950408889634074);
    constexpr T ln2_high = single ? T(0x1.62ep-1f) : T(0x1.62e42fefa0000p-1);
    constexpr T ln2_low = single ? T(0x1.0bfbe8e7bcd5ep-15) : T(0x1.cf79abc9e3b3ap-40);
    // Adding 1.5 * 2^mantissa rounds to an integer and leaves it in the low bits.
    constexpr T magic = T(U(3) << (mantissa - 1));
    const V shifted = fma(x, V(log2e), V(magic));
    const V whole = shifted - V(magic);
    V r = fma(-whole, V(ln2_high), x);
    r = fma(-whole, V(ln2_low), r);
    n = bit_cast<UV>(shifted.v) - bit_cast<UV>(V(magic).v);

    constexpr T inverse_factorial[] = {
        T(1), T(1), T(1.0 / 2), T(1.0 / 6), T(1.0 / 24), T(1.0 / 120), T(1.0 / 720), T(1.0 / 5040),
        T(1.0 / 40320), T(1.0 / 362880), T(1.0 / 3628800), T(1.0 / 39916800), T(1.0 / 479001600),
        T(1.0 / 6227020800.0)};
    constexpr int degree = single ? 7 : 13;
    p = V(inverse_factorial[degree]);
#pragma GCC unroll 16
    for (int k = degree - 1; k >= 0; --k) p = fma(p, r, V(inverse_factorial[k]));
  }

  // 2^k for the exponents of normal numbers.
  static EAMNET_INLINE V power(UV k) {
    return bit_cast<typename V::Native>(UV((k + bias) << mantissa));
  }
};

}  // namespace detail

// e^x within 1 ulp over the whole range, subnormal results included (1.25 ulp where the level has no
// fused multiply-add).
// exp(-inf) = 0, exp(+inf) = inf, NaN stays NaN.
template <class T>
EAMNET_INLINE Vec<T> exp(Vec<T> x) {
  using V = Vec<T>;
  using E = detail::Exponential<T>;
  constexpr T lowest = E::single ? T(-104.0f) : T(-746.0);
  constexpr T highest = E::single ? T(89.0f) : T(710.0);
  // Selects and not minimum(): NaN has to pass through.
  x = select(x < V(lowest), V(lowest), x);
  x = select(x > V(highest), V(highest), x);
  const E e(x);
  // 2^n as two factors, because n may exceed the exponent range on either side although the product
  // does not.
  using IV = typename NativeOf<IntOf<T>>::type;
  using UV = typename E::UV;
  const UV half = bit_cast<UV>(IV(bit_cast<IV>(e.n) >> 1));
  return e.p * E::power(half) * E::power(e.n - half);
}

// The same for weights relative to the largest, x <= 0 or above it by a rounding: what would be
// subnormal is 0, and that saves a third of the instructions.
template <class T>
EAMNET_INLINE Vec<T> exp_weight(Vec<T> x) {
  using V = Vec<T>;
  using E = detail::Exponential<T>;
  constexpr T lowest = E::single ? T(-87.0f) : T(-708.0);
  const E e(x);
  // NaN compares as false and stays.
  return select(x < V(lowest), V(T(0)), e.p * E::power(e.n));
}

}  // namespace EAMNET_LEVEL
}  // namespace eamnet
