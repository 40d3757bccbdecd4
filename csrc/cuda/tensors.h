// What the library's operators need of tensors: checks, addresses, outputs, launches.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>

#include "cuda/launch.h"

namespace eamnet::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check(cudaError_t status, const char* what) {
  STD_TORCH_CHECK(status == cudaSuccess, what, ": ", cudaGetErrorString(status));
}

inline Type type_of(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  if (type == ScalarType::BFloat16) return Type::bfloat16;
  if (type == ScalarType::Half) return Type::float16;
  STD_TORCH_CHECK(
      type == ScalarType::Float, "x is ", torch::headeronly::toString(type),
      "; the CUDA kernels accept float32, bfloat16 and float16");
  return Type::float32;
}

inline TensorRef reference_to(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "a tensor has ", x.dim(), " dimensions; accepted is (B, C, H, W)");
  return {const_cast<void*>(x.const_data_ptr()), {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}};
}

inline void check_operand(
    const Tensor& x, const char* name, std::initializer_list<int64_t> sizes, const Tensor& like,
    ScalarType dtype, bool contiguous = true) {
  bool fits = x.scalar_type() == dtype && (!contiguous || x.is_contiguous()) &&
      x.dim() == static_cast<int64_t>(sizes.size()) && x.device() == like.device();
  int64_t d = 0;
  for (const int64_t size : sizes) fits = fits && x.size(d++) == size;
  STD_TORCH_CHECK(fits, name, " has not the shape, dtype, layout or device that it should have");
}

inline Tensor new_tensor(
    std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& like,
    bool channels_last = false) {
  using torch::headeronly::MemoryFormat;
  return torch::stable::empty(
      sizes, dtype, std::nullopt, like.device(), std::nullopt,
      channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// Launches on the device of a tensor, on torch's current stream there.
class Launcher {
 public:
  explicit Launcher(const Tensor& on) : guard_(on.get_device_index()) {
    const int device = on.get_device_index();
    void* stream = nullptr;
    STD_TORCH_CHECK(
        aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
        "torch's current CUDA stream could not be had");
    stream_ = static_cast<cudaStream_t>(stream);
    limits_.threads = 256;
    check(cudaDeviceGetAttribute(&limits_.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&limits_.multiprocessors, cudaDevAttrMultiProcessorCount, device),
          "cudaDeviceGetAttribute");
  }

  const Limits& limits() const { return limits_; }

  template <class... Parameters, class... Arguments>
  void operator()(
      void (*kernel)(Parameters...), const Grid& grid, int threads, int64_t shared_bytes,
      const Arguments&... arguments) const {
    STD_TORCH_CHECK(
        shared_bytes <= limits_.shared_bytes, "a block would take ", shared_bytes,
        " bytes of shared memory, this card gives ", limits_.shared_bytes);
    STD_TORCH_CHECK(
        grid.x <= INT32_MAX && grid.y <= 65535 && grid.z <= 65535, "the input is too large");
    if (shared_bytes > 48 << 10) {  // what a block gets without asking
      check(cudaFuncSetAttribute(
                kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
            "cudaFuncSetAttribute");
    }
    const dim3 blocks(unsigned(grid.x), unsigned(grid.y), unsigned(grid.z));
    kernel<<<blocks, threads, shared_bytes, stream_>>>(arguments...);
    check(cudaGetLastError(), "launch");
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  Limits limits_{};
};

}  // namespace eamnet::cuda
