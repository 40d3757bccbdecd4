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
from torch import _C, Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._pytree import (
    TreeSpec,
    tree_flatten,
    tree_leaves,
    tree_structure,
    tree_unflatten,
)

from eamnet_kernels import backends, native
from eamnet_kernels.ops.schemas import SCHEMAS

_NAMESPACE = "eamnet_kernels"


@cache
def _schema(operator: str) -> torch.FunctionSchema:
    return _C.parse_schema(f"{_NAMESPACE}::{SCHEMAS[operator]}")


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

    def kernel(*args: Any, backend: str = "auto") -> Any:
        run = backends.choose(backend, operator, dict(zip(names, args, strict=True)))
        with _C._DisableAutocast():
            return run(*args)

    return kernel


_kernels: dict[str, Callable[..., Any]] = {}
_eager: dict[str, type[torch.autograd.Function]] = {}
_transformable: dict[str, type[torch.autograd.Function]] = {}


def call(operator: str, *args: Any, backend: str) -> Any:
    """`torch.ops.eamnet_kernels.<operator>(*args)`, also under `torch.func` transforms.

    In eager mode autograd is a `torch.autograd.Function` around the call, for two reasons. The
    autograd that is registered with the dispatcher, which compilers and direct calls get, refuses
    `torch.func.grad` and its kin. And it is a generic wrapper in Python: without it a forward and a
    backward of `gate_statistics` take 0.28 instead of 0.34 ms at 1x8x4x4, 0.1 to 0.2 ms less at
    4x256x32x32, whose data push the interpreter's out of the caches (AMD EPYC, 2026-11-27).

    A `torch.jit.trace` cannot keep a Python function and records the operator itself. Tangents of
    forward-mode differentiation go to the function, which says that it has no such derivative.
    """
    if torch.compiler.is_compiling() or _C._get_tracing_state():
        return getattr(torch.ops.eamnet_kernels, operator)(*args, backend=backend)
    function = _eager[operator]
    if _C._are_functorch_transforms_active():
        function = _transformable[operator]
    elif not (
        (torch.is_grad_enabled() and _C._any_requires_grad(*args)) or forward_ad._current_level >= 0
    ):
        return _below_autograd(operator, args, backend)
    if not any(isinstance(arg, list) for arg in args):
        return function.apply(None, backend, *args)
    structure = _Structure(args)
    outs = function.apply(structure, backend, *tree_leaves(args))
    return tree_unflatten(outs, structure.outputs)


def _below_autograd(operator: str, args: Sequence[Any], backend: str) -> Any:
    """The operator without its autograd; straight to its kernel where nothing would intervene.

    The way through the dispatcher and back into Python costs 20 us of 50 for `gate_statistics` at
    1x8x4x4, and several times that between kernels that fill the caches (AMD EPYC, 2026-11-27).
    """
    with _C._AutoDispatchBelowAutograd():
        if _is_plain(args) and not (
            _C._len_torch_dispatch_stack()
            or _C._len_torch_function_stack()
            or _C._are_functorch_transforms_active()
            or _C._get_tracing_state()
        ):
            return _kernels[operator](*args, backend=backend)
        return getattr(torch.ops.eamnet_kernels, operator).default(*args, backend=backend)


def _is_plain(args: Sequence[Any]) -> bool:
    """Whether all tensors among `args` are ordinary ones with data, not of a class of their own.

    One may also stand for the negative of its data (`z.conj().imag`): the dispatcher resolves that.
    """
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is Parameter:
            if arg.is_meta or arg.is_neg():
                return False
        elif kind is list or kind is tuple:
            if not _is_plain(arg):
                return False
        elif isinstance(arg, (Tensor, list, tuple)):
            return False
    return True


class _Structure:
    """How flattened arguments and results were nested, for an operator that takes a list."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.inputs = tree_structure(args)
        self.leaves = [len(tree_leaves(arg)) for arg in args]  # of each argument
        self.outputs: TreeSpec


def _make_functions(
    operator: str, setup: Callable[..., None], derivative: Callable[..., Any]
) -> None:
    """The operator as a `torch.autograd.Function` of its arguments, flattened if need be."""

    class Transformable(torch.autograd.Function):
        @staticmethod
        def forward(structure: _Structure | None, backend: str, *leaves: Any) -> Any:
            if structure is None:
                return _below_autograd(operator, leaves, backend)
            args = tree_unflatten(leaves, structure.inputs)
            out = _below_autograd(operator, args, backend)
            out_leaves, structure.outputs = tree_flatten(out)
            return tuple(out_leaves)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.structure, ctx.backend, *args = inputs
            if ctx.structure is not None:
                args = tree_unflatten(args, ctx.structure.inputs)
                output = tree_unflatten(output, ctx.structure.outputs)
            setup(ctx, tuple(args), output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            structure = ctx.structure
            if structure is not None:
                nested = tree_unflatten(grads, structure.outputs)
                grads = tuple(nested) if isinstance(nested, (tuple, list)) else (nested,)
            derivatives = derivative(ctx, *grads)
            if not isinstance(derivatives, tuple):
                derivatives = (derivatives,)
            if structure is None:
                return None, None, *derivatives
            spread = [
                d if isinstance(d, list) else [d] * count
                for d, count in zip(derivatives, structure.leaves, strict=True)
            ]
            return None, None, *(d for ds in spread for d in ds)

    class Eager(torch.autograd.Function):
        # In one, because for a `setup_context` torch inspects the signature at every call, 40 us.
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = Transformable.forward(*inputs)
            Transformable.setup_context(ctx, inputs, output)
            return output

        backward = staticmethod(Transformable.backward)

    _eager[operator] = Eager
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
    keeps what `backward(ctx, *grads)` needs; the latter returns a gradient per argument. Of `grads`
    at least one is a tensor, the others are `None` where nothing depends on that output.
    `double_backward(args, grads)` returns the gradients of `<operator>_backward`'s arguments.
    """
    for name, function in ((operator, fake), (f"{operator}_backward", fake_backward)):
        qualified = f"{_NAMESPACE}::{name}"
        _kernels[name] = _on_chosen_backend(name)
        torch.library.impl(qualified, "CompositeExplicitAutograd", _kernels[name])
        torch.library.register_fake(
            qualified, lambda *args, _function=function, backend="auto": _function(*args)
        )

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        # Otherwise autograd makes and fills a gradient of zeros for each output that is kept for
        # the backward alone, 3/4 of x for `multi_dilation_conv`.
        ctx.set_materialize_grads(False)
        ctx.no_gradients = tuple(
            [None] * len(a) if isinstance(a, list) and a and isinstance(a[0], Tensor) else None
            for a in inputs
        )
        setup_context(ctx, inputs, output)

    def differentiate(ctx: Any, *grads: Any) -> Any:
        if all(grad is None for grad in grads):
            return ctx.no_gradients
        return backward(ctx, *grads)

    def keep(
        ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
    ) -> None:
        ctx.backend = keyword_only_inputs["backend"]
        setup(ctx, inputs, output)

    torch.library.register_autograd(f"{_NAMESPACE}::{operator}", differentiate, setup_context=keep)
    _make_functions(operator, setup, differentiate)

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
        with _C._DisableAutocast():  # as in the kernels
            return tuple(double_backward(args, grads))

    torch.library.register_autograd(
        f"{_NAMESPACE}::{operator}_backward",
        differentiate_backward,
        setup_context=keep_arguments,
    )
    _make_functions(f"{operator}_backward", setup_arguments, differentiate_backward)


def saved_for_backward(saved: Tensor, expected: int) -> None:
    """Refuse a backward of a call that was told not to save for it."""
    if saved.numel() == 0 < expected:
        raise RuntimeError("this call has no backward: it was made with save_for_backward=False")


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
