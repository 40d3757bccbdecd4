"""What the conformance suite knows of each operator: cases, inputs, and the definition to obey.

A new operator is an entry of `OPERATORS`; a new backend needs nothing here: `backends.names()`
lists it, and its own `can_run` says which cases it is held to. A bug found becomes a case.

Interpreted kernels (TRITON_INTERPRET=1) take seconds for a case, a cost of statements and hardly of
sizes: then `OPERATORS` has of each operator the cases that its `interpreted` names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import eamnet_kernels.functional as F
from eamnet_kernels.reference import (
    cross_mix_channels,
    cross_mix_pixels,
    external_memory,
    gate_statistics,
    multi_dilation_conv,
)
from eamnet_kernels.triton import interpreted

Inputs = dict[str, Any]
"""An operator's tensors by name; a list of tensors under one name counts as several."""


@dataclass(frozen=True)
class Operator:
    """One operator under test.

    `make(case, randn)` draws inputs; `run(inputs, case)` calls the public function, `direct` the
    definition, `raw` gives the arguments of `torch.ops.eamnet_kernels.<name>`. `layout` names the
    input whose memory layout is varied. `interpreted` names the cases for interpreted kernels; they
    must go beyond every block: more than one of pixels and of channels, the last one ragged.
    """

    name: str
    cases: Mapping[str, dict[str, Any]]
    make: Callable[[dict[str, Any], Callable[..., Tensor]], Inputs]
    run: Callable[[Inputs, dict[str, Any]], Any]
    direct: Callable[[Inputs, dict[str, Any]], Any]
    raw: Callable[[Inputs, dict[str, Any]], tuple[Any, ...]]
    layout: str = "x"
    interpreted: tuple[str, ...] = ()

    def thinned(self) -> Operator:
        """With the cases for interpreted kernels, in the order of `interpreted`."""
        return replace(self, cases={name: self.cases[name] for name in self.interpreted})


def _shape(case: dict[str, Any]) -> tuple[int, int, int, int]:
    return case["shape"]


# Sizes: odd ones, one pixel, one channel, empty batch, channels that fill no vector, rows longer
# than any tile of pixels, and one that takes several tiles in each direction.
_SHAPES = {
    "odd": (2, 8, 5, 7),
    "one-pixel": (3, 16, 1, 1),
    "narrow": (1, 4, 1, 67),
    "empty-batch": (0, 8, 4, 4),
    "ragged-channels": (2, 20, 9, 11),
    "wide": (1, 64, 33, 35),
    "long": (1, 8, 3, 1111),
}


# ---- gate_statistics
def _ties(case: dict[str, Any], randn: Callable[..., Tensor]) -> Inputs:
    x = randn(*_shape(case))
    if case.get("ties"):
        x = (x * 2).round() / 2
    return {"x": x}


GATE_STATISTICS = Operator(
    "gate_statistics",
    {
        **{name: {"shape": shape} for name, shape in _SHAPES.items()},
        "one-channel": {"shape": (2, 1, 6, 5)},
        # Sums long enough that adding one number after the other shows.
        "many-channels": {"shape": (2, 256, 16, 16)},
        "ties": {"shape": (2, 12, 17, 9), "ties": True},
        "ties-across-tiles": {"shape": (1, 5, 70, 70), "ties": True},
    },
    _ties,
    lambda i, _: tuple(F.gate_statistics(i["x"])),
    lambda i, _: gate_statistics.direct(i["x"]),
    lambda i, _: (i["x"],),
    interpreted=(
        "odd",
        "empty-batch",
        "one-pixel",
        "one-channel",
        "long",
        "ties-across-tiles",
        "ragged-channels",
        "ties",
    ),
)


# ---- cross_mix_pixels
_TOKENS = ("q_s", "k_s", "v_s", "q_c", "k_c", "v_c")


def _pixels(case: dict[str, Any], randn: Callable[..., Tensor]) -> Inputs:
    batch, heads, pixels, dims = case["tokens"]
    # As the module has them: views into one (B,N,6,h,d) tensor.
    packed = randn(batch, pixels, 6, heads, dims)
    inputs: Inputs = dict(zip(_TOKENS, packed.permute(2, 0, 3, 1, 4), strict=True))
    inputs["spatial_gate"] = randn(batch, pixels).sigmoid() if case.get("gate", True) else None
    return inputs


def _pixels_scale(i: Inputs) -> float:
    return float(i["q_s"].shape[3] ** -0.5)


CROSS_MIX_PIXELS = Operator(
    "cross_mix_pixels",
    {
        "odd": {"tokens": (2, 2, 35, 5)},
        "one-pixel": {"tokens": (2, 1, 1, 8)},
        "no-gate": {"tokens": (1, 2, 33, 16), "gate": False},
        "empty-batch": {"tokens": (0, 2, 9, 8)},
        "d32": {"tokens": (1, 2, 130, 32)},
        "d64": {"tokens": (1, 1, 257, 64)},
        "d80": {"tokens": (1, 1, 70, 80)},
    },
    _pixels,
    lambda i, _: F.cross_mix_pixels(*(i[t] for t in _TOKENS), i["spatial_gate"]),
    lambda i, _: cross_mix_pixels.direct(
        *(i[t] for t in _TOKENS), i["spatial_gate"], _pixels_scale(i)
    ),
    lambda i, _: (*(i[t] for t in _TOKENS), i["spatial_gate"], _pixels_scale(i), True),
    layout="k_c",
    interpreted=("odd", "empty-batch", "one-pixel", "d32", "no-gate", "d80"),
)


# ---- cross_mix_channels
_CHANNEL_INPUTS = (
    "x",
    "spatial_gate",
    "channel_gate",
    "w_spatial",
    "w_channel",
    "w_out",
    "temperature",
)


def _channels(case: dict[str, Any], randn: Callable[..., Tensor]) -> Inputs:
    batch, channels, height, width = _shape(case)
    scale = channels**-0.5
    return {
        "x": randn(batch, channels, height, width),
        "spatial_gate": randn(batch, 1, height, width).sigmoid(),
        "channel_gate": randn(batch, channels).sigmoid(),
        "w_spatial": randn(3 * channels, channels) * scale,
        "w_channel": randn(3 * channels, channels) * scale,
        "w_out": randn(channels, channels) * scale,
        "temperature": 1 + randn(2, case.get("heads", 2)).abs(),
    }


CROSS_MIX_CHANNELS = Operator(
    "cross_mix_channels",
    {
        **{name: {"shape": shape} for name, shape in _SHAPES.items()},
        "one-pixel": {"shape": _SHAPES["one-pixel"], "singular": True},
        "ragged-blocks": {"shape": (1, 40, 9, 31)},
    },
    _channels,
    lambda i, _: F.cross_mix_channels(*(i[n] for n in _CHANNEL_INPUTS)),
    lambda i, _: cross_mix_channels.direct(*(i[n] for n in _CHANNEL_INPUTS)),
    lambda i, _: tuple(i[n] for n in _CHANNEL_INPUTS),
    interpreted=("odd", "empty-batch", "long", "narrow", "ragged-blocks"),
)


# ---- external_memory
_MEMORY_INPUTS = ("x", "memory_key", "memory_value", "w_out")


def _memory(case: dict[str, Any], randn: Callable[..., Tensor]) -> Inputs:
    batch, channels, height, width = _shape(case)
    slots = case.get("slots", 7)
    # Channel scores well apart, so that no rounding of any dtype changes which channels are kept.
    order = torch.arange(channels).mul(7).remainder(channels)
    separation = 1 + 0.1 * order
    return {
        "x": randn(batch, channels, height, width),
        "memory_key": randn(slots, channels) * channels**-0.5,
        # All of one sign: the scores then hardly vary with the attention.
        "memory_value": (1 + 0.02 * randn(slots, channels)) * separation,
        "w_out": randn(channels, channels) * channels**-0.5,
    }


def _top_k(i: Inputs, case: dict[str, Any]) -> int:
    channels = i["x"].shape[1]
    return int(case.get("top_k", max(1, channels // 2)))


EXTERNAL_MEMORY = Operator(
    "external_memory",
    {
        **{name: {"shape": shape} for name, shape in _SHAPES.items()},
        "all-kept": {"shape": (2, 8, 6, 5), "top_k": 8},
        "one-kept": {"shape": (2, 8, 6, 5), "top_k": 1},
        "one-slot": {"shape": (2, 8, 6, 5), "slots": 1},
        "many-slots": {"shape": (1, 32, 13, 17), "slots": 64},
        "ragged-blocks": {"shape": (1, 40, 17, 31), "slots": 20},
    },
    _memory,
    lambda i, c: F.external_memory(*(i[n] for n in _MEMORY_INPUTS), top_k=_top_k(i, c)),
    lambda i, c: external_memory.direct(*(i[n] for n in _MEMORY_INPUTS), _top_k(i, c)),
    lambda i, c: (*(i[n] for n in _MEMORY_INPUTS), _top_k(i, c)),
    interpreted=("odd", "empty-batch", "all-kept", "one-slot", "ragged-blocks"),
)


# ---- multi_dilation_conv
def _conv(case: dict[str, Any], randn: Callable[..., Tensor]) -> Inputs:
    batch, channels, height, width = _shape(case)
    branches = len(case.get("dilations", (3, 5, 7)))
    group = channels // (branches + 1)
    inner = 1 if case.get("depthwise") else group
    return {
        "x": randn(batch, channels, height, width),
        "w_branches": [randn(group, inner, 3, 3) / (3 * inner**0.5) for _ in range(branches)],
        "w_point": randn(channels, channels) * channels**-0.5,
        "bias": randn(channels) if case.get("bias") else None,
    }


def _conv_options(case: dict[str, Any]) -> tuple[tuple[int, ...], str]:
    return case.get("dilations", (3, 5, 7)), case.get("activation", "relu")


_CONV_KINDS: dict[str, dict[str, Any]] = {
    **{name: {"shape": shape} for name, shape in _SHAPES.items()},
    "bias": {"shape": (2, 8, 6, 5), "bias": True},
    "silu": {"shape": (2, 8, 9, 6), "activation": "silu", "bias": True},
    "identity": {"shape": (2, 8, 6, 9), "activation": "identity"},
    "one-branch": {"shape": (2, 6, 6, 5), "dilations": (2,)},
    "five-branches": {"shape": (1, 12, 10, 9), "dilations": (1, 2, 3, 4, 6)},
    "dilation-beyond-picture": {"shape": (1, 8, 4, 5), "dilations": (1, 4, 40)},
    "wide-groups": {"shape": (1, 48, 9, 29), "dilations": (2,)},
    "rows-of-64": {"shape": (1, 16, 64, 64), "dilations": (2,)},
}

MULTI_DILATION_CONV = Operator(
    "multi_dilation_conv",
    {
        **{f"dense-{name}": case for name, case in _CONV_KINDS.items()},
        **{f"depthwise-{name}": {**case, "depthwise": True} for name, case in _CONV_KINDS.items()},
    },
    _conv,
    lambda i, c: F.multi_dilation_conv(
        i["x"], i["w_branches"], i["w_point"], i["bias"], *_conv_options(c)
    ),
    lambda i, c: multi_dilation_conv.direct(
        i["x"], i["w_branches"], i["w_point"], i["bias"], *_conv_options(c)
    ),
    lambda i, c: (
        i["x"],
        i["w_branches"],
        i["w_point"],
        i["bias"],
        list(_conv_options(c)[0]),
        _conv_options(c)[1],
        True,
    ),
    interpreted=(
        "dense-one-branch",
        "dense-empty-batch",
        "depthwise-silu",
        "depthwise-wide-groups",
        "dense-dilation-beyond-picture",
        "dense-wide-groups",
    ),
)

OPERATORS = {
    operator.name: operator.thinned() if interpreted() else operator
    for operator in (
        GATE_STATISTICS,
        CROSS_MIX_PIXELS,
        CROSS_MIX_CHANNELS,
        EXTERNAL_MEMORY,
        MULTI_DILATION_CONV,
    )
}
