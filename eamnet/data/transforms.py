"""Resizing, and augmentation that depends on nothing but (seed, epoch, id)."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Pixels = npt.NDArray[np.uint8]

#: Raised whenever :func:`resize_image` or :func:`resize_mask` change, for the cache's keys.
RESIZE_VERSION = 1


def resize_image(image: Pixels, size: int) -> Pixels:
    """Squash a picture, uint8 ``(H, W, 3)``, to ``(size, size, 3)``.

    Bilinear with the filter widened by the factor of reduction, so that hair and noise of large
    pictures are averaged and not sampled. The aspect is not kept, as is usual for these data sets.
    """
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


def resize_mask(mask: Pixels, size: int) -> Pixels:
    """Bring class indices, uint8 ``(H, W)``, to ``(size, size)``: the class that covers most.

    Each new pixel gets the class with the largest area in it (lowest on a tie); for two classes,
    that is coverage above one half. Taking the nearest pixel instead would read one of many
    hundred where a 6000-pixel picture is reduced to 256: ragged borders, and thin structures that
    appear or vanish by chance.
    """
    if mask.shape == (size, size):
        return mask
    classes = np.unique(mask)
    cover = np.stack(
        [
            np.asarray(
                Image.fromarray((mask == index).astype(np.uint8) * np.uint8(255)).resize(
                    (size, size), Image.Resampling.BOX
                )
            )
            for index in classes
        ]
    )
    return classes[cover.argmax(axis=0)].astype(np.uint8)


def resize_mask_nearest(mask: Pixels, height: int, width: int) -> Pixels:
    """Class indices at another size by nearest pixel: for undoing a reduction."""
    if mask.shape == (height, width):
        return mask
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))


@dataclass(frozen=True)
class Augmentation:
    """Flips, quarter turns, mild affine maps and colour jitter; geometry on picture and mask alike.

    What happens to a picture is a function of (seed, epoch, id): not of the worker, the process,
    the batch or anything that was drawn before, so that an interrupted training goes on exactly
    as an unbroken one.

    Attributes:
        flips: mirror left-right and up-down, each in half of the cases.
        quarter_turns: turn by 0, 90, 180 or 270 degrees.
        affine_probability: how often the affine map below is applied at all. The other pictures
            are not interpolated and stay sharp.
        rotation: largest turn, in degrees, either way.
        scale: largest relative change of size, either way.
        translation: largest shift, in sides of the picture, either way.
        brightness, contrast, saturation: largest relative change, either way.
        hue: largest turn of the hue, in degrees, either way.
    """

    flips: bool = True
    quarter_turns: bool = True
    affine_probability: float = 0.5
    rotation: float = 20.0
    scale: float = 0.15
    translation: float = 0.06
    brightness: float = 0.1
    contrast: float = 0.1
    saturation: float = 0.1
    hue: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.affine_probability <= 1:
            raise ValueError(
                f"affine_probability must lie in 0 .. 1, got {self.affine_probability}"
            )
        for name in ("scale", "translation", "brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must lie in 0 .. 1 (1 excluded), got {getattr(self, name)}"
                )

    def __call__(
        self, image: Pixels, mask: Pixels | None, *, seed: int, epoch: int, picture_id: str
    ) -> tuple[Tensor, Tensor | None]:
        """Augment one picture.

        Args:
            image: uint8 ``(S, S, 3)``.
            mask: uint8 class indices ``(S, S)``, or ``None``.
            seed, epoch, picture_id: decide what is done.

        Returns:
            The picture, float32 ``(3, S, S)`` in [0, 1], and the mask, uint8 ``(S, S)``.
        """
        draw = _Draw(f"{seed}/{epoch}/{picture_id}")
        across, down, turns = draw.chance(0.5), draw.chance(0.5), int(draw.uniform(0, 4))
        for flip, axis in ((across, 1), (down, 0)):
            if self.flips and flip:
                image = np.flip(image, axis)
                mask = None if mask is None else np.flip(mask, axis)
        if self.quarter_turns and turns:
            image = np.rot90(image, turns)
            mask = None if mask is None else np.rot90(mask, turns)
        pixels = to_float(image)
        labels = None if mask is None else torch.from_numpy(np.array(mask))
        affine = self._affine(draw)
        if affine is not None:
            pixels, labels = _warp(pixels, labels, affine)
        return self._recolour(pixels, draw), labels

    def _affine(self, draw: _Draw) -> Tensor | None:
        """Map from output to input coordinates, ``(2, 3)``, the picture spanning [-1, 1]."""
        wanted = draw.chance(self.affine_probability)
        angle = math.radians(draw.uniform(-self.rotation, self.rotation))
        factor = math.exp(draw.uniform(-1, 1) * math.log1p(self.scale))
        shift = [2 * draw.uniform(-self.translation, self.translation) for _ in range(2)]
        if not wanted:
            return None
        cosine, sine = factor * math.cos(angle), factor * math.sin(angle)
        return torch.tensor([[cosine, -sine, shift[0]], [sine, cosine, shift[1]]])

    def _recolour(self, pixels: Tensor, draw: _Draw) -> Tensor:
        """Brightness, contrast, saturation and hue as one 3x3 matrix and one offset."""
        brightness = 1 + draw.uniform(-self.brightness, self.brightness)
        contrast = 1 + draw.uniform(-self.contrast, self.contrast)
        saturation = 1 + draw.uniform(-self.saturation, self.saturation)
        hue = math.radians(draw.uniform(-self.hue, self.hue))
        cosine, sine = saturation * math.cos(hue), saturation * math.sin(hue)
        chroma = torch.tensor([[1.0, 0.0, 0.0], [0.0, cosine, -sine], [0.0, sine, cosine]])
        matrix = (brightness * contrast) * (_YIQ_TO_RGB @ chroma @ _RGB_TO_YIQ)
        # Contrast is about the picture's own mean grey, so that it does not darken or brighten.
        grey = brightness * (1 - contrast) * float(_RGB_TO_YIQ[0] @ pixels.mean(dim=(1, 2)))
        flat = torch.addmm(torch.tensor(grey), matrix, pixels.flatten(1))
        return flat.clamp_(0, 1).view_as(pixels)


class _Draw:
    """Up to 16 uniform numbers from one hash: no generator state to seed, keep or restore."""

    def __init__(self, key: str) -> None:
        digest = hashlib.sha512(key.encode()).digest()
        self._numbers = iter(np.frombuffer(digest, dtype="<u4").tolist())

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * (next(self._numbers) / 2**32)

    def chance(self, probability: float) -> bool:
        return self.uniform(0, 1) < probability


_RGB_TO_YIQ = torch.tensor(
    [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]]
)
_YIQ_TO_RGB = torch.linalg.inv(_RGB_TO_YIQ)


def to_float(image: Pixels) -> Tensor:
    """uint8 ``(H, W, 3)`` to a contiguous float32 ``(3, H, W)`` in [0, 1]."""
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))
    return torch.from_numpy(planes).float().div_(255)


def _warp(pixels: Tensor, labels: Tensor | None, affine: Tensor) -> tuple[Tensor, Tensor | None]:
    """Sample picture (bilinear) and mask (nearest) on one grid; what lies outside mirrors."""
    grid = F.affine_grid(affine[None], [1, 1, *pixels.shape[1:]], align_corners=False)
    warped = F.grid_sample(pixels[None], grid, "bilinear", "reflection", align_corners=False)
    if labels is not None:
        values = labels[None, None].float()
        values = F.grid_sample(values, grid, "nearest", "reflection", align_corners=False)
        labels = values[0, 0].to(torch.uint8)
    return warped[0], labels
