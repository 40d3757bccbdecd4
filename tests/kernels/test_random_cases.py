"""The CPU kernels on shapes, strides and options that nobody chose, against the definition.

The bound is that of `test_conformance`, times `LUCK`. It compares the largest errors of two
computations, and where these have few elements plain PyTorch's may be none at all: of 19,000
comparisons 35 passed the bound in float32, by at most 2.2 times, none in bfloat16 or float64.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import eamnet_kernels
from eamnet_kernels import native

from .operators import OPERATORS
from .test_conformance import LAYOUTS, check, draw, poisoned

__all__ = ["poisoned"]  # for every test of this file, too

LUCK = 8
_DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])


def _one_for_all(t: Tensor) -> Tensor:
    """The first sample expanded over all: a stride of zero."""
    return t[:1].expand(t.shape)


def _only_one(t: Tensor) -> Tensor:
    return t


_LAYOUTS: st.SearchStrategy[Callable[[Tensor], Tensor]] = st.sampled_from(
    [_only_one, _one_for_all, *(f for name, f in LAYOUTS.items() if name != "expanded")]
)


@st.composite
def _maps(draw: st.DrawFn, channels: int) -> tuple[int, int, int, int]:
    """Shapes, in half of the cases of a picture of one row, one column or one pixel."""
    side = st.one_of(st.just(1), st.integers(1, 9), st.integers(1, 70))
    height, width = draw(side), draw(side)
    return draw(st.integers(0, 3)), channels, height, min(width, 1 + 1500 // height)


@st.composite
def _cases(draw: st.DrawFn, operator: str) -> dict[str, Any]:
    if operator == "cross_mix_pixels":
        batch, heads = draw(st.integers(0, 3)), draw(st.integers(1, 3))
        tokens = draw(st.one_of(st.just(1), st.integers(1, 20), st.integers(1, 150)))
        return {
            "tokens": (batch, heads, tokens, draw(st.integers(1, 70))),
            "gate": draw(st.booleans()),
        }
    if operator == "multi_dilation_conv":
        dilations = tuple(
            draw(st.lists(st.one_of(st.integers(1, 7), st.integers(1, 90)), min_size=1, max_size=4))
        )
        channels = draw(st.integers(1, 11)) * (len(dilations) + 1)
        return {
            "shape": draw(_maps(channels)),
            "dilations": dilations,
            "depthwise": draw(st.booleans()),
            "bias": draw(st.booleans()),
            "activation": draw(st.sampled_from(["relu", "silu", "identity"])),
        }
    if operator == "cross_mix_channels":
        heads = draw(st.integers(1, 4))
        # Products X X^T keep half the digits where there are too few pixels for C independent rows.
        return {
            "shape": draw(_maps(heads * draw(st.integers(1, 10)))),
            "heads": heads,
            "singular": True,
        }
    channels = draw(st.integers(1, 45))
    case: dict[str, Any] = {"shape": draw(_maps(channels))}
    if operator == "external_memory":
        return {**case, "slots": draw(st.integers(1, 40)), "top_k": draw(st.integers(1, channels))}
    return {**case, "ties": draw(st.booleans())}


@pytest.mark.skipif(not native.load(), reason="the compiled library is not loaded")
@pytest.mark.parametrize("name", OPERATORS)
def test_random_cases(name: str) -> None:
    operator = OPERATORS[name]

    @settings(
        max_examples=25,
        deadline=None,
        derandomize="CI" in os.environ,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        case = data.draw(_cases(name), label="case")
        dtype = data.draw(_DTYPES, label="dtype")
        inputs = draw(operator, case, dtype, seed=data.draw(st.integers(0, 99), label="seed"))
        for key, value in inputs.items():
            if isinstance(value, Tensor) and value.dim() == 4:
                inputs[key] = data.draw(_LAYOUTS, label=f"layout of {key}")(value)
        with eamnet_kernels.use_backend("cpu"):
            check(operator, inputs, case, dtype, factor=LUCK)

    run()


@pytest.mark.skipif(not native.load(), reason="the compiled library is not loaded")
@pytest.mark.parametrize("name", OPERATORS)
def test_an_empty_batch_in_any_layout(name: str) -> None:
    """Such a view counts as contiguous whatever its strides, and contiguous() returns it as is."""
    operator = OPERATORS[name]
    case = next(case for key, case in operator.cases.items() if key.endswith("empty-batch"))
    for layout in (f for key, f in LAYOUTS.items() if key != "expanded"):
        inputs = draw(operator, case, torch.float32)
        for key, value in inputs.items():
            if isinstance(value, Tensor) and value.dim() == 4:
                inputs[key] = layout(value)
        with eamnet_kernels.use_backend("cpu"):
            check(operator, inputs, case, torch.float32)
