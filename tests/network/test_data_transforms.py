"""Resizing and augmentation: joint geometry, exact identities, dependence on the key alone."""

import numpy as np
import pytest
import torch

from eamnet.data.transforms import (
    Augmentation,
    resize_image,
    resize_mask,
    resize_mask_nearest,
    to_float,
)

NOTHING = Augmentation(
    flips=False,
    quarter_turns=False,
    affine_probability=0,
    brightness=0,
    contrast=0,
    saturation=0,
    hue=0,
)


@pytest.fixture
def picture():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return image, (image[..., 0] > 128).astype(np.uint8)


def apply(augment, picture, epoch=0, seed=0, name="a"):
    return augment(*picture, seed=seed, epoch=epoch, picture_id=name)


def test_the_same_key_gives_the_same_picture_whatever_came_before(picture):
    augment = Augmentation()
    first = apply(augment, picture)
    torch.manual_seed(123)
    np.random.seed(5)  # noqa: NPY002 - the point is that global state is not used
    for epoch in range(5):
        apply(augment, picture, epoch=epoch)
    again = apply(Augmentation(), picture)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_every_part_of_the_key_counts(picture):
    augment = Augmentation()
    base = apply(augment, picture)[0]
    for other in ({"epoch": 1}, {"seed": 1}, {"name": "b"}):
        assert not torch.equal(base, apply(augment, picture, **other)[0])
    # Digits must not run together: (1, 11) is not (11, 1).
    assert not torch.equal(
        apply(augment, picture, seed=1, epoch=11)[0], apply(augment, picture, seed=11, epoch=1)[0]
    )


def test_nothing_is_the_identity(picture):
    image, mask = apply(NOTHING, picture)
    torch.testing.assert_close(image, to_float(picture[0]), rtol=0, atol=1e-6)
    assert np.array_equal(mask.numpy(), picture[1])


def test_output_and_inputs(picture):
    before = picture[0].copy(), picture[1].copy()
    for epoch in range(20):
        image, mask = apply(Augmentation(), picture, epoch=epoch)
        assert image.dtype == torch.float32
        assert image.shape == (3, 32, 32)
        assert image.is_contiguous()
        assert 0 <= image.min() <= image.max() <= 1
        assert mask.dtype == torch.uint8
        assert set(mask.unique().tolist()) <= {0, 1}
    assert np.array_equal(picture[0], before[0])
    assert np.array_equal(picture[1], before[1])
    image, mask = Augmentation()(picture[0], None, seed=0, epoch=0, picture_id="a")
    assert mask is None


def test_geometry_is_the_same_for_picture_and_mask():
    # A picture that is its own mask must stay so, at every pixel away from the border between
    # black and white, where bilinear and nearest sampling differ.
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[10:30, 20:50] = 1
    image = np.repeat(mask[..., None] * np.uint8(255), 3, axis=2)
    augment = Augmentation(brightness=0, contrast=0, saturation=0, hue=0, affine_probability=1)
    moved = 0
    for epoch in range(50):
        warped, labels = augment(image, mask, seed=0, epoch=epoch, picture_id="a")
        grey = warped.mean(0)
        sure = (grey < 0.02) | (grey > 0.98)
        assert sure.float().mean() > 0.9
        assert torch.equal((grey > 0.5)[sure], labels.bool()[sure])
        moved += not torch.equal(labels, torch.from_numpy(mask))
    assert moved == 50


def test_all_eight_turns_and_mirrors_occur_equally(picture):
    only_turns = Augmentation(affine_probability=0, brightness=0, contrast=0, saturation=0, hue=0)
    seen = {}
    for epoch in range(800):
        image, _ = apply(only_turns, picture, epoch=epoch)
        key = (image * 255).round().to(torch.uint8).numpy().tobytes()
        seen[key] = seen.get(key, 0) + 1
    assert len(seen) == 8
    assert min(seen.values()) > 60


def test_affine_is_applied_as_often_as_asked_and_stays_mild():
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[24:40, 24:40] = 1
    image = np.repeat(mask[..., None] * np.uint8(255), 3, axis=2)
    augment = Augmentation(flips=False, quarter_turns=False, brightness=0, contrast=0, hue=0)
    changed, areas = 0, []
    for epoch in range(400):
        _, labels = augment(image, mask, seed=0, epoch=epoch, picture_id="a")
        changed += not torch.equal(labels, torch.from_numpy(mask))
        areas.append(labels.sum().item() / mask.sum())
    assert 160 < changed < 240
    assert 0.7 < min(areas) < 0.85
    assert 1.15 < max(areas) < 1.45


def test_colour_jitter_moves_colour_and_keeps_the_mean_under_contrast():
    rng = np.random.default_rng(1)
    image = rng.integers(80, 170, (16, 16, 3), dtype=np.uint8)
    jitter = Augmentation(
        flips=False,
        quarter_turns=False,
        affine_probability=0,
        brightness=0,
        contrast=0.3,
        saturation=0,
        hue=0,
    )
    original = to_float(image)
    weights = torch.tensor([0.299, 0.587, 0.114])
    for epoch in range(10):
        result, _ = jitter(image, None, seed=0, epoch=epoch, picture_id="a")
        torch.testing.assert_close(
            weights @ result.mean((1, 2)), weights @ original.mean((1, 2)), rtol=0, atol=1e-4
        )
        assert not torch.allclose(result, original, atol=1e-3)


@pytest.mark.parametrize("options", [{"affine_probability": 2}, {"scale": 1}, {"brightness": -0.1}])
def test_wrong_arguments_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Augmentation(**options)


def test_reduction_averages_pictures():
    # A one-pixel checkerboard is grey at half the size; sampling would give black or white.
    board = np.indices((64, 64)).sum(0) % 2 * 255
    image = np.repeat(board[..., None].astype(np.uint8), 3, axis=2)
    small = resize_image(image, 32)
    assert abs(small.astype(int) - 127).max() <= 4


def test_reduced_masks_take_the_class_with_most_area():
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[:3, :4] = 5  # 12 of 16 pixels of one new pixel
    mask[4:5, 4:] = 2  # 4 of 16
    assert resize_mask(mask, 2).tolist() == [[5, 0], [0, 0]]
    halves = np.zeros((4, 4), dtype=np.uint8)
    halves[:2] = 1
    assert resize_mask(halves, 1).tolist() == [[0]], "a tie goes to the lower class"


def test_reduction_keeps_area_better_than_sampling():
    y, x = np.mgrid[:997, :1403]
    mask = (((x - 700) / 500) ** 2 + ((y - 500) / 300) ** 2 + 0.3 * np.sin(x) < 1).astype(np.uint8)
    area = mask.mean()
    assert abs(resize_mask(mask, 64).mean() - area) < 0.004


def test_sizes_that_fit_are_left_alone(picture):
    image, mask = picture
    assert resize_image(image, 32) is image
    assert resize_mask(mask, 32) is mask
    assert resize_mask_nearest(mask, 32, 32) is mask
    assert resize_mask_nearest(mask, 64, 96).shape == (64, 96)
    assert np.array_equal(resize_mask_nearest(mask, 64, 64)[::2, ::2], mask)
