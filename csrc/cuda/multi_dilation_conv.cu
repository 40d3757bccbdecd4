// multi_dilation_conv: from tensors to the kernels.
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/multi_dilation_conv_host.h"
#include "cuda/tensors.h"

namespace eamnet::cuda {
namespace {

Activation activation_of(const std::string& name) {
  if (name == "relu") return Activation::relu;
  if (name == "silu") return Activation::silu;
  STD_TORCH_CHECK(name == "identity", "activation is '", name, "'; accepted: relu, silu, identity");
  return Activation::identity;
}

// Checks the operands that forward and backward share.
ConvCall make_call(
    const Tensor& x, const std::vector<Tensor>& w_branches, const Tensor& w_point,
    const std::vector<int64_t>& dilations, const std::string& activation, bool channels_last) {
  ConvCall call{};
  call.type = type_of(x);
  call.x = reference_to(x);
  call.channels_last = channels_last;
  call.activation = static_cast<int32_t>(activation_of(activation));
  for (int d = 0; d < 4; ++d) call.sizes[d] = x.size(d);
  const int64_t C = x.size(1), n = static_cast<int64_t>(dilations.size());
  STD_TORCH_CHECK(C > 0 && x.size(2) > 0 && x.size(3) > 0, "x has no channels or no pixels");
  STD_TORCH_CHECK(n <= kMaxBranches, "there are ", n, " branches; accepted: up to ", kMaxBranches);
  STD_TORCH_CHECK(C % (n + 1) == 0, "x has ", C, " channels, which do not divide into ", n + 1, " groups");
  STD_TORCH_CHECK(
      static_cast<int64_t>(w_branches.size()) == n, "w_branches has ", w_branches.size(), " weights for ",
      n, " dilations");
  const int64_t c = C / (n + 1), inputs = n ? w_branches[0].size(1) : 1;
  STD_TORCH_CHECK(inputs == c || inputs == 1, "w_branches are neither dense nor depthwise");
  call.branches = static_cast<int32_t>(n);
  call.depthwise = inputs == 1;
  for (int64_t g = 0; g < n; ++g) {
    check_operand(w_branches[g], "w_branches", {c, inputs, 3, 3}, x, x.scalar_type());
    STD_TORCH_CHECK(dilations[g] >= 1, "a dilation is ", dilations[g], "; accepted: at least 1");
    call.branch[g] = w_branches[g].const_data_ptr();
    call.dilations[g] = dilations[g];
  }
  check_operand(w_point, "w_point", {C, C}, x, x.scalar_type());
  call.point = w_point.const_data_ptr();
  return call;
}

void run_with_workspace(ConvCall& call, bool backward, const Launcher& launcher, const Tensor& like) {
  Tensor workspace =
      new_tensor({workspace_bytes(call, backward, launcher.limits())}, ScalarType::Byte, like);
  call.workspace = workspace.mutable_data_ptr();
  run(call, backward, launcher.limits(), launcher);
}

std::tuple<Tensor, Tensor> forward(
    const Tensor& x, std::vector<Tensor> w_branches, const Tensor& w_point, std::optional<Tensor> bias,
    std::vector<int64_t> dilations, const std::string& activation, bool save_for_backward,
    bool channels_last) {
  ConvCall call = make_call(x, w_branches, w_point, dilations, activation, channels_last);
  const int64_t B = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  const ScalarType dtype = x.scalar_type();
  if (bias) check_operand(*bias, "bias", {C}, x, dtype);
  call.bias = bias ? bias->const_data_ptr() : nullptr;
  const Launcher launcher(x);
  Tensor out = new_tensor({B, C, H, W}, dtype, x, channels_last);
  call.out = reference_to(out);
  Tensor preactivation = new_tensor({0}, dtype, x);
  if (save_for_backward) {
    preactivation = new_tensor({B, C - C / (call.branches + 1), H, W}, dtype, x, channels_last);
    call.preactivation = reference_to(preactivation);
  }
  run_with_workspace(call, false, launcher, x);
  return {out, preactivation};
}

std::tuple<Tensor, std::vector<Tensor>, Tensor, Tensor> backward(
    const Tensor& grad_out, const Tensor& x, std::vector<Tensor> w_branches, const Tensor& w_point,
    bool has_bias, std::vector<int64_t> dilations, const std::string& activation,
    const Tensor& preactivation, bool channels_last) {
  ConvCall call = make_call(x, w_branches, w_point, dilations, activation, channels_last);
  const int64_t B = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  const int64_t c = C / (call.branches + 1);
  const ScalarType dtype = x.scalar_type();
  check_operand(grad_out, "grad_out", {B, C, H, W}, x, dtype, false);
  check_operand(preactivation, "preactivation", {B, C - c, H, W}, x, dtype, false);
  call.grad_out = reference_to(grad_out);
  call.preactivation = reference_to(preactivation);
  const Launcher launcher(x);
  Tensor grad_x = new_tensor({B, C, H, W}, dtype, x, channels_last);
  call.grad_x = reference_to(grad_x);
  std::vector<Tensor> grad_branches;
  for (int32_t g = 0; g < call.branches; ++g) {
    grad_branches.push_back(new_tensor({c, w_branches[g].size(1), 3, 3}, dtype, x));
    call.grad_branch[g] = grad_branches.back().mutable_data_ptr();
  }
  Tensor grad_point = new_tensor({C, C}, dtype, x), grad_bias = new_tensor({has_bias ? C : 0}, dtype, x);
  call.grad_point = grad_point.mutable_data_ptr();
  call.grad_bias = has_bias ? grad_bias.mutable_data_ptr() : nullptr;
  run_with_workspace(call, true, launcher, x);
  return {grad_x, grad_branches, grad_point, grad_bias};
}

// What a call of these sizes would launch on a card with these limits. `type` is the number of a Type.
std::vector<int64_t> launches(
    std::vector<int64_t> sizes, std::vector<int64_t> dilations, int64_t type, bool depthwise,
    bool channels_last, bool backward, int64_t shared_bytes, int64_t multiprocessors) {
  ConvCall call{};
  call.type = static_cast<Type>(type);
  call.branches = static_cast<int32_t>(dilations.size());
  call.depthwise = depthwise;
  call.channels_last = channels_last;
  std::copy(sizes.begin(), sizes.end(), call.sizes);
  std::copy(dilations.begin(), dilations.end(), call.dilations);
  std::vector<int64_t> found;
  run(call, backward, {int(shared_bytes), int(multiprocessors), kMaxThreads}, Recorder{found});
  return found;
}

}  // namespace
}  // namespace eamnet::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(eamnet_kernels_native, m) {
  m.def(
      "multi_dilation_conv_launches(int[] sizes, int[] dilations, int type, bool depthwise,"
      " bool channels_last, bool backward, int shared_bytes, int multiprocessors) -> int[]");
}
STABLE_TORCH_LIBRARY_IMPL(eamnet_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("multi_dilation_conv_launches", TORCH_BOX(&eamnet::cuda::launches));
}

STABLE_TORCH_LIBRARY_IMPL(eamnet_kernels_native, CUDA, m) {
  m.impl("multi_dilation_conv", TORCH_BOX(&eamnet::cuda::forward));
  m.impl("multi_dilation_conv_backward", TORCH_BOX(&eamnet::cuda::backward));
}
