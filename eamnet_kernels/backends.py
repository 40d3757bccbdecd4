"""Which implementation runs: the registry of backends and the choice between them.

A backend is a package `eamnet_kernels.<name>` with one module per operator. Such a module has
`forward` and `backward` with the arguments of the operator's schema (`ops/schemas.py`), and
`can_run(arguments)`, which returns None where it can, or else the reason why it cannot. It may have
`declines(arguments)`: the reason why `auto` should pass it over although it can run, because
something else was measured to be faster there. The same predicates serve the choice, `explain` and
the tests, so they cannot drift apart.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

import torch

Arguments = Mapping[str, Any]
"""An operator's arguments by the names of its schema, for `can_run` and `declines`."""

Predicate = Callable[[Arguments], str | None]

OPERATORS = (
    "gate_statistics",
    "cross_mix_pixels",
    "cross_mix_channels",
    "external_memory",
    "multi_dilation_conv",
)


@cache  # import_module takes 7 us, and every call asks every backend
def _module(backend: str, operator: str) -> ModuleType:
    return importlib.import_module(f"eamnet_kernels.{backend}.{operator}")


def _declines(module: ModuleType) -> Predicate | None:
    return getattr(module, "declines", None)


@dataclass(frozen=True)
class Backend:
    """One implementation of the operators.

    `unavailable()` gives the reason why nothing of it can run on this machine, or None;
    `operators` are those that it implements.
    """

    name: str
    description: str
    unavailable: Callable[[], str | None]
    operators: tuple[str, ...] = field(default=OPERATORS)

    def module(self, operator: str) -> ModuleType:
        """The module that implements `operator`; imported at first use."""
        return _module(self.name, operator)

    def reason_not(self, operator: str, arguments: Arguments) -> str | None:
        """Why this backend cannot run the call, or None where it can."""
        operator = operator.removesuffix("_backward")
        if operator not in self.operators:
            return f"backend {self.name!r} does not implement {operator}"
        reason = self.unavailable()
        if reason is None:
            reason = self.module(operator).can_run(arguments)
        return reason

    def reason_declined(self, operator: str, arguments: Arguments) -> str | None:
        """Why `auto` passes this backend over although it can run the call, or None."""
        declines = _declines(self.module(operator.removesuffix("_backward")))
        return declines(arguments) if declines else None


def _native_unavailable() -> str | None:
    from eamnet_kernels import native

    if native.load():
        return None
    return f"the compiled library did not load: {native.error()}"


def _triton_unavailable() -> str | None:
    from eamnet_kernels import triton

    return triton.unavailable()


def _cuda_unavailable() -> str | None:
    from eamnet_kernels import native

    return native.cuda_error()


# In the order of preference of `auto`.
_REGISTRY: dict[str, Backend] = {}


def register(backend: Backend) -> None:
    """Add a backend after those that are there; a name can be taken once."""
    if backend.name in _REGISTRY or backend.name == "auto":
        raise ValueError(f"a backend named {backend.name!r} is registered already")
    _REGISTRY[backend.name] = backend
    _implementations.cache_clear()


def unregister(name: str) -> None:
    """Remove a backend; ValueError where there is none of that name."""
    get(name)
    del _REGISTRY[name]
    _implementations.cache_clear()


class _Implementation(NamedTuple):
    """A backend's code for one operator or its backward."""

    can_run: Predicate
    declines: Predicate | None
    run: Callable[..., Any]


@cache
def _implementations(name: str, operator: str) -> tuple[_Implementation, ...]:
    """What may serve on this machine: of the named backend, or for `"auto"` of all in their order.

    Kept because the Python of a call is cold: between kernels whose data push it out of the caches,
    asking every backend took most of the 0.2 ms of a choice (AMD EPYC, 2026-11-27).
    """
    asked = _REGISTRY.values() if name == "auto" else [get(name)]
    forward, is_backward, _ = operator.partition("_backward")
    able = [b for b in asked if forward in b.operators and b.unavailable() is None]
    modules = [backend.module(forward) for backend in able]
    return tuple(
        _Implementation(m.can_run, _declines(m), m.backward if is_backward else m.forward)
        for m in modules
    )


register(
    Backend(
        "triton",
        "Triton kernels for NVIDIA GPUs",
        _triton_unavailable,
    )
)
# After Triton, which passes over what these were measured to be faster at (docs/cuda.md).
register(Backend("cuda", "CUDA C++", _cuda_unavailable, ("gate_statistics", "multi_dilation_conv")))
register(Backend("cpu", "C++ with run-time SIMD dispatch", _native_unavailable))
register(Backend("reference", "plain PyTorch, any device and dtype", lambda: None))


def names() -> tuple[str, ...]:
    """The registered backends, most preferred first."""
    return tuple(_REGISTRY)


def get(name: str) -> Backend:
    """The backend of that name; ValueError names those there are."""
    try:
        return _REGISTRY[name]
    except KeyError:
        raise ValueError(
            f"backend {name!r} is not known; accepted: 'auto', {', '.join(map(repr, names()))}"
        ) from None


# An unknown name is refused at the first call.
_DEFAULT = os.environ.get("EAMNET_BACKEND") or "auto"

_selected: ContextVar[str | None] = ContextVar("eamnet_kernels_backend", default=None)


def selected() -> str:
    """The backend that calls made here ask for: `use_backend`, else EAMNET_BACKEND, else auto."""
    return _selected.get() or _DEFAULT


# torch.compile before 2.14 cannot trace a ContextVar (tried: 2.11, 2.13); there the result is a
# constant of the traced function. It is what torch.compiler.assume_constant_result does, without
# importing the compiler.
if torch.__version__ < "2.14":
    selected._dynamo_marked_constant = True  # type: ignore[attr-defined]


class use_backend:  # noqa: N801 - used like a function, as torch.no_grad is
    """Ask for one backend by name, or for `"auto"`: as a call for good, or in a `with` for a while.

    A named backend that cannot run a call raises and says why; only `"auto"` chooses. The choice
    belongs to the current thread and async task. In a function under `torch.compile` it is what was
    selected when the function was traced; from torch 2.14 on another choice traces it anew.

    >>> use_backend("reference")                # doctest: +SKIP
    >>> with use_backend("cpu"):                # doctest: +SKIP
    ...     model(x)
    """

    def __init__(self, name: str) -> None:
        if name != "auto":
            get(name)
        self.name = name
        self._token: Token[str | None] | None = _selected.set(self.name)

    def __enter__(self) -> use_backend:
        if self._token is None:  # entered again
            self._token = _selected.set(self.name)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._token is not None
        _selected.reset(self._token)
        self._token = None


def choose(name: str, operator: str, arguments: Arguments) -> Callable[..., Any]:
    """The implementation of `operator` (or of its backward) for one call.

    That of the named backend, or for `"auto"` of the most preferred one that can run. Raises
    ValueError for an unknown name and RuntimeError with the reason where the named backend cannot
    run the call.
    """
    for can_run, declines, run in _implementations(name, operator):
        if can_run(arguments) is None and (
            name != "auto" or declines is None or declines(arguments) is None
        ):
            return run
    if name != "auto":
        reason = get(name).reason_not(operator, arguments)
        raise RuntimeError(f"backend {name!r} cannot run {operator} here: {reason}")
    raise RuntimeError(f"no backend can run {operator} here:\n{_table(operator, arguments)}")


@dataclass(frozen=True)
class Explanation:
    """What `auto` would run for one call, and why not the others (`reasons` by backend)."""

    operator: str
    chosen: str | None
    reasons: dict[str, str | None]

    def __str__(self) -> str:
        lines = [f"{self.operator}: {self.chosen or 'nothing can run'}"]
        for name, reason in self.reasons.items():
            mark = "runs" if name == self.chosen else (reason or "can run, less preferred")
            lines.append(f"  {name}: {mark}")
        return "\n".join(lines)


def explain(operator: str, *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend `auto` would take for a call and why it would not take the others.

    `args` and `kwargs` are those of `torch.ops.eamnet_kernels.<operator>`; defaults may be left
    out.
    """
    from eamnet_kernels.ops.registration import bind

    arguments = bind(operator, args, kwargs)
    reasons: dict[str, str | None] = {}
    chosen = None
    for name, backend in _REGISTRY.items():
        reason = backend.reason_not(operator, arguments)
        if reason is None:
            reason = backend.reason_declined(operator, arguments)
            reason = None if reason is None else f"can run, but auto passes it over: {reason}"
        if reason is None and chosen is None:
            chosen = name
        reasons[name] = reason
    return Explanation(operator, chosen, reasons)


def _table(operator: str, arguments: Arguments) -> str:
    return "\n".join(
        f"  {name}: {backend.reason_not(operator, arguments)}"
        for name, backend in _REGISTRY.items()
    )


def cpu_tensors_reason(arguments: Arguments, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """For `can_run` of a CPU backend: why the tensors' device or dtype does not serve, or None."""
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            if value.device.type != "cpu":
                return f"{name} is on {value.device}; it takes tensors on the CPU"
            if value.is_floating_point() and value.dtype not in dtypes:
                accepted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
                return f"{name} is {value.dtype}; it takes {accepted}"
    return None
