"""The operators for users: checked arguments, documented shapes, one call each.

Dtypes: float32, bfloat16, float16 and float64; an operator's tensors share one dtype and one
device. Sums, softmaxes and norms are made in float32 (float64 for float64). Under `torch.autocast`
every floating tensor is converted to the autocast dtype first, except those of `gate_statistics`,
which keeps the dtype it is given, and the temperature, which stays float32. A call in float64 stays
in float64.

Layouts: any strides are accepted. Channels-last input gives channels-last output; any other input
gives NCHW. Inputs are never written to. All operators can be differentiated twice.

Errors: TypeError for a wrong type or dtype, ValueError for a wrong shape, value or device; each
names the argument, what was given and what is accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from eamnet_kernels.backends import selected
from eamnet_kernels.ops.layout import autocast_dtype, dense
from eamnet_kernels.ops.registration import call
from eamnet_kernels.reference.multi_dilation_conv import ACTIVATIONS

__all__ = [
    "GateStatistics",
    "cross_mix_channels",
    "cross_mix_pixels",
    "external_memory",
    "gate_statistics",
    "multi_dilation_conv",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class GateStatistics(NamedTuple):
    """Mean and maximum of `x` (B,C,H,W) over its channels and over its pixels."""

    pixel_mean: Tensor
    """(B,1,H,W), over channels."""
    pixel_max: Tensor
    """(B,1,H,W), over channels."""
    channel_mean: Tensor
    """(B,C), over pixels."""
    channel_max: Tensor
    """(B,C), over pixels."""


def gate_statistics(x: Tensor) -> GateStatistics:
    """The four reductions that CBAM's channel and spatial gates need, in one pass over `x`.

    Args:
        x: (B,C,H,W), with at least one channel and one pixel.

    Returns:
        `GateStatistics` in the dtype of `x`. A maximum is NaN where there is one; its gradient goes
        to the first maximal element.

    Source: Woo et al., CBAM, arXiv:1807.06521.
    """
    _check_map(x)
    out = call("gate_statistics", dense(x), backend=selected())
    return GateStatistics(*out[:4])


def cross_mix_pixels(
    q_s: Tensor,
    k_s: Tensor,
    v_s: Tensor,
    q_c: Tensor,
    k_c: Tensor,
    v_c: Tensor,
    spatial_gate: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`softmax(scale Q_s K_c^T) V_c + softmax(scale Q_c K_s^T) V_s`, the pixels being the tokens.

    Memory is linear in N: no N x N matrix is kept on any backend.

    Args:
        q_s, k_s, v_s, q_c, k_c, v_c: (B,h,N,d), the spatial and the channel side's queries, keys
            and values. Any strides.
        spatial_gate: (B,N) or None. Multiplies q_s, k_s and v_s at each pixel, as they are loaded.
        scale: the factor of the scores; 1/sqrt(d) by default.

    Returns:
        (B,h,N,d).

    Source: EAM-Net, arXiv:2512.07275, equations 1-5.
    """
    _check_tensor("q_s", q_s, 4, "(B,h,N,d)")
    named = {"k_s": k_s, "v_s": v_s, "q_c": q_c, "k_c": k_c, "v_c": v_c}
    for name, tensor in named.items():
        _check_shape(name, tensor, tuple(q_s.shape), "that of q_s")
    if q_s.shape[2] == 0 or q_s.shape[3] == 0:
        raise ValueError(f"q_s has shape {tuple(q_s.shape)}; N and d must be at least 1")
    if spatial_gate is not None:
        _check_shape("spatial_gate", spatial_gate, (q_s.shape[0], q_s.shape[2]), "(B,N)")
        named["spatial_gate"] = spatial_gate
    if scale is None:
        scale = q_s.shape[3] ** -0.5
    tensors = _one_dtype("q_s", q_s, named)
    save = _needs_grad(*tensors)
    gate = None if spatial_gate is None else tensors[6]
    out: Tensor = call(
        "cross_mix_pixels", *tensors[:6], gate, float(scale), save, backend=selected()
    )[0]
    return out


def cross_mix_channels(
    x: Tensor,
    spatial_gate: Tensor,
    channel_gate: Tensor,
    w_spatial: Tensor,
    w_channel: Tensor,
    w_out: Tensor,
    temperature: Tensor,
) -> Tensor:
    """CMAM's cross mix with a head's channels as tokens: linear in the pixels, residual included.

    `x + W_o (softmax(t_0 Q_s K_c^T) V_c + softmax(t_1 Q_c K_s^T) V_s)`, where `Q_s, K_s, V_s` are
    1x1 projections of `spatial_gate * x`, the others of `channel_gate * x`, and the rows of every Q
    and K are divided by their L2 norm over the pixels.

    Args:
        x: (B,C,H,W).
        spatial_gate: (B,1,H,W).
        channel_gate: (B,C).
        w_spatial: (3C,C), the rows of W_q, W_k and W_v of the spatial side.
        w_channel: (3C,C), likewise of the channel side.
        w_out: (C,C).
        temperature: (2,h), one per direction and head; h divides C. May be float32 at any dtype.

    Returns:
        (B,C,H,W).

    Source: EAM-Net, arXiv:2512.07275, equations 1-5; XCiT, arXiv:2106.09681, section 3.
    """
    _check_map(x)
    batch, channels, height, width = x.shape
    _check_shape("spatial_gate", spatial_gate, (batch, 1, height, width), "(B,1,H,W)")
    _check_shape("channel_gate", channel_gate, (batch, channels), "(B,C)")
    _check_shape("w_spatial", w_spatial, (3 * channels, channels), "(3C,C)")
    _check_shape("w_channel", w_channel, (3 * channels, channels), "(3C,C)")
    _check_shape("w_out", w_out, (channels, channels), "(C,C)")
    _check_tensor("temperature", temperature, 2, "(2,h)")
    heads = temperature.shape[1]
    if temperature.shape[0] != 2 or heads == 0 or channels % heads:
        raise ValueError(
            f"temperature has shape {tuple(temperature.shape)}; accepted: (2,h) with h dividing "
            f"the {channels} channels of x"
        )
    if temperature.device != x.device:
        raise ValueError(f"temperature is on {temperature.device}, x is on {x.device}")
    tensors = _one_dtype(
        "x",
        dense(x),
        {
            "spatial_gate": spatial_gate,
            "channel_gate": channel_gate,
            "w_spatial": w_spatial,
            "w_channel": w_channel,
            "w_out": w_out,
        },
    )
    if temperature.dtype not in (tensors[0].dtype, torch.float32):
        raise TypeError(f"temperature is {temperature.dtype}; accepted: float32, or that of x")
    out: Tensor = call("cross_mix_channels", *tensors, temperature, backend=selected())[0]
    return out


def external_memory(
    x: Tensor, memory_key: Tensor, memory_value: Tensor, w_out: Tensor, top_k: int | None = None
) -> Tensor:
    """Attention of every pixel to S memory slots, then the `top_k` channels of largest L1 norm.

    `A = softmax over pixels of memory_key x`, divided by `1e-9 + its sum over slots`;
    `F = memory_value^T A`; the channels of F with the largest `sum |F|` over the pixels are kept,
    the others set to zero; result `w_out F`. Kept channels pass their gradient; the selection has
    none.

    Args:
        x: (B,C,H,W).
        memory_key: (S,C), the memory's keys times the projection of x, if there is one.
        memory_value: (S,C).
        w_out: (C,C).
        top_k: 1 to C; C, or None, keeps all. Ties go to the lower channel.

    Returns:
        (B,C,H,W), before normalisation and residual.

    Source: EANet, arXiv:2105.02358, section 3; EAM-Net, arXiv:2512.07275, section II.D.
    """
    _check_map(x)
    channels = x.shape[1]
    _check_tensor("memory_key", memory_key, 2, "(S,C)")
    slots = memory_key.shape[0]
    if slots == 0:
        raise ValueError("memory_key has no slots; accepted: (S,C) with S of at least 1")
    _check_shape("memory_key", memory_key, (slots, channels), "(S,C)")
    _check_shape("memory_value", memory_value, (slots, channels), "(S,C)")
    _check_shape("w_out", w_out, (channels, channels), "(C,C)")
    if top_k is None:
        top_k = channels
    if isinstance(top_k, float):
        raise TypeError(f"top_k is {top_k}, a float; accepted: a whole number")
    if not 1 <= top_k <= channels:
        raise ValueError(f"top_k is {top_k}; accepted: 1 to the {channels} channels of x")
    tensors = _one_dtype(
        "x",
        dense(x),
        {"memory_key": memory_key, "memory_value": memory_value, "w_out": w_out},
    )
    out: Tensor = call("external_memory", *tensors, top_k, backend=selected())[0]
    return out


def multi_dilation_conv(
    x: Tensor,
    w_branches: Sequence[Tensor],
    w_point: Tensor,
    bias: Tensor | None = None,
    dilations: Sequence[int] = (3, 5, 7),
    activation: str = "relu",
) -> Tensor:
    """Parallel 3x3 convolutions of different dilation over groups of channels, mixed by a 1x1.

    The channels form n + 1 groups of c for n branches. The first passes unchanged; group i goes
    through a 3x3 convolution of dilation and padding `dilations[i-1]` and the activation; the 1x1
    convolution acts on their concatenation, which is never written on the compiled backends.

    Args:
        x: (B,C,H,W) with C = (n+1) c.
        w_branches: n weights, each dense (c,c,3,3) or depthwise (c,1,3,3), all of one kind.
        w_point: (C,C).
        bias: (C) or None, of the 1x1 convolution.
        dilations: n >= 1 numbers of at least 1; they may be larger than the picture.
        activation: "relu", "silu" or "identity", after each branch.

    Returns:
        (B,C,H,W).

    Source: EAM-Net, arXiv:2512.07275, section II.C.
    """
    _check_map(x)
    if any(int(dilation) != dilation for dilation in dilations):
        raise TypeError(f"dilations are {list(dilations)}; accepted: whole numbers")
    dilations = [int(dilation) for dilation in dilations]
    count, channels = len(dilations), x.shape[1]
    if len(w_branches) != count:
        raise ValueError(f"w_branches has {len(w_branches)} weights for {count} dilations")
    if min(dilations, default=0) < 1:
        raise ValueError(f"dilations are {dilations}; accepted: one or more numbers, at least 1")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation is {activation!r}; accepted: {', '.join(map(repr, ACTIVATIONS))}"
        )
    if channels % (count + 1):
        raise ValueError(
            f"x has {channels} channels, which do not divide into {count + 1} equal groups "
            f"for {count} dilations"
        )
    group = channels // (count + 1)
    kinds = ((group, group, 3, 3), (group, 1, 3, 3))
    named = dict(zip(_branch_names(count), w_branches, strict=True))
    for name, weight in named.items():
        _check_tensor(name, weight, 4, "(c,c,3,3) or (c,1,3,3)")
        # Not `in`: torch.compile of torch 2.11 takes the shape for a tuple that is not in there.
        if weight.shape != kinds[0] and weight.shape != kinds[1]:
            raise ValueError(
                f"{name} has shape {tuple(weight.shape)}; accepted: {kinds[0]} or {kinds[1]}"
            )
        if weight.shape != w_branches[0].shape:
            raise ValueError(f"{name} differs in shape from w_branches[0]; all must be of one kind")
    _check_shape("w_point", w_point, (channels, channels), "(C,C)")
    named["w_point"] = w_point
    if bias is not None:
        _check_shape("bias", bias, (channels,), "(C)")
        named["bias"] = bias
    x, *weights = _one_dtype("x", dense(x), named)
    branches, point = weights[:count], weights[count]
    point_bias = None if bias is None else weights[count + 1]
    save = _needs_grad(x, *weights)
    out: Tensor = call(
        "multi_dilation_conv",
        x,
        branches,
        point,
        point_bias,
        dilations,
        activation,
        save,
        backend=selected(),
    )[0]
    return out


@cache
def _branch_names(count: int) -> tuple[str, ...]:
    return tuple(f"w_branches[{i}]" for i in range(count))


def _needs_grad(*tensors: Tensor) -> bool:
    """Whether a backward may come. Under transforms a tensor tells of the innermost level alone."""
    return torch.is_grad_enabled() and (
        any(t.requires_grad for t in tensors)
        or (not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active())
    )


# The checks pass through as little Python as they can: between kernels whose data fill the caches a
# line takes 1 us and more. Messages are put together only where they are raised.


def _check_tensor(name: str, tensor: Tensor, dims: int, meaning: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; accepted: a tensor {meaning}")
    if tensor.dim() != dims:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; accepted: {meaning}")
    if tensor.dtype not in _DTYPES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise TypeError(f"{name} is {tensor.dtype}; accepted: {accepted}")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if isinstance(tensor, Tensor) and tensor.shape == shape and tensor.dtype in _DTYPES:
        return
    _check_tensor(name, tensor, len(shape), f"{meaning} = {shape}")
    raise ValueError(f"{name} has shape {tuple(tensor.shape)}; accepted: {meaning} = {shape}")


def _check_map(x: Tensor) -> None:
    _check_tensor("x", x, 4, "(B,C,H,W)")
    if 0 in x.shape[1:]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; accepted: (B,C,H,W) with at least one channel and pixel"
        )


def _one_dtype(name: str, first: Tensor, others: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """All tensors in one dtype: autocast's where it is on, else they must agree already."""
    device, dtype = first.device, first.dtype
    cast_to = autocast_dtype(device)
    for other, tensor in others.items():
        if tensor.device != device:
            raise ValueError(f"{other} is on {tensor.device}, {name} is on {device}")
        if tensor.dtype != dtype and cast_to is None:
            raise TypeError(
                f"{other} is {tensor.dtype}, {name} is {dtype}; accepted: one dtype for all, "
                "or torch.autocast"
            )
    tensors = (first, *others.values())
    if cast_to is None:
        return tensors
    double = [t.dtype == torch.float64 for t in tensors]  # which autocast leaves alone
    if not any(double):
        return tuple(t.to(cast_to) for t in tensors)
    if not all(double):
        names = (name, *others)
        kinds = {n: t.dtype for n, t in zip(names, tensors, strict=True)}
        other = next(n for n in names if kinds[n] != kinds[name])
        raise TypeError(
            f"{other} is {kinds[other]}, {name} is {kinds[name]}; accepted under torch.autocast: "
            "all float64, or none"
        )
    return tensors
