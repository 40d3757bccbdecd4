"""What is particular to the CPU kernels of `cross_mix_channels`, beside the conformance suite."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eamnet_kernels import native
from eamnet_kernels.mixing import mix, mix_backward
from eamnet_kernels.reference.cross_mix_channels import (
    mixing_matrices,
    mixing_matrices_backward,
)

pytestmark = pytest.mark.skipif(not native.load(), reason="the compiled library is not built")


def kernels() -> torch._ops._OpNamespace:
    return torch.ops.eamnet_kernels_native


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x, an incoming gradient and a gate."""
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    gate = torch.rand(shape[0], 1, *shape[2:], generator=generator, dtype=torch.float64)
    return x.to(dtype), grad.to(dtype), gate.to(dtype)


def gated_product(x: Tensor, z: Tensor, gate: Tensor, power: int) -> Tensor:
    x, z, gate = (t.double().flatten(2) for t in (x, z, gate))
    return x * gate**power @ z.transpose(1, 2)


# Channels that fill no block of rows or columns, pixels that fill no vector, tile or slab; and
# enough of either for several slabs and several ranges of rows.
SHAPES = [(2, 1, 3, 5), (1, 7, 16, 33), (2, 37, 65, 67), (1, 130, 24, 25), (3, 5, 0, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_gated_products(shape: tuple[int, ...], channels_last: bool) -> None:
    x, grad, gate = draw(*shape, dtype=torch.float64)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, grad = x.contiguous(memory_format=layout), grad.contiguous(memory_format=layout)
    grams = kernels().cross_mix_channels_grams(x, gate)
    grads = kernels().cross_mix_channels_grad_matrices(grad, x, gate)
    for power in range(3):
        torch.testing.assert_close(grams[power], gated_product(x, x, gate, power))
    for power in range(2):
        torch.testing.assert_close(grads[power], gated_product(grad, x, gate, power))
    assert torch.equal(grams, grams.mT), "Gram matrices are symmetric to the last bit"


def test_long_sums_keep_their_digits() -> None:
    # Naive summation of 2^16 equal-sized terms would lose about three digits.
    x, grad, gate = draw(1, 4, 256, 256)
    x, grad = x + 3, grad - 3
    for got, powers, other in (
        (kernels().cross_mix_channels_grams(x, gate), 3, x),
        (kernels().cross_mix_channels_grad_matrices(grad, x, gate), 2, grad),
    ):
        for power in range(powers):
            exact = gated_product(other, x, gate, power)
            error = (got[power].double() - exact).abs().max() / exact.abs().max()
            assert error < 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_thread_and_many_give_the_same_bits(dtype: torch.dtype) -> None:
    x, grad, gate = draw(2, 40, 33, 65, dtype=dtype)
    matrices, doubled = torch.randn(2, 2, 40, 40), torch.randn(3, 2, 40, 40)
    doubled = doubled + doubled.mT

    def all_kernels() -> list[Tensor]:
        return [
            kernels().cross_mix_channels_grams(x, gate),
            kernels().cross_mix_channels_grad_matrices(grad, x, gate),
            kernels().cross_mix_channels_apply(x, gate, matrices, False),
            *kernels().cross_mix_channels_apply_backward(grad, x, gate, matrices, doubled, False),
        ]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = all_kernels()
        torch.set_num_threads(4)
        many = all_kernels()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def test_kernels_check_what_they_are_given() -> None:
    x, grad, gate = draw(1, 4, 3, 3)
    with pytest.raises(RuntimeError, match="spatial_gate must be"):
        kernels().cross_mix_channels_grams(x, gate[..., :2])
    with pytest.raises(RuntimeError, match="grad_out must have the shape"):
        kernels().cross_mix_channels_grad_matrices(grad[:, :2], x, gate)
    with pytest.raises(RuntimeError, match="matrices must be"):
        kernels().cross_mix_channels_apply(x, gate, torch.zeros(2, 1, 3, 3), False)


@pytest.mark.parametrize(("channels", "heads"), [(12, 3), (8, 1), (1, 1)])
@pytest.mark.parametrize("dead_row", [False, True])
def test_the_algebra_is_that_of_the_reference(channels: int, heads: int, dead_row: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, gate = randn(2, channels, 40), randn(2, 1, 40).sigmoid()
    grams = torch.stack([x * gate**power @ x.mT for power in range(3)])
    weights = [randn(2, channels).sigmoid(), *(randn(3 * channels, channels) for _ in range(2))]
    weights += [randn(channels, channels), randn(2, heads)]
    if dead_row:  # its norm is clamped, and passes no gradient
        weights[1][0] = weights[2][channels] = 0
    grad = randn(2, 2, channels, channels)
    mixing = mix(grams, *weights)
    torch.testing.assert_close(mixing.matrices, mixing_matrices(grams, *weights))
    doubled, *grads = mix_backward(grad, mixing, grams)
    grad_grams, *expected = mixing_matrices_backward(grad, grams, *weights)
    torch.testing.assert_close(doubled, 2 * grad_grams)
    for got, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, wanted)
