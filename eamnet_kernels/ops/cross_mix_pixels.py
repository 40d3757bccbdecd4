"""Dispatcher entry of `cross_mix_pixels`: shapes, what is saved, autograd.

Definition: `reference/cross_mix_pixels.py`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from eamnet_kernels.ops.layout import accumulation_dtype
from eamnet_kernels.ops.registration import call, register, saved_for_backward, vjp_of_vjp
from eamnet_kernels.reference import cross_mix_pixels as reference


def _fake(
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
    shape, accumulate = q_s.shape, accumulation_dtype(q_s.dtype)
    if not save_for_backward:
        return q_s.new_empty(shape), q_s.new_empty(0), q_s.new_empty(0, dtype=accumulate)
    return (
        q_s.new_empty(shape),
        q_s.new_empty((2, *shape)),
        q_s.new_empty((2, *shape[:3]), dtype=accumulate),
    )


def _fake_backward(
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
    grads = [q_s.new_empty(q_s.shape) for _ in range(6)]
    gate = (
        grad_out.new_empty(0)
        if spatial_gate is None
        else spatial_gate.new_empty(spatial_gate.shape)
    )
    return (*grads, gate)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, branches, lse = output
    # The softmaxes are computed again from lse. The two results are kept because each softmax needs
    # its own sum(grad * result), which their rounded sum no longer gives.
    ctx.save_for_backward(*inputs[:7], branches, lse)
    ctx.mark_non_differentiable(branches, lse)
    ctx.scale = inputs[7]


def _backward(ctx: Any, grad: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    *tensors, branches, lse = ctx.saved_tensors
    saved_for_backward(branches, grad.numel())
    *grads, grad_gate = call(
        "cross_mix_pixels_backward", grad, *tensors, branches, lse, ctx.scale, backend=ctx.backend
    )
    return *grads, None if tensors[6] is None else grad_gate, None, None


def _double_backward(args: Any, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    grad_out, *tensors, _, _, scale = args
    given = [t for t in tensors if t is not None]

    def function(*tensors: Tensor) -> Tensor:
        q_s, k_s, v_s, q_c, k_c, v_c, *gate = tensors
        return reference.direct(q_s, k_s, v_s, q_c, k_c, v_c, gate[0] if gate else None, scale)

    grad_grad_out, grad_inputs = vjp_of_vjp(function, given, grad_out, grads[: len(given)])
    return grad_grad_out, *grad_inputs, *[None] * (7 - len(given)), None, None, None


register(
    "cross_mix_pixels",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
    double_backward=_double_backward,
)
