"""Tests on another data set, and pictures that two data sets have in common."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eamnet import runs
from eamnet.cli import main
from eamnet.data import IsicSource, Split, SyntheticSource
from eamnet.data.overlap import find_overlaps, fingerprint
from eamnet.data.source import Pixels
from eamnet.metrics import read_csv
from eamnet.report import write_report

ISIC = Path(__file__).parents[3] / "shared" / "data" / "isic2017"


def saved(image: Pixels, size: tuple[int, int], quality: int) -> Pixels:
    """As a JPEG of another size."""
    buffer = io.BytesIO()
    Image.fromarray(image).resize(size, Image.Resampling.BICUBIC).save(
        buffer, "JPEG", quality=quality
    )
    return np.asarray(Image.open(buffer))


@pytest.fixture(scope="module")
def drawn() -> list[Pixels]:
    source = SyntheticSource(30, size=128)
    return [source.load(record)[0] for record in source]


@pytest.mark.parametrize(
    "change",
    [
        lambda image: saved(image, (96, 72), 75),
        lambda image: saved(image, (400, 300), 40),
        lambda image: ((image / 255.0) ** 0.8 * 230 + 10).astype(np.uint8),
    ],
    ids=["smaller", "larger and compressed", "brighter"],
)
def test_a_changed_copy_is_found_and_other_pictures_are_not(
    change: Callable[[Pixels], Pixels], drawn: list[Pixels]
) -> None:
    table = np.array([fingerprint(image) for image in drawn])
    copies = np.array([fingerprint(change(image)) for image in drawn])
    alike = copies @ table.T
    assert alike.diagonal().min() > 0.9
    np.fill_diagonal(alike, 0)
    assert alike.max() < 0.9


def test_a_picture_without_structure_is_like_nothing() -> None:
    flat = np.full((50, 60, 3), 90, np.uint8)
    assert not fingerprint(flat).any()


def test_pairs_are_named_most_alike_first() -> None:
    source = SyntheticSource(6, size=32)
    ids = [record.id for record in source]
    found = find_overlaps((source, ids[:4]), (source, ids[2:]), likeness=0.999)
    assert found == [(ids[2], ids[2], 1.0), (ids[3], ids[3], 1.0)]
    assert not find_overlaps((source, ids[:2]), (source, []))
    with pytest.raises(ValueError, match="likeness"):
        find_overlaps((source, ids), (source, ids), likeness=0)


def test_pictures_of_isic_2017_that_are_in_two_parts_are_found() -> None:
    if not ISIC.is_dir():
        pytest.skip(f"{ISIC} is not there")
    source = IsicSource(ISIC, 2017)
    parts = source.parts
    known = {"ISIC_0012970": "ISIC_0012127", "ISIC_0000171": "ISIC_0015124"}
    train = sorted({*known, *parts["train"][::40]})
    val = sorted({*known.values(), *parts["val"][::5]})
    found = find_overlaps((source, train), (source, val))
    assert {o.first: o.second for o in found} == known
    assert len(found) == len(known)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def other(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three pictures of the run's training part, at another size, and three new ones."""
    monkeypatch.setattr(runs, "write_report", lambda folder: folder / "report.html")
    folder = tmp_path / "clinic"
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    split = Split.read(trained / "split.json")
    known, new = SyntheticSource(24, size=32), SyntheticSource(3, seed=7, size=32)
    chosen = [known[name] for name in (*split.train[:2], split.val[0])]
    for source, records in ((known, chosen), (new, new.records)):
        for index, record in enumerate(records):
            image, mask = source.load(record)
            assert mask is not None
            name = f"{'known' if source is known else 'new'}{index}"
            for kind, pixels in (("images", image), ("masks", mask * np.uint8(255))):
                enlarged = pixels.repeat(2, axis=0).repeat(2, axis=1)
                Image.fromarray(enlarged).save(folder / kind / f"{name}.png")
    return folder


def test_pictures_of_the_training_are_refused_left_out_or_allowed(
    run: Path, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["external", "--run_dir", str(run), "--external.dataset", "folder"]
    words += ["--external.root", str(other)]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "3 of 6 pictures" in said
    assert "known0 is synthetic_" in said
    assert "new" not in said.partition("no external test")[0]
    folder = run / "test-clinic"
    assert {p.name for p in folder.iterdir()} == {"overlap.json"}

    assert main([*words, "--overlap", "leave_out"]) == 0
    assert {row.id for row in read_csv(folder / "per_image.csv")} == {"new0", "new1", "new2"}
    split = Split.read(folder / "split.json")
    assert split.protocol == "external test, without those of the training"
    pairs = json.loads((folder / "overlap.json").read_text())["pairs"]
    assert sorted(pair[1] for pair in pairs) == ["known0", "known1", "known2"]
    # Scores of one choice do not take the place of another's.
    assert main([*words, "--overlap", "allow"]) == 2
    assert "holds another split" in capsys.readouterr().err
    assert main([*words, "--overlap", "allow", "--name", "all"]) == 0
    assert len({row.id for row in read_csv(run / "test-all" / "per_image.csv")}) == 6
    # The run's own evaluation and split are as they were; the report shows both tests.
    assert not (run / "test").exists()
    html = write_report(run).read_text()
    assert "Test on clinic" in html
    assert "Test on all" in html


def test_one_command_trains_and_tests(tiny: list[str], other: Path, tmp_path: Path) -> None:
    run = tmp_path / "new"
    words = ["external", "--run_dir", str(run), *tiny, "--trainer.max_epochs", "1"]
    words += ["--external.dataset", "folder", "--external.root", str(other)]
    assert main([*words, "--overlap", "leave_out"]) == 0
    assert {row.id for row in read_csv(run / "test-clinic" / "per_image.csv")} == {
        "new0",
        "new1",
        "new2",
    }
    config = (run / "config.yaml").read_text()
    assert "dataset: synthetic" in config
    assert "protocol: random" in config


def test_the_other_data_set_must_be_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["external", "--run_dir", str(run)]) == 2
    assert "--external.dataset" in capsys.readouterr().err
    # The root of the training's data is not taken for the other's.
    assert main(["external", "--run_dir", str(run), "--external.dataset", "ph2"]) == 2
    assert "root must name the folder of ph2" in capsys.readouterr().err
