"""Bad arguments get an error that names the argument, what was given and what is accepted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import eamnet_kernels.functional as F
from eamnet_kernels import native
from eamnet_kernels.reference import external_memory

X = torch.randn(2, 8, 4, 5)
TOKENS = [torch.randn(2, 2, 6, 4) for _ in range(6)]
BRANCHES = [torch.randn(2, 2, 3, 3) for _ in range(3)]
POINT = torch.randn(8, 8)


def channels(**changes: Any) -> Any:
    arguments = {
        "x": X,
        "spatial_gate": torch.rand(2, 1, 4, 5),
        "channel_gate": torch.rand(2, 8),
        "w_spatial": torch.randn(24, 8),
        "w_channel": torch.randn(24, 8),
        "w_out": POINT,
        "temperature": torch.ones(2, 2),
    }
    return F.cross_mix_channels(**{**arguments, **changes})


def memory(**changes: Any) -> Any:
    key = torch.randn(5, 8)
    return F.external_memory(
        **{"x": X, "memory_key": key, "memory_value": key, "w_out": POINT, "top_k": 4, **changes}
    )


def autocast(call: Callable[[], Any]) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return call()


def conv(**changes: Any) -> Any:
    return F.multi_dilation_conv(**{"x": X, "w_branches": BRANCHES, "w_point": POINT, **changes})


BAD_CALLS = {
    "x dims": (lambda: F.gate_statistics(X[0]), ValueError, r"x has shape \(8, 4, 5\).*B,C,H,W"),
    "x type": (lambda: F.gate_statistics([1.0]), TypeError, "x is a list.*tensor"),
    "x dtype": (lambda: F.gate_statistics(X.int()), TypeError, "x is torch.int32.*float32"),
    "no pixels": (lambda: F.gate_statistics(X[..., :0]), ValueError, "at least one.*pixel"),
    "no channels": (lambda: F.gate_statistics(X[:, :0]), ValueError, "at least one channel"),
    "token shape": (
        lambda: F.cross_mix_pixels(*TOKENS[:5], TOKENS[5][:, :, 1:]),
        ValueError,
        "v_c has shape .*accepted: that of q_s",
    ),
    "gate shape": (
        lambda: F.cross_mix_pixels(*TOKENS, torch.rand(2, 7)),
        ValueError,
        r"spatial_gate has shape \(2, 7\).*\(2, 6\)",
    ),
    "no tokens": (
        lambda: F.cross_mix_pixels(*(t[:, :, :0] for t in TOKENS)),
        ValueError,
        "N and d must be at least 1",
    ),
    "mixed dtypes": (
        lambda: F.cross_mix_pixels(*TOKENS[:5], TOKENS[5].double()),
        TypeError,
        "v_c is torch.float64, q_s is torch.float32",
    ),
    "spatial gate": (
        lambda: channels(spatial_gate=torch.rand(2, 8, 4, 5)),
        ValueError,
        "spatial_gate has shape.*B,1,H,W",
    ),
    "projection": (lambda: channels(w_spatial=POINT), ValueError, "w_spatial has shape.*3C,C"),
    "heads": (
        lambda: channels(temperature=torch.ones(2, 3)),
        ValueError,
        "temperature has shape.*dividing the 8 channels",
    ),
    "temperature dtype": (
        lambda: channels(temperature=torch.ones(2, 2).double()),
        TypeError,
        "temperature is torch.float64",
    ),
    "no slots": (
        lambda: memory(memory_key=torch.rand(0, 8)),
        ValueError,
        "memory_key has no slots",
    ),
    "slots differ": (
        lambda: memory(memory_value=torch.rand(4, 8)),
        ValueError,
        r"memory_value has shape \(4, 8\).*\(5, 8\)",
    ),
    "top_k": (lambda: memory(top_k=9), ValueError, "top_k is 9; accepted: 1 to the 8"),
    "top_k zero": (lambda: memory(top_k=0), ValueError, "top_k is 0"),
    "branches": (
        lambda: conv(w_branches=BRANCHES[:2]),
        ValueError,
        "w_branches has 2 weights for 3 dilations",
    ),
    "dilations": (lambda: conv(dilations=(0, 1, 2)), ValueError, "at least 1"),
    "no dilations": (lambda: conv(w_branches=[], dilations=()), ValueError, "one or more"),
    "activation": (lambda: conv(activation="tanh"), ValueError, "'tanh'; accepted: 'relu'"),
    "groups": (
        lambda: conv(x=torch.randn(2, 10, 4, 5)),
        ValueError,
        "10 channels, which do not divide into 4 equal groups",
    ),
    "branch shape": (
        lambda: conv(w_branches=[torch.randn(2, 2, 5, 5)] * 3),
        ValueError,
        r"w_branches\[0\] has shape",
    ),
    "branch kinds": (
        lambda: conv(w_branches=[BRANCHES[0], BRANCHES[1][:, :1], BRANCHES[2]]),
        ValueError,
        r"w_branches\[1\] differs",
    ),
    "bias": (lambda: conv(bias=torch.zeros(4)), ValueError, r"bias has shape \(4,\)"),
    "fractional dilations": (
        lambda: conv(dilations=(1, 2, 3.5)),
        TypeError,
        r"dilations are \[1, 2, 3.5\]; accepted: whole numbers",
    ),
    "fractional top_k": (lambda: memory(top_k=2.0), TypeError, "top_k is 2.0, a float"),
    "double beside float under autocast": (
        lambda: autocast(lambda: memory(x=X.double())),
        TypeError,
        "memory_key is torch.float32, x is torch.float64; accepted under torch.autocast",
    ),
    "device": (
        lambda: memory(w_out=POINT.to("meta")),
        ValueError,
        "w_out is on meta, x is on cpu",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_good_arguments_pass() -> None:
    channels()
    memory()
    conv()


def test_what_was_not_saved_for_has_no_backward() -> None:
    message = r"made with save_for_backward=False"
    tokens = [t.clone().requires_grad_() for t in TOKENS]
    out = torch.ops.eamnet_kernels.cross_mix_pixels(*tokens, None, 0.5, False)[0]
    with pytest.raises(RuntimeError, match=message):
        out.sum().backward()
    x = X.clone().requires_grad_()
    arguments = (x, BRANCHES, POINT, None, [1, 2, 3], "relu", False)
    out = torch.ops.eamnet_kernels.multi_dilation_conv(*arguments)[0]
    with pytest.raises(RuntimeError, match=message):
        out.sum().backward()


@pytest.mark.skipif(not native.load(), reason="the compiled operators are not built")
def test_kernels_refuse_a_memory_without_slots_or_pixels() -> None:
    """Past `functional`, which refuses them first; they would divide by zero."""
    call = torch.ops.eamnet_kernels_native.external_memory
    for x, slots in ((X[:, :, :0], 5), (X, 0)):
        key = torch.randn(slots, 8)
        with pytest.raises(RuntimeError, match="accepted is one or more of each"):
            call(x.contiguous(), key, key, POINT, 4, False)


def test_second_derivatives_are_of_the_channels_that_were_kept() -> None:
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, memory_key, memory_value, w_out = rand(2, 6, 5, 7), rand(4, 6), rand(4, 6), rand(6, 6)
    x.requires_grad_()
    grad = rand(2, 6, 5, 7)
    lse = external_memory.slot_normalizers(x.flatten(2), memory_key)
    # Not what would be selected, as where sums are rounded otherwise.
    out = external_memory.forward(x, memory_key, memory_value, w_out, 3)
    arguments = (grad, x, memory_key, memory_value, w_out, lse, ~out[2])
    found = []
    for function in (
        torch.ops.eamnet_kernels.external_memory_backward,
        external_memory.backward,
    ):
        loss = function(*arguments)[0].square().sum()
        found += torch.autograd.grad(loss, x, retain_graph=True)
    torch.testing.assert_close(*found)


def test_statistics_are_named() -> None:
    statistics = F.gate_statistics(X)
    torch.testing.assert_close(statistics.pixel_mean, X.mean(1, keepdim=True))
    torch.testing.assert_close(statistics.channel_max, X.amax((2, 3)))
