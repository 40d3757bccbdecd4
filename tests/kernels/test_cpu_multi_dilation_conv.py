"""What is particular to the CPU kernels of `multi_dilation_conv`: tiles, surroundings, sums."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from eamnet_kernels import native
from eamnet_kernels.cpu import multi_dilation_conv as cpu
from eamnet_kernels.reference import multi_dilation_conv as reference

pytestmark = pytest.mark.skipif(not native.load(), reason="the compiled library is not built")


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]
    dilations: tuple[int, ...]
    activation: str = "relu"


CASES = [
    # Tiles narrower than the picture; dilations below and above the size of a tile and the picture.
    Case((1, 20, 40, 530), (3, 50, 700, 1), "silu"),
    # Tiles as wide as the picture, several of them.
    Case((2, 8, 70, 150), (5,)),
    # Several samples to a part of the sums; groups that fill two vectors, and odd rows.
    Case((3, 128, 19, 33), (3, 5, 7)),
    # Neither channels nor rows fill a vector.
    Case((2, 12, 6, 5), (1, 2, 3), "identity"),
    Case((1, 3, 4, 5), ()),
]


def draw(case: Case, depthwise: bool, dtype: torch.dtype) -> dict[str, list[Tensor] | Tensor]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    channels = case.shape[1]
    group = channels // (len(case.dilations) + 1)
    return {
        "x": randn(*case.shape),
        "grad": randn(*case.shape),
        "w_branches": [randn(group, 1 if depthwise else group, 3, 3) / 3 for _ in case.dilations],
        "w_point": randn(channels, channels) / channels**0.5,
        "bias": randn(channels),
    }


def results(kernels: object, case: Case, x, grad, w_branches, w_point, bias) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """The forward's two outputs and all gradients."""
    options = (case.dilations, case.activation)
    out, preactivation = kernels.forward(x, w_branches, w_point, bias, *options, True)  # type: ignore[attr-defined]
    grad_x, grad_branches, grad_point, grad_bias = kernels.backward(  # type: ignore[attr-defined]
        grad, x, w_branches, w_point, True, *options, preactivation
    )
    return [out, preactivation, grad_x, *grad_branches, grad_point, grad_bias]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("depthwise", [False, True], ids=["dense", "depthwise"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_tiles_and_surroundings(case: Case, depthwise: bool, layout: torch.memory_format) -> None:
    operands = draw(case, depthwise, torch.float64)
    expected = results(reference, case, **operands)
    for name in ("x", "grad"):
        operands[name] = operands[name].contiguous(memory_format=layout)  # type: ignore[union-attr]
    for got, wanted in zip(results(cpu, case, **operands), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("depthwise", [False, True], ids=["dense", "depthwise"])
def test_a_slice_of_channels_is_read_where_it_lies(depthwise: bool) -> None:
    case = CASES[1]
    operands = draw(case, depthwise, torch.float64)
    expected = results(cpu, case, **operands)
    for layout in (torch.contiguous_format, torch.channels_last):
        for name in ("x", "grad"):
            tensor: Tensor = operands[name]  # type: ignore[assignment]
            padded = torch.nn.functional.pad(tensor, (0, 0, 0, 0, 3, 2), value=torch.nan)
            operands[name] = padded.contiguous(memory_format=layout)[:, 3:-2]
        got = results(cpu, case, **operands)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("depthwise", [False, True], ids=["dense", "depthwise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_thread_and_many_give_the_same_bits(depthwise: bool, dtype: torch.dtype) -> None:
    operands = draw(CASES[0], depthwise, dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(cpu, CASES[0], **operands)
        torch.set_num_threads(4)
        many = results(cpu, CASES[0], **operands)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


@pytest.mark.parametrize("depthwise", [False, True], ids=["dense", "depthwise"])
def test_long_sums_keep_their_digits(depthwise: bool) -> None:
    # 2^16 terms of one sign: naive summation in float32 would lose about three digits.
    case = Case((1, 4, 256, 256), (3,), "identity")
    operands = draw(case, depthwise, torch.float32)
    operands["x"], operands["grad"] = operands["x"] + 3, operands["grad"] - 3  # type: ignore[operator]
    doubled = {
        name: [t.double() for t in value] if isinstance(value, list) else value.double()
        for name, value in operands.items()
    }
    expected = results(reference, case, **doubled)
    for got, wanted in zip(results(cpu, case, **operands)[3:], expected[3:], strict=True):
        error = (got.double() - wanted).abs().max() / wanted.abs().max()
        assert error < 8 * torch.finfo(torch.float32).eps


LEVELS = native.facts()["levels"] if native.load() else ["baseline"]  # type: ignore[index]


@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set(level: str) -> None:
    """The level is chosen once per process, so each is tried in a process of its own."""
    environment = os.environ | {"EAMNET_CPU_LEVEL": level, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", _TRY_LEVEL],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "this processor accepts" in run.stderr:
        pytest.skip(f"this processor has no {level}")
    assert run.returncode == 0, run.stdout + run.stderr


_TRY_LEVEL = """
import torch
from tests.kernels.test_cpu_multi_dilation_conv import *

native.cpu_level()
for case in CASES[2:]:
    for depthwise in (False, True):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
            rounded = draw(case, depthwise, dtype)
            exact = results(reference, case, **{
                name: [t.double() for t in v] if isinstance(v, list) else v.double()
                for name, v in rounded.items()
            })
            for got, wanted in zip(results(cpu, case, **rounded), exact, strict=True):
                scale = wanted.abs().max() if wanted.numel() else 1
                assert ((got.double() - wanted).abs() <= tolerance * scale).all()
"""


def test_kernels_check_what_they_are_given() -> None:
    operands = draw(CASES[3], False, torch.float32)
    x, w_branches, w_point = operands["x"], operands["w_branches"], operands["w_point"]
    native_forward = torch.ops.eamnet_kernels_native.multi_dilation_conv
    with pytest.raises(RuntimeError, match="w_point must be"):
        native_forward(x, w_branches, w_point[1:], None, [1, 2, 3], "relu", False, False)
    with pytest.raises(RuntimeError, match="2 dilations"):
        native_forward(x[:, :9], w_branches, w_point, None, [1, 2], "relu", False, False)
    with pytest.raises(RuntimeError, match="accepted: at least 1"):
        native_forward(x, w_branches, w_point, None, [1, 0, 3], "relu", False, False)
    with pytest.raises(RuntimeError, match="accepted: relu"):
        native_forward(x, w_branches, w_point, None, [1, 2, 3], "tanh", False, False)


def test_inference_of_many_channels_is_left_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """In channels-last alone, where it was measured faster; training stays with ours, except that
    in matrix tiles both are left out, of 512 channels in either layout."""
    x = torch.randn(1, 256, 4, 4)
    weights = [torch.randn(64, 64, 3, 3) for _ in range(3)]

    def declined(x: Tensor, save: bool) -> bool:
        arguments = {"x": x, "w_branches": weights, "save_for_backward": save}
        return cpu.declines(arguments) is not None

    last = x.contiguous(memory_format=torch.channels_last)
    for level in ("avx2", "avx512", "amx_bf16"):
        monkeypatch.setattr(native, "cpu_level", lambda level=level: level)
        found = [declined(t, save) for t in (x, last) for save in (True, False)]
        assert found == [False] * 3 + [True]
    monkeypatch.setattr(native, "cpu_level", lambda: "amx_bf16")
    assert declined(last.bfloat16(), True)
    assert not declined(x.bfloat16(), True)
    assert not declined(last[:, :128].bfloat16(), True)
    assert declined(x.repeat(1, 2, 1, 1).bfloat16(), True)
