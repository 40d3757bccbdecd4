// multi_dilation_conv: shapes to workspace, tiles and launches.
#pragma once

#include <algorithm>
#include <cstdint>

#include "launch.h"
#include "multi_dilation_conv_kernels.h"

namespace eamnet::cuda {

// A call in plain data: what the library makes of tensors, and the tests of addresses.
struct ConvCall {
  Type type;
  int32_t branches, depthwise, channels_last, activation;
  int64_t sizes[4];  // B, C, H, W
  int64_t dilations[kMaxBranches];
  TensorRef x, out, preactivation, grad_out, grad_x;  // data null: not there
  const void* branch[kMaxBranches];
  const void *point, *bias;
  void* grad_branch[kMaxBranches];
  void *grad_point, *grad_bias;
  void* workspace;
};

template <class T>
Conv<T> make_conv(const ConvCall& call) {
  Conv<T> a{};
  const auto& [B, C, H, W] = call.sizes;
  a.batch = static_cast<int>(B);
  a.channels = static_cast<int>(C);
  a.branches = call.branches;
  a.group = a.channels / (a.branches + 1);
  a.height = static_cast<int>(H);
  a.width = static_cast<int>(W);
  a.activation = static_cast<Activation>(call.activation);
  a.depthwise = call.depthwise != 0;
  const auto map = [&](const TensorRef& tensor, int64_t channels) {
    return make_map<T>(tensor, {B, channels, H, W}, a.group);
  };
  a.x = map(call.x, C);
  a.out = map(call.out, C);
  a.preactivation = map(call.preactivation, C - a.group);
  a.grad_out = map(call.grad_out, C);
  a.grad_x = map(call.grad_x, C);
  for (int g = 0; g < a.branches; ++g) {
    // A dilation of the size of the picture moves every tap but the middle one out of it.
    a.dilation[g] = static_cast<int>(std::min(call.dilations[g], std::max(H, W)));
    a.branch[g] = static_cast<const T*>(call.branch[g]);
  }
  a.point = static_cast<const T*>(call.point);
  a.bias = static_cast<const T*>(call.bias);
  return a;
}

template <class T>
int64_t window_elements(const Conv<T>& a, const Tiling& tiling) {
  int64_t most = 0;
  for (int g = 0; g < a.branches; ++g) {
    const Window window(tiling, a.dilation[g]);
    most = std::max<int64_t>(most, int64_t(window.rows) * window.columns * kWindowStride<T>);
  }
  return most;
}

template <class T>
int64_t stage_elements(const Tiling& tiling, const Limits& limits) {
  return int64_t(threads_for(tiling, limits)) / 32 * kStageSize<T>;
}

template <class T>
int64_t forward_bytes(const Conv<T>& a, const Tiling& t, const Limits& limits) {
  const int64_t window = std::max(window_elements(a, t), stage_elements<T>(t, limits));
  return (int64_t(t.pixels()) * row_length<T>(a.grouped_channels()) + window) * sizeof(T);
}

template <class T>
int64_t point_backward_bytes(const Conv<T>& a, const Tiling& t, const Limits& limits) {
  return (int64_t(t.pixels()) * row_length<T>(a.channels) + stage_elements<T>(t, limits)) * sizeof(T);
}

template <class T>
int64_t stencil_backward_bytes(const Conv<T>& a, const Tiling& t) {
  return (int64_t(t.pixels()) * row_length<T>(a.padded_group()) + window_elements(a, t)) * sizeof(T);
}

template <class T>
int64_t branch_gradient_bytes(const Conv<T>& a, const Tiling& t) {
  const int row = a.depthwise ? kWindowStride<T> : row_length<T>(kGradientRows);
  return (int64_t(t.pixels()) * row + window_elements(a, t)) * sizeof(T);
}

// Launch-independent parts of the sums over pixels: enough to fill the card twice.
inline int splits_for(int64_t parts, int64_t blocks_per_part, const Limits& limits) {
  const int64_t wanted = ceil_div(2 * int64_t(limits.multiprocessors), int(std::max<int64_t>(1, blocks_per_part)));
  return int(std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, std::min<int64_t>(parts, 256))));
}

// Everything about the backward's sums that workspace and launches must agree on.
struct GradientPlan {
  Tiling tiling;
  int blocks, branch_splits, point_blocks, point_input_blocks, point_splits;
  int64_t tiles, runs;
};

template <class T>
GradientPlan gradient_plan(const Conv<T>& a, const Limits& limits) {
  GradientPlan plan;
  const int inputs = ceil_div(a.group, kStep<T>);
  plan.blocks = a.branches * inputs * (a.depthwise ? 1 : ceil_div(a.group, kGradientRows));
  plan.tiling = choose_tiling(
      a.batch, a.height, a.width, limits, plan.blocks,
      [&](const Tiling& t) { return branch_gradient_bytes(a, t); });
  plan.tiles = int64_t(a.batch) * plan.tiling.down * plan.tiling.across;
  plan.branch_splits = splits_for(plan.tiles, plan.blocks, limits);
  plan.runs = int64_t(a.batch) * ceil_div(int64_t(a.height) * a.width, kPointPixels);
  plan.point_blocks = ceil_div(a.channels, kPointSize);
  plan.point_input_blocks =
      ceil_div(a.padded_group() + round_up(a.channels - a.group, kVec<T>), kPointSize);
  plan.point_splits = splits_for(plan.runs, int64_t(plan.point_blocks) * plan.point_input_blocks, limits);
  return plan;
}

// Divides `memory` among the call's intermediate results and returns the bytes that they take; with
// memory null it only counts.
template <class T>
int64_t place_workspace(Conv<T>& a, char* memory, bool backward, bool channels_last, const Limits& limits) {
  int64_t used = 0;
  const auto take = [&](int64_t bytes) {
    char* at = memory == nullptr ? nullptr : memory + used;
    used += (bytes + 255) / 256 * 256;
    return at;
  };
  const int64_t branch = a.depthwise ? branch_size<T, true>(a.group) * int64_t(sizeof(float))
                                     : branch_size<T, false>(a.group) * int64_t(sizeof(T));
  a.packed_branches = take(a.branches * branch);
  const int64_t rows = round_up(std::max(a.channels, a.grouped_channels()), 16);
  a.packed_point = reinterpret_cast<T*>(
      take(rows * round_up(std::max(a.channels, a.grouped_channels()), kStep<T>) * sizeof(T)));
  if (backward) {
    const GradientPlan plan = gradient_plan(a, limits);
    const int64_t C = a.channels;
    a.branch_partials = reinterpret_cast<float*>(
        take(plan.branch_splits * a.branches * a.branch_elements() * int64_t(sizeof(float))));
    a.point_partials =
        reinterpret_cast<float*>(take(plan.point_splits * (C * C + C) * int64_t(sizeof(float))));
    const std::array<int64_t, 4> sizes{a.batch, a.channels - a.group, a.height, a.width};
    void* gradient = take(sizes[0] * sizes[1] * sizes[2] * sizes[3] * int64_t(sizeof(T)));
    a.grad_preactivation = make_map<T>(
        TensorRef{gradient, dense_strides(sizes, channels_last)}, sizes, a.group);
  }
  return used;
}

template <class T, bool depthwise, bool backward, class Launch>
void launch_packing(const Conv<T>& a, const Limits& limits, Launch&& launch) {
  const int64_t elements = a.branches * branch_size<T, depthwise>(a.group) +
      int64_t(a.grouped_channels()) * a.grouped_channels();
  const int64_t blocks = std::min<int64_t>(ceil_div(elements, limits.threads), 4 * limits.multiprocessors);
  launch(pack_weights<T, depthwise, backward>, Grid{std::max<int64_t>(1, blocks)}, limits.threads, 0, a);
}

template <class T, bool depthwise, class Launch>
void launch_forward(Conv<T> a, const Limits& limits, Launch&& launch) {
  if (a.batch == 0) return;
  launch_packing<T, depthwise, false>(a, limits, launch);
  a.tiling = choose_tiling(
      a.batch, a.height, a.width, limits, 1,
      [&](const Tiling& t) { return forward_bytes(a, t, limits); });
  launch(
      conv_forward<T, depthwise>, Grid{int64_t(a.batch) * a.tiling.down * a.tiling.across},
      threads_for(a.tiling, limits), forward_bytes(a, a.tiling, limits), a);
}

// The outputs for the weights: in the shapes of the weights; grad_bias null where there is no bias.
template <class T>
struct WeightGradients {
  T* branch[kMaxBranches];
  T *point, *bias;
};

template <class T, bool depthwise, class Launch>
void launch_backward(
    Conv<T> a, const WeightGradients<T>& out, const Limits& limits, Launch&& launch) {
  const GradientPlan plan = gradient_plan(a, limits);
  if (a.batch > 0) {
    launch_packing<T, depthwise, true>(a, limits, launch);
    a.tiling = choose_tiling(
        a.batch, a.height, a.width, limits, 1,
        [&](const Tiling& t) { return point_backward_bytes(a, t, limits); });
    launch(
        point_backward<T>, Grid{int64_t(a.batch) * a.tiling.down * a.tiling.across},
        threads_for(a.tiling, limits), point_backward_bytes(a, a.tiling, limits), a);
    if (a.branches > 0) {
      a.tiling = choose_tiling(
          a.batch, a.height, a.width, limits, a.branches,
          [&](const Tiling& t) { return stencil_backward_bytes(a, t); });
      launch(
          stencil_backward<T, depthwise>,
          Grid{int64_t(a.batch) * a.tiling.down * a.tiling.across, a.branches},
          threads_for(a.tiling, limits), stencil_backward_bytes(a, a.tiling), a);
      a.tiling = plan.tiling;
      const Grid grid{plan.branch_splits, plan.blocks};
      const int tiles = static_cast<int>(plan.tiles);
      const int64_t bytes = branch_gradient_bytes(a, a.tiling);
      if constexpr (depthwise) {
        launch(depthwise_gradient<T>, grid, threads_for(a.tiling, limits), bytes, a, tiles);
      } else {
        const int warps = kGradientSpans<T> * (a.group > kProductRows ? 2 : 1);
        launch(dense_gradient<T>, grid, warps * 32, bytes, a, tiles);
      }
    }
    const int64_t bytes = 2 * kPointPixels * row_length<T>(kPointSize) * int64_t(sizeof(T));
    launch(
        point_gradient<T>, Grid{plan.point_splits, plan.point_blocks, plan.point_input_blocks},
        kPointSize / kProductRows * 32, bytes, a, plan.runs);
  }
  // An empty batch has no partial sums, and the sum of none is zero.
  Segments<T> segments{};
  int count = 0;
  int64_t longest = 0;
  const auto add = [&](T* to, const float* from, int64_t size, int64_t split_stride, int splits) {
    segments.segment[count++] = {to, from, size, split_stride, a.batch > 0 ? splits : 0};
    longest = std::max(longest, size);
  };
  const int64_t elements = a.branch_elements(), C = a.channels;
  for (int g = 0; g < a.branches; ++g) {
    add(out.branch[g], a.branch_partials + g * elements, elements, a.branches * elements,
        plan.branch_splits);
  }
  add(out.point, a.point_partials, C * C, C * C + C, plan.point_splits);
  if (out.bias != nullptr) add(out.bias, a.point_partials + C * C, C, C * C + C, plan.point_splits);
  launch(sum_partials<T>, Grid{ceil_div(longest, limits.threads), count}, limits.threads, 0, segments);
}

// Bytes of workspace that a call needs.
inline int64_t workspace_bytes(const ConvCall& call, bool backward, const Limits& limits) {
  return visit(call.type, [&]<class T>() {
    Conv<T> a = make_conv<T>(call);
    return place_workspace(a, nullptr, backward, call.channels_last != 0, limits);
  });
}

template <class Launch>
void run(const ConvCall& call, bool backward, const Limits& limits, Launch&& launch) {
  visit(call.type, [&]<class T>() {
    Conv<T> a = make_conv<T>(call);
    place_workspace(a, static_cast<char*>(call.workspace), backward, call.channels_last != 0, limits);
    WeightGradients<T> gradients{};
    for (int g = 0; g < a.branches; ++g) gradients.branch[g] = static_cast<T*>(call.grad_branch[g]);
    gradients.point = static_cast<T*>(call.grad_point);
    gradients.bias = static_cast<T*>(call.grad_bias);
    if (backward && a.depthwise) launch_backward<T, true>(a, gradients, limits, launch);
    if (backward && !a.depthwise) launch_backward<T, false>(a, gradients, limits, launch);
    if (!backward && a.depthwise) launch_forward<T, true>(a, limits, launch);
    if (!backward && !a.depthwise) launch_forward<T, false>(a, limits, launch);
    return 0;
  });
}

}  // namespace eamnet::cuda
