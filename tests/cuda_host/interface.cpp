// The kernels of csrc/cuda, run on the CPU, for ctypes: backend.py has the structures' other side.
#include "cuda/gate_statistics_host.h"
#include "cuda/multi_dilation_conv_host.h"

namespace {

// Few threads and few multiprocessors: small pictures then take several tiles in several sizes.
constexpr eamnet::cuda::Limits kLimits{96 << 10, 3, 64};

}  // namespace

extern "C" {

int64_t conv_workspace(const eamnet::cuda::ConvCall* call, int backward) {
  return workspace_bytes(*call, backward != 0, kLimits);
}

void conv_run(const eamnet::cuda::ConvCall* call, int backward) {
  run(*call, backward != 0, kLimits, cuda_host::Launch{});
}

int64_t gate_workspace(const eamnet::cuda::GateCall* call) { return workspace_bytes(*call, kLimits); }

void gate_run(const eamnet::cuda::GateCall* call, int backward) {
  run(*call, backward != 0, kLimits, cuda_host::Launch{});
}
}
