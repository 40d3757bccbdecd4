// Runs every kernel of csrc/cuda once or more on the CPU, for a sanitizer to watch. Each tensor is a heap
// block of its exact size. Results are test_conformance.py's business.
#include <cstdio>
#include <vector>

#include "cuda/gate_statistics_host.h"
#include "cuda/multi_dilation_conv_host.h"

namespace {

using namespace eamnet::cuda;

constexpr Limits kLimits{96 << 10, 3, 64};
const cuda_host::Launch kLaunch;

template <class T>
std::vector<T> values(int64_t count) {
  std::vector<T> out(static_cast<size_t>(count));
  out.shrink_to_fit();
  uint32_t state = 1;
  for (T& v : out) v = narrow<T>(float((state = state * 1664525u + 1013904223u) >> 16) / 65536.f - .5f);
  return out;
}

template <class T, bool depthwise>
void conv(int64_t C, int64_t H, int64_t W, std::vector<int64_t> dilations, bool channels_last) {
  const int64_t B = 2, n = int64_t(dilations.size()), c = C / (n + 1);
  ConvCall call{};
  call.branches = static_cast<int32_t>(n);
  call.depthwise = depthwise;
  call.channels_last = channels_last;
  const std::array<int64_t, 4> sizes{B, C, H, W}, convolved{B, C - c, H, W};
  std::copy(sizes.begin(), sizes.end(), call.sizes);
  std::copy(dilations.begin(), dilations.end(), call.dilations);
  auto x = values<T>(B * C * H * W), out = x, grad_out = x, grad_x = x;
  auto z = values<T>(B * (C - c) * H * W);
  const auto strides = dense_strides(sizes, channels_last);
  call.x = {x.data(), strides};
  call.out = {out.data(), strides};
  call.grad_out = {grad_out.data(), strides};
  call.grad_x = {grad_x.data(), strides};
  call.preactivation = {z.data(), dense_strides(convolved, channels_last)};
  std::vector<std::vector<T>> weights(size_t(n), values<T>(9 * c * (depthwise ? 1 : c)));
  auto grads = weights;
  auto point = values<T>(C * C), bias = values<T>(C), grad_point = point, grad_bias = bias;
  WeightGradients<T> gradients{};
  for (size_t g = 0; g < weights.size(); ++g) {
    call.branch[g] = weights[g].data();
    gradients.branch[g] = grads[g].data();
  }
  call.point = point.data();
  call.bias = bias.data();
  gradients.point = grad_point.data();
  gradients.bias = grad_bias.data();
  for (const bool backward : {false, true}) {
    Conv<T> a = make_conv<T>(call);
    std::vector<char> memory(size_t(place_workspace(a, nullptr, backward, channels_last, kLimits)));
    place_workspace(a, memory.data(), backward, channels_last, kLimits);
    if (backward) {
      launch_backward<T, depthwise>(a, gradients, kLimits, kLaunch);
    } else {
      launch_forward<T, depthwise>(a, kLimits, kLaunch);
    }
  }
}

template <class T>
[[maybe_unused]] void gate(int64_t B, int64_t C, int64_t H, int64_t W) {
  auto x = values<T>(B * C * H * W), pixel_mean = values<T>(B * H * W), pixel_max = pixel_mean;
  auto channel_mean = values<T>(B * C), channel_max = channel_mean;
  std::vector<int32_t> pixel_argmax(size_t(B * H * W));
  std::vector<int64_t> channel_argmax(size_t(B * C));
  GateCall call{};
  call.sizes[0] = B, call.sizes[1] = C, call.sizes[2] = H, call.sizes[3] = W;
  call.x = {x.data(), dense_strides({B, C, H, W}, false)};
  GateStatistics<T> a = make_gate<T>(call);
  a.pixel_mean = pixel_mean.data();
  a.pixel_max = pixel_max.data();
  a.channel_mean = channel_mean.data();
  a.channel_max = channel_max.data();
  a.pixel_argmax = pixel_argmax.data();
  a.channel_argmax = channel_argmax.data();
  std::vector<char> memory(size_t(gate_workspace(a, kLimits)));
  a.partials = reinterpret_cast<Extreme*>(memory.data());
  launch_gate_forward(a, kLimits, kLaunch);
  launch_gate_backward(
      GateStatisticsBackward<T>{
          B, C, H * W, false, x.data(), pixel_mean.data(), pixel_max.data(), channel_mean.data(),
          channel_max.data(), pixel_argmax.data(), channel_argmax.data()},
      kLimits, kLaunch);
}

}  // namespace

int main() {
  conv<bfloat16, true>(20, 9, 11, {1, 3, 12}, false);
#ifndef EAMNET_ONE_CASE
  conv<bfloat16, false>(20, 9, 11, {1, 3, 12}, false);
  conv<bfloat16, true>(64, 5, 9, {3, 5, 7}, true);
  conv<bfloat16, false>(64, 5, 9, {3, 5, 7}, true);
  conv<float, false>(18, 9, 6, {2}, false);
  gate<float>(2, 20, 9, 11);
#endif
  std::puts("complete");
}
