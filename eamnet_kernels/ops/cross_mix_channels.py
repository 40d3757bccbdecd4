"""Dispatcher entry of `cross_mix_channels`: shapes, what is saved, autograd.

Definition: `reference/cross_mix_channels.py`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from eamnet_kernels.ops.layout import accumulation_dtype, dense, empty_like
from eamnet_kernels.ops.registration import call, register, vjp_of_vjp
from eamnet_kernels.reference import cross_mix_channels as reference


def _fake(x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    batch, channels = x.shape[:2]
    grams = x.new_empty((3, batch, channels, channels), dtype=accumulation_dtype(x.dtype))
    return empty_like(x), grams


def _fake_backward(grad_out: Tensor, x: Tensor, *weights_and_grams: Tensor) -> tuple[Tensor, ...]:
    return empty_like(x), *(w.new_empty(w.shape) for w in weights_and_grams[:-1])


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    # The Gram matrices (3 C/N of x) save the backward one pass over x.
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: object) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: checkpointing refuses to give them a second time
    return call(
        "cross_mix_channels_backward", dense(grad, like=saved[0]), *saved, backend=ctx.backend
    )


def _double_backward(args: Any, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    grad_out, *inputs, _ = args
    grad_grad_out, grad_inputs = vjp_of_vjp(reference.direct, inputs, grad_out, grads)
    return grad_grad_out, *grad_inputs, None


register(
    "cross_mix_channels",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
    double_backward=_double_backward,
)
