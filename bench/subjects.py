"""What is timed: each operator's inputs, our call, and what a user would write without us.

The rivals are the definitions as one writes them in plain PyTorch (`*_plain` below where the
reference's own `direct` is not what one would write for speed), in both layouts and compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import eamnet_kernels.functional as F
from eamnet_kernels.ops.layout import times_pixels
from eamnet_kernels.reference import cross_mix_channels as reference_channels
from eamnet_kernels.reference import multi_dilation_conv as reference_conv

Case = dict[str, Any]
Inputs = dict[str, Any]

MAPS = ((4, 32, 256, 256), (4, 64, 128, 128), (4, 128, 64, 64), (4, 256, 32, 32))
QUICK_MAPS = ((4, 32, 64, 64), (4, 128, 32, 32))


@dataclass(frozen=True)
class Subject:
    """One operator in the form that is timed, with what it is compared with."""

    name: str
    operator: str
    cases: tuple[Case, ...]
    quick: tuple[Case, ...]
    make: Callable[[Case, Callable[..., Tensor]], Inputs]
    ours: Callable[[Inputs, Case], Any]
    plain: Callable[[Inputs, Case], Any]
    raw: Callable[[Inputs, Case], tuple[Any, ...]]


def _maps(**options: Any) -> tuple[Case, ...]:
    return tuple({"shape": shape, **options} for shape in MAPS)


def _quick(**options: Any) -> tuple[Case, ...]:
    return tuple({"shape": shape, **options} for shape in QUICK_MAPS)


# ---- gate_statistics


def gate_statistics_plain(i: Inputs, _: Case) -> tuple[Tensor, ...]:
    x = i["x"]
    pixels = x.flatten(2)
    return x.mean(1, True), x.max(1, True)[0], pixels.mean(2), pixels.max(2)[0]


GATE_STATISTICS = Subject(
    "gate_statistics",
    "gate_statistics",
    _maps(),
    _quick(),
    lambda case, randn: {"x": randn(*case["shape"])},
    lambda i, _: tuple(F.gate_statistics(i["x"])),
    gate_statistics_plain,
    lambda i, _: (i["x"],),
)

# ---- cross_mix_channels

_CHANNELS = (
    "x",
    "spatial_gate",
    "channel_gate",
    "w_spatial",
    "w_channel",
    "w_out",
    "temperature",
)


def _make_channels(case: Case, randn: Callable[..., Tensor]) -> Inputs:
    batch, channels, height, width = case["shape"]
    scale = channels**-0.5
    return {
        "x": randn(batch, channels, height, width),
        "spatial_gate": randn(batch, 1, height, width).sigmoid(),
        "channel_gate": randn(batch, channels).sigmoid(),
        "w_spatial": randn(3 * channels, channels) * scale,
        "w_channel": randn(3 * channels, channels) * scale,
        "w_out": randn(channels, channels) * scale,
        "temperature": 1 + randn(2, max(1, channels // 32)).abs(),
    }


CROSS_MIX_CHANNELS = Subject(
    "cross_mix_channels",
    "cross_mix_channels",
    _maps(),
    _quick(),
    _make_channels,
    lambda i, _: F.cross_mix_channels(*(i[n] for n in _CHANNELS)),
    lambda i, _: reference_channels.direct(*(i[n] for n in _CHANNELS)),
    lambda i, _: tuple(i[n] for n in _CHANNELS),
)

# ---- external_memory


def _make_memory(case: Case, randn: Callable[..., Tensor]) -> Inputs:
    batch, channels, height, width = case["shape"]
    slots = case.get("slots", 64)
    # Scores apart, so that rounding does not change which channels are kept and results compare.
    separation = 1 + 0.1 * torch.arange(channels).mul(7).remainder(channels)
    return {
        "x": randn(batch, channels, height, width),
        "memory_key": randn(slots, channels) * channels**-0.5,
        "memory_value": (1 + 0.02 * randn(slots, channels)) * separation.to(randn(1)),
        "w_out": randn(channels, channels) * channels**-0.5,
    }


def external_memory_plain(i: Inputs, _: Case) -> Tensor:
    x = i["x"]
    attention = torch.softmax(times_pixels(i["memory_key"], x.flatten(2)), -1)
    attention = attention / (1e-9 + attention.sum(1, keepdim=True))
    features = times_pixels(i["memory_value"].t(), attention)
    scores = features.detach().abs().sum(2)
    kept = torch.zeros_like(scores).scatter_(1, scores.topk(x.shape[1] // 2, dim=1)[1], 1.0)
    return times_pixels(i["w_out"], features * kept.unsqueeze(2)).view_as(x)


EXTERNAL_MEMORY = Subject(
    "external_memory",
    "external_memory",
    _maps(),
    _quick(),
    _make_memory,
    lambda i, _: F.external_memory(
        i["x"], i["memory_key"], i["memory_value"], i["w_out"], i["x"].shape[1] // 2
    ),
    external_memory_plain,
    lambda i, _: (i["x"], i["memory_key"], i["memory_value"], i["w_out"], i["x"].shape[1] // 2),
)

# ---- multi_dilation_conv


def _make_conv(case: Case, randn: Callable[..., Tensor]) -> Inputs:
    batch, channels, height, width = case["shape"]
    group = channels // 4
    inner = 1 if case["depthwise"] else group
    return {
        "x": randn(batch, channels, height, width),
        "w_branches": [randn(group, inner, 3, 3) / (3 * inner**0.5) for _ in range(3)],
        "w_point": randn(channels, channels) * channels**-0.5,
    }


def _conv(name: str, depthwise: bool) -> Subject:
    return Subject(
        name,
        "multi_dilation_conv",
        _maps(depthwise=depthwise),
        _quick(depthwise=depthwise),
        _make_conv,
        lambda i, _: F.multi_dilation_conv(i["x"], i["w_branches"], i["w_point"]),
        lambda i, _: reference_conv.direct(
            i["x"], i["w_branches"], i["w_point"], None, (3, 5, 7), "relu"
        ),
        lambda i, _: (i["x"], i["w_branches"], i["w_point"], None, [3, 5, 7], "relu", True),
    )


# ---- cross_mix_pixels

_TOKENS = ("q_s", "k_s", "v_s", "q_c", "k_c", "v_c")


def _make_pixels(case: Case, randn: Callable[..., Tensor]) -> Inputs:
    batch, heads, pixels, dims = case["tokens"]
    # The layout in which the module's one projection gives them.
    packed = randn(batch, pixels, 6, heads, dims)
    return dict(zip(_TOKENS, packed.permute(2, 0, 3, 1, 4), strict=True))


def two_attentions(i: Inputs, _: Case) -> Tensor:
    return scaled_dot_product_attention(
        i["q_s"], i["k_c"], i["v_c"]
    ) + scaled_dot_product_attention(i["q_c"], i["k_s"], i["v_s"])


CROSS_MIX_PIXELS = Subject(
    "cross_mix_pixels",
    "cross_mix_pixels",
    tuple({"tokens": (4, 256 // d, n, d)} for n in (1024, 4096) for d in (16, 32, 64)),
    ({"tokens": (2, 4, 512, 32)},),
    _make_pixels,
    lambda i, _: F.cross_mix_pixels(*(i[t] for t in _TOKENS)),
    # Writing the N x N scores out would be slower, and in float64 need more than 20 GB.
    two_attentions,
    lambda i, _: (*(i[t] for t in _TOKENS), None, i["q_s"].shape[3] ** -0.5, True),
)

SUBJECTS = {
    subject.name: subject
    for subject in (
        GATE_STATISTICS,
        CROSS_MIX_CHANNELS,
        EXTERNAL_MEMORY,
        _conv("multi_dilation_conv, depthwise", True),
        _conv("multi_dilation_conv, dense", False),
        CROSS_MIX_PIXELS,
    )
}
