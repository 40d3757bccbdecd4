"""Dispatcher entry of `external_memory`: shapes, what is saved, autograd.

Definition: `reference/external_memory.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eamnet_kernels.ops.layout import accumulation_dtype, dense, empty_like
from eamnet_kernels.ops.registration import call, register, vjp_of_vjp
from eamnet_kernels.reference import external_memory as reference


def _fake(
    x: Tensor, memory_key: Tensor, memory_value: Tensor, w_out: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels = x.shape[:2]
    lse = x.new_empty((batch, memory_key.shape[0]), dtype=accumulation_dtype(x.dtype))
    return empty_like(x), lse, x.new_empty((batch, channels), dtype=torch.bool)


def _fake_backward(
    grad_out: Tensor,
    x: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    w_out: Tensor,
    lse: Tensor,
    kept: Tensor,
) -> tuple[Tensor, ...]:
    return empty_like(x), *(w.new_empty(w.shape) for w in (memory_key, memory_value, w_out))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # Attention (S/C of x, at the usual S the size of x or more) is computed again from lse.
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: checkpointing refuses to give them a second time
    grads = call(
        "external_memory_backward", dense(grad, like=saved[0]), *saved, backend=ctx.backend
    )
    return *grads, None


def _double_backward(args: Any, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    grad_out, *inputs, _, kept = args

    # Selected anew, from sums of the arguments' dtype, other channels might be kept.
    def function(x: Tensor, key: Tensor, value: Tensor, w_out: Tensor) -> Tensor:
        return reference.direct(x, key, value, w_out, kept)

    grad_grad_out, grad_inputs = vjp_of_vjp(function, inputs, grad_out, grads)
    return grad_grad_out, *grad_inputs, None, None


register(
    "external_memory",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
    double_backward=_double_backward,
)
