"""What makes a picture hard, measured from its mask and pixels: size, outline, contrast."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from scipy.spatial import ConvexHull

from eamnet.metrics import outline

__all__ = ["RING", "area_fraction", "contrast", "solidity"]

#: Width of the ring of skin around a lesion, as a share of the square root of the picture's area.
RING = 0.1


def area_fraction(mask: NDArray[Any]) -> float:
    """The share of a picture that its mask ``(H, W)``, bool or class index, covers."""
    return float(np.count_nonzero(mask) / mask.size)


def solidity(mask: NDArray[Any]) -> float:
    """Area of a mask ``(H, W)`` over that of its convex hull: 1 for convex, less for irregular.

    Pixels count as squares, so that a rectangle has exactly 1. NaN for an empty mask.
    """
    # Corners of the outline's pixels: those inside add nothing to a hull.
    corners = np.argwhere(outline(np.asarray(mask) != 0))
    if not len(corners):
        return math.nan
    squares = (corners[:, None] + np.array([[0, 0], [0, 1], [1, 0], [1, 1]])).reshape(-1, 2)
    return float(np.count_nonzero(mask) / ConvexHull(squares).volume)  # in 2D, its area


def contrast(image: NDArray[np.floating[Any]], mask: NDArray[Any]) -> float:
    """How much darker a lesion is than the skin around it, in grey levels from 0 to 1.

    Mean luminance (ITU-R BT.601) of the pixels outside the mask within :data:`RING` of it, less
    that of the pixels inside. NaN where there is no inside or no outside.

    Args:
        image: floating ``(3, H, W)`` in [0, 1].
        mask: ``(H, W)``, bool or class index.
    """
    lesion = np.asarray(mask) != 0
    if lesion.all() or not lesion.any():
        return math.nan
    grey = np.tensordot(np.array([0.299, 0.587, 0.114]), image, 1)
    distance = np.asarray(distance_transform_edt(~lesion))
    ring = ~lesion & (distance <= max(1.0, RING * math.sqrt(lesion.size)))
    return float(grey[ring].mean() - grey[lesion].mean())
