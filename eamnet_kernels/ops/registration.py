"""Registers an operator: its schema, its choice of backend, its fake implementation, its autograd.

Every operator `f` is a pair in the dispatcher, `eamnet_kernels::f` and
`eamnet_kernels::f_backward`. Their one implementation for all devices asks `backends.choose` and
calls that backend's module. Autograd connects the two; the derivative of `f_backward` is taken from
the plain PyTorch definition, so second derivatives work on every backend, at the speed of plain
PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import (
    TreeSpec,
    tree_flatten,
    tree_leaves,
    tree_structure,
    tree_unflatten,
)

from eamnet_kernels import backends, native
from eamnet_kernels.ops.layout import autocast_dtype
from eamnet_kernels.ops.schemas import SCHEMAS

_NAMESPACE = "eamnet_kernels"


@cache
def _schema(operator: str) -> torch.FunctionSchema:
    return torch._C.parse_schema(f"{_NAMESPACE}::{SCHEMAS[operator]}")


@cache
def _names_and_defaults(operator: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    arguments = [a for a in _schema(operator).arguments if a.name != "backend"]
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
    return tuple(a.name for a in arguments), defaults


def bind(operator: str, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by the names of the operator's schema, `backend` left out."""
    names, defaults = _names_and_defaults(operator)
    if len(args) > len(names):
        raise TypeError(f"{operator} takes {len(names)} arguments, {len(args)} were given")
    return {**defaults, **dict(zip(names, args, strict=False)), **kwargs}


def define_schemas() -> None:
    """Define the operators in Python where the compiled library, which has them, is not loaded."""
    if not native.load():
        for schema in SCHEMAS.values():
            torch.library.define(
                f"{_NAMESPACE}::{schema.split('(')[0]}", schema[schema.index("(") :]
            )


def _on_chosen_backend(operator: str) -> Callable[..., Any]:
    """The operator's kernel for every device: choose the backend and call it.

    Autocast is switched off inside: the dtype rule is `functional`'s, and matrix products that a
    backend makes in float32 must not be cast again.
    """
    names, _ = _names_and_defaults(operator)
    forward, suffix, _ = operator.partition("_backward")
    method = "backward" if suffix else "forward"

    def kernel(*args: Any, backend: str = "auto") -> Any:
        chosen = backends.choose(backend, operator, dict(zip(names, args, strict=True)))
        run = getattr(chosen.module(forward), method)
        device = next(a.device for a in args if isinstance(a, Tensor))
        if autocast_dtype(device) is not None:
            with torch.autocast(device.type, enabled=False):
                return run(*args)
        return run(*args)

    return kernel


_transformable: dict[str, type[torch.autograd.Function]] = {}


def call(operator: str, *args: Any, backend: str) -> Any:
    """`torch.ops.eamnet_kernels.<operator>(*args)`, also under `torch.func` transforms.

    Autograd that is registered with the dispatcher refuses `torch.func.grad` and its kin; only a
    `torch.autograd.Function` is taken apart by them, so under a transform one goes around the call.
    """
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        structure = _Structure(args)
        leaves = tree_leaves(args)
        outs = _transformable[operator].apply(structure, backend, *leaves)
        return tree_unflatten(outs, structure.outputs)
    return getattr(torch.ops.eamnet_kernels, operator)(*args, backend=backend)


class _Structure:
    """How an operator's flattened arguments and results were nested before."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.inputs = tree_structure(args)
        self.leaves = [len(tree_leaves(arg)) for arg in args]  # of each argument
        self.outputs: TreeSpec


def _make_transformable(
    operator: str, setup: Callable[..., None], derivative: Callable[..., Any]
) -> None:
    """The operator as a `torch.autograd.Function` over its flattened arguments."""

    class Transformable(torch.autograd.Function):
        @staticmethod
        def forward(structure: _Structure, backend: str, *leaves: Any) -> tuple[Any, ...]:
            args = tree_unflatten(leaves, structure.inputs)
            out = getattr(torch.ops.eamnet_kernels, operator)(*args, backend=backend)
            out_leaves, structure.outputs = tree_flatten(out)
            return tuple(out_leaves)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            ctx.structure, ctx.backend, *leaves = inputs
            args = tree_unflatten(leaves, ctx.structure.inputs)
            setup(ctx, args, tree_unflatten(output, ctx.structure.outputs))

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            grads = tree_unflatten(grads, ctx.structure.outputs)
            derivatives = derivative(ctx, *(grads if isinstance(grads, (tuple, list)) else [grads]))
            if not isinstance(derivatives, tuple):
                derivatives = (derivatives,)
            spread = [
                d if isinstance(d, list) else [d] * count
                for d, count in zip(derivatives, ctx.structure.leaves, strict=True)
            ]
            return None, None, *(d for ds in spread for d in ds)

    _transformable[operator] = Transformable


def register(
    operator: str,
    *,
    fake: Callable[..., Any],
    fake_backward: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    double_backward: Callable[..., Any],
) -> None:
    """Connect `operator` and its backward to the backends, to tracing and to autograd.

    `fake*` give the outputs' shapes from the operator's arguments. `setup_context(ctx, args, outs)`
    keeps what `backward(ctx, *grads)` needs; the latter returns a gradient per argument.
    `double_backward(args, grads)` returns the gradients of `<operator>_backward`'s arguments.
    """
    for name, function in ((operator, fake), (f"{operator}_backward", fake_backward)):
        qualified = f"{_NAMESPACE}::{name}"
        torch.library.impl(qualified, "CompositeExplicitAutograd", _on_chosen_backend(name))
        torch.library.register_fake(
            qualified, lambda *args, _function=function, backend="auto": _function(*args)
        )

    def keep(
        ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
    ) -> None:
        ctx.backend = keyword_only_inputs["backend"]
        setup_context(ctx, inputs, output)

    torch.library.register_autograd(f"{_NAMESPACE}::{operator}", backward, setup_context=keep)
    _make_transformable(operator, setup_context, backward)

    def setup_arguments(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        leaves, ctx.spec = tree_flatten(inputs)
        ctx.constants = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
        ctx.save_for_backward(*(leaf for leaf in leaves if isinstance(leaf, Tensor)))

    def keep_arguments(
        ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
    ) -> None:
        setup_arguments(ctx, inputs, output)

    def differentiate_backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        leaves = [next(saved) if c is None else c[0] for c in ctx.constants]
        args = tree_unflatten(leaves, ctx.spec)
        return tuple(double_backward(args, grads))

    torch.library.register_autograd(
        f"{_NAMESPACE}::{operator}_backward",
        differentiate_backward,
        setup_context=keep_arguments,
    )
    _make_transformable(f"{operator}_backward", setup_arguments, differentiate_backward)


def vjp(function: Callable[..., Any], *inputs: Tensor) -> Callable[[Any], tuple[Tensor, ...]]:
    """The map from an incoming gradient of `function` at `inputs` to those of the inputs."""
    pull_back: Callable[[Any], tuple[Tensor, ...]] = torch.func.vjp(function, *inputs)[1]
    return pull_back


def vjp_of_vjp(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    grad_out: Tensor,
    grads: Sequence[Tensor | None],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The gradients of (inputs, grad_out) -> vjp(function) for incoming `grads`, one per input.

    Returns the gradient of `grad_out` and those of `inputs`.
    """

    def first(out: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return vjp(function, *tensors)(out)

    pull_back = vjp(first, grad_out, *inputs)
    incoming = tuple(
        torch.zeros_like(x) if g is None else g.to(x.dtype)
        for g, x in zip(grads, inputs, strict=True)
    )
    grad_grad_out, *grad_inputs = pull_back(incoming)
    return grad_grad_out, tuple(grad_inputs)
