"""SegmentationLoss against a plain float64 formula, and its numerics at the edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from eamnet.losses import SegmentationLoss

SMOOTH = 1e-5


def dice_ce(logits: Tensor, mask: Tensor) -> Tensor:
    """The documented loss of one output, written out in float64."""
    z = logits.double()
    if z.shape[1] == 1:
        p, t = torch.sigmoid(z), mask.double()
        ce = -(t * torch.log(p) + (1 - t) * torch.log1p(-p)).mean()
    else:
        p = torch.softmax(z, 1)
        t = torch.zeros_like(p).scatter_(1, mask.long(), 1.0)
        ce = -(t * torch.log(p)).sum(1).mean()
        p, t = p[:, 1:], t[:, 1:]
    overlap = (p * t).sum((2, 3))
    total = p.sum((2, 3)) + t.sum((2, 3))
    return (1 - (2 * overlap + SMOOTH) / (total + SMOOTH)).mean() + ce


def example(num_classes: int, size: int = 24, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_classes)
    shape = (batch, num_classes, size, size + 5)
    logits, auxiliary = (torch.randn(shape, generator=generator) * 3 for _ in range(2))
    mask = torch.randint(0, max(num_classes, 2), (batch, 1, *shape[2:]), generator=generator)
    return logits, auxiliary, mask.float() if num_classes == 1 else mask


@pytest.mark.parametrize("num_classes", [1, 2, 4])
@pytest.mark.parametrize("auxiliary_weight", [0.4, 0.0, 1.5])
def test_value_and_gradients_match_the_formula(num_classes: int, auxiliary_weight: float) -> None:
    logits, auxiliary, mask = example(num_classes)
    inputs = [logits.requires_grad_(), auxiliary.requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in inputs]

    loss = SegmentationLoss(num_classes, auxiliary_weight)(*inputs, mask)
    expected = dice_ce(exact[0], mask) + auxiliary_weight * dice_ce(exact[1], mask)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)

    for actual, reference in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, exact), strict=True
    ):
        scale = reference.abs().max().item()
        torch.testing.assert_close(actual.double(), reference, rtol=1e-5, atol=1e-6 * scale)


def test_without_an_auxiliary_output_only_the_prediction_counts() -> None:
    logits, auxiliary, mask = example(1)
    loss = SegmentationLoss()
    assert loss(logits, None, mask).item() == pytest.approx(dice_ce(logits, mask).item(), rel=1e-6)
    both = dice_ce(logits, mask) + 0.4 * dice_ce(auxiliary, mask)
    assert loss(logits, auxiliary, mask).item() == pytest.approx(both.item(), rel=1e-6)


def test_equal_shares_of_a_batch_average_to_the_loss_of_the_batch() -> None:
    logits, auxiliary, mask = example(1, batch=4)
    mask[2:] = 0  # very unequal lesion sizes, where a pooled Dice would differ
    loss = SegmentationLoss()
    halves = [loss(logits[s], auxiliary[s], mask[s]) for s in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(sum(halves) / 2, loss(logits, auxiliary, mask))


@pytest.mark.parametrize("num_classes", [1, 3])
@pytest.mark.parametrize("truth", ["empty", "full", "half"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_finite_at_512_in_every_dtype(
    num_classes: int, truth: str, dtype: torch.dtype, scale: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(1, num_classes, 512, 512, generator=generator) * scale).to(dtype)
    logits.requires_grad_()
    mask = torch.zeros(1, 1, 512, 512, dtype=torch.int64)
    if truth == "full":
        mask[:] = max(num_classes - 1, 1)
    elif truth == "half":
        mask[..., 256:] = 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = SegmentationLoss(num_classes)(logits, logits, mask)
    loss.backward()
    assert loss.dtype == torch.float32
    assert math.isfinite(loss.item())
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert loss.item() == pytest.approx(
        SegmentationLoss(num_classes)(logits.float(), logits.float(), mask).item(),
        rel=1e-6,
    ), "autocast or the logits' dtype changed the arithmetic"


def test_perfect_predictions_cost_nothing_and_wrong_ones_do() -> None:
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 8:20, 8:20] = 1
    loss = SegmentationLoss(auxiliary_weight=0)
    good, bad = (mask * 2 - 1) * 30, (1 - mask * 2) * 30
    assert loss(good, None, mask) < 1e-6
    assert loss(bad, None, mask) > 30
    assert loss(torch.full_like(mask, -30.0), None, torch.zeros_like(mask)) < 1e-3


@pytest.mark.parametrize(
    ("change", "error", "argument"),
    [
        ({"logits": torch.zeros(2, 2, 8, 8)}, ValueError, "logits"),
        ({"logits": torch.zeros(2, 1, 8)}, ValueError, "logits"),
        ({"logits": torch.zeros(0, 1, 8, 8)}, ValueError, "logits"),
        ({"logits": torch.zeros(2, 1, 8, 8, dtype=torch.int64)}, TypeError, "logits"),
        ({"auxiliary": torch.zeros(2, 1, 4, 4)}, ValueError, "auxiliary"),
        (
            {"auxiliary": torch.zeros(2, 1, 8, 8, dtype=torch.uint8)},
            TypeError,
            "auxiliary",
        ),
        ({"mask": torch.zeros(2, 8, 8)}, ValueError, "mask"),
        ({"mask": torch.zeros(2, 1, 8, 9)}, ValueError, "mask"),
    ],
)
def test_wrong_inputs_are_named(
    change: dict[str, Tensor], error: type[Exception], argument: str
) -> None:
    inputs = {
        "logits": torch.zeros(2, 1, 8, 8),
        "auxiliary": torch.zeros(2, 1, 8, 8),
        "mask": torch.zeros(2, 1, 8, 8),
    }
    SegmentationLoss()(**inputs)
    with pytest.raises(error, match=f"^{argument} must"):
        SegmentationLoss()(**(inputs | change))


def test_multi_class_masks_are_integers() -> None:
    with pytest.raises(TypeError, match=r"^mask of a 3-class problem"):
        SegmentationLoss(3)(torch.zeros(1, 3, 8, 8), None, torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((0,), "num_classes"),
        ((1, -0.1), "auxiliary_weight"),
        ((1, math.nan), "auxiliary_weight"),
    ],
)
def test_wrong_settings_are_named(arguments: tuple[float, ...], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        SegmentationLoss(*arguments)  # type: ignore[arg-type]
