"""Where there is a GPU and `_C_cuda.so` is built: the conformance cases on the card.

Also what to give to compute-sanitizer: `compute-sanitizer --tool racecheck pytest` with this file.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernels.operators import GATE_STATISTICS, MULTI_DILATION_CONV, Inputs, Operator
from kernels.test_conformance import check, draw, mapped, outputs

import eamnet_kernels
from eamnet_kernels import native

REASON = native.cuda_error() or (None if torch.cuda.is_available() else "there is no GPU")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def on_card(operator: Operator) -> Operator:
    """The operator with inputs copied to the card and results back, which autograd follows."""

    def run(inputs: Inputs, case: dict[str, Any]) -> Any:
        with eamnet_kernels.use_backend("cuda"):
            out = outputs(operator.run(mapped(inputs, lambda t: t.cuda()), case))
        return tuple(o.cpu() for o in out)

    return replace(operator, run=run)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("operator", "case"),
    [
        pytest.param(operator, case, id=f"{operator.name}-{name}")
        for operator in (GATE_STATISTICS, MULTI_DILATION_CONV)
        for name, case in operator.cases.items()
    ],
)
def test_values_and_gradients(
    operator: Operator, case: dict[str, Any], dtype: torch.dtype, channels_last: bool
) -> None:
    inputs = draw(operator, case, dtype)
    if channels_last:
        inputs["x"] = inputs["x"].contiguous(memory_format=torch.channels_last)
    check(on_card(operator), inputs, case, dtype)
