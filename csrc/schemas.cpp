// The operators' schemas.
//
// eamnet_kernels holds the public operators; setup.py writes eamnet_schemas.inc from the table in
// eamnet_kernels/ops/schemas.py, the one place where they stand. eamnet_kernels_native holds the CPU
// kernels behind them, which csrc/cpu/<operator>.cpp implement: they take only what the Python side
// has checked, and record no gradient.
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
  m.def("cpu_level() -> str");
  m.def("gate_statistics(Tensor x) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gate_statistics_backward(Tensor grad_pixel_mean, Tensor grad_pixel_max,"
      " Tensor grad_channel_mean, Tensor grad_channel_max, Tensor pixel_argmax,"
      " Tensor channel_argmax, bool channels_last) -> Tensor");
  m.def("cross_mix_channels_grams(Tensor x, Tensor spatial_gate) -> Tensor");
  m.def(
      "cross_mix_channels_apply(Tensor x, Tensor spatial_gate, Tensor matrices, bool channels_last)"
      " -> Tensor");
  m.def(
      "cross_mix_channels_grad_matrices(Tensor grad_out, Tensor x, Tensor spatial_gate) -> Tensor");
  m.def(
      "cross_mix_channels_apply_backward(Tensor grad_out, Tensor x, Tensor spatial_gate,"
      " Tensor matrices, Tensor doubled, bool channels_last) -> (Tensor, Tensor)");
  m.def("external_memory_lse(Tensor x, Tensor key) -> (Tensor, Tensor)");
  m.def(
      "external_memory_scores(Tensor x, Tensor key, Tensor value, Tensor lse, Tensor logits) -> Tensor");
  m.def(
      "external_memory_read(Tensor x, Tensor key, Tensor readout, Tensor lse, Tensor logits,"
      " bool channels_last) -> Tensor");
  m.def(
      "external_memory_backward_sums(Tensor grad_out, Tensor x, Tensor key, Tensor readout,"
      " Tensor lse) -> (Tensor, Tensor)");
  m.def(
      "external_memory_backward(Tensor grad_out, Tensor x, Tensor key, Tensor readout, Tensor lse,"
      " Tensor row, bool channels_last) -> (Tensor, Tensor)");
  m.def(
      "multi_dilation_conv(Tensor x, Tensor[] w_branches, Tensor w_point, Tensor? bias,"
      " int[] dilations, str activation, bool save_for_backward, bool channels_last)"
      " -> (Tensor, Tensor)");
  m.def(
      "multi_dilation_conv_backward(Tensor grad_out, Tensor x, Tensor[] w_branches, Tensor w_point,"
      " bool has_bias, int[] dilations, str activation, Tensor preactivation, bool channels_last)"
      " -> (Tensor, Tensor[], Tensor, Tensor)");
  m.def(
      "cross_mix_pixels(Tensor q_s, Tensor k_s, Tensor v_s, Tensor q_c, Tensor k_c, Tensor v_c,"
      " Tensor? spatial_gate, float scale, bool save_for_backward) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cross_mix_pixels_backward(Tensor grad_out, Tensor q_s, Tensor k_s, Tensor v_s, Tensor q_c,"
      " Tensor k_c, Tensor v_c, Tensor? spatial_gate, Tensor branches, Tensor lse, float scale)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(eamnet_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_level", TORCH_BOX(&cpu_level));
}
