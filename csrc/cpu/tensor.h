// What a kernel's host part needs of tensors: their layout, checks, and outputs. Host only.
#pragma once

#ifndef EAMNET_HOST
#error "tensor.h belongs below #ifdef EAMNET_HOST"
#endif

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <initializer_list>
#include <string>

#include "cpu/feature_map.h"

namespace eamnet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Double:
      return DType::float64;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    default:
      STD_TORCH_CHECK(
          false, name, " is ", torch::headeronly::toString(x.scalar_type()),
          "; the CPU kernels accept float32, float64 and bfloat16");
  }
}

// The layout of a (B, C, H, W) tensor; an error where its pixels or channels are not adjacent.
inline FeatureMap feature_map(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 4, name, " has ", x.dim(), " dimensions; accepted is (B, C, H, W)");
  const int64_t H = x.size(2), W = x.size(3);
  FeatureMap map;
  map.data = x.const_data_ptr();
  map.dtype = dtype_of(x, name);
  map.batch = x.size(0);
  map.channels = x.size(1);
  map.pixels = H * W;
  map.batch_stride = x.stride(0);
  map.channel_stride = x.stride(1);
  // The stride of a dimension of one element says nothing.
  map.pixel_stride = W > 1 ? x.stride(3) : H > 1 ? x.stride(2) : 1;
  if (map.channels == 1 && map.pixel_stride != 1) map.channel_stride = 1;
  const bool rows_join = H <= 1 || W <= 1 || x.stride(2) == W * x.stride(3);
  STD_TORCH_CHECK(
      rows_join && (map.pixel_stride == 1 || map.channel_stride == 1),
      name, " is neither contiguous nor channels-last in each sample; make it contiguous first");
  return map;
}

// Asks for huge pages behind a large new tensor. From 32 MiB on (glibc's limit) its memory is mapped
// anew for every call, and touching it page by page takes longer than most kernels: measured 11 ms for
// 32 MiB in pages of 4 KiB, against a write that takes 1 ms. Where the system declines, nothing changes.
inline void prefer_huge_pages([[maybe_unused]] const Tensor& x) {
#if defined(__linux__)
  constexpr uintptr_t huge = uintptr_t(2) << 20;
  const auto bytes = static_cast<uintptr_t>(x.numel()) * x.element_size();
  if (bytes < 16 * huge) return;
  const auto address = reinterpret_cast<uintptr_t>(x.mutable_data_ptr());
  const uintptr_t begin = (address + huge - 1) / huge * huge, end = (address + bytes) / huge * huge;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// An uninitialised output.
inline Tensor new_tensor(
    std::initializer_list<int64_t> sizes, ScalarType dtype, bool channels_last = false) {
  using torch::headeronly::MemoryFormat;
  Tensor out = torch::stable::empty(
      sizes, dtype, std::nullopt, std::nullopt, std::nullopt,
      channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  prefer_huge_pages(out);
  return out;
}

// For small operands (gates, weights, gradients of statistics): contiguous and of the given sizes.
inline void check_operand(
    const Tensor& x, const char* name, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  bool fits = x.scalar_type() == dtype && x.is_contiguous() &&
      x.dim() == static_cast<int64_t>(sizes.size());
  int64_t d = 0;
  for (const int64_t size : sizes) fits = fits && x.size(d++) == size;
  if (fits) return;
  std::string wanted;
  for (const int64_t size : sizes) wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
  STD_TORCH_CHECK(
      false, name, " must be a contiguous ", torch::headeronly::toString(dtype), " tensor of shape (",
      wanted, ")");
}

}  // namespace eamnet
