"""What is timed: each operator's inputs, our call, and what a user would write without us.

The rivals are the definitions as one writes them in plain PyTorch (`*_plain` below where the
reference's own `direct` is not what one would write for speed), in both layouts and compiled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import eamnet_kernels.functional as F
import eamnet_kernels.modules as library
from eamnet_kernels.functional import GateStatistics
from eamnet_kernels.ops.layout import times_pixels
from eamnet_kernels.reference import cross_mix_channels as reference_channels
from eamnet_kernels.reference import cross_mix_pixels as reference_pixels
from eamnet_kernels.reference import external_memory as reference_memory
from eamnet_kernels.reference import multi_dilation_conv as reference_conv

Case = dict[str, Any]
Inputs = dict[str, Any]

MAPS = ((4, 32, 256, 256), (4, 64, 128, 128), (4, 128, 64, 64), (4, 256, 32, 32))
QUICK_MAPS = ((4, 32, 64, 64), (4, 128, 32, 32))


@dataclass(frozen=True)
class Subject:
    """One operator or module in the form that is timed, with what it is compared with."""

    name: str
    operator: str | None  # None: a module, whose operators choose their backends one by one
    cases: tuple[Case, ...]
    quick: tuple[Case, ...]
    make: Callable[[Case, Callable[..., Tensor]], Inputs]
    ours: Callable[[Inputs, Case], Any]
    plain: Callable[[Inputs, Case], Any]
    raw: Callable[[Inputs, Case], tuple[Any, ...]] = lambda i, _: tuple(i.values())
    # Inputs that results are checked on, where `make` gives some whose rounding decides a branch.
    make_exact: Callable[[Case, Callable[..., Tensor]], Inputs] | None = None
    # The definition in float64, where `plain` would need too much memory for it.
    truth: Callable[[Inputs, Case], Any] | None = None
    ends_in_relu: bool = False
    scope: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext  # around `plain`


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


def _whole(randn: Callable[..., Tensor], *shape: int) -> Tensor:
    """Small whole numbers: their products sum without rounding, so no preactivation differs in sign
    from the definition's, where one ReLU on the other side is an error of a whole gradient."""
    return randn(*shape).mul(1.5).round().clamp(-4, 4)


def _make_conv_exact(case: Case, randn: Callable[..., Tensor]) -> Inputs:
    return {
        name: [_whole(randn, *w.shape) for w in value] if name == "w_branches"
        else _whole(randn, *value.shape) if name == "x"
        else value
        for name, value in _make_conv(case, randn).items()
    }  # fmt: skip


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
        lambda i, _: (
            i["x"],
            i["w_branches"],
            i["w_point"],
            None,
            [3, 5, 7],
            "relu",
            i["x"].requires_grad,
        ),
        make_exact=_make_conv_exact,
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


def pixels_truth(i: Inputs, _: Case) -> Tensor:
    """The definition head by head, its scores not kept: all at once they pass 16 GB in float64."""

    def head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v

    def branch(*names: str) -> Tensor:
        tokens = [i[name].flatten(0, 1) for name in names]
        heads = zip(*tokens, strict=True)
        rows = [checkpoint(head, *group, use_reentrant=False) for group in heads]
        return torch.stack(rows).view(i["q_s"].shape)

    return branch("q_s", "k_c", "v_c") + branch("q_c", "k_s", "v_s")


CROSS_MIX_PIXELS = Subject(
    "cross_mix_pixels",
    "cross_mix_pixels",
    # Batch 1 at 4096: one call of one head takes as long as 16 at 1024.
    tuple({"tokens": (b, 256 // d, n, d)} for b, n in ((4, 1024), (1, 4096)) for d in (16, 32, 64)),
    ({"tokens": (2, 4, 512, 32)},),
    _make_pixels,
    lambda i, _: F.cross_mix_pixels(*(i[t] for t in _TOKENS)),
    two_attentions,  # writing the N x N scores out would be slower
    lambda i, _: (
        *(i[t] for t in _TOKENS),
        None,
        i["q_s"].shape[3] ** -0.5,
        i["q_s"].requires_grad,
    ),
    truth=pixels_truth,
)

# ---- modules

# Of a module: channel attention at the first, pixel attention at the second.
_MODULE_CASES = tuple({"shape": shape} for shape in (MAPS[1], MAPS[3]))


@contextlib.contextmanager
def direct_definitions() -> Iterator[None]:
    """The modules, and so EAM-Net, call the definitions as one writes them in plain PyTorch."""

    def gates(x: Tensor) -> GateStatistics:
        return GateStatistics(*gate_statistics_plain({"x": x}, {}))

    def pixels(
        q_s: Tensor,
        k_s: Tensor,
        v_s: Tensor,
        q_c: Tensor,
        k_c: Tensor,
        v_c: Tensor,
        spatial_gate: Tensor | None = None,
    ) -> Tensor:
        scale = q_s.shape[3] ** -0.5
        return reference_pixels.direct(q_s, k_s, v_s, q_c, k_c, v_c, spatial_gate, scale)

    def conv(
        x: Tensor,
        w_branches: list[Tensor],
        w_point: Tensor,
        bias: Tensor | None = None,
        dilations: tuple[int, ...] = (3, 5, 7),
        activation: str = "relu",
    ) -> Tensor:
        return reference_conv.direct(x, w_branches, w_point, bias, dilations, activation)

    with (
        mock.patch.object(library.cmam, "gate_statistics", gates),
        mock.patch.object(library.cmam, "cross_mix_pixels", pixels),
        mock.patch.object(library.cmam, "cross_mix_channels", reference_channels.direct),
        mock.patch.object(library.eab, "external_memory", reference_memory.direct),
        mock.patch.object(library.mrcf, "multi_dilation_conv", conv),
    ):
        yield


def _module(
    name: str,
    build: Callable[[int, int], nn.Module],
    change: Callable[[Inputs, Callable[..., Tensor]], Inputs] | None = None,
    ends_in_relu: bool = False,
) -> Subject:
    """A module as a function of its input and parameters; it trains where gradients are on."""
    built: dict[tuple[int, int], nn.Module] = {}

    def module(case: Case) -> nn.Module:
        _, channels, height, width = case["shape"]
        key = channels, height * width
        if key not in built:
            built[key] = build(*key)
        return built[key]

    def make(case: Case, randn: Callable[..., Tensor]) -> Inputs:
        x = randn(*case["shape"])
        parameters = {k: p.detach().to(x.device) for k, p in module(case).named_parameters()}
        return {"x": x, **parameters}

    def make_exact(case: Case, randn: Callable[..., Tensor]) -> Inputs:
        inputs = make(case, randn)
        return inputs if change is None else change(inputs, randn)

    def call(i: Inputs, case: Case) -> Any:
        own = module(case).train(torch.is_grad_enabled())
        buffers = {k: b.to(i["x"]) for k, b in own.named_buffers() if b.is_floating_point()}
        parameters = {k: v for k, v in i.items() if k != "x"}
        return functional_call(own, {**parameters, **buffers}, (i["x"],))

    return Subject(
        name, None, _MODULE_CASES, _quick(), make, call, call,
        make_exact=make_exact, ends_in_relu=ends_in_relu, scope=direct_definitions,
    )  # fmt: skip


def _varied_memory(inputs: Inputs, randn: Callable[..., Tensor]) -> Inputs:
    """EAB with slots that choose among pixels and values that differ from slot to slot.

    A fresh module attends to all pixels alike; its batch norm then divides rounding errors by what
    little they differ, and torch's own channels-last batch norm loses four digits on that.
    """
    key, value = inputs["memory_key"], inputs["memory_value"]
    return {
        **inputs,
        "memory_key": randn(*key.shape) * 3 * key.shape[1] ** -0.5,
        "memory_value": randn(*value.shape),
    }


def _whole_branches(inputs: Inputs, randn: Callable[..., Tensor]) -> Inputs:
    """MRCF's input and branch weights in whole numbers, as `_make_conv_exact` has them."""
    whole = ("x", "w_branches")
    return {
        k: _whole(randn, *v.shape).to(v) if k.startswith(whole) else v for k, v in inputs.items()
    }


MODULES = (
    _module(
        "CMAM",
        lambda channels, pixels: library.CMAM(
            channels, attend="pixels" if pixels <= 1024 else "channels"
        ),
    ),
    _module("EAB", lambda channels, _: library.EAB(channels), _varied_memory, True),
    _module("MRCF", lambda channels, _: library.MRCF(channels), _whole_branches, True),
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
        *MODULES,
    )
}
