// Products of 16 x 64 outputs per warp, on tensor cores for 16-bit types.
//
// inner_step: sum over channels. acc(m, n) += sum_k A(m, k) B(n, k): A is a matrix of weights, packed
//   (packed_index) so that each thread reads what it needs by 16 bytes; B(n, .) are channels of pixel n.
// outer_step: sum over pixels. acc(m, n) += sum_p A(p, m) B(p, n), for gradients of weights.
//
// Both operands of pixels lie in shared memory, channels of a pixel adjacent. The 64 columns are eight
// times eight; what is eight columns (eight pixels; eight channels under one tap) the caller says by a
// function from 0..7 to an address. float32 is multiplied as float32. float32 and the plain form for
// the CPU divide the outputs differently among the threads of a warp than matrix instructions do.
#pragma once

#include "common.h"

namespace eamnet::cuda {

inline constexpr int kProductRows = 16, kProductColumns = 64, kProductPixels = 16;

// How often loops over inner_step are unrolled, so that weights are on the way early: what 128 registers
// allow without spilling. A step in float32 has 16 weights per thread in flight by itself.
template <class T>
inline constexpr int kUnroll = sizeof(T) == 2 ? 2 : 1;

struct Accumulator {
  float value[32];

  EAMNET_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < 32; ++i) value[i] = 0.f;
  }
};

// visit(row, eight, column, value) for each output of this thread; the output's column is
// 8 * eight + column.
template <class T, class Visit>
EAMNET_DEVICE void each_output(Accumulator& acc, Visit&& visit) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    if constexpr (sizeof(T) == 2) {
      visit(lane / 4 + i / 2 % 2 * 8, i / 4, lane % 4 * 2 + i % 2, acc.value[i]);
    } else {
      visit(lane / 8 * 4 + i / 8, i % 8, lane % 8, acc.value[i]);
    }
  }
}

// Where A(m, k) of a matrix with `steps` * kStep columns stands in its packed form.
template <class T>
EAMNET_HOST_DEVICE int64_t packed_index(int m, int k, int steps) {
  const int64_t block = static_cast<int64_t>(m / 16) * steps + k / kStep<T>;
  m %= 16;
  k %= kStep<T>;
  int inside;
  if constexpr (sizeof(T) == 2) {
    const int lane = m % 8 * 4 + k % 8 / 2, part = m / 8 + k / 8 * 2;
    inside = lane * 8 + part * 2 + k % 2;
  } else {
    inside = (k / 4 * 16 + m) * 4 + k % 4;
  }
  return block * 16 * kStep<T> + inside;
}

#ifdef __CUDA_ARCH__
template <bool transpose, class T>
EAMNET_DEVICE void load_matrices(uint32_t (&out)[4], const T* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (transpose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  }
}

template <class T>
EAMNET_DEVICE void multiply(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (__is_same(T, bfloat16)) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}
#endif

// One step over kStep channels. `a`: the packed block; b(eight): the first of eight pixels' channels,
// the next pixel `stride` further.
template <class T, class B>
EAMNET_DEVICE void inner_step(Accumulator& acc, const T* a, B&& b, int stride) {
#ifdef __CUDA_ARCH__
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    const uint4 packed = *reinterpret_cast<const uint4*>(a + lane * 8);
    const uint32_t rows[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int eight = 0; eight < 8; eight += 2) {
      uint32_t columns[4];
      load_matrices<false>(columns, b(eight + lane / 16) + lane % 8 * stride + lane / 8 % 2 * 8);
      multiply<T>(acc.value + eight * 4, rows, columns[0], columns[1]);
      multiply<T>(acc.value + eight * 4 + 4, rows, columns[2], columns[3]);
    }
  } else {
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      float4 rows[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        rows[i] = *reinterpret_cast<const float4*>(a + (half * 16 + lane / 8 * 4 + i) * 4);
      }
#pragma unroll
      for (int eight = 0; eight < 8; ++eight) {
        const float4 column =
            *reinterpret_cast<const float4*>(b(eight) + lane % 8 * stride + half * 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& sum = acc.value[i * 8 + eight];
          sum += rows[i].x * column.x;
          sum += rows[i].y * column.y;
          sum += rows[i].z * column.z;
          sum += rows[i].w * column.w;
        }
      }
    }
  }
#else
  each_output<T>(acc, [&](int row, int eight, int column, float& sum) {
    const T* channels = b(eight) + column * stride;
    for (int k = 0; k < kStep<T>; ++k) sum += widen(a[packed_index<T>(row, k, 1)]) * widen(channels[k]);
  });
#endif
}

// One step over kProductPixels pixels. `a`: rows 0..15 of the first, the next pixel a_stride further.
// b(eight, p), p = 0 or 8: these eight columns of pixel p, of which eight are b_stride apart.
template <class T, class B>
EAMNET_DEVICE void outer_step(Accumulator& acc, const T* a, int a_stride, B&& b, int b_stride) {
#ifdef __CUDA_ARCH__
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    uint32_t rows[4];
    load_matrices<true>(rows, a + (lane % 8 + lane / 16 * 8) * a_stride + lane / 8 % 2 * 8);
#pragma unroll
    for (int eight = 0; eight < 8; eight += 2) {
      uint32_t columns[4];
      load_matrices<true>(columns, b(eight + lane / 16, lane % 16 / 8 * 8) + lane % 8 * b_stride);
      multiply<T>(acc.value + eight * 4, rows, columns[0], columns[1]);
      multiply<T>(acc.value + eight * 4 + 4, rows, columns[2], columns[3]);
    }
  } else {
#pragma unroll
    for (int half = 0; half < kProductPixels; half += 8) {
      const T* columns[8];
#pragma unroll
      for (int eight = 0; eight < 8; ++eight) columns[eight] = b(eight, half) + lane % 8;
#pragma unroll 4
      for (int p = 0; p < 8; ++p) {
        const float4 rows = *reinterpret_cast<const float4*>(a + (half + p) * a_stride + lane / 8 * 4);
#pragma unroll
        for (int eight = 0; eight < 8; ++eight) {
          const float column = columns[eight][p * b_stride];
          acc.value[eight] += rows.x * column;
          acc.value[8 + eight] += rows.y * column;
          acc.value[16 + eight] += rows.z * column;
          acc.value[24 + eight] += rows.w * column;
        }
      }
    }
  }
#else
  each_output<T>(acc, [&](int row, int eight, int column, float& sum) {
    for (int p = 0; p < kProductPixels; ++p) {
      sum += widen(a[p * a_stride + row]) * widen(b(eight, p / 8 * 8)[p % 8 * b_stride + column]);
    }
  });
#endif
}

}  // namespace eamnet::cuda
