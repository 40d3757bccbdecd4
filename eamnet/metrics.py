"""How a segmentation is judged: per-image metrics, two averagings, intervals, files.

Conventions (``docs/metrics.md`` gives the reasons):

* A ratio whose denominator is zero is 1, as in the ISIC challenge's scorer: Dice and IoU when
  truth and prediction are both empty, recall without truth, precision without prediction,
  specificity without background.
* HD95 and ASSD are in pixels of the arrays compared. They are 0 when truth and prediction are both
  empty and the largest distance in the picture, ``hypot(H - 1, W - 1)``, when exactly one of them
  is; NSD is then 1 and 0.
* Class 0 is the background and is not scored; a class is scored one against the rest. With
  several classes the overall value is the macro average, the plain mean over classes.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, TypeVar, get_args

import numpy as np
import torch
import torchmetrics
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion
from scipy.spatial import KDTree
from torch import Tensor

__all__ = [
    "CALIBRATION_BINS",
    "METRICS",
    "NSD_TOLERANCE",
    "RATES",
    "SCHEMA",
    "THRESHOLD",
    "Calibration",
    "ClassSummary",
    "Estimate",
    "ImageMetrics",
    "Resolution",
    "ResolutionSummary",
    "SegmentationMetrics",
    "Subgroup",
    "Summary",
    "boundary_metrics",
    "calibration_bins",
    "calibration_error",
    "discretise",
    "hausdorff95",
    "image_metrics",
    "outline",
    "rates",
    "read_csv",
    "read_summary",
    "summarise",
    "surface_distances",
    "write_atomic",
    "write_csv",
    "write_summary",
]

Resolution = Literal["network", "native"]

#: Probability above which a pixel is foreground. Fixed before any test set is seen.
THRESHOLD = 0.5
#: IoU below which the ISIC challenge counts a picture as failed.
JACCARD_THRESHOLD = 0.65
#: Metrics of a confusion matrix; defined for one picture and for a pooled matrix.
RATES = ("dice", "iou", "accuracy", "precision", "recall", "specificity")
#: Share of the picture's diagonal within which two outlines count as the same for NSD.
NSD_TOLERANCE = 0.01
#: Equal intervals of probability that the calibration is looked at in.
CALIBRATION_BINS = 15
#: Every metric of one picture; the thresholded Jaccard and the distances exist per picture only.
METRICS = (*RATES, "threshold_jaccard", "hd95", "assd", "nsd", "ece")
#: Version of the JSON summary.
SCHEMA = 1

_Array = TypeVar("_Array", NDArray[Any], Tensor)


def rates(counts: _Array) -> dict[str, _Array]:
    """Return the metrics of confusion matrices, keyed by :data:`RATES`.

    Args:
        counts: ``(..., 4)``, true positives, false positives, false negatives and true
            negatives in the last dimension; NumPy array or tensor, integer or floating.

    Returns:
        Arrays ``(...)`` of the same kind, each 1 where its denominator is 0.
    """
    tp, fp, fn, tn = (counts[..., i] for i in range(4))

    def ratio(numerator: _Array, denominator: _Array) -> _Array:
        undefined = denominator == 0  # the numerator is then 0 too
        result: _Array = (numerator + undefined) / (denominator + undefined)
        return result

    return {
        "dice": ratio(2 * tp, 2 * tp + fp + fn),
        "iou": ratio(tp, tp + fp + fn),
        "accuracy": ratio(tp + tn, tp + fp + fn + tn),
        "precision": ratio(tp, tp + fp),
        "recall": ratio(tp, tp + fn),
        "specificity": ratio(tn, tn + fp),
    }


def discretise(logits: Tensor) -> Tensor:
    """Return the class indices of logits ``(B, K, H, W)`` as uint8 ``(B, 1, H, W)``.

    One channel is foreground where its probability exceeds :data:`THRESHOLD`; of several
    channels the largest wins, the first one on a tie.
    """
    if logits.shape[1] == 1:
        return (logits.float().sigmoid() > THRESHOLD).to(torch.uint8)
    return logits.argmax(dim=1, keepdim=True).to(torch.uint8)


def outline(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the pixels of ``mask`` ``(H, W)`` with a 4-neighbour outside it.

    Beyond the picture counts as outside, so a region cut by the frame has a closed outline.
    """
    edge: NDArray[np.bool_] = mask & ~binary_erosion(mask)
    return edge


def surface_distances(
    truth: NDArray[np.bool_], prediction: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the distances between two outlines, in pixels, in both directions.

    This is what boundary metrics are made of: HD95 takes percentiles of it, the average surface
    distance its mean, the normalised surface Dice the share below a tolerance.

    Args:
        truth, prediction: bool ``(H, W)``, neither empty.

    Returns:
        For every outline pixel of ``prediction`` the Euclidean distance to the nearest one of
        ``truth``, and the reverse.
    """
    # A tree over the outline pixels: 0.8 ms at 256x256 and 33 ms at 2048x3072 on one core, where
    # two distance transforms of the bounding box take 2.7 ms and 680 ms.
    rows, columns = (np.flatnonzero((truth | prediction).any(axis)) for axis in (1, 0))
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    points = [np.argwhere(outline(mask[box])) for mask in (truth, prediction)]
    trees = [KDTree(p) for p in points]
    return np.asarray(trees[0].query(points[1])[0]), np.asarray(trees[1].query(points[0])[0])


def hausdorff95(truth: NDArray[np.bool_], prediction: NDArray[np.bool_]) -> float:
    """Return the larger of the two directed 95th percentile outline distances, in pixels.

    0 when both masks ``(H, W)`` are empty; ``hypot(H - 1, W - 1)`` when exactly one is.
    """
    empty = not truth.any(), not prediction.any()
    if all(empty):
        return 0.0
    if any(empty):
        return math.hypot(truth.shape[0] - 1, truth.shape[1] - 1)
    return max(float(np.percentile(d, 95)) for d in surface_distances(truth, prediction))


def boundary_metrics(truth: NDArray[np.bool_], prediction: NDArray[np.bool_]) -> dict[str, float]:
    """Return what two outlines say about each other, all from :func:`surface_distances`.

    ``hd95`` as :func:`hausdorff95`; ``assd`` the average symmetric surface distance, the mean over
    the pixels of both outlines, in pixels; ``nsd`` the normalised surface Dice (Nikolov et al.,
    arXiv:1809.04430), the share of those pixels within :data:`NSD_TOLERANCE` times the picture's
    diagonal.
    """
    diagonal = math.hypot(truth.shape[0] - 1, truth.shape[1] - 1)
    empty = not truth.any(), not prediction.any()
    if all(empty):
        return {"hd95": 0.0, "assd": 0.0, "nsd": 1.0}
    if any(empty):
        return {"hd95": diagonal, "assd": diagonal, "nsd": 0.0}
    distances = surface_distances(truth, prediction)
    both = np.concatenate(distances)
    return {
        "hd95": max(float(np.percentile(d, 95)) for d in distances),
        "assd": float(both.mean()),
        "nsd": float(np.mean(both <= NSD_TOLERANCE * diagonal)),
    }


def calibration_bins(
    truth: NDArray[Any], probability: NDArray[np.floating[Any]]
) -> NDArray[np.float64]:
    """Sort pixels by their predicted probability.

    Args:
        truth: class indices ``(H, W)``, bool or integer.
        probability: ``(K, H, W)``; of the foreground for ``K = 1``, else of each class.

    Returns:
        ``(max(K, 2) - 1, CALIBRATION_BINS, 3)``: for each class other than the background and each
        interval of probability the number of pixels, the sum of their probabilities and the number
        that are of the class. Sums of such arrays stand for several pictures.

    Raises:
        ValueError: a probability is NaN.
    """
    if np.isnan(probability).any():
        raise ValueError("probability must be a number everywhere, got NaN")
    classes = probability if len(probability) == 1 else probability[1:]
    result = np.empty((len(classes), CALIBRATION_BINS, 3))
    for label, values in enumerate(classes, start=1):
        p = values.ravel()
        index = np.minimum((p * CALIBRATION_BINS).astype(np.intp), CALIBRATION_BINS - 1)
        of_class = index[truth.ravel() == label]
        result[label - 1].T[...] = [
            np.bincount(index, minlength=CALIBRATION_BINS),
            np.bincount(index, weights=p, minlength=CALIBRATION_BINS),
            np.bincount(of_class, minlength=CALIBRATION_BINS),
        ]
    return result


def calibration_error(bins: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the expected calibration error of :func:`calibration_bins` ``(..., bins, 3)``.

    The mean over pixels of the distance between the mean probability of a pixel's interval and the
    frequency of the class in it (Naeini et al., AAAI 2015, class by class).
    """
    result: NDArray[np.float64] = np.abs(bins[..., 1] - bins[..., 2]).sum(-1)
    return result / bins[..., 0].sum(-1)


@dataclass(frozen=True)
class ImageMetrics:
    """The metrics of one class in one picture at one resolution: a row of ``per_image.csv``.

    ``label`` is the class index (1 for the foreground of a binary task), ``height`` and ``width``
    the size at which truth and prediction were compared, ``native_height`` and ``native_width``
    the size of the picture's file. ``hd95``, ``assd``, ``nsd`` and ``ece`` are NaN when they were
    not computed. ``contrast`` (:func:`eamnet.measures.contrast`, NaN if unknown) and ``diagnosis``
    (empty if unknown) are the picture's own, the same in each of its rows.
    """

    id: str
    resolution: Resolution
    label: int
    height: int
    width: int
    native_height: int
    native_width: int
    tp: int
    fp: int
    fn: int
    tn: int
    dice: float
    iou: float
    accuracy: float
    precision: float
    recall: float
    specificity: float
    threshold_jaccard: float
    hd95: float
    assd: float = math.nan
    nsd: float = math.nan
    ece: float = math.nan
    contrast: float = math.nan
    diagnosis: str = ""


def _check_mask(name: str, mask: NDArray[Any], classes: int) -> None:
    if mask.ndim != 2 or mask.size == 0:
        raise ValueError(f"{name} must be a non-empty (H, W), got shape {mask.shape}")
    if mask.dtype.kind not in "biu":
        raise TypeError(f"{name} must be bool or integer, got {mask.dtype}")
    low, high = int(mask.min()), int(mask.max())
    if low < 0 or high >= classes:
        raise ValueError(
            f"{name} must hold class indices from 0 to {classes - 1}, got {low} to {high}"
        )


def image_metrics(
    image_id: str,
    truth: NDArray[Any],
    prediction: NDArray[Any],
    *,
    resolution: Resolution,
    num_classes: int = 1,
    native_size: tuple[int, int] | None = None,
    hd95: bool = True,
    bins: NDArray[np.float64] | None = None,
    contrast: float = math.nan,
    diagnosis: str = "",
) -> list[ImageMetrics]:
    """Compare one prediction with the truth; one row per class other than the background.

    Args:
        image_id: the picture's id.
        truth, prediction: class indices ``(H, W)``, bool or integer; 0 and 1 for one class.
        resolution: whether the arrays have the size the network works at or that of the file.
        num_classes: channels of the network's output; 1 is a binary task.
        native_size: ``(height, width)`` of the file; the arrays' own size if ``None``.
        hd95: compute HD95, ASSD and NSD, else leave NaN.
        bins: :func:`calibration_bins` of the picture, for ``ece``; NaN if ``None``.
        contrast, diagnosis: of the picture, to be kept with the rows.

    Raises:
        TypeError: a mask is not bool or integer.
        ValueError: unequal or wrong shapes, a class index out of range, unknown resolution.
    """
    if resolution not in get_args(Resolution):
        raise ValueError(f"resolution must be one of {get_args(Resolution)}, got {resolution!r}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    classes = max(num_classes, 2)
    _check_mask("truth", truth, classes)
    _check_mask("prediction", prediction, classes)
    if truth.shape != prediction.shape:
        raise ValueError(
            f"prediction must have the shape of truth, {truth.shape}, got {prediction.shape}"
        )
    height, width = truth.shape
    native_height, native_width = native_size or truth.shape
    rows = []
    for label in range(1, classes):
        t, p = truth == label, prediction == label
        tp, positives, predicted = (int(np.count_nonzero(m)) for m in (t & p, t, p))
        fp, fn = predicted - tp, positives - tp
        tn = t.size - tp - fp - fn
        values = {name: float(v) for name, v in rates(np.array([tp, fp, fn, tn])).items()}
        iou = values["iou"]
        boundary = boundary_metrics(t, p) if hd95 else {"hd95": math.nan}
        rows.append(
            ImageMetrics(
                id=image_id,
                resolution=resolution,
                label=label,
                height=height,
                width=width,
                native_height=native_height,
                native_width=native_width,
                tp=tp,
                fp=fp,
                fn=fn,
                tn=tn,
                **values,
                threshold_jaccard=iou if iou >= JACCARD_THRESHOLD else 0.0,
                **boundary,
                ece=math.nan if bins is None else float(calibration_error(bins[label - 1])),
                contrast=contrast,
                diagnosis=diagnosis,
            )
        )
    return rows


class Estimate(TypedDict):
    """A value and the ends of its bootstrap interval."""

    value: float
    low: float
    high: float


class ClassSummary(TypedDict):
    """One class, or the macro average: both averagings, each metric with its interval."""

    mean: dict[str, Estimate]
    pooled: dict[str, Estimate]


class Calibration(TypedDict):
    """One class: for each interval of probability what was predicted and what was there.

    ``probability`` is the mean prediction and ``frequency`` the share of the class, ``None`` in
    intervals that hold no pixel; ``pixels`` are summed over all images.
    """

    pixels: list[int]
    probability: list[float | None]
    frequency: list[float | None]


class _ResolutionSummary(TypedDict):
    macro: ClassSummary
    classes: dict[str, ClassSummary]
    empty: dict[str, int]


class ResolutionSummary(_ResolutionSummary, total=False):
    """All classes at one resolution.

    ``empty`` counts images and classes whose truth, prediction or both hold no foreground.
    HD95 of those with only one empty is the picture's diagonal. ``calibration``, by class, is
    there where probabilities were looked at.
    """

    calibration: dict[str, Calibration]


class Bootstrap(TypedDict):
    """How the intervals were computed."""

    method: str
    unit: str
    resamples: int
    confidence: float
    seed: int


class Subgroup(TypedDict):
    """The macro average of some of the images: which property, which group of it."""

    by: str
    group: str
    images: int
    scores: ClassSummary


class _Summary(TypedDict):
    schema: int
    images: int
    threshold: float
    bootstrap: Bootstrap
    resolutions: dict[str, ResolutionSummary]


class Summary(_Summary, total=False):
    """The content of ``summary.json``; ``subgroups`` of :mod:`eamnet.subgroups` in evaluations."""

    subgroups: list[Subgroup]


def summarise(
    rows: Iterable[ImageMetrics],
    calibration: Mapping[str, Mapping[Resolution, NDArray[np.float64]]] | None = None,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Summary:
    """Average rows both ways, with percentile bootstrap intervals over images.

    ``mean`` is the mean over images of the per-image metric; ``pooled`` the metric of the
    confusion matrix summed over images. Images are drawn with replacement, all classes and
    metrics of an image together; the same draws serve every metric and both resolutions. The
    result does not depend on the order of the rows.

    Args:
        rows: rows of the same images and classes for each resolution present.
        calibration: by image and resolution :func:`calibration_bins`, for the calibration curve
            and the pooled ``ece``.
        resamples: bootstrap resamples, at least 1.
        confidence: coverage of the intervals, between 0 and 1.
        seed: seed of the draws.

    Raises:
        ValueError: no rows, a row given twice or missing, or an argument out of range.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    tables = _tables(rows)
    images = len(next(iter(tables.values())).counts)
    # How often each image is drawn: (resamples, images). Every statistic here is a weighted sum
    # over images, so all resamples of all metrics are a few matrix products.
    draws = np.random.default_rng(seed).integers(images, size=(resamples, images))
    draws += images * np.arange(resamples)[:, None]
    weights = np.bincount(draws.ravel(), minlength=resamples * images)
    weights = weights.reshape(resamples, images).astype(np.float64)
    quantiles = [(1 - confidence) / 2, (1 + confidence) / 2]

    def estimates(values: NDArray[Any], samples: NDArray[Any]) -> list[Estimate]:
        """Estimates for ``values`` ``(K,)`` and ``samples`` ``(resamples, K)``, macro last."""
        values, samples = (np.c_[np.atleast_2d(a), np.mean(a, -1)] for a in (values, samples))
        low, high = np.quantile(samples, quantiles, axis=0)
        ends = zip(values[0].tolist(), low.tolist(), high.tolist(), strict=True)
        return [Estimate(value=v, low=lo, high=hi) for v, lo, hi in ends]

    resolutions: dict[str, ResolutionSummary] = {}
    for resolution, table in tables.items():
        counts = table.counts
        mean = {k: estimates(v.mean(0), weights @ v / images) for k, v in table.metrics.items()}
        total = rates(counts.sum(0))
        resampled = rates((weights @ counts.reshape(images, -1)).reshape(-1, *counts.shape[1:]))
        pooled = {k: estimates(total[k], resampled[k]) for k in RATES}
        curves: dict[str, Calibration] = {}
        if calibration is not None:
            bins = np.stack([calibration[name][resolution] for name in table.ids])
            redrawn = (weights @ bins.reshape(images, -1)).reshape(-1, *bins.shape[1:])
            pooled["ece"] = estimates(calibration_error(bins.sum(0)), calibration_error(redrawn))
            curves = {
                str(label): _curve(of) for label, of in zip(table.labels, bins.sum(0), strict=True)
            }
        summaries = [
            ClassSummary(
                mean={k: e[column] for k, e in mean.items()},
                pooled={k: e[column] for k, e in pooled.items()},
            )
            for column in range(len(table.labels) + 1)
        ]
        no_truth = counts[..., 0] + counts[..., 2] == 0
        no_prediction = counts[..., 0] + counts[..., 1] == 0
        resolutions[resolution] = ResolutionSummary(
            macro=summaries[-1],
            classes={str(c): s for c, s in zip(table.labels, summaries[:-1], strict=True)},
            empty={
                "truth": int(no_truth.sum()),
                "prediction": int(no_prediction.sum()),
                "both": int((no_truth & no_prediction).sum()),
            },
        )
        if curves:
            resolutions[resolution]["calibration"] = curves
    return Summary(
        schema=SCHEMA,
        images=images,
        threshold=THRESHOLD,
        bootstrap=Bootstrap(
            method="percentile",
            unit="image",
            resamples=resamples,
            confidence=confidence,
            seed=seed,
        ),
        resolutions=resolutions,
    )


def _curve(bins: NDArray[np.float64]) -> Calibration:
    """The calibration curve of one class from its summed bins (bins, 3)."""

    def ratio(column: int) -> list[float | None]:
        return [float(b[column] / b[0]) if b[0] else None for b in bins]

    return Calibration(
        pixels=[int(n) for n in bins[:, 0]], probability=ratio(1), frequency=ratio(2)
    )


class _Table(NamedTuple):
    """Rows of one resolution as arrays: images sorted by id, then classes."""

    ids: list[str]
    labels: list[int]
    counts: NDArray[np.int64]  # (images, classes, 4)
    metrics: dict[str, NDArray[np.float64]]  # (images, classes) each


def _tables(rows: Iterable[ImageMetrics]) -> dict[Resolution, _Table]:
    """Return the rows as a table per resolution; refuse duplicates and gaps."""
    cells: dict[tuple[str, str, int], ImageMetrics] = {}
    for row in rows:
        key = (row.resolution, row.id, row.label)
        if key in cells:
            raise ValueError(
                f"rows hold image {row.id!r}, class {row.label}, "
                f"at {row.resolution} resolution twice"
            )
        cells[key] = row
    if not cells:
        raise ValueError("rows must hold at least one image, got none")
    resolutions: list[Resolution] = sorted({row.resolution for row in cells.values()})
    ids = sorted({row.id for row in cells.values()})
    labels = sorted({row.label for row in cells.values()})
    tables: dict[Resolution, _Table] = {}
    for resolution in resolutions:
        missing = [(i, c) for i in ids for c in labels if (resolution, i, c) not in cells]
        if missing:
            raise ValueError(
                f"rows lack image {missing[0][0]!r}, class {missing[0][1]}, "
                f"at {resolution} resolution ({len(missing)} missing in all)"
            )
        grid = [[cells[resolution, i, c] for c in labels] for i in ids]
        metrics = {k: np.array([[getattr(r, k) for r in line] for line in grid]) for k in METRICS}
        metrics = {k: v for k, v in metrics.items() if not np.isnan(v).all()}
        counts = np.array([[(r.tp, r.fp, r.fn, r.tn) for r in line] for line in grid])
        tables[resolution] = _Table(ids, labels, counts, metrics)
    return tables


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: readers and a crash see the old content or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# Field types are strings here, as annotations are not evaluated.
_COLUMNS = {field.name: str(field.type) for field in fields(ImageMetrics)}
#: Columns that a file may lack at its end: results published before there were these stay readable.
_LATER = ("assd", "nsd", "ece", "contrast", "diagnosis")
#: Columns whose cell is empty where the value is NaN, or the text empty.
_OPTIONAL = ("hd95", *_LATER)
_CONVERT: dict[str, Callable[[str], Any]] = {
    "str": str,
    "Resolution": str,
    "int": int,
    "float": float,
}


def write_csv(rows: Iterable[ImageMetrics], path: Path) -> None:
    """Write rows sorted by image, resolution and class; floats read back to the same bits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(_COLUMNS), lineterminator="\n")
    writer.writeheader()
    for row in sorted(rows, key=lambda r: (r.id, r.resolution, r.label)):
        values = asdict(row)
        writer.writerow({k: "" if v != v else v for k, v in values.items()})
    write_atomic(path, text.getvalue().encode())


def read_csv(path: Path) -> list[ImageMetrics]:
    """Read the rows of :func:`write_csv`.

    Raises:
        ValueError: other columns than those of :class:`ImageMetrics`, or a cell that is no
            number where one belongs.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        older = [name for name in _COLUMNS if name not in _LATER]
        if reader.fieldnames not in (list(_COLUMNS), older):
            raise ValueError(
                f"{path} must have the columns {list(_COLUMNS)}, got {reader.fieldnames}"
            )
        rows = []
        for line in reader:
            if None in line or None in line.values():
                cells = len(reader.fieldnames)
                raise ValueError(f"{path}, line {reader.line_num}: {cells} cells expected")
            for name in _OPTIONAL:
                if line.get(name) == "" and name != "diagnosis":
                    line[name] = "nan"
            try:
                rows.append(ImageMetrics(**{k: _CONVERT[_COLUMNS[k]](v) for k, v in line.items()}))
            except ValueError as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
        return rows


def write_summary(summary: Summary, path: Path) -> None:
    """Write a summary as JSON."""
    write_atomic(path, (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode())


def read_summary(path: Path) -> Summary:
    """Read the summary of :func:`write_summary`.

    Raises:
        ValueError: not JSON, or another version of it.
    """
    summary = json.loads(path.read_text(encoding="utf-8"))
    schema = summary.get("schema") if isinstance(summary, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path} must be a metrics summary of schema {SCHEMA}, got {schema!r}")
    result: Summary = summary
    return result


class SegmentationMetrics(torchmetrics.Metric):
    """Streaming metrics for the validation curve, without keeping any picture.

    ``compute`` returns scalar tensors keyed by :data:`RATES`, the mean over images, and by
    ``pooled_`` and the same, from the pooled confusion matrix; both averaged over the classes
    other than the background. Every state is a sum over images, so processes of a distributed
    run may have seen different numbers of them. HD95 is left to the test: it is computed on the
    CPU.

    Args:
        num_classes: channels of the logits; 1 means sigmoid, more means softmax.
        **kwargs: arguments of :class:`torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    counts: Tensor
    sums: Tensor
    images: Tensor

    def __init__(self, num_classes: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.num_classes = num_classes
        self.labels = max(num_classes, 2) - 1
        # float32, not float64, which some accelerators lack
        self.add_state("counts", torch.zeros(self.labels, 4, dtype=torch.int64), "sum")
        self.add_state("sums", torch.zeros(len(RATES), self.labels), "sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), "sum")

    def update(self, logits: Tensor, mask: Tensor) -> None:
        """Add a batch.

        Args:
            logits: ``(B, num_classes, H, W)``.
            mask: ``(B, 1, H, W)``, class indices of any dtype.

        Raises:
            ValueError: shapes that do not fit.
        """
        if logits.ndim != 4 or logits.shape[1] != self.num_classes:
            raise ValueError(
                f"logits must be (B, {self.num_classes}, H, W), got {tuple(logits.shape)}"
            )
        if mask.shape != (logits.shape[0], 1, *logits.shape[2:]):
            raise ValueError(
                f"mask must be {(logits.shape[0], 1, *logits.shape[2:])}, got {tuple(mask.shape)}"
            )
        label = torch.arange(1, self.labels + 1, device=logits.device)[:, None, None]
        truth, prediction = mask == label, discretise(logits) == label
        cells = (truth & prediction, ~truth & prediction, truth & ~prediction, ~truth & ~prediction)
        counts = torch.stack([cell.sum((-2, -1)) for cell in cells], dim=-1)
        self.counts += counts.sum(0)
        self.sums += torch.stack([value.sum(0) for value in rates(counts).values()])
        self.images += logits.shape[0]

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics of everything seen since the last reset; NaN if that is nothing."""
        mean = (self.sums / self.images).mean(-1)
        pooled = torch.stack(list(rates(self.counts).values())).mean(-1)
        pooled = pooled.where(self.images > 0, math.nan)
        names = (*RATES, *(f"pooled_{name}" for name in RATES))
        return dict(zip(names, (*mean, *pooled), strict=True))
