"""Pictures that two data sets have in common, found by what they show and not by their names.

Each picture is reduced to 32x32 grey values, whose differences between neighbours make its
fingerprint; the likeness of two pictures is the correlation of their fingerprints inside a disc,
because the dark corners of the microscope's tube look alike in pictures of different lesions.
Size, aspect, brightness, contrast and compression hardly matter; a picture that is cropped, turned
or mirrored is not found.

Measured on the 2150 training and validation pictures of ISIC 2017: of the 2.3 million pairs nine
are more alike than 0.9, and in all nine both pictures show the same lesion, some in other colours.
The first pair of different lesions is at 0.86, between pairs of the same lesion that were coloured
anew and moved (down to 0.81). A copy reduced to 128x96 and saved as JPEG of quality 30 was never
below 0.91 (25 pictures), of quality 75 at 64x48 never below 0.93.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from eamnet.data.cache import PictureStore
from eamnet.data.source import Pixels, Source
from eamnet.data.transforms import resize_image

#: Correlation from which on two pictures count as the same.
LIKENESS = 0.9

_SIDE = 32
_GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)


class Overlap(NamedTuple):
    """A picture of each of two data sets that show the same, and how alike they are (to 1)."""

    first: str
    second: str
    likeness: float


def fingerprint(image: Pixels) -> NDArray[np.float32]:
    """The fingerprint of a picture, uint8 ``(H, W, 3)``: float32 ``(1984,)`` of length 1.

    That of a picture without any structure is zero, and like nothing.
    """
    grey = resize_image(image, _SIDE).astype(np.float32) @ _GREY
    steps = [(np.diff(grey, axis=axis) * _disc(axis)).ravel() for axis in (0, 1)]
    values = np.concatenate(steps)
    length = float(np.linalg.norm(values))
    return (values / length if length > 1e-3 else np.zeros_like(values)).astype(np.float32)


def _disc(axis: int) -> NDArray[np.float32]:
    """Weight of each difference: 1 in the middle, 0 in the corners."""
    across = (np.arange(_SIDE) + 0.5) / (_SIDE / 2) - 1
    weight = np.clip((1.05 - np.hypot(across[:, None], across)) / 0.25, 0, 1)
    steps = range(_SIDE - 1)
    pairs: NDArray[np.float64] = np.minimum(
        weight.take(steps, axis), weight.take(range(1, _SIDE), axis)
    )
    return pairs.astype(np.float32)


def fingerprints(
    source: Source, ids: Sequence[str], cache_dir: str | Path | None = None
) -> tuple[list[str], NDArray[np.float32]]:
    """The readable pictures among ``ids`` and their fingerprints ``(len, 1984)``."""
    store = PictureStore(source, _SIDE, cache_dir, in_memory=True)
    records = [source[name] for name in ids]
    unreadable = store.fill(records).unreadable
    kept = [record for record in records if record.id not in unreadable]
    table = np.zeros((len(kept), 2 * _SIDE * (_SIDE - 1)), np.float32)
    for row, record in zip(table, kept, strict=True):
        row[:] = fingerprint(store[record].image)
    return [record.id for record in kept], table


def find_overlaps(
    first: tuple[Source, Sequence[str]],
    second: tuple[Source, Sequence[str]],
    *,
    likeness: float = LIKENESS,
    cache_dir: str | Path | None = None,
) -> list[Overlap]:
    """Pairs of pictures of two data sets that show the same, the most alike first.

    Args:
        first, second: a data set and the ids to be compared.
        likeness: from which correlation on, up to 1.
        cache_dir: where decoded pictures are kept, as for :class:`PictureStore`.

    Raises:
        ValueError: ``likeness`` is out of range, or masks cannot be used.
    """
    if not 0 < likeness <= 1:
        raise ValueError(f"likeness must lie in 0 .. 1 (0 excluded), got {likeness}")
    names, table = fingerprints(*first, cache_dir)
    others, other_table = fingerprints(*second, cache_dir)
    found: list[Overlap] = []
    for start in range(0, len(names), 1000):  # 1000 x 10 000 correlations are 40 MB
        alike = table[start : start + 1000] @ other_table.T
        # Rounding may leave a copy at 0.9999999.
        for row, column in np.argwhere(alike >= likeness - 1e-5):
            value = min(1.0, round(float(alike[row, column]), 4))
            found.append(Overlap(names[start + row], others[column], value))
    return sorted(found, key=lambda o: (-o.likeness, o.first, o.second))
