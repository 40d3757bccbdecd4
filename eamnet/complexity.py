"""Parameters and multiply-accumulates of EAM-Net, counted on the reference path.

A multiply-accumulate (MAC) is one product and one addition; the column called FLOPs in tables of
segmentation papers is mostly MACs. Counted are convolutions, linear layers and the products inside
the attentions. Not counted, as in those tables, are biases, normalisations, activations, softmaxes,
pooling, interpolation and elementwise arithmetic.

The operators of ``eamnet_kernels`` are opaque to a counter, so each is counted by running its
definition in ``eamnet_kernels.reference`` in its place, on shapes alone. That definition comes in
two forms: the direct one, which does what the equations say and is what another paper's table can
be compared with; and the folded algebra, which is what the reference backend carries out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from eamnet_kernels.reference import (
    cross_mix_channels,
    cross_mix_pixels,
    external_memory,
    multi_dilation_conv,
)

__all__ = ["Complexity", "count_complexity", "count_parameters"]

# gate_statistics is missing: it has no products.
_OPERATORS: dict[str, ModuleType] = {
    "cross_mix_channels": cross_mix_channels,
    "cross_mix_pixels": cross_mix_pixels,
    "external_memory": external_memory,
    "multi_dilation_conv": multi_dilation_conv,
}


class Complexity(NamedTuple):
    """Size of a network for one picture."""

    parameters: int
    """Trainable parameters, those of the training-only head included."""
    macs: int
    """Multiply-accumulates of one forward pass in evaluation mode."""
    by_module: dict[str, int]
    """MACs of each named submodule that has any, its own submodules included."""


def count_parameters(module: nn.Module) -> int:
    """Number of trainable scalars in ``module``; shared ones count once."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def count_complexity(
    model: nn.Module,
    size: tuple[int, int] = (256, 256),
    in_channels: int = 3,
    *,
    folded: bool = False,
) -> Complexity:
    """Count parameters and multiply-accumulates of ``model`` for one picture.

    Nothing is computed and ``model`` is left as it is: shapes alone pass through it, so that any
    size is counted in a moment.

    Args:
        model: a network that maps ``(B, in_channels, H, W)`` to its prediction.
        size: ``H, W`` in pixels.
        in_channels: channels of the picture.
        folded: count the operators' folded algebra in place of their direct definition.

    Returns:
        The counts, see :class:`Complexity`.
    """
    fake = FakeTensorMode()
    state: dict[str, torch.Tensor] = {
        name: fake.from_tensor(tensor)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    form = "forward" if folded else "direct"
    formulas = {
        getattr(torch.ops.eamnet_kernels, name): _count_of(getattr(module, form))
        for name, module in _OPERATORS.items()
    }
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    dtype = next(model.parameters()).dtype
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with fake, counter, torch.no_grad():
            picture = torch.empty(1, in_channels, *size, dtype=dtype, device=device)
            torch.func.functional_call(model, state, (picture,))
    finally:
        for module, training in modes.items():
            module.training = training
    root = type(model).__name__
    by_module = {
        name.removeprefix(f"{root}."): sum(counts.values()) // 2
        for name, counts in counter.get_flop_counts().items()
        if name not in ("Global", root)
    }
    return Complexity(count_parameters(model), counter.get_total_flops() // 2, by_module)


def _count_of(definition: Callable[..., Any]) -> Callable[..., int]:
    """A formula for the counter: the flops of ``definition`` for the operator's arguments."""
    # The operator may have flags after the definition's arguments, which change no product.
    arity = len(inspect.signature(definition).parameters)

    def formula(*args: Any, **_: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            definition(*args[:arity])
        return int(counter.get_total_flops())

    # The counter's switch between tensors and bare shapes as a formula's arguments.
    formula._get_raw = True  # type: ignore[attr-defined]
    return formula
