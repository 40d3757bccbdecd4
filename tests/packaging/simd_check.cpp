// Checks csrc/cpu/simd.h and gemm.h on one level; built and run by test_native_headers.py.
// Prints one line per failed check and ends with the number of failures as exit code (at most 100).
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/simd.h"

using namespace eamnet;
using namespace eamnet::EAMNET_LEVEL;

namespace {

int failures = 0;

void expect(bool ok, const char* what, double got = 0, double wanted = 0, long long where = 0) {
  if (ok) return;
  if (++failures <= 20) std::printf("FAILED %s: got %.9g, wanted %.9g at %lld\n", what, got, wanted, where);
}

bool same(double a, double b) { return a == b || (a != a && b != b); }

std::mt19937 generator(1);
template <class T>
T random_value() {
  return static_cast<T>(std::normal_distribution<double>()(generator));
}
template <>
bfloat16 random_value<bfloat16>() {
  return narrow<bfloat16>(random_value<float>());
}
template <class T>
std::vector<T> random_values(int64_t count) {
  std::vector<T> out(count);
  for (auto& x : out) x = random_value<T>();
  return out;
}

// A load or store past the end would touch the canary or, under a sanitizer, the redzone.
template <class T, class S>
void check_partial() {
  constexpr int width = Vec<T>::width;
  for (int count = 0; count <= width; ++count) {
    auto from = random_values<S>(count);
    from.reserve(1);  // so that there is an address even for no values
    const auto v = Vec<T>::load_partial(from.data(), count, T(-7));
    for (int i = 0; i < width; ++i) {
      expect(v[i] == (i < count ? T(widen(from[i])) : T(-7)), "load_partial", v[i], 0, count);
    }
    std::vector<S> to(width + 1, narrow<S>(T(9)));
    v.store_partial(to.data(), count);
    for (int i = 0; i <= width; ++i) {
      expect(widen(to[i]) == (i < count ? widen(from[i]) : T(9)), "store_partial", widen(to[i]), 0, count);
    }
  }
}

template <class T>
void check_lanes() {
  constexpr int width = Vec<T>::width;
  const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  const T values[] = {T(-0.0), T(0.0), T(1), T(-3), inf, -inf, nan};
  expect(std::signbit(Vec<T>(T(-0.0))[0]), "broadcast of -0.0");
  for (T x : values) {
    for (T y : values) {
      const T wanted = (x != x || y != y) ? nan : std::max(x, y);
      expect(same(maximum(Vec<T>(x), Vec<T>(y))[width - 1], wanted), "maximum", x, y);
      expect((Vec<T>(x) > Vec<T>(y)).any() == (x > y), "greater", x, y);
      expect((Vec<T>(x) <= Vec<T>(y)).any() == (x <= y), "less or equal", x, y);
      expect((Vec<T>(x) == Vec<T>(y)).any() == (x == y), "equal", x, y);
    }
    expect(isnan(Vec<T>(x)).any() == (x != x), "isnan", x);
    expect(same(abs(Vec<T>(x))[0], std::fabs(x)), "abs", x);
  }
  auto data = random_values<T>(width * width);
  T total = 0;
  for (int i = 0; i < width; ++i) total += data[i];
  expect(std::fabs(sum(Vec<T>::load(data.data())) - total) < 1e-5, "sum");
  for (int i = 0; i < width; ++i) {
    auto copy = std::vector<T>(data.begin(), data.begin() + width);
    copy[i] = T(100);
    expect(max(Vec<T>::load(copy.data())) == T(100), "max");
    const auto mask = Vec<T>::load(copy.data()) == Vec<T>(T(100));
    expect(mask.any() && mask.first() == i && mask.bits() == (1u << i), "mask", mask.first(), i);
    expect(first_lanes<T>(i).bits() == (1u << i) - 1, "first_lanes", first_lanes<T>(i).bits(), i);
    copy[i] = nan;
    expect(same(max(Vec<T>::load(copy.data())), nan), "max of NaN");
    using I = IntOf<T>;
    const auto chosen = select(mask, Vec<I>(I(5)), Vec<I>::lane_index());
    for (int l = 0; l < width; ++l) expect(chosen[l] == (l == i ? 5 : l), "select", chosen[l], l);
  }
  Vec<T> rows[width];
  for (int i = 0; i < width; ++i) rows[i] = Vec<T>::load(&data[i * width]);
  transpose(rows);
  for (int i = 0; i < width; ++i) {
    for (int j = 0; j < width; ++j) expect(rows[i][j] == data[j * width + i], "transpose");
  }
  for (int i = 0; i < width; ++i) rows[i] = Vec<T>::load(&data[i * width]);
  const auto sums = sum_rows(rows);
  for (int i = 0; i < width; ++i) {
    double wanted = 0;
    for (int j = 0; j < width; ++j) wanted += data[i * width + j];
    expect(std::fabs(sums[i] - wanted) < 1e-5, "sum_rows", sums[i], wanted);
  }
}

void check_bfloat16() {
  // Every bfloat16 widens and narrows to itself, NaNs (made quiet) included.
  for (uint32_t bits = 0; bits < 65536; bits += Vec<float>::width) {
    bfloat16 in[Vec<float>::width], out[Vec<float>::width];
    for (int i = 0; i < Vec<float>::width; ++i) in[i].bits = static_cast<uint16_t>(bits + i);
    const auto v = Vec<float>::load(in);
    v.store(out);
    for (int i = 0; i < Vec<float>::width; ++i) {
      expect(same(v[i], widen(in[i])), "widen", v[i], widen(in[i]), bits + i);
      const bool is_nan = widen(in[i]) != widen(in[i]);
      expect(is_nan ? widen(out[i]) != widen(out[i]) : out[i].bits == in[i].bits, "round trip", out[i].bits, in[i].bits);
    }
  }
  // Rounding: vector and scalar agree with the nearest of both neighbours, ties to even.
  for (int t = 0; t < 200000; ++t) {
    uint32_t bits = generator();
    if (t % 3 == 0) bits = (bits & 0xffff0000u) | 0x8000u;  // a tie
    const float x = bit_cast<float>(bits);
    bfloat16 out[Vec<float>::width];
    Vec<float>(x).store(out);
    const float got = widen(out[0]);
    expect(narrow<bfloat16>(x).bits == out[0].bits, "scalar narrow", got, x);
    if (x != x) {
      expect(got != got, "NaN kept", got, x);
      continue;
    }
    const uint32_t down = bits & 0xffff0000u, up = down + 0x10000u;
    const double low = bit_cast<float>(down);
    const float above = bit_cast<float>(up);
    // The neighbour of the largest finite number is infinity, at the place of 2^128.
    const double high = std::isinf(above) ? std::copysign(std::ldexp(1.0, 128), low) : above;
    const double below = std::fabs(double(x) - low), over = std::fabs(high - double(x));
    const bool take_high = std::isinf(x) ? false : over < below || (over == below && (down & 0x10000u));
    const uint32_t wanted = take_high ? up : down;
    expect(bit_cast<uint32_t>(got) == wanted, "rounding", got, bit_cast<float>(wanted), bits);
  }
}

template <class T>
double ulps(T got, long double exact) {
  if (std::isinf(got)) return 0;
  int exponent;
  std::frexp(static_cast<T>(exact), &exponent);
  const int lowest = std::numeric_limits<T>::min_exponent;
  const long double ulp =
      std::ldexp(1.0L, std::max(exponent, lowest) - std::numeric_limits<T>::digits);
  return static_cast<double>(std::fabs(static_cast<long double>(got) - exact) / ulp);
}

template <class T>
void check_exp(double tolerance) {
  const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  expect(exp(Vec<T>(-inf))[0] == 0, "exp(-inf)");
  expect(exp(Vec<T>(inf))[0] == inf, "exp(inf)");
  expect(same(exp(Vec<T>(nan))[0], nan), "exp(NaN)");
  expect(exp(Vec<T>(T(0)))[0] == 1, "exp(0)", exp(Vec<T>(T(0)))[0], 1);
  expect(exp(Vec<T>(T(-1e30)))[0] == 0 && exp(Vec<T>(T(1e30)))[0] == inf, "exp of huge");
  const double low = sizeof(T) == 4 ? -104 : -746, high = sizeof(T) == 4 ? 89 : 710;
  double worst = 0, where = 0;
  std::uniform_real_distribution<double> range(low, high), near(-1, 1);
  for (int t = 0; t < 400000; ++t) {
    const T x = static_cast<T>(t % 2 ? range(generator) : near(generator));
    const long double exact = std::exp(static_cast<long double>(x));
    const T got = exp(Vec<T>(x))[t % Vec<T>::width];
    expect(std::isinf(got) == std::isinf(static_cast<T>(exact)), "exp overflow", got, x);
    const double error = ulps(got, exact);
    if (error > worst) worst = error, where = x;
  }
  // Weights relative to the largest: the same from the smallest normal number to a rounding above 0.
  expect(same(exp_weight(Vec<T>(nan))[0], nan), "exp_weight(NaN)");
  expect(exp_weight(Vec<T>(-inf))[0] == 0 && exp_weight(Vec<T>(T(-1e30)))[0] == 0, "exp_weight of huge");
  std::uniform_real_distribution<double> below(sizeof(T) == 4 ? -87 : -708, 1e-3);
  for (int t = 0; t < 100000; ++t) {
    const Vec<T> x(static_cast<T>(below(generator)));
    expect(exp_weight(x)[0] == exp(x)[0], "exp_weight", exp_weight(x)[0], exp(x)[0]);
  }
  std::printf("exp<%d bytes>: at most %.3f ulp, at %.9g\n", int(sizeof(T)), worst, where);
  expect(worst <= tolerance, "exp accuracy", worst, tolerance);
}

// S: type in memory; the product of random matrices against the same sum in double.
template <class S, class T = Compute<S>>
void check_gemm() {
  const double eps = std::numeric_limits<T>::epsilon();
  const int64_t shapes[][3] = {{1, 1, 1}, {3, 5, 2}, {8, 48, 7}, {13, 101, 33}, {32, 200, 32},
                               {16, 16, 0}, {40, 97, 64}, {9, 24, 256}};
  for (const auto& shape : shapes) {
    const int64_t M = shape[0], N = shape[1], K = shape[2];
    const auto a = random_values<S>(M * K), at = [&] {
      auto t = std::vector<S>(M * K);
      for (int64_t i = 0; i < M; ++i) {
        for (int64_t k = 0; k < K; ++k) t[k * M + i] = a[i * K + k];
      }
      return t;
    }();
    const auto b = random_values<S>(K * N);
    const auto base = random_values<T>(M * N);
    std::vector<double> wanted(M * N), bound(M * N);
    for (int64_t i = 0; i < M; ++i) {
      for (int64_t j = 0; j < N; ++j) {
        for (int64_t k = 0; k < K; ++k) {
          const double term = double(widen(a[i * K + k])) * double(widen(b[k * N + j]));
          wanted[i * N + j] += term;
          bound[i * N + j] += std::fabs(term) * eps * (K + 2);
        }
      }
    }
    const auto check = [&](const std::vector<T>& got, bool added, const char* what) {
      for (int64_t q = 0; q < M * N; ++q) {
        const double w = wanted[q] + (added ? double(base[q]) : 0);
        expect(std::fabs(got[q] - w) <= bound[q] + 8 * eps * std::fabs(w) + (added ? 1e-6 * (sizeof(T) == 4) : 0),
               what, got[q], w, q);
      }
    };
    std::vector<T> packed(PackedLeft<T>::size(M, K));
    std::vector<T> y = base;
    gemm<T>(M, N, K, PackedLeft<T>::pack(M, K, a.data(), K, 1, packed.data()), Rows<S>{b.data(), N}, store_to(y.data(), N));
    check(y, false, "gemm");
    y = base;
    gemm<T>(M, N, K, PackedLeft<T>::pack(M, K, at.data(), 1, M, packed.data()), Rows<S>{b.data(), N}, add_to(y.data(), N));
    check(y, true, "gemm transposed left, added");
    y = base;
    gemm<T>(M, N, K, StridedLeft<T, S>{a.data(), K, 1}, Rows<S>{b.data(), N}, store_to(y.data(), N));
    check(y, false, "gemm strided left");
    std::vector<const S*> rows(K);
    for (int64_t k = 0; k < K; ++k) rows[k] = b.data() + k * N;
    y = base;
    gemm<T>(M, N, K, StridedLeft<T, S>{at.data(), 1, M}, RowTable<S>{rows.data()}, store_to(y.data(), N));
    check(y, false, "gemm row table");

    // X Zᵀ with X = A (rows of K values) and Z = Bᵀ.
    std::vector<S> bt(N * K);
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t j = 0; j < N; ++j) bt[j * K + k] = b[k * N + j];
    }
    y = base;
    gemm_transposed<T>(M, N, K, Rows<S>{a.data(), K}, Rows<S>{bt.data(), K},
                       [&](int64_t i, int64_t j, T value) { y[i * N + j] = value; });
    check(y, false, "gemm_transposed");
    std::vector<T> upper(M * M, T(-1)), full(M * M);
    gemm_transposed<T>(M, M, K, Rows<S>{a.data(), K}, Rows<S>{a.data(), K},
                       [&](int64_t i, int64_t j, T value) { full[i * M + j] = value; });
    gemm_transposed<T, Part::upper>(M, M, K, Rows<S>{a.data(), K}, Rows<S>{a.data(), K},
                                    [&](int64_t i, int64_t j, T value) { upper[i * M + j] = value; });
    for (int64_t i = 0; i < M; ++i) {
      for (int64_t j = 0; j < M; ++j) {
        expect(upper[i * M + j] == (i <= j ? full[i * M + j] : T(-1)), "gemm_transposed upper");
      }
    }
  }
}

template <class T>
void check_transpose_panel() {
  constexpr int64_t width = Vec<T>::width;
  for (const int64_t rows : {int64_t(1), width - 1, width, 2 * width + 1}) {
    const int64_t columns = 3 * width, stride = columns + 5, to_stride = round_up(rows, width);
    const auto panel = random_values<T>(rows * stride);
    std::vector<T> to(columns * to_stride, T(-5));
    transpose_panel(panel.data(), stride, rows, columns, to.data(), to_stride);
    for (int64_t n = 0; n < columns; ++n) {
      for (int64_t i = 0; i < to_stride; ++i) {
        const T wanted = i < rows ? panel[i * stride + n] : T(0);
        expect(to[n * to_stride + i] == wanted, "transpose_panel", to[n * to_stride + i], wanted, n);
      }
    }
  }
}

template <class S, class T = Compute<S>>
void check_panels() {
  const DType dtype = sizeof(S) == 8 ? DType::float64 : sizeof(S) == 4 ? DType::float32 : DType::bfloat16;
  for (const int64_t C : {1, 3, 16, 20, 33}) {
    for (const int64_t N : {1, 7, 16, 50}) {
      const auto values = random_values<S>(2 * C * N);
      for (const bool last : {false, true}) {
        const FeatureMap x{values.data(), dtype, 2, C, N, C * N, last ? 1 : N, last ? C : 1};
        for (const int64_t first : {int64_t(0), N / 2}) {
          const int64_t count = N - first, stride = round_up(count, Vec<T>::width) + 3;
          std::vector<T> panel(C * stride, T(-5));
          load_panel<S>(x, 1, first, count, panel.data(), stride);
          for (int64_t c = 0; c < C; ++c) {
            for (int64_t n = 0; n < round_up(count, Vec<T>::width); ++n) {
              const T wanted = n < count ? T(widen(*x.at<S>(1, c, first + n))) : T(0);
              expect(panel[c * stride + n] == wanted, "load_panel", panel[c * stride + n], wanted, n);
            }
          }
          std::vector<S> copy(values.size(), narrow<S>(T(3)));
          FeatureMap y = x;
          y.data = copy.data();
          store_panel<S>(y, 1, first, count, panel.data(), stride);
          for (int64_t b = 0; b < 2; ++b) {
            for (int64_t c = 0; c < C; ++c) {
              for (int64_t n = 0; n < N; ++n) {
                const T wanted = b == 1 && n >= first ? T(widen(*x.at<S>(b, c, n))) : T(3);
                expect(widen(*y.at<S>(b, c, n)) == wanted, "store_panel", widen(*y.at<S>(b, c, n)), wanted, n);
              }
            }
          }
        }
      }
    }
  }
}

}  // namespace

int main() {
  check_partial<float, float>();
  check_partial<double, double>();
  check_partial<float, bfloat16>();
  check_lanes<float>();
  check_lanes<double>();
  check_bfloat16();
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  const double exp_ulps = 1.0;
#else
  const double exp_ulps = 1.25;
#endif
  check_exp<float>(exp_ulps);
  check_exp<double>(exp_ulps);
  check_gemm<float>();
  check_gemm<double>();
  check_gemm<bfloat16>();
  check_transpose_panel<float>();
  check_transpose_panel<double>();
  check_panels<float>();
  check_panels<double>();
  check_panels<bfloat16>();
  std::printf("%d failed checks\n", failures);
  return std::min(failures, 100);
}
