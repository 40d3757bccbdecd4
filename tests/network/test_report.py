"""The report of a run folder made of synthetic arrays: what it says, shows and survives."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from eamnet.metrics import (
    ImageMetrics,
    image_metrics,
    outline,
    read_summary,
    summarise,
    write_csv,
    write_summary,
)
from eamnet.report import (
    PREDICTION_COLOUR,
    TRUTH_COLOUR,
    contact_sheet,
    load_picture,
    outline_overlay,
    picture_folder,
    save_test_picture,
    select_pictures,
    write_contact_sheet,
    write_report,
)

Pixels = NDArray[np.uint8]


def lesion(rng: np.random.Generator, shape: tuple[int, int], num_classes: int) -> Pixels:
    """An ellipse of each class, one inside the other."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    centre = np.array(shape) * rng.uniform(0.4, 0.6, 2)
    radii = np.array(shape) * rng.uniform(0.12, 0.35, 2)
    distance = np.hypot((y - centre[0]) / radii[0], (x - centre[1]) / radii[1])
    labels = np.zeros(shape, np.uint8)
    for label in range(1, max(num_classes, 2)):
        labels[distance < 1 / label] = label
    return labels


def make_run(
    folder: Path, *, images: int = 12, num_classes: int = 1, part: str = "test", epochs: int = 6
) -> list[ImageMetrics]:
    """Fill a run folder as a real run would, from synthetic pictures and predictions."""
    rng = np.random.default_rng(images)
    rows: list[ImageMetrics] = []
    pictures = folder / part / "pictures"
    for index in range(images):
        shape = 90 + 10 * (index % 3), 120
        truth = lesion(rng, shape, num_classes)
        prediction = np.roll(truth, rng.integers(-3 - index, 4 + index, 2), (0, 1))
        skin = np.array([205, 160, 140]) + rng.normal(0, 6, (*shape, 3))
        image = (skin - 90 * (truth > 0)[..., None]).clip(0, 255).astype(np.uint8)
        name = f"ISIC_{index:07d}"
        for resolution, step in (("native", 1), ("network", 2)):
            rows += image_metrics(
                name,
                truth[::step, ::step],
                prediction[::step, ::step],
                resolution=resolution,  # type: ignore[arg-type]
                num_classes=num_classes,
                native_size=shape,
            )
        save_test_picture(pictures, name, image, truth, prediction)
    write_csv(rows, folder / part / "per_image.csv")
    write_summary(summarise(rows, resamples=200), folder / part / "summary.json")
    speed = {"seconds_per_picture": 0.0123, "device": "cpu", "threads": 2}
    (folder / part / "speed.json").write_text(json.dumps(speed))
    with (folder / "metrics.csv").open("w", newline="") as file:
        columns = ["epoch", "step", "lr", "train_loss", "val_dice", "val_iou", "val_loss"]
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for epoch in range(epochs):
            common = {"epoch": epoch, "step": 10 * epoch + 9}
            writer.writerow(
                common | {"val_loss": 1 / (epoch + 1), "val_dice": 0.8 - 1 / (epoch + 2)}
            )
            writer.writerow(common | {"train_loss": 0.9 / (epoch + 1), "lr": 1e-3 / (epoch + 1)})
    (folder / "config.yaml").write_text(
        "seed_everything: 3\ndata:\n  dataset: isic2018\n  size: 64\n"
    )
    ids = sorted({row.id for row in rows})
    (folder / "split.json").write_text(json.dumps({"schema": 1, "hash": "5eed" * 16, "test": ids}))
    versions = {"eamnet": "0.1.0", "python": "3.11", "device": {"name": "cpu", "threads": 2}}
    (folder / "versions.json").write_text(json.dumps(versions))
    (folder / "data_report.json").write_text(json.dumps(["2 masks are not binary: a.png, b.png"]))
    return rows


class Page(HTMLParser):
    """What a browser would make of the page: its text, its pictures and what it would load."""

    VOID = frozenset({"meta", "br", "img", "link", "hr", "input", "source"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.references: list[str] = []
        self.images: list[tuple[dict[str, str | None], Image.Image]] = []
        self.style = ""
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == [], "unclosed tags"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        values = dict(attrs)
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            reference = values.get(name)
            if reference is None:
                continue
            if tag == "img":
                head, _, body = reference.partition(",")
                assert head == "data:image/png;base64"
                image = Image.open(io.BytesIO(base64.b64decode(body, validate=True)))
                image.load()
                assert image.format == "PNG"
                self.images.append((values, image))
            else:
                self.references.append(reference)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> out of place"

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["style"]:
            self.style += data
        else:
            self.text += data + " "

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "2026-01-02_baseline"
    folder.mkdir()
    make_run(folder)
    return folder


@pytest.fixture(scope="module")
def page(run_dir: Path) -> Page:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return read(path)


# --- the page ---------------------------------------------------------------------------------


def test_the_page_needs_nothing_but_itself(page: Page) -> None:
    assert all(reference.startswith("#") for reference in page.references)
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "video", "base"}
    assert "url(" not in page.style
    assert "@import" not in page.style
    assert "prefers-color-scheme: dark" in page.style
    assert "@media print" in page.style


def test_the_headline_comes_first_with_its_interval(page: Page, run_dir: Path) -> None:
    mean = read_summary(run_dir / "test" / "summary.json")["resolutions"]["native"]["macro"]["mean"]
    dice, hd95 = mean["dice"], mean["hd95"]
    first = page.words[: page.words.index("12 pictures")]
    assert f"Dice {dice['value']:.3f} {dice['low']:.3f}–{dice['high']:.3f}" in first
    assert f"HD95, pixels {hd95['value']:.1f} {hd95['low']:.1f}–{hd95['high']:.1f}" in first
    assert "not a medical device" in first
    assert "2026-01-02_baseline" in first
    assert "isic2018" in first


def test_every_number_of_the_summary_is_in_the_table(page: Page, run_dir: Path) -> None:
    summary = read_summary(run_dir / "test" / "summary.json")
    table = page.words[page.words.index("all metrics") :]
    for resolution in summary["resolutions"].values():
        for averaging in ("mean", "pooled"):
            for name, e in resolution["macro"][averaging].items():
                digits = 1 if name in ("hd95", "assd") else 3
                value, low, high = (f"{e[k]:.{digits}f}" for k in ("value", "low", "high"))
                assert f"{value} {low}–{high}" in table, (name, averaging)
    for word in ("mean over pictures", "pooled pixels", "native resolution", "network resolution"):
        assert word in table
    assert "120×90 to 120×110 pixels" in table
    assert "60×45 to 60×55 pixels" in table


def test_pictures_are_those_selected_with_their_outlines(page: Page, run_dir: Path) -> None:
    from eamnet.metrics import read_csv

    rows = read_csv(run_dir / "test" / "per_image.csv")
    groups = select_pictures(rows)
    figures = [(a, image) for a, image in page.images if "outlines" in str(a["alt"])]
    assert len(figures) == sum(map(len, groups.values())) == 12
    shown = [str(attributes["alt"]).split()[0] for attributes, _ in figures]
    assert shown == [name for group in ("best", "median", "worst") for name in groups[group]]
    sizes = {row.id: (row.native_width, row.native_height) for row in rows}
    for name, (attributes, image) in zip(shown, figures, strict=True):
        assert image.size == tuple(4 * side for side in sizes[name]), "small ones are enlarged"
        assert (attributes["width"], attributes["height"]) == tuple(map(str, image.size))
        for colour in (TRUTH_COLOUR, PREDICTION_COLOUR):
            assert (np.asarray(image) == colour).all(-1).any()
    assert page.words.index("Best") < page.words.index("Median") < page.words.index("Worst")


def test_curves_and_distributions_are_drawn(page: Page) -> None:
    alts = [str(a["alt"]) for a, _ in page.images]
    (curves,) = [alt for alt in alts if alt.startswith("Learning curves")]
    assert "best Dice 0.657, epoch 5" in curves  # 0.8 - 1/7
    assert any("histogram of Dice over 12 pictures" in alt for alt in alts)
    for attributes, image in page.images:
        if "outlines" not in str(attributes["alt"]):
            assert image.width == pytest.approx(2 * int(str(attributes["width"])), abs=1)
            assert image.width > 1000
            assert np.asarray(image.convert("L")).std() > 5, "an empty figure"


def test_provenance_is_complete(page: Page) -> None:
    for text in (
        "5eed" * 16,
        "test 12 entries",
        "device.threads 2",
        "seed_everything: 3",
        "2 masks are not binary: a.png, b.png",
        "1 note on the data",
        "12.3 ms per picture (device cpu, threads 2)",
        "200 resamples of the 12 pictures, seed 0",
        "So few pictures make the intervals too narrow",
    ):
        assert text in page.words, text
    assert "missing" not in page.words


def test_the_same_run_gives_the_same_bytes(run_dir: Path) -> None:
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first


def test_text_from_outside_is_text(tmp_path: Path) -> None:
    rows = image_metrics(
        "<b>x</b>", np.eye(8, dtype=int), np.eye(8, dtype=int), resolution="native"
    )
    (tmp_path / "test").mkdir()
    write_csv(rows, tmp_path / "test" / "per_image.csv")
    (tmp_path / "config.yaml").write_text("note: <script>alert(1)</script>\n")
    (tmp_path / "data_report.json").write_text('["</ul><img src=\\"http://example.org/x\\">"]')
    page = read(write_report(tmp_path))
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.text
    assert all(reference.startswith("#") for reference in page.references)


# --- other runs -------------------------------------------------------------------------------


def test_several_classes_have_a_table_each(tmp_path: Path) -> None:
    make_run(tmp_path, images=4, num_classes=3)
    page = read(write_report(tmp_path))
    assert "Macro average" in page.words
    macro = read_summary(tmp_path / "test" / "summary.json")["resolutions"]["native"]["classes"]
    for label in ("1", "2"):
        after = page.words[page.words.index(f"Class {label}") :]
        assert f"{macro[label]['mean']['dice']['value']:.3f}" in after


def test_a_validation_part_says_that_it_is_no_test(tmp_path: Path) -> None:
    make_run(tmp_path, images=3, part="validation")
    words = read(write_report(tmp_path)).words
    assert "The validation part chose the checkpoint" in words
    make_run(tmp_path, images=4, part="test")
    words = read(write_report(tmp_path)).words.replace(" ,", ",")
    assert words.index("Test part, 4 pictures") < words.index("Validation part: all metrics")
    assert "The validation part chose the checkpoint" not in words


def test_an_empty_folder_gives_a_report_of_what_is_missing(tmp_path: Path) -> None:
    words = read(write_report(tmp_path)).words
    for name in ("metrics.csv", "config.yaml", "split.json", "versions.json", "data_report.json"):
        assert f"{name} is missing" in words
    assert "No evaluated part" in words


@pytest.mark.parametrize(
    "damage",
    [
        {
            "test/summary.json": (None, "test/summary.json is missing: averages computed anew"),
            "metrics.csv": ("step\n1\n", "metrics.csv could not be read"),
            "config.yaml": ("a: [", "config.yaml could not be read"),
            "split.json": ("[1]", "split.json could not be read"),
            "versions.json": ("not json", "versions.json could not be read"),
            "data_report.json": ("{}", "data_report.json could not be read"),
            "test/speed.json": ("{}", "test/speed.json could not be read"),
            "test/pictures/ISIC_0000000/truth.png": (None, "ISIC_0000000 could not be read"),
            "test/pictures/ISIC_0000001/image.png": ("x", "ISIC_0000001 could not be read"),
        },
        {
            "test/summary.json": ("{}", "test/summary.json could not be read"),
            "metrics.csv": ("epoch,val_dice\n1,oops\n", "metrics.csv could not be read"),
        },
        {"test/per_image.csv": (None, "test/per_image.csv is missing")},
        {"test/per_image.csv": ("a,b\n1,2\n", "test/per_image.csv could not be read")},
    ],
)
def test_what_is_missing_or_damaged_is_named(
    tmp_path: Path, damage: dict[str, tuple[str | None, str]]
) -> None:
    make_run(tmp_path, images=3, epochs=1)
    for name, (content, _) in damage.items():
        if content is None:
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_text(content)
    page = read(write_report(tmp_path))
    for _, expected in damage.values():
        assert expected in page.words
    assert str(tmp_path) not in page.text, "a report may be passed on: no machine's paths in it"
    assert "Dice" in page.words
    assert page.images


def test_no_run_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="run_dir"):
        write_report(tmp_path / "absent")


# --- pictures ---------------------------------------------------------------------------------


def test_pictures_read_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (30, 41, 3), dtype=np.uint8)
    truth = rng.integers(0, 5, (30, 41), dtype=np.int64)
    prediction = truth > 2
    for name in ("plain", "sub/folder:a?*", "..", "läsion 1", ".hidden"):
        folder = save_test_picture(tmp_path / "pictures", name, image, truth, prediction)
        assert folder == picture_folder(tmp_path / "pictures", name)
        assert folder.parent == tmp_path / "pictures", "an id must not leave the folder"
        assert sorted(f.name for f in folder.iterdir()) == [
            "image.png",
            "prediction.png",
            "truth.png",
        ]
        picture = load_picture(folder)
        np.testing.assert_array_equal(picture.image, image)
        np.testing.assert_array_equal(picture.truth, truth)
        np.testing.assert_array_equal(picture.prediction, prediction)
    with Image.open(folder / "prediction.png") as mask:
        seen = np.asarray(mask.convert("L"))
    np.testing.assert_array_equal(seen, prediction * 255, "a viewer must show white on black")


def test_large_pictures_are_reduced_with_their_classes_intact(tmp_path: Path) -> None:
    truth = np.zeros((600, 900), np.uint8)
    truth[100:400, 300:600] = 3
    folder = save_test_picture(tmp_path, "a", np.zeros((600, 900, 3), np.uint8), truth, truth)
    picture = load_picture(folder)
    assert picture.truth.shape == (341, 512)
    assert set(np.unique(picture.truth)) == {0, 3}
    assert (picture.truth == 3).mean() == pytest.approx((truth == 3).mean(), rel=0.02)


def test_outlines_lie_on_the_edges_and_nowhere_else() -> None:
    image = np.full((60, 80, 3), 200, np.uint8)
    truth, prediction = np.zeros((2, 60, 80), np.uint8)
    truth[10:40, 10:40] = 1
    prediction[20:50, 30:70] = 1
    before = [a.copy() for a in (image, truth, prediction)]
    overlay = outline_overlay(image, truth, prediction)
    for a, b in zip((image, truth, prediction), before, strict=True):
        np.testing.assert_array_equal(a, b, "inputs are not written to")

    def drawn(colour: tuple[int, ...]) -> NDArray[np.bool_]:
        return (overlay == colour).all(-1)

    edges = outline(prediction > 0)
    np.testing.assert_array_equal(drawn(PREDICTION_COLOUR), edges)
    assert drawn(TRUTH_COLOUR)[outline(truth > 0) & ~edges].all()
    assert (overlay[:5] == 200).all()
    assert (overlay[15:18, 15:25] == 200).all(), "the inside of a region stays visible"
    coincident = outline_overlay(image, truth, truth)
    for colour in (TRUTH_COLOUR, PREDICTION_COLOUR):
        assert (coincident == colour).all(-1).any(), "both lines show where they coincide"
    np.testing.assert_array_equal(outline_overlay(image, None, None), image)


def test_every_class_is_outlined() -> None:
    image = np.full((40, 40, 3), 200, np.uint8)
    prediction = np.zeros((40, 40), np.uint8)
    prediction[5:35, 5:35] = 1
    prediction[15:25, 15:25] = 2
    overlay = outline_overlay(image, None, prediction)
    assert (overlay[15, 18] == PREDICTION_COLOUR).all()
    assert (overlay[5, 18] == PREDICTION_COLOUR).all()


def test_selection_takes_the_ends_and_the_middle() -> None:
    truth = np.zeros((10, 20), np.uint8)
    truth[:, :10] = 1
    rows = []
    for index in range(10):
        prediction = np.zeros_like(truth)
        prediction[:, index : 10 + index] = 1
        rows += image_metrics(f"i{index}", truth, prediction, resolution="native")
    expected = {"best": ["i0", "i1"], "median": ["i4", "i5"], "worst": ["i8", "i9"]}
    assert select_pictures(rows, 2) == expected
    assert select_pictures(rows[::-1], 2) == expected
    assert select_pictures(rows[:2], 4) == {"best": ["i0"], "median": ["i0"], "worst": ["i1"]}
    # resolution: the ranking is the native one where there is one
    flipped = [
        row
        for index in range(10)
        for row in image_metrics(
            f"i{index}", truth, np.roll(truth, 9 - index, 1), resolution="network"
        )
    ]
    assert select_pictures(rows + flipped, 2) == expected
    with pytest.raises(ValueError, match="none"):
        select_pictures([])
    with pytest.raises(ValueError, match="count"):
        select_pictures(rows, 0)


def test_contact_sheet_holds_every_tile() -> None:
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (9, 90, 180), (90, 9, 90)]
    tiles = [
        (f"tile {i}\nDice 0.{i}", np.full((30 + 10 * i, 40, 3), colour, np.uint8))
        for i, colour in enumerate(colours)
    ]
    sheet = contact_sheet(tiles, columns=3, tile=64)
    assert sheet.dtype == np.uint8
    assert sheet.ndim == 3
    assert 3 * 64 < sheet.shape[1] < 3 * 64 + 60
    for colour in [*colours, TRUTH_COLOUR, PREDICTION_COLOUR]:
        assert (sheet == colour).all(-1).sum() > 100, colour
    with pytest.raises(ValueError, match="tiles"):
        contact_sheet([])
    with pytest.raises(ValueError, match="columns"):
        contact_sheet(tiles, columns=0)


def test_contact_sheet_of_an_evaluation(run_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    write_contact_sheet(run_dir / "test", path, count=2, tile=96)
    with Image.open(path) as sheet:
        assert sheet.format == "PNG"
        assert 2 * 96 < sheet.width < 3 * 96
        assert 3 * 96 < sheet.height < 5 * 96


@pytest.mark.parametrize(
    ("change", "error", "argument"),
    [
        ({"image": np.zeros((8, 9, 3))}, TypeError, "image"),
        ({"image": np.zeros((8, 9), np.uint8)}, ValueError, "image"),
        ({"truth": np.zeros((8, 9))}, TypeError, "truth"),
        ({"truth": np.zeros((9, 8), bool)}, ValueError, "truth"),
        ({"prediction": np.zeros((8, 9, 1), bool)}, ValueError, "prediction"),
    ],
)
def test_wrong_pictures_are_named(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], argument: str
) -> None:
    mask = np.zeros((8, 9), bool)
    inputs: dict[str, Any] = {
        "image": np.zeros((8, 9, 3), np.uint8),
        "truth": mask,
        "prediction": mask,
    }
    save_test_picture(tmp_path, "a", **inputs)
    outline_overlay(**inputs)
    with pytest.raises(error, match=rf"^{argument} must"):
        save_test_picture(tmp_path, "a", **(inputs | change))
    with pytest.raises(error, match=rf"^{argument} must"):
        outline_overlay(**(inputs | change))


def test_styles_name_only_colours_that_exist(page: Page) -> None:
    used = set(re.findall(r"var\((--[a-z-]+)\)", page.style))
    for block in ("light dark", "dark) { :root", "light; --ink"):
        definitions = page.style[page.style.index(block) :].split("}")[0]
        assert used <= set(re.findall(r"(--[a-z-]+):", definitions)) | {"--warn-rule"}
