"""Test-time augmentation, measures of pictures, subgroups, and how a run shows them."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eamnet.cli import main
from eamnet.data import SyntheticSource
from eamnet.inference import Predictor
from eamnet.measures import area_fraction, contrast, solidity
from eamnet.metrics import ImageMetrics, image_metrics, read_csv, read_summary, summarise
from eamnet.subgroups import MIN_IMAGES, subgroups
from eamnet.tta import augmented_logits

# --- test-time augmentation -------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 3])
def test_the_mean_is_that_of_the_eight_views(classes: int) -> None:
    torch.manual_seed(0)
    network = nn.Conv2d(2, classes, 3, padding=1)
    image = torch.randn(2, 2, 5, 5)

    def probability(logits: Tensor) -> Tensor:
        return logits.sigmoid() if classes == 1 else logits.softmax(1)

    with torch.no_grad():
        views = []
        for index in range(8):
            seen = np.rot90(image.numpy(), index % 4, (2, 3))
            seen = seen[..., ::-1] if index < 4 else seen
            found = probability(network(torch.from_numpy(seen.copy()))).numpy()
            found = found[..., ::-1] if index < 4 else found
            views.append(np.rot90(found, -(index % 4), (2, 3)))
        logits = augmented_logits(network, image)
    assert len({view.tobytes() for view in views}) == 8
    np.testing.assert_allclose(probability(logits), np.mean(views, 0), atol=1e-6)


def test_the_mean_does_not_depend_on_how_the_picture_is_turned() -> None:
    torch.manual_seed(0)
    network = nn.Conv2d(1, 1, (3, 1), padding=(1, 0))
    image = torch.randn(1, 1, 4, 6)  # views of two shapes
    with torch.no_grad():
        expected = augmented_logits(network, image)
        turned = augmented_logits(network, torch.rot90(image, 1, (2, 3)))
        alone = network(torch.rot90(image, 1, (2, 3)))
    torch.testing.assert_close(torch.rot90(turned, -1, (2, 3)), expected)
    assert not torch.allclose(torch.rot90(alone, -1, (2, 3)), network(image))


def test_certain_predictions_stay_finite() -> None:
    logits = augmented_logits(lambda x: x * 1000, torch.tensor([[[[1.0, -1.0]]]]))
    assert logits.isfinite().all()
    assert logits.sigmoid().tolist() == [[[[1, 0]]]]


def test_the_predictor_averages(trained: Path) -> None:
    image = SyntheticSource(4, 5, 32, 1).load(SyntheticSource(4, 5, 32, 1).records[0])[0]
    weights = trained / "best.safetensors"
    plain, averaged = Predictor.from_file(weights), Predictor.from_file(weights, tta=True)
    flipped = np.ascontiguousarray(image[:, ::-1])
    assert np.abs(plain(flipped)[:, ::-1] - plain(image)).max() > 1e-3
    np.testing.assert_allclose(averaged(flipped)[:, ::-1], averaged(image), atol=1e-5)


# --- measures ---------------------------------------------------------------------------------


def test_measures_of_drawn_shapes() -> None:
    rectangle = np.zeros((40, 50), np.uint8)
    rectangle[5:25, 10:40] = 2  # any class counts
    assert area_fraction(rectangle) == 600 / 2000
    assert solidity(rectangle) == pytest.approx(1)
    cross = np.zeros((30, 30), bool)
    cross[10:20] = cross[:, 10:20] = True
    assert solidity(cross) == pytest.approx(500 / 700)  # the hull lacks four triangles of 50
    line = np.zeros((9, 9), bool)
    line[4, 2] = True
    assert solidity(line) == 1
    assert math.isnan(solidity(np.zeros((9, 9))))


def test_contrast_is_against_the_ring_alone() -> None:
    mask = np.zeros((100, 100), bool)
    mask[40:60, 40:60] = True
    image = np.full((3, 100, 100), 0.7)
    image[:, mask] = 0.5
    image[:, :20] = 0  # a dark corner, farther away than the ring is wide
    assert contrast(image, mask) == pytest.approx(0.2)
    assert contrast(1 - image, mask) == pytest.approx(-0.2)
    image[0, mask] = 0.7  # red as the skin: its weight in luminance is 0.299
    assert contrast(image, mask) == pytest.approx(0.2 * (1 - 0.299))
    assert math.isnan(contrast(image, np.zeros_like(mask)))
    assert math.isnan(contrast(image, np.ones_like(mask)))


# --- subgroups --------------------------------------------------------------------------------


def rows(count: int, diagnoses: tuple[str, ...] = ("",)) -> list[ImageMetrics]:
    """Larger lesions are segmented better; contrast falls as they grow."""
    found = []
    for index in range(count):
        truth = np.zeros((20, 20), bool)
        truth[: index + 1] = True
        prediction = truth.copy()
        prediction[0] = False
        found += image_metrics(
            f"{index:02d}",
            truth,
            prediction,
            resolution="native",
            contrast=1 - index / count,
            diagnosis=diagnoses[index % len(diagnoses)],
        )
    return found


def test_thirds_by_size_and_contrast() -> None:
    of = rows(18)
    found = subgroups(of[::-1])
    assert [(g["by"], g["group"].split(":")[0], g["images"]) for g in found] == [
        *(("lesion size", name, 6) for name in ("small", "medium", "large")),
        *(("contrast", name, 6) for name in ("low", "medium", "high")),
    ]
    assert found[0]["group"] == "small: 5.0 to 30.0 % of picture"
    assert found[0]["scores"] == summarise(of[:6])["resolutions"]["native"]["macro"]
    assert found[3]["scores"] == found[2]["scores"]  # the faintest are the largest
    dice = [g["scores"]["mean"]["dice"]["value"] for g in found[:3]]
    assert dice == sorted(dice)
    assert subgroups(rows(3 * MIN_IMAGES - 1)) == []


def test_groups_by_diagnosis_and_pictures_without_a_value() -> None:
    of = rows(18, ("melanoma", "naevus", "naevus"))
    empty = np.zeros((20, 20), bool)
    of += image_metrics("empty", empty, empty, resolution="native", diagnosis="naevus")
    found = {(g["by"], g["group"].split(":")[0]): g["images"] for g in subgroups(of)}
    assert found["diagnosis", "melanoma"] == 6
    assert found["diagnosis", "naevus"] == 13
    assert found["lesion size", "small"] == found["contrast", "low"] == 6


# --- in a run ---------------------------------------------------------------------------------


def test_a_run_is_tested_with_augmentation_beside_its_test(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    pictures = ["--data.split", str(tmp_path / "all.json"), "--data.protocol", "external"]
    for words in ([], ["--tta", "true"]):
        assert main(["test", "--run_dir", str(run), *pictures, *words]) == 0
    summaries = [read_summary(run / part / "summary.json") for part in ("test", "test-tta")]
    values = [s["resolutions"]["native"]["macro"]["mean"]["dice"]["value"] for s in summaries]
    assert values[0] != values[1]
    for summary, part in zip(summaries, ("test", "test-tta"), strict=True):
        found = read_csv(run / part / "per_image.csv")
        assert len(found) == 48
        assert all(row.assd >= 0 and 0 <= row.nsd <= 1 and 0 <= row.ece <= 1 for row in found)
        assert all(row.contrast > 0 for row in found), "synthetic lesions are darker than skin"
        assert {g["by"] for g in summary["subgroups"]} == {"lesion size", "contrast"}
        native = summary["resolutions"]["native"]
        assert sum(native["calibration"]["1"]["pixels"]) == 24 * 32 * 32
        assert "ece" in native["macro"]["pooled"]
    report = (run / "report.html").read_text()
    for text in (
        "Test part, test-time augmentation",
        "calibration curve per pixel",
        "Test part: subgroups",
        summaries[0]["subgroups"][0]["group"],
        "ASSD, pixels",
        "NSD at 1 % of the diagonal",
    ):
        assert text in report, text
