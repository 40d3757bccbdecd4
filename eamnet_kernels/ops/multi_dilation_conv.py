"""Dispatcher entry of `multi_dilation_conv`: shapes, what is saved, autograd.

Definition: `reference/multi_dilation_conv.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eamnet_kernels.ops.layout import dense, empty_like, memory_format
from eamnet_kernels.ops.registration import call, register, saved_for_backward, vjp_of_vjp
from eamnet_kernels.reference import multi_dilation_conv as reference


def _fake(
    x: Tensor,
    w_branches: Sequence[Tensor],
    w_point: Tensor,
    bias: Tensor | None,
    dilations: Sequence[int],
    activation: str,
    save_for_backward: bool,
) -> tuple[Tensor, Tensor]:
    if not save_for_backward:
        return empty_like(x), x.new_empty(0)
    batch, channels, height, width = x.shape
    convolved = channels // (len(dilations) + 1) * len(dilations)
    preactivation = torch.empty(
        (batch, convolved, height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=memory_format(x),
    )
    return empty_like(x), preactivation


def _fake_backward(
    grad_out: Tensor,
    x: Tensor,
    w_branches: Sequence[Tensor],
    w_point: Tensor,
    has_bias: bool,
    dilations: Sequence[int],
    activation: str,
    preactivation: Tensor,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    return (
        empty_like(x),
        [w.new_empty(w.shape) for w in w_branches],
        w_point.new_empty(w_point.shape),
        grad_out.new_empty(x.shape[1] if has_bias else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w_branches, w_point, bias, ctx.dilations, ctx.activation, _ = inputs
    # The preactivation costs n/(n+1) of x to keep and, dense, most of the forward to compute again.
    ctx.save_for_backward(x, w_point, output[1], *w_branches)
    ctx.mark_non_differentiable(output[1])
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor, _: object) -> tuple[Any, ...]:
    x, w_point, preactivation, *w_branches = ctx.saved_tensors
    saved_for_backward(preactivation, x.numel() * len(w_branches))
    grad_x, grad_branches, grad_point, grad_bias = call(
        "multi_dilation_conv_backward",
        dense(grad, like=x),
        x,
        w_branches,
        w_point,
        ctx.has_bias,
        ctx.dilations,
        ctx.activation,
        preactivation,
        backend=ctx.backend,
    )
    return (
        grad_x,
        grad_branches,
        grad_point,
        grad_bias if ctx.has_bias else None,
        None,
        None,
        None,
    )


def _double_backward(args: Any, grads: tuple[Any, ...]) -> tuple[Any, ...]:
    grad_out, x, w_branches, w_point, _, dilations, activation, _ = args
    grad_x, grad_branches, grad_point, grad_bias = grads

    # The bias is left out: its gradient is the sum of grad_out, added below.
    def function(x: Tensor, w_point: Tensor, *w_branches: Tensor) -> Tensor:
        return reference.direct(x, w_branches, w_point, None, dilations, activation)

    grad_grad_out, (second_x, second_point, *second_branches) = vjp_of_vjp(
        function, (x, w_point, *w_branches), grad_out, (grad_x, grad_point, *grad_branches)
    )
    if grad_bias is not None and grad_bias.numel():
        grad_grad_out = grad_grad_out + grad_bias[:, None, None]
    return grad_grad_out, second_x, list(second_branches), second_point, None, None, None, None


register(
    "multi_dilation_conv",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
    double_backward=_double_backward,
)
