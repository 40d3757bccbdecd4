"""How a network does on small and large lesions, faint and plain ones, each diagnosis."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

from eamnet.metrics import ImageMetrics, Subgroup, summarise

__all__ = ["MIN_IMAGES", "subgroups"]

#: A group of fewer pictures is not shown: its interval would mean nothing.
MIN_IMAGES = 5


def subgroups(rows: Iterable[ImageMetrics]) -> list[Subgroup]:
    """Summaries of groups of pictures, at native resolution if the rows have it.

    By lesion size (share of the picture that the truth covers) and by contrast
    (:func:`eamnet.measures.contrast`), each in thirds of as many pictures; by diagnosis where the
    data set has one. Pictures without a lesion are in no size group, those without a contrast in
    no contrast group. The intervals are those of :func:`eamnet.metrics.summarise`, drawn within
    the group.
    """
    by_id: dict[str, list[ImageMetrics]] = defaultdict(list)
    rows = list(rows)
    resolution = "native" if any(r.resolution == "native" for r in rows) else "network"
    for row in sorted(rows, key=lambda r: (r.id, r.label)):
        if row.resolution == resolution:
            by_id[row.id].append(row)
    first = {name: of[0] for name, of in by_id.items()}
    size = {
        name: sum(r.tp + r.fn for r in of) / (of[0].height * of[0].width)
        for name, of in by_id.items()
    }
    lesions = {name: share for name, share in size.items() if share}
    contrasts = {name: row.contrast for name, row in first.items()}
    diagnoses: dict[str, list[str]] = defaultdict(list)
    for name, row in first.items():
        if row.diagnosis:
            diagnoses[row.diagnosis].append(name)
    families = {
        "lesion size": _thirds(lesions, ("small", "medium", "large"), 100, "{:.1f} % of picture"),
        "contrast": _thirds(contrasts, ("low", "medium", "high"), 1, "{:.3f}"),
        "diagnosis": diagnoses if len(diagnoses) > 1 else {},
    }
    found = []
    for by, groups in families.items():
        for group, ids in groups.items():
            if len(ids) < MIN_IMAGES:
                continue
            summary = summarise(row for name in ids for row in by_id[name])
            found.append(
                Subgroup(
                    by=by,
                    group=group,
                    images=len(ids),
                    scores=summary["resolutions"][resolution]["macro"],
                )
            )
    return found


def _thirds(
    values: Mapping[str, float], names: tuple[str, str, str], scale: float, unit: str
) -> dict[str, list[str]]:
    """Ids by third, the name of each third with its range; nothing where a third is too small."""
    ids = sorted((i for i in values if not math.isnan(values[i])), key=lambda i: (values[i], i))
    if len(ids) < 3 * MIN_IMAGES:
        return {}
    groups = {}
    for name, part in zip(names, np.array_split(np.array(ids, dtype=object), 3), strict=True):
        low, high = (unit.format(values[i] * scale) for i in (part[0], part[-1]))
        groups[f"{name}: {low.split(' %')[0]} to {high}"] = part.tolist()
    return groups
