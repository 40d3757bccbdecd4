// Types, 16-byte vectors and feature maps as the kernels see them.
//
// Everything below csrc/cuda except the .cu files also compiles with a C++20 compiler for the CPU, on
// which tests/cuda_host runs it: there `cuda_names.h` gives the names of CUDA a meaning, and what is
// an instruction of the GPU here stands beside a plain form.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define EAMNET_HOST_DEVICE __host__ __device__ __forceinline__
#define EAMNET_DEVICE __device__ __forceinline__
#else
#include "cuda_names.h"
#define EAMNET_HOST_DEVICE inline
#define EAMNET_DEVICE inline
#endif

namespace eamnet::cuda {

// Storage only: kernels compute on the float32 that they widen to.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

EAMNET_DEVICE float widen(float x) { return x; }

#ifdef __CUDA_ARCH__
EAMNET_DEVICE float widen(bfloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
EAMNET_DEVICE float widen(float16 x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}
template <class T>
EAMNET_DEVICE T narrow(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {
    T y;
    if constexpr (__is_same(T, bfloat16)) {
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    } else {
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    }
    return y;
  }
}
#else
inline float widen(bfloat16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }
inline float widen(float16 x) { return static_cast<float>(__builtin_bit_cast(_Float16, x.bits)); }
template <class T>
inline T narrow(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (__is_same(T, bfloat16)) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  } else {
    return {__builtin_bit_cast(uint16_t, static_cast<_Float16>(x))};
  }
}
#endif

template <class T>
struct alignas(16) Vec {
  static constexpr int size = 16 / sizeof(T);
  T lane[size];
};
template <class T>
inline constexpr int kVec = Vec<T>::size;
// Channels that a product takes at a time, and that a window holds: 32 bytes of one pixel.
template <class T>
inline constexpr int kStep = 2 * kVec<T>;

EAMNET_HOST_DEVICE constexpr int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }
EAMNET_HOST_DEVICE constexpr int round_up(int a, int b) { return (a + b - 1) / b * b; }
EAMNET_HOST_DEVICE constexpr int at_most(int a, int b) { return a < b ? a : b; }

// Rows of channels in shared memory, one per pixel, are 16 bytes longer than a multiple of 32 bytes.
// Eight neighbouring pixels, read by 16 bytes or as the fragments of a matrix instruction, then lie
// in different banks whatever the number of channels.
template <class T>
EAMNET_HOST_DEVICE constexpr int row_length(int channels) {
  return round_up(channels, kStep<T>) + kVec<T>;
}

// A feature map (B, C, H, W) where it lies. `vectors`: 16 bytes of a pixel's channels can be read and
// written at once, at each multiple of kVec channels from the start of each group of channels.
template <class T>
struct Map {
  T* data = nullptr;
  int64_t batch_stride = 0, channel_stride = 0, row_stride = 0, column_stride = 0;
  bool vectors = false;

  EAMNET_DEVICE T* at(int64_t b, int64_t c, int64_t y, int64_t x) const {
    return data + b * batch_stride + c * channel_stride + y * row_stride + x * column_stride;
  }
};

// kVec channels of one pixel from channel c on; zeros from channel `end` on.
template <class T>
EAMNET_DEVICE Vec<T> load(const Map<T>& map, int64_t b, int c, int end, int y, int x) {
  const T* from = map.at(b, c, y, x);
  if (map.vectors) return *reinterpret_cast<const Vec<T>*>(from);
  Vec<T> values;
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) {
    values.lane[i] = c + i < end ? from[i * map.channel_stride] : narrow<T>(0.f);
  }
  return values;
}

template <class T>
EAMNET_DEVICE void store(
    const Map<T>& map, int64_t b, int c, int end, int y, int x, const Vec<T>& values) {
  T* to = map.at(b, c, y, x);
  if (map.vectors) {
    *reinterpret_cast<Vec<T>*>(to) = values;
    return;
  }
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) {
    if (c + i < end) to[i * map.channel_stride] = values.lane[i];
  }
}

// The same as load() into shared memory, and without passing through registers where vectors are
// possible; `inside` false gives zeros. Complete, for the thread itself, after copies_done().
template <class T>
EAMNET_DEVICE void copy(
    T* to, const Map<T>& map, int64_t b, int c, int end, int y, int x, bool inside) {
  inside = inside && c < end;
#ifdef __CUDA_ARCH__
  if (map.vectors) {
    const T* from = inside ? map.at(b, c, y, x) : map.data;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                     static_cast<uint32_t>(__cvta_generic_to_shared(to))),
                 "l"(from), "r"(inside ? 16 : 0)
                 : "memory");
    return;
  }
#endif
  Vec<T> values{};
  if (inside) values = load(map, b, c, end, y, x);
  *reinterpret_cast<Vec<T>*>(to) = values;
}

EAMNET_DEVICE void copies_done() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// The dynamic shared memory of the block.
template <class T>
EAMNET_DEVICE T* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
#else
  return reinterpret_cast<T*>(cuda_host::shared_memory());
#endif
}

}  // namespace eamnet::cuda
