"""The report of a run: one self-contained HTML file, and the pictures that go into it.

A report is built from what lies in the run folder, and from nothing else::

    config.yaml           the full configuration
    versions.json         versions of the software and of the machine
    split.json            the ids of each part and the hash of the split
    data_report.json      a list of lines: the split drawn, non-binary masks, stray files
    metrics.csv           learning curves, one or more rows per epoch
    test/, validation/    an evaluation: per_image.csv, summary.json, speed.json,
                          pictures/<id>/*.png; also test-tta/, validation-tta/
    test-<data set>/      the same, of another data set
    attention/            what `eamnet attention` wrote, if it was asked

What is missing or damaged is named in the report and left out.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

import numpy as np
import yaml  # type: ignore[import-untyped, unused-ignore]
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_dilation

from eamnet.metrics import (
    METRICS,
    Calibration,
    ClassSummary,
    ImageMetrics,
    Resolution,
    Summary,
    outline,
    read_csv,
    read_summary,
    summarise,
    write_atomic,
)

__all__ = [
    "METRIC_NAMES",
    "PREDICTION_COLOUR",
    "TRUTH_COLOUR",
    "Picture",
    "contact_sheet",
    "format_metric",
    "load_picture",
    "outline_overlay",
    "picture_folder",
    "save_test_picture",
    "select_pictures",
    "write_contact_sheet",
    "write_report",
]

# Okabe and Ito's palette: told apart under every form of colour blindness. Blue and yellow differ
# in brightness too, so a grey print still shows which is which.
TRUTH_COLOUR = (86, 180, 233)
PREDICTION_COLOUR = (240, 228, 66)
_PALETTE = [(0, 0, 0), (255, 255, 255), (230, 159, 0), (86, 180, 233), (0, 158, 115)]
_PALETTE += [(240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167)]
_BLUE, _ORANGE, _GREEN = "#0072b2", "#d55e00", "#009e73"

_Pixels = NDArray[np.uint8]
_T = TypeVar("_T")


# --- pictures ---------------------------------------------------------------------------------


class Picture(NamedTuple):
    """A picture with its truth and prediction, as stored for the report."""

    image: _Pixels  #: (H, W, 3)
    truth: _Pixels  #: (H, W), class indices
    prediction: _Pixels  #: (H, W), class indices


def _check_picture(image: NDArray[Any], truth: NDArray[Any], prediction: NDArray[Any]) -> None:
    if image.dtype != np.uint8:
        raise TypeError(f"image must be uint8, got {image.dtype}")
    if image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"image must be a non-empty (H, W, 3), got {image.shape}")
    for name, mask in (("truth", truth), ("prediction", prediction)):
        if mask.dtype.kind not in "biu":
            raise TypeError(f"{name} must be bool or integer, got {mask.dtype}")
        if mask.shape != image.shape[:2]:
            raise ValueError(
                f"{name} must have the size of image, {image.shape[:2]}, got {mask.shape}"
            )


def picture_folder(directory: Path, image_id: str) -> Path:
    """Return where :func:`save_test_picture` stores a picture under ``directory``.

    Ids may hold path separators: characters that file systems do not take are percent-encoded.
    """
    name = quote(image_id, safe=" ")
    return directory / (f"%2E{name[1:]}" if name.startswith(".") else name)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def save_test_picture(
    directory: Path,
    image_id: str,
    image: NDArray[Any],
    truth: NDArray[Any],
    prediction: NDArray[Any],
    *,
    max_side: int = 512,
) -> Path:
    """Store a picture for the report as ``<directory>/<id>/{image,truth,prediction}.png``.

    Masks are palette PNGs whose values are the class indices; the palette makes the foreground of
    a binary mask white. Larger pictures are reduced to ``max_side`` pixels: they are for looking
    at, never for measuring.

    Args:
        directory: the pictures' folder, created if need be.
        image_id: the picture's id.
        image: uint8 ``(H, W, 3)``.
        truth, prediction: class indices ``(H, W)``, bool or integer.
        max_side: longest side in pixels of what is stored.

    Returns:
        The picture's folder.

    Raises:
        TypeError: wrong dtypes.
        ValueError: wrong or unequal shapes.
    """
    _check_picture(image, truth, prediction)
    folder = picture_folder(directory, image_id)
    folder.mkdir(parents=True, exist_ok=True)
    height, width = truth.shape
    scale = min(1.0, max_side / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    picture = Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)
    write_atomic(folder / "image.png", _png(picture))
    for name, mask in (("truth", truth), ("prediction", prediction)):
        indices = Image.fromarray(mask.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
        indices.putpalette([channel for colour in _PALETTE for channel in colour])
        write_atomic(folder / f"{name}.png", _png(indices))
    return folder


def load_picture(folder: Path) -> Picture:
    """Read what :func:`save_test_picture` stored in a picture's folder.

    Raises:
        OSError: a file is missing or no picture.
        ValueError: the three do not fit together.
    """
    parts = []
    for name, mode in (("image", "RGB"), ("truth", "P"), ("prediction", "P")):
        with Image.open(folder / f"{name}.png") as file:
            if file.mode != mode:
                raise ValueError(
                    f"{folder.name}/{name}.png must be of mode {mode}, got {file.mode}"
                )
            parts.append(np.asarray(file))
    _check_picture(*parts)
    return Picture(*parts)


def outline_overlay(
    image: NDArray[Any], truth: NDArray[Any] | None, prediction: NDArray[Any] | None
) -> _Pixels:
    """Draw the outlines of truth and prediction into a picture.

    The truth is a broad line in :data:`TRUTH_COLOUR`, the prediction a thin one in
    :data:`PREDICTION_COLOUR` on top of it, so that both show where they coincide; a dark seam
    sets them off from skin of any shade. Every class is outlined.

    Args:
        image: uint8 ``(H, W, 3)``.
        truth, prediction: class indices ``(H, W)``, bool or integer; ``None`` draws nothing.

    Returns:
        A new uint8 ``(H, W, 3)``.

    Raises:
        TypeError: wrong dtypes.
        ValueError: wrong or unequal shapes.
    """
    nothing = np.zeros(image.shape[:2], np.uint8)
    truth = nothing if truth is None else truth
    prediction = nothing if prediction is None else prediction
    _check_picture(image, truth, prediction)

    def line(mask: NDArray[Any], width: int) -> NDArray[np.bool_]:
        edges = np.zeros(mask.shape, bool)
        for label in np.unique(mask[mask > 0]):
            edges |= outline(mask == label)
        return thicken(edges, width - 1)

    def thicken(edges: NDArray[np.bool_], by: int) -> NDArray[np.bool_]:
        # SciPy takes zero iterations as "until nothing changes".
        thick: NDArray[np.bool_] = binary_dilation(edges, iterations=by) if by else edges
        return thick

    width = max(1, round(max(image.shape[:2]) / 256))
    broad, thin = line(truth, width + 1), line(prediction, width)
    result: _Pixels = image.copy()
    seam = thicken(broad | thin, 1)
    result[seam] = result[seam] // 3
    result[broad] = TRUTH_COLOUR
    result[thin] = PREDICTION_COLOUR
    return result


def _shown(picture: Picture) -> _Pixels:
    """The overlay of a stored picture, enlarged first where fine lines would need more pixels."""
    height, width = picture.truth.shape
    factor = math.ceil(384 / max(height, width))
    size = width * factor, height * factor
    image = Image.fromarray(picture.image).resize(size, Image.Resampling.LANCZOS)
    masks = (mask.repeat(factor, 0).repeat(factor, 1) for mask in picture[1:])
    return outline_overlay(np.asarray(image), *masks)


def contact_sheet(
    tiles: Sequence[tuple[str, NDArray[Any]]], *, columns: int = 4, tile: int = 256
) -> _Pixels:
    """Arrange pictures in a grid, with captions below them and the legend on top.

    Args:
        tiles: caption (lines separated by a newline) and uint8 ``(H, W, 3)`` of each picture;
            sizes may differ.
        columns: pictures in a row.
        tile: side in pixels of the square that each picture is fitted into.

    Returns:
        uint8 ``(height, width, 3)`` on white.

    Raises:
        ValueError: no pictures, or fewer than one column.
    """
    if not tiles:
        raise ValueError("tiles must hold at least one picture, got none")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    gap, text = 10, 15
    font = ImageFont.load_default(text - 2)
    columns = min(columns, len(tiles))
    caption = text * max(title.count("\n") + 1 for title, _ in tiles) + 4
    rows = math.ceil(len(tiles) / columns)
    header = text + 2 * gap
    size = gap + columns * (tile + gap), header + rows * (tile + caption + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    x = gap
    for name, colour in (("truth", TRUTH_COLOUR), ("prediction", PREDICTION_COLOUR)):
        draw.rectangle((x, gap, x + 2 * text, gap + text), fill=colour, outline="black")
        draw.text((x + 2 * text + 6, gap), name, fill="black", font=font)
        x += 8 * text
    for index, (title, pixels) in enumerate(tiles):
        x = gap + index % columns * (tile + gap)
        y = header + index // columns * (tile + caption + gap)
        picture = Image.fromarray(pixels)
        scale = tile / max(picture.size)
        fitted = [max(1, round(side * scale)) for side in picture.size]
        picture = picture.resize((fitted[0], fitted[1]), Image.Resampling.LANCZOS)
        sheet.paste(picture, (x + (tile - fitted[0]) // 2, y + (tile - fitted[1]) // 2))
        draw.multiline_text((x, y + tile + 2), title, fill="black", font=font, spacing=2)
    return np.asarray(sheet)


# --- which pictures ---------------------------------------------------------------------------


class _Case(NamedTuple):
    """One picture's numbers as the report shows them: means over the classes."""

    id: str
    dice: float
    iou: float
    hd95: float
    area: float  # share of the picture that the truth covers
    size: tuple[int, int]


def _cases(rows: Iterable[ImageMetrics]) -> list[_Case]:
    """Pictures from worst to best Dice, at native resolution if the rows have it."""
    rows = list(rows)
    resolution = _resolutions({row.resolution for row in rows})[0] if rows else "native"
    by_id: dict[str, list[ImageMetrics]] = defaultdict(list)
    for row in rows:
        if row.resolution == resolution:
            by_id[row.id].append(row)
    cases = [
        _Case(
            id=name,
            dice=float(np.mean([r.dice for r in of])),
            iou=float(np.mean([r.iou for r in of])),
            hd95=float(np.mean([r.hd95 for r in of])),
            area=sum(r.tp + r.fn for r in of) / (of[0].height * of[0].width),
            size=(of[0].native_height, of[0].native_width),
        )
        for name, of in by_id.items()
    ]
    return sorted(cases, key=lambda case: (case.dice, case.id))


def _resolutions(present: Iterable[str]) -> list[Resolution]:
    """The resolutions present, the one to look at first leading."""
    order: tuple[Resolution, ...] = ("native", "network")
    return [resolution for resolution in order if resolution in present]


def select_pictures(rows: Iterable[ImageMetrics], count: int = 4) -> dict[str, list[str]]:
    """Choose the ids to show: ``best``, ``median`` and ``worst`` by Dice, best first.

    Dice is the mean over classes, at native resolution if the rows have it; ties go by id. The
    three groups are disjoint wherever there are three pictures, and shorter than ``count`` where
    there are fewer than three times as many.

    Raises:
        ValueError: no rows, or ``count`` below 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    ids = [case.id for case in reversed(_cases(rows))]
    if not ids:
        raise ValueError("rows must hold at least one image, got none")
    count = max(1, min(count, len(ids) // 3))
    middle = (len(ids) - count) // 2
    return {
        "best": ids[:count],
        "median": ids[middle : middle + count],
        "worst": ids[-count:],
    }


def write_contact_sheet(directory: Path, path: Path, *, count: int = 4, tile: int = 256) -> None:
    """Write the best, median and worst pictures of an evaluation as one PNG.

    Args:
        directory: the evaluation's folder, with ``per_image.csv`` and ``pictures/``.
        path: the PNG to write.
        count: pictures in each of the three rows.
        tile: side of a picture in pixels.

    Raises:
        OSError: ``per_image.csv`` or a chosen picture is missing.
        ValueError: a file is damaged.
    """
    rows = read_csv(directory / "per_image.csv")
    cases = {case.id: case for case in _cases(rows)}
    groups = select_pictures(rows, count)
    tiles = [
        (
            f"{group}: {name}\nDice {cases[name].dice:.3f}",
            _shown(load_picture(picture_folder(directory / "pictures", name))),
        )
        for group, names in groups.items()
        for name in names
    ]
    sheet = contact_sheet(tiles, columns=len(groups["best"]), tile=tile)
    write_atomic(path, _png(Image.fromarray(sheet)))


# --- figures ----------------------------------------------------------------------------------


class _Graphic(NamedTuple):
    """An embedded PNG."""

    uri: str
    width: int
    height: int
    alt: str


def _embed(png: bytes, alt: str, pixels_per_unit: float = 1) -> _Graphic:
    with Image.open(io.BytesIO(png)) as image:
        width, height = (round(side / pixels_per_unit) for side in image.size)
    uri = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return _Graphic(uri, width, height, alt)


def _embed_figure(figure: Figure, alt: str) -> _Graphic:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)
    return _embed(buffer.getvalue(), alt, pixels_per_unit=2)


_Curves = dict[str, tuple[list[int], list[float]]]


def _read_curves(path: Path) -> _Curves:
    """Read Lightning's CSV log: for every column the epochs and the mean of each epoch."""
    cells: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if "epoch" not in (reader.fieldnames or ()):
            raise ValueError(f"no column 'epoch' among {reader.fieldnames}")
        for line in reader:
            for name, cell in line.items():
                if name not in ("epoch", "step") and cell:
                    cells[name][int(line["epoch"])].append(float(cell))
    return {
        name: (sorted(epochs), [float(np.mean(epochs[e])) for e in sorted(epochs)])
        for name, epochs in cells.items()
    }


def _curves_figure(curves: _Curves) -> _Graphic | None:
    panels: list[tuple[str, list[tuple[str, str, str]]]] = [
        ("loss", [("train_loss", "training", _BLUE), ("val_loss", "validation", _ORANGE)]),
        ("validation score", [("val_dice", "Dice", _ORANGE), ("val_iou", "IoU", _GREEN)]),
        ("learning rate", [("lr", "learning rate", _BLUE)]),
    ]
    shown = [(title, [line for line in lines if line[0] in curves]) for title, lines in panels]
    shown = [(title, lines) for title, lines in shown if lines]
    if not shown:
        return None
    figure = Figure(figsize=(10.4, 2.9), layout="constrained")
    titles = []
    for axes, (title, lines) in zip(
        figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True
    ):
        for column, label, colour in lines:
            epochs, values = curves[column]
            # Markers, because a single epoch would be an invisible line.
            axes.plot(epochs, values, color=colour, label=label, marker="o", markersize=2.5)
            if column == "val_dice" and not np.isnan(values).all():
                best = int(np.nanargmax(values))
                axes.axvline(epochs[best], color="0.6", linestyle=":", zorder=0)
                title += f" (best Dice {values[best]:.3f}, epoch {epochs[best]})"
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(lines) > 1:
            axes.legend(fontsize=8, frameon=False)
        titles.append(title)
    return _embed_figure(figure, "Learning curves over epochs: " + ", ".join(titles))


def _distribution_figure(cases: Sequence[_Case]) -> _Graphic:
    dice = np.array([case.dice for case in cases])
    area = np.array([case.area for case in cases]) * 100
    figure = Figure(figsize=(10.4, 3.1), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(dice, bins=np.linspace(0, 1, 41).tolist(), color=_BLUE)
    for value, label, style in ((np.median(dice), "median", "-"), (dice.mean(), "mean", "--")):
        left.axvline(float(value), color="black", linestyle=style, label=f"{label} {value:.3f}")
    left.set(xlabel="Dice of a picture", ylabel="pictures", xlim=(0, 1))
    left.legend(fontsize=8, frameon=False)
    lesion = area > 0
    right.scatter(area[lesion], dice[lesion], s=9, color=_BLUE, alpha=0.5, linewidths=0)
    if lesion.sum() >= 8:
        edges = np.quantile(area[lesion], [0, 0.25, 0.5, 0.75, 1])
        quarter = np.clip(np.searchsorted(edges, area[lesion], side="right") - 1, 0, 3)
        medians = [np.median(dice[lesion][quarter == q]) for q in np.unique(quarter)]
        right.hlines(
            medians,
            edges[np.unique(quarter)],
            edges[np.unique(quarter) + 1],
            color=_ORANGE,
            label="median of each size quarter",
        )
        right.legend(fontsize=8, frameon=False, loc="lower right")
    right.set(
        xlabel="lesion, % of the picture (true mask)",
        ylabel="Dice",
        xscale="log",
        ylim=(-0.02, 1.02),
    )
    right.xaxis.set_major_formatter("{x:g}")
    return _embed_figure(
        figure,
        f"Left: histogram of Dice over {len(dice)} pictures, median {np.median(dice):.3f}. "
        "Right: Dice against lesion size.",
    )


def _calibration_figure(summary: Summary) -> _Graphic | None:
    """Reliability curves at each resolution, with how many pixels each point stands for."""
    found: dict[str, dict[str, Calibration]] = {
        resolution: summary["resolutions"][resolution]["calibration"]
        for resolution in _resolutions(summary["resolutions"])
        if "calibration" in summary["resolutions"][resolution]
    }
    if not found:
        return None
    figure = Figure(figsize=(10.4, 3.4), layout="constrained")
    curve, histogram = figure.subplots(1, 2)
    curve.plot([0, 1], [0, 1], color="0.6", linestyle=":", label="calibrated")
    for (resolution, classes), line in zip(found.items(), ("-", "--"), strict=False):
        for index, (label, bins) in enumerate(classes.items()):
            name = resolution + (f", class {label}" if len(classes) > 1 else "")
            colour = (_BLUE, _ORANGE, _GREEN)[index % 3]
            points = [
                (p, f)
                for p, f in zip(bins["probability"], bins["frequency"], strict=True)
                if p is not None and f is not None
            ]
            curve.plot(*zip(*points, strict=True), line, color=colour, marker="o", markersize=3)
            curve.lines[-1].set_label(name)
            share = np.array(bins["pixels"]) / sum(bins["pixels"])
            edges = np.linspace(0, 1, len(share) + 1)
            histogram.stairs(share, edges, color=colour, linestyle=line, label=name)
    curve.set(xlabel="predicted probability", ylabel="share of pixels that are lesion")
    histogram.set(xlabel="predicted probability", ylabel="share of all pixels", yscale="log")
    for axes in (curve, histogram):
        axes.legend(fontsize=8, frameon=False)
    return _embed_figure(
        figure, "Left: calibration curve per pixel. Right: how often each probability is predicted."
    )


# --- the page ---------------------------------------------------------------------------------

#: What tables call each of :data:`eamnet.metrics.METRICS`.
METRIC_NAMES = {
    "dice": "Dice",
    "iou": "IoU (Jaccard)",
    "accuracy": "Accuracy",
    "precision": "Precision",
    "recall": "Recall (sensitivity)",
    "specificity": "Specificity",
    "threshold_jaccard": "Thresholded Jaccard (ISIC)",
    "hd95": "HD95, pixels",
    "assd": "ASSD, pixels",
    "nsd": "NSD at 1 % of the diagonal",
    "ece": "Calibration error (ECE)",
}
_HEADLINES = ("dice", "iou", "recall", "specificity", "hd95")
_PARTS = {
    "test": "Test part",
    "test-tta": "Test part, test-time augmentation",
    "validation": "Validation part",
    "validation-tta": "Validation part, test-time augmentation",
}


@dataclass
class _Evaluation:
    """One evaluated part, ready for the template."""

    name: str
    title: str
    summary: Summary
    resolutions: list[Resolution]
    sizes: dict[str, str]
    groups: dict[str, list[tuple[_Case, _Graphic]]] = field(default_factory=dict)
    distribution: _Graphic | None = None
    calibration: _Graphic | None = None
    without_lesion: int = 0
    speed: str = ""

    @property
    def metrics(self) -> list[str]:
        """The metrics that the summary has."""
        found = [self.summary["resolutions"][r]["macro"]["mean"] for r in self.resolutions]
        return [metric for metric in METRICS if any(metric in mean for mean in found)]

    @property
    def tables(self) -> list[tuple[str, dict[Resolution, ClassSummary]]]:
        """Title and content of each metric table: the macro average, then several classes."""
        by_resolution = {r: self.summary["resolutions"][r] for r in self.resolutions}
        tables = [("", {r: s["macro"] for r, s in by_resolution.items()})]
        labels = list(by_resolution[self.resolutions[0]]["classes"])
        if len(labels) > 1:
            for label in labels:
                of_class = {r: s["classes"][label] for r, s in by_resolution.items()}
                tables.append((f"Class {label}", of_class))
        return tables


def _title(folder: str) -> str:
    """Of an evaluation on other pictures than the run's own."""
    kind, _, name = folder.partition("-")
    titles = {"test": f"Test on {name}", "validation": f"Validation part of {name}"}
    return titles.get(kind, f"Evaluation {folder}")


class _Run:
    """Reads a run folder and keeps what was missing or damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[str] = []

    def read(self, name: str, reader: Callable[[Path], _T], purpose: str) -> _T | None:
        path = self.folder / name
        if not path.exists():
            self.problems.append(f"{name} is missing: {purpose}")
            return None
        try:
            return reader(path)
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
            reason = str(error).replace(str(path), name)
            self.problems.append(f"{name} could not be read ({reason}): {purpose}")
            return None

    def evaluation(self, part: str) -> _Evaluation | None:
        if not (self.folder / part).is_dir():
            return None
        rows = self.read(f"{part}/per_image.csv", read_csv, "no pictures and distributions")
        summary = self.read(f"{part}/summary.json", read_summary, "averages computed anew")
        if rows and summary is None:
            summary = summarise(rows)
        if summary is None:
            return None
        result = _Evaluation(
            name=part,
            title=_PARTS.get(part) or _title(part),
            summary=summary,
            resolutions=_resolutions(summary["resolutions"]),
            sizes={},
            calibration=_calibration_figure(summary),
            speed=self.read(f"{part}/speed.json", _read_speed, "no seconds per picture") or "",
        )
        if rows:
            cases = _cases(rows)
            result.groups = self._groups(part, rows, {case.id: case for case in cases})
            result.distribution = _distribution_figure(cases)
            result.without_lesion = sum(case.area == 0 for case in cases)
            for resolution in result.resolutions:
                sizes = {(r.height, r.width) for r in rows if r.resolution == resolution}
                result.sizes[resolution] = _sizes(sizes)
        return result

    def attention(self) -> dict[str, Any] | None:
        """What ``eamnet attention`` found, with its two pictures; None if it was not asked."""
        if not (self.folder / "attention").is_dir():
            return None
        found = self.read("attention/attention.json", _read_table, "no attention maps")
        sheet = self.read("attention/sheet.png", _embed_attention, "no attention maps")
        channels = self.read("attention/channels.png", _embed_attention, "no attention maps")
        if found is None or sheet is None or channels is None:
            return None
        return {**found, "sheet": sheet, "channels": channels}

    def _groups(
        self, part: str, rows: list[ImageMetrics], cases: dict[str, _Case]
    ) -> dict[str, list[tuple[_Case, _Graphic]]]:
        groups: dict[str, list[tuple[_Case, _Graphic]]] = {}
        for group, ids in select_pictures(rows).items():
            for name in ids:
                where = picture_folder(Path(part, "pictures"), name).as_posix()
                picture = self.read(where, load_picture, "picture not shown")
                if picture is not None:
                    png = _png(Image.fromarray(_shown(picture)))
                    alt = f"{name} with the outlines of truth and prediction"
                    groups.setdefault(group, []).append((cases[name], _embed(png, alt)))
        return groups


def _embed_attention(path: Path) -> _Graphic:
    what = {
        "sheet": "Pictures with outlines, and the attention maps of each network",
        "channels": "Attention to channels, and the channels that EAB keeps",
    }
    return _embed(path.read_bytes(), what[path.stem], pixels_per_unit=1)


def _sizes(sizes: set[tuple[int, int]]) -> str:
    """Describe a set of (height, width)."""
    if len(sizes) == 1:
        ((height, width),) = sizes
        return f"{width}×{height}"
    smallest, largest = (f(sizes, key=lambda s: s[0] * s[1]) for f in (min, max))
    return f"{smallest[1]}×{smallest[0]} to {largest[1]}×{largest[0]}"


def format_metric(metric: str, value: float) -> str:
    """A metric's value as tables show it."""
    return f"{value:.1f}" if metric in ("hd95", "assd") else f"{value:.3f}"


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _read_lines(path: Path) -> list[str]:
    lines = _read_json(path)
    if not isinstance(lines, list):
        raise ValueError(f"a list of lines expected, got {type(lines).__name__}")
    return [str(line) for line in lines]


def _read_table(path: Path) -> dict[str, Any]:
    table = _read_json(path)
    if not isinstance(table, dict):
        raise ValueError(f"a table expected, got {type(table).__name__}")
    return table


def _flat(table: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Turn a nested table into rows of dotted name and text; count the entries of long lists."""
    rows: list[tuple[str, str]] = []
    for key, value in table.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            rows += _flat(value, f"{name}.")
        elif isinstance(value, list) and not 0 < len(value) <= 8:
            rows.append((name, f"{len(value)} entries"))
        else:
            rows.append(
                (name, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
            )
    return rows


def _read_speed(path: Path) -> str:
    speed = _read_table(path)
    seconds = float(speed.pop("seconds_per_picture"))
    conditions = ", ".join(f"{name} {value}" for name, value in _flat(speed))
    return f"{seconds * 1000:.3g} ms per picture" + (f" ({conditions})" if conditions else "")


def _read_config(path: Path) -> tuple[str, str]:
    """The text of the configuration and the name of the data set in it, if any."""
    text = path.read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    data = config.get("data") if isinstance(config, dict) else None
    data = data.get("init_args", data) if isinstance(data, dict) else {}
    return text, str(data.get("dataset", ""))


def write_report(run_dir: Path | str) -> Path:
    """Write ``report.html`` into a run folder: one file that needs nothing else.

    Args:
        run_dir: the run's folder; see the top of this module for what is read from it.

    Returns:
        The path of the report.

    Raises:
        NotADirectoryError: there is no such folder.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise NotADirectoryError(f"run_dir must be the folder of a run, got {folder}")
    run = _Run(folder)
    others = {path.parent.name for path in folder.glob("*/per_image.csv")} - set(_PARTS)
    evaluations = [e for e in map(run.evaluation, [*_PARTS, *sorted(others)]) if e is not None]
    if not evaluations:
        run.problems.append("No evaluated part: run `eamnet test` or `eamnet validate`")
    curves = run.read("metrics.csv", _read_curves, "no learning curves")
    config, dataset = run.read("config.yaml", _read_config, "no configuration") or ("", "")
    split = run.read("split.json", _read_table, "the split is not identified") or {}
    versions = run.read("versions.json", _read_table, "no versions") or {}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html").render(
        run=folder.resolve().name,
        dataset=dataset,
        evaluations=evaluations,
        curves=_curves_figure(curves) if curves else None,
        attention=run.attention(),
        config=config,
        split=_flat(split),
        versions=_flat(versions),
        data_report=run.read(
            "data_report.json", _read_lines, "what was odd in the data is unknown"
        ),
        problems=run.problems,
        headlines=_HEADLINES,
        names=METRIC_NAMES,
        subgroup_metrics=("dice", "iou", "recall", "hd95", "nsd"),
        format_metric=format_metric,
        colours={"truth": TRUTH_COLOUR, "prediction": PREDICTION_COLOUR},
    )
    path = folder / "report.html"
    write_atomic(path, html.encode())
    return path
