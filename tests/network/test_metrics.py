"""Metrics against independent scorers, brute force and hand-worked examples."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist

from eamnet.metrics import (
    CALIBRATION_BINS,
    METRICS,
    NSD_TOLERANCE,
    RATES,
    ImageMetrics,
    SegmentationMetrics,
    boundary_metrics,
    calibration_bins,
    calibration_error,
    discretise,
    hausdorff95,
    image_metrics,
    outline,
    rates,
    read_csv,
    read_summary,
    summarise,
    surface_distances,
    write_atomic,
    write_csv,
    write_summary,
)

Mask = NDArray[np.bool_]

DATA = Path(
    os.environ.get("EAMNET_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "data"
)
#: The ISIC scorer's names for ours.
ISIC_NAMES = {
    "accuracy": "accuracy",
    "sensitivity": "recall",
    "specificity": "specificity",
    "jaccard": "iou",
    "threshold_jaccard": "threshold_jaccard",
    "dice": "dice",
    "ppv": "precision",
}


def blobs(rng: np.random.Generator, shape: tuple[int, int], level: float = 0.0) -> Mask:
    """An irregular mask; a high level leaves little of it, a low one fills the picture."""
    noise = gaussian_filter(rng.normal(size=shape), 4)
    mask: Mask = noise / noise.std() > level
    return mask


def pairs(count: int, shape: tuple[int, int] = (48, 61)) -> list[tuple[Mask, Mask]]:
    """Pairs of masks, from disjoint to nearly equal, with every case of emptiness among them."""
    rng = np.random.default_rng(count)
    result = [(blobs(rng, shape, rng.normal()), blobs(rng, shape, rng.normal()))]
    while len(result) < count:
        truth = blobs(rng, shape, rng.normal())
        result.append((truth, truth ^ blobs(rng, shape, rng.uniform(0, 3))))
    empty, full = np.zeros(shape, bool), np.ones(shape, bool)
    some = result[0][0]
    special = [(empty, empty), (full, full), (empty, full), (full, empty)]
    special += [(some, empty), (empty, some), (some, full), (full, some), (some, ~some)]
    return result + special


def rows_of(
    masks: list[tuple[Any, Any]], *, hd95: bool = False, num_classes: int = 1, **kwargs: Any
) -> list[ImageMetrics]:
    kwargs.setdefault("resolution", "native")
    return [
        row
        for i, (truth, prediction) in enumerate(masks)
        for row in image_metrics(
            f"image{i:04d}", truth, prediction, hd95=hd95, num_classes=num_classes, **kwargs
        )
    ]


# --- one picture ------------------------------------------------------------------------------


def test_a_hand_worked_picture() -> None:
    truth = np.array([[1, 1, 1, 0], [0, 0, 0, 0]])
    prediction = np.array([[1, 1, 0, 1], [0, 0, 0, 0]])
    (row,) = image_metrics(
        "a", truth, prediction, resolution="network", native_size=(600, 800), hd95=False
    )
    assert (row.tp, row.fp, row.fn, row.tn) == (2, 1, 1, 4)
    assert (row.height, row.width, row.native_height, row.native_width) == (2, 4, 600, 800)
    assert (row.id, row.resolution, row.label) == ("a", "network", 1)
    expected = {"dice": 4 / 6, "iou": 0.5, "accuracy": 6 / 8, "precision": 2 / 3, "recall": 2 / 3}
    expected |= {"specificity": 4 / 5, "threshold_jaccard": 0.0}
    for name, value in expected.items():
        assert getattr(row, name) == pytest.approx(value, abs=1e-15), name
    assert all(math.isnan(getattr(row, name)) for name in ("hd95", "assd", "nsd", "ece"))


def test_the_jaccard_threshold_itself_passes() -> None:
    truth = np.ones((1, 20), bool)
    for pixels, expected in ((13, 0.65), (12, 0.0)):
        prediction = np.arange(20)[None] < pixels
        (row,) = image_metrics("a", truth, prediction, resolution="native")
        assert row.threshold_jaccard == expected
        assert isic_row(truth, prediction)["threshold_jaccard"] == expected


def isic_row(truth: Mask, prediction: Mask) -> dict[str, float]:
    confusion = pytest.importorskip("isic_challenge_scoring.confusion")
    scorer = pytest.importorskip("isic_challenge_scoring.metrics")
    matrix = confusion.create_binary_confusion_matrix(truth, prediction)
    return {
        ours: getattr(scorer, f"binary_{theirs}")(matrix) for theirs, ours in ISIC_NAMES.items()
    }


def test_every_picture_agrees_with_the_isic_scorer() -> None:
    masks = pairs(200)
    for (truth, prediction), row in zip(masks, rows_of(masks), strict=True):
        for name, value in isic_row(truth, prediction).items():
            assert getattr(row, name) == pytest.approx(value, abs=1e-15), (name, row)


def isic_folders(tmp_path: Path, masks: list[tuple[Mask, Mask]]) -> tuple[Path, Path]:
    folders = tmp_path / "truth", tmp_path / "prediction"
    for folder, suffix, part in zip(folders, ("_segmentation", ""), range(2), strict=True):
        folder.mkdir()
        for i, pair in enumerate(masks):
            image = Image.fromarray(pair[part].astype(np.uint8) * 255)
            image.save(folder / f"ISIC_{i:07d}{suffix}.png")
    return folders


def assert_summary_is_the_isic_score(tmp_path: Path, masks: list[tuple[Mask, Mask]]) -> None:
    segmentation = pytest.importorskip("isic_challenge_scoring.segmentation")
    score = segmentation.SegmentationScore.from_dir(*isic_folders(tmp_path, masks))
    ours = summarise(rows_of(masks))["resolutions"]["native"]["macro"]["mean"]
    names = dict(score.macro_average)
    assert set(names) == set(ISIC_NAMES) - {"ppv"}
    for theirs, value in names.items():
        assert ours[ISIC_NAMES[theirs]]["value"] == pytest.approx(value, abs=1e-12), theirs


@pytest.mark.filterwarnings("ignore:The inplace keyword")
def test_the_mean_over_images_is_the_isic_score(tmp_path: Path) -> None:
    assert_summary_is_the_isic_score(tmp_path, pairs(25))


@pytest.mark.filterwarnings("ignore:The inplace keyword")
def test_the_mean_over_real_masks_is_the_isic_score(tmp_path: Path) -> None:
    folder = DATA / "isic2017" / "ISIC-2017_Validation_Part1_GroundTruth"
    files = sorted(folder.glob("*_segmentation.png"))[:24]
    if not files:
        pytest.skip(f"needs the ISIC 2017 validation masks in {folder} (see EAMNET_DATA)")
    truths = [np.asarray(Image.open(file)) > 128 for file in files]
    rng = np.random.default_rng(0)
    masks = [(t, np.roll(t, rng.integers(-30, 30, 2), (0, 1))) for t in truths]
    assert_summary_is_the_isic_score(tmp_path, masks)


# --- outlines and HD95 ------------------------------------------------------------------------


def brute_hd95(truth: Mask, prediction: Mask) -> float:
    """All pairs of outline pixels, each pixel's neighbours looked at one by one."""

    def edge(mask: Mask) -> NDArray[np.int64]:
        padded = np.pad(mask, 1)
        points = [
            (i, j)
            for i, j in np.argwhere(mask)
            if not all(
                padded[i + 1 + di, j + 1 + dj] for di, dj in ((0, 1), (1, 0), (0, -1), (-1, 0))
            )
        ]
        return np.array(points)

    distances = cdist(edge(truth), edge(prediction))
    return float(max(np.percentile(distances.min(axis), 95) for axis in (0, 1)))


small_masks = arrays(bool, (9, 12)).filter(lambda mask: bool(mask.any()))


@settings(max_examples=60, deadline=None)
@given(small_masks, small_masks)
def test_hd95_is_the_percentile_over_all_outline_pixels(truth: Mask, prediction: Mask) -> None:
    value = hausdorff95(truth, prediction)
    assert value == pytest.approx(brute_hd95(truth, prediction), abs=1e-12)
    assert value == hausdorff95(prediction, truth)
    assert hausdorff95(truth, truth) == 0
    framed = [np.pad(mask, ((3, 5), (2, 7))) for mask in (truth, prediction)]
    assert hausdorff95(*framed) == value, "background around the pair must not matter"


@pytest.mark.filterwarnings("ignore::FutureWarning:monai")
def test_hd95_agrees_with_monai() -> None:
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance

    masks = [(t, p) for t, p in pairs(25) if t.any() and p.any()]
    truth, prediction = (torch.tensor(np.array(part))[:, None] for part in zip(*masks, strict=True))
    expected = compute_hausdorff_distance(prediction, truth, include_background=True, percentile=95)
    actual = [hausdorff95(t, p) for t, p in masks]
    # MONAI interpolates the percentile in float32.
    np.testing.assert_allclose(actual, expected[:, 0].numpy(), rtol=1e-5)


def test_hd95_of_shifted_squares_and_of_empty_masks() -> None:
    square = np.zeros((40, 50), bool)
    square[10:20, 10:20] = True
    assert hausdorff95(square, np.roll(square, 7, axis=1)) == pytest.approx(7)
    dot = np.zeros((40, 50), bool)
    dot[0, 0] = True
    assert hausdorff95(dot, np.rot90(dot, 2)) == pytest.approx(math.hypot(39, 49))
    empty = np.zeros_like(square)
    assert hausdorff95(empty, empty) == 0
    assert hausdorff95(square, empty) == hausdorff95(empty, square) == math.hypot(39, 49)


@pytest.mark.filterwarnings("ignore::FutureWarning:monai")
def test_boundary_metrics_agree_with_monai() -> None:
    from monai.metrics.surface_dice import compute_surface_dice
    from monai.metrics.surface_distance import compute_average_surface_distance

    masks = [(t, p) for t, p in pairs(25) if t.any() and p.any()]
    truth, prediction = (torch.tensor(np.array(part))[:, None] for part in zip(*masks, strict=True))
    options = {"include_background": True}
    assd = compute_average_surface_distance(prediction, truth, symmetric=True, **options)
    tolerance = NSD_TOLERANCE * math.hypot(47, 60)
    assert 0.5 < tolerance < 1, (
        "no distance between pixels lies so near to it that rounding decides"
    )
    nsd = compute_surface_dice(prediction, truth, class_thresholds=[tolerance], **options)
    ours = [boundary_metrics(t, p) for t, p in masks]
    np.testing.assert_allclose([m["assd"] for m in ours], assd[:, 0].numpy(), rtol=1e-5)
    np.testing.assert_allclose([m["nsd"] for m in ours], nsd[:, 0].numpy(), rtol=1e-5)
    assert [m["hd95"] for m in ours] == [hausdorff95(t, p) for t, p in masks]


def test_boundary_metrics_of_shifted_squares_and_of_empty_masks() -> None:
    square = np.zeros((301, 401), bool)  # a diagonal of 500 pixels: the tolerance is 5
    square[100:200, 100:200] = True
    for shift, nsd in ((5, 1.0), (6, None)):
        found = boundary_metrics(square, np.roll(square, shift, axis=1))
        if nsd is None:
            assert 0.4 < found["nsd"] < 0.8  # the upper and lower sides overlap, but for their ends
        else:
            assert found["nsd"] == nsd
    empty = np.zeros_like(square)
    assert boundary_metrics(empty, empty) == {"hd95": 0, "assd": 0, "nsd": 1}
    for pair in ((square, empty), (empty, square)):
        assert boundary_metrics(*pair) == {"hd95": 500, "assd": 500, "nsd": 0}


def test_surface_distances_name_their_direction() -> None:
    truth, prediction = np.zeros((2, 9, 30), bool)
    truth[4, 2] = True
    prediction[4, [2, 12]] = True
    from_prediction, from_truth = surface_distances(truth, prediction)
    assert sorted(from_prediction) == [0, 10]
    assert list(from_truth) == [0]


def test_an_outline_is_closed_at_the_frame() -> None:
    mask = np.zeros((6, 7), bool)
    mask[:4, :5] = True
    expected = mask.copy()
    expected[1:3, 1:4] = False
    np.testing.assert_array_equal(outline(mask), expected)


# --- several classes --------------------------------------------------------------------------


def test_classes_are_scored_one_against_the_rest() -> None:
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 4, (30, 20))
    prediction = np.where(rng.random((30, 20)) < 0.7, truth, rng.integers(0, 4, (30, 20)))
    rows = image_metrics("a", truth, prediction, resolution="native", num_classes=4)
    assert [row.label for row in rows] == [1, 2, 3]
    for row in rows:
        (alone,) = image_metrics(
            "a", truth == row.label, prediction == row.label, resolution="native"
        )
        assert replace(alone, label=row.label) == row


def test_macro_is_the_mean_over_classes_in_both_averagings() -> None:
    rng = np.random.default_rng(4)
    masks = [tuple(rng.integers(0, 3, (2, 12, 12))) for _ in range(5)]
    result = summarise(rows_of(masks, num_classes=3))["resolutions"]["native"]
    assert sorted(result["classes"]) == ["1", "2"]
    for averaging in ("mean", "pooled"):
        for name in RATES:
            values = [c[averaging][name]["value"] for c in result["classes"].values()]
            assert result["macro"][averaging][name]["value"] == pytest.approx(np.mean(values))


def test_pooled_classes_agree_with_torchmetrics() -> None:
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    rng = np.random.default_rng(5)
    masks = [tuple(rng.integers(0, 3, (2, 15, 11))) for _ in range(6)]
    truth, prediction = (torch.tensor(np.array(part)) for part in zip(*masks, strict=True))
    matrix = multiclass_confusion_matrix(prediction, truth, num_classes=3).double()
    classes = summarise(rows_of(masks, num_classes=3))["resolutions"]["native"]["classes"]
    for label in (1, 2):
        tp, positives = matrix[label, label], matrix[label].sum()
        predicted = matrix[:, label].sum()
        pooled = classes[str(label)]["pooled"]
        assert pooled["dice"]["value"] == pytest.approx((2 * tp / (positives + predicted)).item())
        assert pooled["recall"]["value"] == pytest.approx((tp / positives).item())
        assert pooled["precision"]["value"] == pytest.approx((tp / predicted).item())


# --- averagings and intervals -----------------------------------------------------------------


def test_the_two_averagings_on_a_hand_worked_pair() -> None:
    small, large = np.zeros((2, 10, 10), bool)
    small[0, :2] = True
    large[:9] = True
    # A missed small lesion costs the mean a half and the pooled matrix almost nothing.
    rows = rows_of([(small, np.zeros_like(small)), (large, large)], hd95=True)
    result = summarise(rows)["resolutions"]["native"]["macro"]
    assert result["mean"]["dice"]["value"] == pytest.approx(0.5)
    assert result["pooled"]["dice"]["value"] == pytest.approx(180 / 182)
    assert result["mean"]["hd95"]["value"] == pytest.approx(math.hypot(9, 9) / 2)
    assert set(result["mean"]) == set(METRICS) - {"ece"}
    assert set(result["pooled"]) == set(RATES)


def test_intervals_are_those_of_resampling_images_one_by_one() -> None:
    rows = rows_of(pairs(12), hd95=True)
    result = summarise(rows, resamples=300, seed=7, confidence=0.9)
    macro = result["resolutions"]["native"]["macro"]
    counts = np.array([(r.tp, r.fp, r.fn, r.tn) for r in rows])
    draws = np.random.default_rng(7).integers(len(rows), size=(300, len(rows)))

    def interval(statistic: Callable[[NDArray[np.int64]], float]) -> list[float]:
        return list(np.percentile([statistic(draw) for draw in draws], [5, 95]))

    for name in macro["mean"]:
        values = np.array([getattr(r, name) for r in rows])
        low, high = interval(lambda draw, v=values: v[draw].mean())  # type: ignore[misc]
        estimate = macro["mean"][name]
        assert [estimate["low"], estimate["high"]] == pytest.approx([low, high], abs=1e-9)
    for name in RATES:
        low, high = interval(lambda draw, n=name: rates(counts[draw].sum(0))[n])  # type: ignore[misc]
        estimate = macro["pooled"][name]
        assert [estimate["low"], estimate["high"]] == pytest.approx([low, high], abs=1e-12)
        assert low <= estimate["value"] <= high


def test_intervals_agree_with_scipy_and_with_the_normal_law() -> None:
    from scipy.stats import bootstrap

    rows = rows_of(pairs(150))
    dice = np.array([row.dice for row in rows])
    estimate = summarise(rows)["resolutions"]["native"]["macro"]["mean"]["dice"]
    theirs = bootstrap(
        (dice,), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    error = dice.std() / math.sqrt(len(dice))
    for end, other, normal in (
        (estimate["low"], theirs.low, dice.mean() - 1.96 * error),
        (estimate["high"], theirs.high, dice.mean() + 1.96 * error),
    ):
        # The ends of two runs of 2000 resamples differ by a few per cent of the interval.
        assert abs(end - other) < 0.2 * error
        assert abs(end - normal) < 0.3 * error


def test_the_summary_depends_on_seed_and_rows_alone() -> None:
    rows = rows_of(pairs(10)) + rows_of(pairs(10), resolution="network")
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    assert summarise(shuffled) == summarise(rows)
    assert summarise(rows, seed=1) != summarise(rows)
    result = summarise(rows)["resolutions"]
    assert result["network"] == result["native"], "the same draws must serve both resolutions"


# --- calibration ------------------------------------------------------------------------------


def brute_ece(truth: Mask, probability: NDArray[np.float32]) -> float:
    """The definition, interval by interval."""
    error = 0.0
    for index in range(CALIBRATION_BINS):
        low, high = index / CALIBRATION_BINS, (index + 1) / CALIBRATION_BINS
        last = index == CALIBRATION_BINS - 1
        inside = (probability >= low) & ((probability < high) | last)
        if inside.any():
            gap = probability[inside].astype(float).mean() - truth[inside].mean()
            error += inside.mean() * abs(gap)
    return float(error)


def test_the_calibration_error_is_its_definition() -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        probability = rng.random((1, 40, 30), np.float32) ** 3
        truth = rng.random((40, 30)) < probability[0] * 0.8
        bins = calibration_bins(truth, probability)
        assert bins.shape == (1, CALIBRATION_BINS, 3)
        assert bins[..., 0].sum() == truth.size
        assert calibration_error(bins)[0] == pytest.approx(brute_ece(truth, probability[0]))
    right = np.array([[0.0, 1.0, 1.0]], np.float32)
    assert calibration_error(calibration_bins(right > 0.5, right[None]))[0] == 0
    assert calibration_error(calibration_bins(right < 0.5, right[None]))[0] == 1
    with pytest.raises(ValueError, match="NaN"):
        calibration_bins(right > 0.5, right[None] * np.float32("nan"))


def test_calibration_is_pooled_over_images_and_drawn_with_them() -> None:
    rng = np.random.default_rng(1)
    rows, calibration = [], {}
    for index in range(9):
        probability = rng.dirichlet(np.ones(3), (11, 7)).transpose(2, 0, 1)
        truth = rng.integers(0, 3, (11, 7))
        bins = calibration_bins(truth, probability)
        for label in (1, 2):
            alone = calibration_bins(truth == label, probability[label : label + 1])
            np.testing.assert_array_equal(alone[0], bins[label - 1])
        calibration[str(index)] = {"native": bins}
        rows += image_metrics(
            str(index), truth, truth, resolution="native", num_classes=3, bins=bins
        )
    result = summarise(rows, calibration, resamples=100, seed=3)["resolutions"]["native"]  # type: ignore[arg-type]
    everything = np.stack([calibration[str(i)]["native"] for i in range(9)])
    draws = np.random.default_rng(3).integers(9, size=(100, 9))
    for label in (1, 2):
        of_class = everything[:, label - 1]
        estimate = result["classes"][str(label)]["pooled"]["ece"]
        assert estimate["value"] == pytest.approx(calibration_error(of_class.sum(0)))
        redrawn = [calibration_error(of_class[draw].sum(0)) for draw in draws]
        assert [estimate["low"], estimate["high"]] == pytest.approx(
            list(np.percentile(redrawn, [2.5, 97.5]))
        )
        mean = result["classes"][str(label)]["mean"]["ece"]["value"]
        assert mean == pytest.approx(np.mean([calibration_error(b) for b in of_class]))
        curve = result["calibration"][str(label)]
        assert sum(curve["pixels"]) == 9 * 77
        for pixels, probability_, frequency in zip(*curve.values(), strict=True):  # type: ignore[call-overload]
            assert (pixels == 0) == (probability_ is None) == (frequency is None)
    json.dumps(result, allow_nan=False)


def test_empty_masks_are_counted() -> None:
    result = summarise(rows_of(pairs(5)))["resolutions"]["native"]
    # pairs() adds three with empty truth, three with empty prediction, one of them both
    assert result["empty"] == {"truth": 3, "prediction": 3, "both": 1}


def test_one_image_has_a_degenerate_interval() -> None:
    row = rows_of(pairs(1))[0]
    estimate = summarise([row])["resolutions"]["native"]["macro"]["mean"]["dice"]
    assert estimate["low"] == estimate["value"] == estimate["high"] == row.dice


def test_duplicate_missing_and_no_rows_are_refused() -> None:
    rows = rows_of(pairs(3))
    with pytest.raises(ValueError, match="'image0000', class 1, at native resolution twice"):
        summarise([*rows, rows[0]])
    with pytest.raises(ValueError, match="lack image 'image0001', class 1, at network"):
        summarise([*rows, replace(rows[0], resolution="network")])
    with pytest.raises(ValueError, match="got none"):
        summarise([])
    with pytest.raises(ValueError, match=r"^resamples"):
        summarise(rows, resamples=0)
    with pytest.raises(ValueError, match=r"^confidence"):
        summarise(rows, confidence=95)


def test_a_thousand_images_take_seconds() -> None:
    mask = blobs(np.random.default_rng(0), (256, 256), 1.0).astype(np.uint8)
    other = np.roll(mask, 9, axis=0)
    start = time.process_time()  # a loaded machine must not fail it
    rows = [
        row
        for i in range(1000)
        for row in image_metrics(str(i), mask, other, resolution="network", hd95=False)
    ]
    summarise(rows)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("change", "error", "argument"),
    [
        ({"truth": np.zeros((8, 9), int)}, ValueError, "prediction"),
        ({"truth": np.zeros((8, 8, 1), int)}, ValueError, "truth"),
        ({"truth": np.zeros((0, 8), int)}, ValueError, "truth"),
        ({"truth": np.zeros((8, 8))}, TypeError, "truth"),
        ({"truth": np.full((8, 8), 255, np.uint8)}, ValueError, "truth"),
        ({"prediction": np.full((8, 8), -1)}, ValueError, "prediction"),
        ({"prediction": np.full((8, 8), 3), "num_classes": 3}, ValueError, "prediction"),
        ({"resolution": "full"}, ValueError, "resolution"),
        ({"num_classes": 0}, ValueError, "num_classes"),
    ],
)
def test_wrong_inputs_are_named(
    change: dict[str, Any], error: type[Exception], argument: str
) -> None:
    inputs: dict[str, Any] = {
        "truth": np.zeros((8, 8), np.uint8),
        "prediction": np.zeros((8, 8), bool),
        "resolution": "native",
    }
    image_metrics("a", **inputs)
    with pytest.raises(error, match=f"^{argument} must"):
        image_metrics("a", **(inputs | change))


# --- files ------------------------------------------------------------------------------------


def test_rows_read_back_to_the_same_bits(tmp_path: Path) -> None:
    rows = rows_of(pairs(6), hd95=True) + rows_of(pairs(6), resolution="network")
    rows.append(replace(rows[0], id='odd, "name"\nof a läsion'))
    path = tmp_path / "per_image.csv"
    write_csv(rows, path)
    key = lambda row: (row.id, row.resolution, row.label)  # noqa: E731
    for actual, expected in zip(read_csv(path), sorted(rows, key=key), strict=True):
        assert repr(actual) == repr(expected)
    assert path.read_bytes().splitlines()[0].startswith(b"id,resolution,label,height,width")


def test_files_of_before_the_later_columns_are_read(tmp_path: Path) -> None:
    rows = rows_of(pairs(3), hd95=True)
    path = tmp_path / "per_image.csv"
    write_csv(rows, path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line.rsplit(",", 5)[0] for line in lines) + "\n")
    for actual, expected in zip(read_csv(path), rows, strict=True):
        assert repr(actual) == repr(replace(expected, assd=math.nan, nsd=math.nan))


def test_foreign_rows_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "per_image.csv"
    path.write_text("id,dice\na,0.5\n")
    with pytest.raises(ValueError, match="must have the columns"):
        read_csv(path)
    write_csv(rows_of(pairs(1)), path)
    whole = path.read_text()
    for damaged in (whole[:-60], whole.replace("native", "native,", 1).rstrip() + ",1\n"):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"per_image\.csv"):
            read_csv(path)
    path.write_text(whole.replace(",1,48,", ",one,48,"))
    with pytest.raises(ValueError, match=r"per_image\.csv, line 2: invalid literal"):
        read_csv(path)


def test_summary_reads_back_and_has_a_version(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    summary = summarise(rows_of(pairs(4)))
    write_summary(summary, path)
    assert read_summary(path) == summary
    assert "hd95" not in summary["resolutions"]["native"]["macro"]["mean"]
    assert json.loads(path.read_text())["bootstrap"] == {
        "method": "percentile",
        "unit": "image",
        "resamples": 2000,
        "confidence": 0.95,
        "seed": 0,
    }
    for text in ('{"schema": 99}', "[]", "{}"):
        path.write_text(text)
        with pytest.raises(ValueError, match="schema 1"):
            read_summary(path)


def test_a_failed_write_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# --- the validation curve ---------------------------------------------------------------------


def batches(num_classes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(num_classes)
    result = []
    for size in (3, 2, 1):
        logits = torch.randn(size, num_classes, 16, 18, generator=generator)
        mask = torch.randint(0, max(num_classes, 2), (size, 1, 16, 18), generator=generator)
        mask[0] = 0
        result.append((logits, mask.float() if num_classes == 1 else mask))
    return result


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("num_classes", [1, 3])
def test_streaming_agrees_with_the_summary(num_classes: int) -> None:
    metric = SegmentationMetrics(num_classes)
    rows = []
    for step, (logits, mask) in enumerate(batches(num_classes)):
        metric.update(logits, mask)
        prediction = discretise(logits)
        assert prediction.shape == mask.shape
        assert prediction.dtype == torch.uint8
        for i in range(len(mask)):
            arrays_ = mask[i, 0].to(torch.uint8).numpy(), prediction[i, 0].numpy()
            rows += image_metrics(
                f"{step}/{i}", *arrays_, resolution="network", num_classes=num_classes, hd95=False
            )
    macro = summarise(rows)["resolutions"]["network"]["macro"]
    values = metric.compute()
    assert set(values) == {*RATES, *(f"pooled_{name}" for name in RATES)}
    for name in RATES:
        assert values[name].item() == pytest.approx(macro["mean"][name]["value"], rel=1e-6)
        pooled = values[f"pooled_{name}"].item()
        assert pooled == pytest.approx(macro["pooled"][name]["value"], rel=1e-6)
    metric.reset()
    assert all(value.isnan() for value in metric.compute().values())


PROCESS = """
import sys, torch
from eamnet.metrics import SegmentationMetrics
torch.set_num_threads(1)
rank, store, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
metric = SegmentationMetrics(1)
for i, batch in enumerate(torch.load(f"{folder}/batches.pt", weights_only=True)):
    if min(i, 1) == rank:  # one batch on the first process, two on the second
        metric.update(*batch)
torch.save(metric.compute(), f"{folder}/result{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    torch.save(batches(1), tmp_path / "batches.pt")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), str(tmp_path / "store"), str(tmp_path)],
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    finally:
        for process in processes:  # one that fails would leave the other waiting for it
            process.kill()
    alone = SegmentationMetrics(1)
    for batch in batches(1):
        alone.update(*batch)
    for rank in range(2):
        result = torch.load(tmp_path / f"result{rank}.pt", weights_only=True)
        torch.testing.assert_close(result, alone.compute())


def test_discretise_decides_above_one_half() -> None:
    logits = torch.tensor([-1.0, -1e-3, 0.0, 1e-3, 50.0]).reshape(1, 1, 1, 5)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert discretise(logits.to(dtype)).flatten().tolist() == [0, 0, 0, 1, 1]
    several = torch.tensor([[1.0, 0.0, 3.0], [1.0, 2.0, 3.0], [0.0, 2.0, 4.0]])
    assert discretise(several[None, :, None]).flatten().tolist() == [0, 1, 2]


def test_streaming_names_wrong_inputs() -> None:
    metric = SegmentationMetrics(1)
    with pytest.raises(ValueError, match=r"^logits must"):
        metric.update(torch.zeros(1, 2, 8, 8), torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"^mask must"):
        metric.update(torch.zeros(1, 1, 8, 8), torch.zeros(1, 8, 8))
    with pytest.raises(ValueError, match=r"^num_classes must"):
        SegmentationMetrics(0)
