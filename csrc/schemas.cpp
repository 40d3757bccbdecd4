// The operators' schemas.
//
// eamnet_kernels holds the public operators; eamnet_kernels_native holds the CPU kernels behind them,
// which csrc/cpu/<operator>.cpp implement: they take only what the Python side has checked, and record
// no gradient. setup.py writes the .inc files from the tables in eamnet_kernels/ops/schemas.py, the one
// place where the schemas stand.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/dispatch.h"

namespace {

std::string cpu_level() { return eamnet::level_name(eamnet::active_level()); }

}  // namespace

STABLE_TORCH_LIBRARY(eamnet_kernels, m) {
#include "eamnet_schemas.inc"
}

STABLE_TORCH_LIBRARY(eamnet_kernels_native, m) {
#include "eamnet_native_schemas.inc"
}

STABLE_TORCH_LIBRARY_IMPL(eamnet_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_level", TORCH_BOX(&cpu_level));
}
