"""`cross_mix_pixels` in C++: forward and backward, each one native call."""

from __future__ import annotations

import torch
from torch import Tensor

from eamnet_kernels.backends import Arguments, cpu_tensors_reason

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_native = torch.ops.eamnet_kernels_native


def can_run(arguments: Arguments) -> str | None:
    return cpu_tensors_reason(arguments, _DTYPES)


def _in_place(t: Tensor) -> Tensor:
    """`t` (B,h,N,d) in a layout that the kernels read where it lies; copied only if need be.

    That is: the channels of a token or the tokens of a head are adjacent. So are contiguous tensors
    and permuted views of a (B,N,6,h,d) or a (B,6,h,d,N).
    """
    tokens, channels = t.shape[2:]
    token_stride, channel_stride = t.stride()[2:]
    adjacent = channels == 1 or channel_stride == 1 or tokens == 1 or token_stride == 1
    # Not contiguous(): it returns a view without elements as it is, whatever its strides.
    return t if adjacent else t.clone(memory_format=torch.contiguous_format)


def forward(
    q_s: Tensor,
    k_s: Tensor,
    v_s: Tensor,
    q_c: Tensor,
    k_c: Tensor,
    v_c: Tensor,
    spatial_gate: Tensor | None,
    scale: float,
    save_for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (_in_place(t) for t in (q_s, k_s, v_s, q_c, k_c, v_c))
    gate = None if spatial_gate is None else spatial_gate.contiguous()
    return _native.cross_mix_pixels(*tensors, gate, scale, save_for_backward)


def backward(
    grad_out: Tensor,
    q_s: Tensor,
    k_s: Tensor,
    v_s: Tensor,
    q_c: Tensor,
    k_c: Tensor,
    v_c: Tensor,
    spatial_gate: Tensor | None,
    branches: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    tensors = (_in_place(t) for t in (grad_out, q_s, k_s, v_s, q_c, k_c, v_c))
    gate = None if spatial_gate is None else spatial_gate.contiguous()
    return _native.cross_mix_pixels_backward(
        *tensors, gate, branches.contiguous(), lse.contiguous(), scale
    )
