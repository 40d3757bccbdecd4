// How a feature map (B, C, H, W) lies in memory, as kernels see it: N = H*W pixels in one sequence.
//
// Contiguous (NCHW), channels-last, and slices of either over batch or channels are all of this form
// and are used where they lie. A slice over H or W is in general not: its pixels have no common
// stride, and the caller makes it contiguous first.
#pragma once

#include <cstdint>

namespace eamnet {

// Storage only: kernels compute on the float32 that it widens to.
struct bfloat16 {
  uint16_t bits;
};

enum class DType { float32, float64, bfloat16 };

struct FeatureMap {
  const void* data = nullptr;
  DType dtype = DType::float32;
  int64_t batch = 0;
  int64_t channels = 0;
  int64_t pixels = 0;
  // In elements. Exactly one of the last two is 1 unless a dimension has a single element;
  // channels_last() tells which one kernels may rely on.
  int64_t batch_stride = 0;
  int64_t channel_stride = 0;
  int64_t pixel_stride = 0;

  bool channels_last() const { return pixel_stride != 1; }

  // Address of one value; T has to be the type that dtype names.
  template <class T>
  const T* at(int64_t b, int64_t c, int64_t n) const {
    return static_cast<const T*>(data) + b * batch_stride + c * channel_stride + n * pixel_stride;
  }
  // The same for an output, which the caller created and may write.
  template <class T>
  T* mutable_at(int64_t b, int64_t c, int64_t n) const {
    return const_cast<T*>(at<T>(b, c, n));
  }
};

// visit(dtype, [&]<class S>() { ... }) runs the body with S = float, double or bfloat16.
template <class Body>
inline __attribute__((always_inline)) void visit(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::float32:
      return body.template operator()<float>();
    case DType::float64:
      return body.template operator()<double>();
    case DType::bfloat16:
      return body.template operator()<bfloat16>();
  }
}

}  // namespace eamnet
