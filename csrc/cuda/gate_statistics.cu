// gate_statistics: from tensors to the kernels.
#include <tuple>

#include "cuda/gate_statistics_host.h"
#include "cuda/tensors.h"

namespace eamnet::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x) {
  GateCall call{};
  call.type = type_of(x);
  call.x = reference_to(x);
  const int64_t B = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  STD_TORCH_CHECK(C > 0 && H > 0 && W > 0, "x has no channels or no pixels");
  for (int d = 0; d < 4; ++d) call.sizes[d] = x.size(d);
  const Launcher launcher(x);
  const ScalarType dtype = x.scalar_type();
  Tensor pixel_mean = new_tensor({B, 1, H, W}, dtype, x), pixel_max = new_tensor({B, 1, H, W}, dtype, x);
  Tensor channel_mean = new_tensor({B, C}, dtype, x), channel_max = new_tensor({B, C}, dtype, x);
  Tensor pixel_argmax = new_tensor({B, 1, H, W}, ScalarType::Int, x);
  Tensor channel_argmax = new_tensor({B, C}, ScalarType::Long, x);
  call.pixel_mean = pixel_mean.mutable_data_ptr();
  call.pixel_max = pixel_max.mutable_data_ptr();
  call.channel_mean = channel_mean.mutable_data_ptr();
  call.channel_max = channel_max.mutable_data_ptr();
  call.pixel_argmax = pixel_argmax.mutable_data_ptr<int32_t>();
  call.channel_argmax = channel_argmax.mutable_data_ptr<int64_t>();
  Tensor workspace =
      new_tensor({workspace_bytes(call, launcher.limits())}, ScalarType::Byte, x);
  call.workspace = workspace.mutable_data_ptr();
  run(call, false, launcher.limits(), launcher);
  return {pixel_mean, pixel_max, channel_mean, channel_max, pixel_argmax, channel_argmax};
}

Tensor backward(
    const Tensor& grad_pixel_mean, const Tensor& grad_pixel_max, const Tensor& grad_channel_mean,
    const Tensor& grad_channel_max, const Tensor& pixel_argmax, const Tensor& channel_argmax,
    bool channels_last) {
  STD_TORCH_CHECK(grad_pixel_mean.dim() == 4, "grad_pixel_mean must be (B, 1, H, W)");
  STD_TORCH_CHECK(grad_channel_mean.dim() == 2, "grad_channel_mean must be (B, C)");
  const Tensor& like = grad_pixel_mean;
  const ScalarType dtype = like.scalar_type();
  const int64_t B = grad_channel_mean.size(0), C = grad_channel_mean.size(1);
  const int64_t H = like.size(2), W = like.size(3);
  check_operand(grad_pixel_mean, "grad_pixel_mean", {B, 1, H, W}, like, dtype);
  check_operand(grad_pixel_max, "grad_pixel_max", {B, 1, H, W}, like, dtype);
  check_operand(grad_channel_mean, "grad_channel_mean", {B, C}, like, dtype);
  check_operand(grad_channel_max, "grad_channel_max", {B, C}, like, dtype);
  check_operand(pixel_argmax, "pixel_argmax", {B, 1, H, W}, like, ScalarType::Int);
  check_operand(channel_argmax, "channel_argmax", {B, C}, like, ScalarType::Long);
  const Launcher launcher(like);
  Tensor grad_x = new_tensor({B, C, H, W}, dtype, like, channels_last);
  GateCall call{};
  call.type = type_of(like);
  call.channels_last = channels_last;
  for (int d = 0; d < 4; ++d) call.sizes[d] = grad_x.size(d);
  call.pixel_mean = const_cast<void*>(grad_pixel_mean.const_data_ptr());
  call.pixel_max = const_cast<void*>(grad_pixel_max.const_data_ptr());
  call.channel_mean = const_cast<void*>(grad_channel_mean.const_data_ptr());
  call.channel_max = const_cast<void*>(grad_channel_max.const_data_ptr());
  call.pixel_argmax = const_cast<int32_t*>(pixel_argmax.const_data_ptr<int32_t>());
  call.channel_argmax = const_cast<int64_t*>(channel_argmax.const_data_ptr<int64_t>());
  call.grad_x = grad_x.mutable_data_ptr();
  run(call, true, launcher.limits(), launcher);
  return grad_x;
}

// What a call of these sizes would launch on a card with these limits. `type` is the number of a Type.
std::vector<int64_t> launches(
    std::vector<int64_t> sizes, int64_t type, bool backward, int64_t shared_bytes,
    int64_t multiprocessors) {
  GateCall call{};
  call.type = static_cast<Type>(type);
  std::copy(sizes.begin(), sizes.end(), call.sizes);
  std::vector<int64_t> found;
  run(call, backward, {int(shared_bytes), int(multiprocessors), 256}, Recorder{found});
  return found;
}

}  // namespace
}  // namespace eamnet::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(eamnet_kernels_native, m) {
  m.def(
      "gate_statistics_launches(int[] sizes, int type, bool backward, int shared_bytes,"
      " int multiprocessors) -> int[]");
}
STABLE_TORCH_LIBRARY_IMPL(eamnet_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("gate_statistics_launches", TORCH_BOX(&eamnet::cuda::launches));
}

STABLE_TORCH_LIBRARY_IMPL(eamnet_kernels_native, CUDA, m) {
  m.impl("gate_statistics", TORCH_BOX(&eamnet::cuda::forward));
  m.impl("gate_statistics_backward", TORCH_BOX(&eamnet::cuda::backward));
}
