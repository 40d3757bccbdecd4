// gate_statistics: shapes to workspace, tiles and launches.
#pragma once

#include <algorithm>
#include <cstdint>

#include "gate_statistics_kernels.h"
#include "launch.h"

namespace eamnet::cuda {

// A call in plain data. Forward: x and the six results. Backward: grad_x and what it is made from.
struct GateCall {
  Type type;
  int32_t channels_last;
  int64_t sizes[4];  // B, C, H, W
  TensorRef x;
  void *pixel_mean, *pixel_max, *channel_mean, *channel_max;  // backward: their gradients
  int32_t* pixel_argmax;
  int64_t* channel_argmax;
  void *grad_x, *workspace;
};

template <class T>
GateStatistics<T> make_gate(const GateCall& call) {
  const auto& [B, C, H, W] = call.sizes;
  GateStatistics<T> a{int(B), int(C), int(H), int(W), {}, {}, {}, {}, {}, {}, {}, {}, {}};
  a.x = make_map<T>(call.x, {B, C, H, W}, a.channels);
  a.pixel_mean = static_cast<T*>(call.pixel_mean);
  a.pixel_max = static_cast<T*>(call.pixel_max);
  a.channel_mean = static_cast<T*>(call.channel_mean);
  a.channel_max = static_cast<T*>(call.channel_max);
  a.pixel_argmax = call.pixel_argmax;
  a.channel_argmax = call.channel_argmax;
  a.partials = static_cast<Extreme*>(call.workspace);
  return a;
}

template <class T>
int64_t gate_tile_bytes(const Tiling& t) {
  return t.pixels() * (kWindowStride<T> * int64_t(sizeof(T)) + int64_t(sizeof(Extreme)));
}

template <class T>
Tiling gate_tiling(const GateStatistics<T>& a, const Limits& limits) {
  Tiling tiling = choose_tiling(
      a.batch, a.height, a.width, limits, 1, [](const Tiling& t) { return gate_tile_bytes<T>(t); });
  while (tiling.pixels() > limits.threads) {
    tiling = make_tiling(tiling.rows / 2, tiling.log_columns, a.height, a.width);
  }
  return tiling;
}

template <class T>
int64_t gate_workspace(const GateStatistics<T>& a, const Limits& limits) {
  const Tiling tiling = gate_tiling(a, limits);
  return int64_t(a.batch) * a.channels * tiling.down * tiling.across * int64_t(sizeof(Extreme));
}

template <class T, class Launch>
void launch_gate_forward(GateStatistics<T> a, const Limits& limits, Launch&& launch) {
  if (a.batch == 0) return;
  a.tiling = gate_tiling(a, limits);
  launch(
      gate_tiles<T>, Grid{int64_t(a.batch) * a.tiling.down * a.tiling.across}, a.tiling.pixels(),
      gate_tile_bytes<T>(a.tiling), a);
  const int64_t threads = 32 * int64_t(a.batch) * a.channels;
  launch(gate_channels<T>, Grid{ceil_div(threads, limits.threads)}, limits.threads, 0, a);
}

template <class T, class Launch>
void launch_gate_backward(const GateStatisticsBackward<T>& a, const Limits& limits, Launch&& launch) {
  const int64_t inner = a.channels_last ? a.channels : a.pixels;
  const int64_t outer = a.channels_last ? a.pixels : a.channels;
  const int64_t threads = a.batch * outer * ceil_div(inner, kVec<T>);
  if (threads == 0) return;
  const int64_t blocks = std::min<int64_t>((threads + limits.threads - 1) / limits.threads,
                                           16 * int64_t(limits.multiprocessors));
  launch(gate_backward<T>, Grid{blocks}, limits.threads, 0, a);
}

inline int64_t workspace_bytes(const GateCall& call, const Limits& limits) {
  return visit(call.type, [&]<class T>() { return gate_workspace(make_gate<T>(call), limits); });
}

template <class Launch>
void run(const GateCall& call, bool backward, const Limits& limits, Launch&& launch) {
  visit(call.type, [&]<class T>() {
    if (!backward) {
      launch_gate_forward(make_gate<T>(call), limits, launch);
    } else {
      launch_gate_backward(
          GateStatisticsBackward<T>{
              call.sizes[0], call.sizes[1], call.sizes[2] * call.sizes[3], call.channels_last != 0,
              static_cast<T*>(call.grad_x), static_cast<const T*>(call.pixel_mean),
              static_cast<const T*>(call.pixel_max), static_cast<const T*>(call.channel_mean),
              static_cast<const T*>(call.channel_max), call.pixel_argmax, call.channel_argmax},
          limits, launch);
    }
    return 0;
  });
}

}  // namespace eamnet::cuda
