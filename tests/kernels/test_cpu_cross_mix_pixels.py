"""What is particular to the CPU kernels of `cross_mix_pixels`, beside the conformance suite."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from eamnet_kernels import native
from eamnet_kernels.cpu import cross_mix_pixels as cpu
from eamnet_kernels.reference import cross_mix_pixels as reference

pytestmark = pytest.mark.skipif(not native.load(), reason="the compiled library is not built")

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def draw(
    *shape: int, dtype: torch.dtype = torch.float32, spread: float = 1.0
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The six tokens (B,h,N,d), as the module has them, a gate (B,N) and an incoming gradient."""
    batch, heads, tokens, channels = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, tokens, 7, heads, channels, generator=generator, dtype=torch.float64)
    gate = torch.rand(batch, tokens, generator=generator, dtype=torch.float64)
    *six, grad = (x * spread).to(dtype).permute(2, 0, 3, 1, 4)
    return six, gate.to(dtype), grad


def run(six: list[Tensor], gate: Tensor | None, grad: Tensor, scale: float) -> list[Tensor]:
    """The result and the gradients of all inputs."""
    out, branches, lse = cpu.forward(*six, gate, scale, True)
    again = cpu.forward(*six, gate, scale, False)[0]
    torch.testing.assert_close(again, out, rtol=0, atol=0, equal_nan=True)
    return [out, *cpu.backward(grad, *six, gate, branches, lse, scale)]


def direct(
    six: list[Tensor], gate: Tensor, grad: Tensor, scale: float, dtype: torch.dtype
) -> list[Tensor]:
    leaves = [t.to(dtype).detach().requires_grad_() for t in (*six, gate)]
    out = reference.direct(*leaves, scale)  # type: ignore[call-arg, misc]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


def check(six: list[Tensor], gate: Tensor, grad: Tensor, scale: float) -> None:
    """At most twice (gradients: three times) the error of plain PyTorch, and one rounding."""
    dtype = gate.dtype
    true = direct(six, gate, grad, scale, torch.float64)
    largest = max(t.abs().max() for t in true[1:])
    for index, (got, plain, truth) in enumerate(
        zip(run(six, gate, grad, scale), direct(six, gate, grad, scale, dtype), true, strict=True)
    ):
        error, of_plain = ((x.double() - truth).abs().max() for x in (got, plain))
        rounding = torch.finfo(dtype).eps * (truth.abs().max() if index == 0 else largest)
        assert error <= (2 if index == 0 else 3) * of_plain + rounding, index


# Blocks of keys and of queries of every level: none full, full ones and a rest, several chunks; one
# channel, channels that fill no vector, no tile, more than one.
SHAPES = [(1, 1, 1, 1), (2, 3, 17, 5), (1, 2, 161, 16), (1, 1, 300, 70), (1, 1, 1100, 33)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(*draw(*shape, dtype=dtype), shape[3] ** -0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [4.0, -1.0])
def test_scores_of_hundreds(scale: float, dtype: torch.dtype) -> None:
    # Far beyond what could do without the maximum; most weights vanish. Negative: keys that repel.
    check(*draw(1, 2, 200, 24, dtype=dtype, spread=2.0), scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_bits_for_any_layout_and_threads(dtype: torch.dtype) -> None:
    six, gate, grad = draw(2, 2, 700, 20, dtype=dtype)
    wanted = run(six, gate, grad, 0.3)
    contiguous = [t.contiguous() for t in six]
    tokens_adjacent = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in six]
    threads = torch.get_num_threads()
    for others, count in ((contiguous, 1), (tokens_adjacent, 1), (six, 3)):
        torch.set_num_threads(count)
        try:
            got = run(others, gate, grad, 0.3)
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_values_reach_the_result(bad: float, dtype: torch.dtype) -> None:
    for which in range(6):
        six, gate, grad = draw(1, 2, 150, 9, dtype=dtype)
        six = [t.clone() for t in six]
        six[which][0, 1, 140, 4] = bad
        got, wanted = run(six, gate, grad, 0.3), direct(six, gate, grad, 0.3, torch.float64)
        # Numbers where plain PyTorch has numbers. Which gradients are Inf and which NaN depends on
        # the order of sums; none that is either may become a number.
        assert torch.equal(got[0].isnan(), wanted[0].isnan())
        assert torch.equal(got[0].isinf(), wanted[0].isinf())
        for a, b in zip(got[1:], wanted[1:], strict=True):
            assert not (a.isfinite() & ~b.isfinite()).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_that_nothing_attends_to(dtype: torch.dtype) -> None:
    # Every score of the first blocks is -inf: their weights are 0 once a finite score has come.
    six, _, _ = draw(1, 1, 400, 8, dtype=dtype)
    q, k = six[0].abs() + 0.1, six[4].clone()
    k[0, 0, :390] = -float("inf")
    out = cpu.forward(q, *six[1:4], k, six[5], None, 1.0, True)[1][0]
    wanted = torch.softmax(q.double() @ k.double().mT, -1) @ six[5].double()
    torch.testing.assert_close(out.double(), wanted, rtol=0.02, atol=0.02)
    assert torch.equal(out.isnan(), wanted.isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saved_values_serve_the_other_backend(dtype: torch.dtype) -> None:
    six, gate, grad = draw(1, 2, 70, 12, dtype=dtype)
    tolerance = 30 * torch.finfo(dtype).eps
    saved = [b.forward(*six, gate, 0.3, True) for b in (cpu, reference)]
    for ours, theirs in zip(*saved, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    grads = [cpu.backward(grad, *six, gate, *s[1:], 0.3) for s in saved]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=10 * tolerance)


_AT_LEVEL = """if True:
    import torch
    from eamnet_kernels import native
    try:
        level = native.cpu_level()
    except RuntimeError as error:
        print("lacks", error)
        raise SystemExit
    from tests.kernels.test_cpu_cross_mix_pixels import SHAPES, check, draw
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            check(*draw(*shape, dtype=dtype), shape[3] ** -0.5)
    check(*draw(1, 2, 200, 24, dtype=torch.bfloat16, spread=2.0), 4.0)
    print("right", level)
"""


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512", "amx_bf16"])
def test_forced_level(level: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _AT_LEVEL],
        env=os.environ | {"EAMNET_CPU_LEVEL": level},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.stdout.startswith("lacks"):
        pytest.skip(done.stdout)
    assert done.stdout.split() == ["right", level], done.stderr


_MEMORY = """if True:
    import resource
    import torch
    from eamnet_kernels import native
    from eamnet_kernels.cpu import cross_mix_pixels as cpu
    assert native.load()
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    def attend(tokens):
        x = torch.randn(7, 1, 1, tokens, 8)
        out, branches, lse = cpu.forward(*x[:6], None, 0.3, True)
        cpu.backward(x[6], *x[:6], None, branches, lse, 0.3)
    attend(64)
    before = peak()
    attend(12000)
    print(peak() - before)
"""


def test_memory_is_linear_in_the_tokens() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True
    )
    values = 12000 * 8 * 4  # bytes of one of the tensors; N x N scores would be 576 MB
    assert int(done.stdout) < 100 * values
