"""Studies: which trainings they are made of, what is kept, what is refused, what the page says."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eamnet import runs
from eamnet.cli import main
from eamnet.data import Split
from eamnet.page import Page, Plot, Table
from eamnet.training import SegmentationTask
from eamnet.trials import Result, Study, Trial, _Row, read_results

NUCLEI = Path(__file__).parents[3] / "shared" / "data" / "nuclei2018"


@pytest.fixture(scope="module", autouse=True)
def _no_run_reports() -> Iterator[None]:
    """The runs' own reports take longer than these trainings and are tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "write_report", lambda folder: folder / "report.html")
        yield


@pytest.fixture
def options(tiny: list[str]) -> list[str]:
    return [
        *tiny,
        *("--trainer.max_epochs", "2", "--model.widths", "[4,4,8,8]", "--model.memory_size", "4"),
        *("--model.decoder_widths", "[4,4,4]", "--model.heads", "2"),
    ]


class Trainings:
    """Stands in for the training of a trial; scores follow from its configuration."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.results: dict[str, Result] = {}
        self.configurations: dict[str, Any] = {}
        self.fail: dict[str, BaseException] = {}

    def __call__(self, study: Study, trial: Trial) -> Result:
        if trial.stem in self.fail:
            raise self.fail[trial.stem]
        self.done.append(trial.stem)
        if trial.name not in self.configurations:
            self.configurations[trial.name] = study.configure(trial.overrides).model
        model = self.configurations[trial.name]
        (study.folder / "trials" / trial.stem / "checkpoints").mkdir(parents=True)
        split = Split.read(study.folder / trial.split)
        correct = 10 + 4 * model.mrcf + 2 * (model.cmam != "none") + trial.seed
        rows = [
            _Row(name, 1, 32, 32, correct + index, 20, 5, 900, 3.5, 1.5, 0.5, 0.1).metrics()
            for index, name in enumerate(split.test)
        ]
        result = self.results[trial.stem] = Result(
            name=trial.name,
            seed=trial.seed,
            overrides=dict(trial.overrides),
            configuration={
                "data": {"dataset": "synthetic", "size": 32, "batch_size": 4, "folds": 3},
                "trainer": {"max_epochs": 2},
            },
            split=split.hash,
            parameters=1000,
            epochs=2,
            seconds=1.0,
            versions={},
            parts={"val": rows[:1], "test": rows},
        )
        return result


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Trainings:
    stand_in = Trainings()
    monkeypatch.setattr(Study, "_train", lambda study, trial: stand_in(study, trial))
    return stand_in


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time of what is not about figures."""
    monkeypatch.setattr(Plot, "png", b"")


def test_ablate_trains_every_subset_of_the_modules_once(
    options: list[str], trainings: Trainings, tmp_path: Path
) -> None:
    words = ["ablate", "--study", str(tmp_path / "s"), "--seeds", "2", *options]
    assert main(words) == 0
    parts = {n: (m.mrcf, m.cmam, m.eab) for n, m in trainings.configurations.items()}
    assert parts == {
        "baseline": (False, "none", False),
        "mrcf": (True, "none", False),
        "cmam": (False, "cross", False),
        "eab": (False, "none", True),
        "mrcf+cmam": (True, "cross", False),
        "mrcf+eab": (True, "none", True),
        "cmam+eab": (False, "cross", True),
        "full": (True, "cross", True),
    }
    assert trainings.done == [f"{name}-{seed}" for seed in (0, 1) for name in parts]
    page = tmp_path / "docs" / "page.md"
    shutil.rmtree(tmp_path / "s" / "trials")  # results are all that the page needs
    report = ["ablate", "--study", str(tmp_path / "s"), "--report_only", "true"]
    assert main([*report, "--page", str(page)]) == 0
    text = page.read_text()
    assert "(../s/differences.png)" in text
    assert (tmp_path / "s" / "differences.png").is_file()
    results = {(r.name, r.seed): r.mean("iou") for r in read_results(tmp_path / "s")}
    full, base = (np.mean([results[n, s] for s in (0, 1)]) for n in ("full", "baseline"))
    row = next(line for line in text.splitlines() if line.startswith("| full"))
    assert f"{full:.3f} [" in row
    assert f"{full - base:+.4f} [" in row
    eab = next(line for line in text.splitlines() if line.startswith("| EAB"))
    assert "| +0.0000 [−0.0" in eab
    assert "a single training" not in text
    assert "| 1.000 |" in eab
    html = (tmp_path / "s" / "report.html").read_text()
    assert "data:image/png" in html
    assert "memory_size: 4" in html
    assert 'src="http' not in html


@pytest.mark.usefixtures("no_figures")
def test_a_failing_trial_is_named_and_tried_again(
    options: list[str], trainings: Trainings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["ablate", "--variants", "fusions", "--study", str(tmp_path / "s"), "--seeds", "1"]
    trainings.fail["serial-0"] = RuntimeError("out of memory")
    assert main([*words, *options]) == 1
    assert trainings.done == ["cross-0", "parallel-0"]
    assert "not finished: serial-0: RuntimeError: out of memory" in capsys.readouterr().out
    report = (tmp_path / "s" / "report.html").read_text()
    assert "of cross, parallel there is a single training" in report
    trainings.fail.clear()
    assert main(words) == 0  # the folder's own configuration is enough; nothing is trained twice
    assert trainings.done == ["cross-0", "parallel-0", "serial-0"]
    assert not list((tmp_path / "s" / "failures").iterdir())


@pytest.mark.usefixtures("no_figures")
def test_an_interrupted_study_goes_on_with_what_is_left(
    options: list[str], trainings: Trainings, tmp_path: Path
) -> None:
    words = ["ablate", "--variants", "fusions", "--study", str(tmp_path / "s"), "--seeds", "1"]
    trainings.fail["serial-0"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        main([*words, *options])
    assert trainings.done == ["cross-0"]
    trainings.fail.clear()
    # Another process, still alive, has one of them.
    with (tmp_path / "s" / "trials" / ".parallel-0.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(words) == 1
    assert trainings.done == ["cross-0", "serial-0"]
    assert main(words) == 0


@pytest.mark.parametrize(
    ("keep", "left"), [("all", {"checkpoints"}), ("weights", set()), ("nothing", None)]
)
def test_what_is_kept(
    keep: str,
    left: set[str] | None,
    options: list[str],
    trainings: Trainings,
    tmp_path: Path,
) -> None:
    study = Study(tmp_path, "sweep", options, keep)  # type: ignore[arg-type]
    study.split()
    assert study.run([Trial("base", 0, {})])
    folder = tmp_path / "trials" / "base-0"
    found = {p.name for p in folder.iterdir()} if folder.exists() else None
    assert found == left


def test_what_would_not_compare_is_refused(options: list[str], tmp_path: Path) -> None:
    # A mistake that shows before the first trial can be put right.
    Study(tmp_path, "kfold", [*options, "--model.learning_rate", "3"])
    study = Study(tmp_path, "sweep", options)
    study.split()
    (tmp_path / "trials").mkdir()
    with pytest.raises(ValueError, match=r"model.learning_rate is 0.1, the study has 0.03"):
        Study(tmp_path, "sweep", ["--model.learning_rate", "0.1"])
    with pytest.raises(ValueError, match="of the kind 'sweep'"):
        Study(tmp_path, "kfold", options)
    with pytest.raises(ValueError, match=r"trainer.devices must be 'auto', 1 or a list of one"):
        Study(tmp_path / "several", "sweep", [*options, "--trainer.devices", "2"])
    other = tmp_path / "other.json"
    split = Split.read(tmp_path / "split.json")
    Split(split.dataset, split.protocol, 1, split.train, split.val, split.test).write(other)
    with pytest.raises(ValueError, match="holds another split"):
        Study(tmp_path, "sweep", ["--data.split", str(other), "--data.num_workers", "1"]).split()


def test_a_new_study_spares_what_is_in_the_folder(options: list[str], tmp_path: Path) -> None:
    drawn = Study(tmp_path / "first", "sweep", options).split()
    run, shared = tmp_path / "run", tmp_path / "shared"
    for folder in (run, shared):
        Split("synthetic", "mine", 0, drawn.train, drawn.test, drawn.val).write(
            folder / "split.json"
        )
    (run / "config.yaml").write_text("of a run")
    with pytest.raises(ValueError, match=r"not the folder of a study and holds 'config.yaml'"):
        Study(run, "sweep", options)
    assert (run / "config.yaml").read_text() == "of a run"
    options = [word if word != "random" else "auto" for word in options]
    assert Study(shared, "sweep", options).split().test == drawn.val


def test_results_read_back_as_they_were(
    options: list[str], trainings: Trainings, tmp_path: Path
) -> None:
    study = Study(tmp_path, "sweep", options)
    study.split()
    study.run([Trial("base", 0, {})])
    path = tmp_path / "results" / "base-0.json"
    result = Result.read(path)
    assert result == trainings.results["base-0"]
    copy = tmp_path / "copy.json"
    result.write(copy)
    assert copy.read_text() == path.read_text()
    assert json.loads(path.read_text())["scores"]["test"]["iou"] == result.mean("iou")
    path.write_text(path.read_text()[:-10])
    with pytest.raises(ValueError, match="is not a trial's result"):
        read_results(tmp_path)


@pytest.mark.usefixtures("no_figures")
def test_trials_of_other_pictures_are_not_compared(
    options: list[str], trainings: Trainings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["ablate", "--variants", "fusions", "--study", str(tmp_path), "--seeds", "1"]
    assert main([*words, *options]) == 0
    path = tmp_path / "results" / "serial-0.json"
    content = json.loads(path.read_text())
    content["parts"]["test"].pop()
    path.write_text(json.dumps(content))
    assert main([*words, "--report_only", "true"]) == 2
    assert "scored on other pictures" in capsys.readouterr().err


def test_a_sweep_grows_and_shares_the_configuration_that_it_starts_from(
    options: list[str], trainings: Trainings, tmp_path: Path
) -> None:
    words = ["sweep", "--study", str(tmp_path / "s"), "--seeds", "1"]
    memory = ["--key", "model.memory_size", "--values", "8,4"]
    assert main([*words, *memory, *options]) == 0
    assert trainings.done == ["memory_size=8-0", "base-0"]
    dilations = ["--key", "model.dilations", "--values", "[3,5,7],[1,2,3]"]
    assert main([*words, *dilations, "--page", str(tmp_path / "page.md")]) == 0
    assert trainings.done[2:] == ["dilations=1_2_3-0"]
    assert trainings.configurations["dilations=1_2_3"].dilations == (1, 2, 3)
    text = (tmp_path / "page.md").read_text()
    assert text.index("| 4 |") < text.index("| 8 |")
    assert "| [3, 5, 7] |" in text
    assert (tmp_path / "s" / "memory_size.png").is_file()
    assert (tmp_path / "s" / "dilations.png").is_file()


@pytest.mark.usefixtures("no_figures")
def test_the_stable_region_is_what_is_not_told_apart_from_the_best(
    options: list[str], trainings: Trainings, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    words = ["sweep", "--study", str(tmp_path / "s"), "--seeds", "2", "--page", str(page)]
    keys = ["--key", "model.cmam", "--values", "cross,serial,none"]
    assert main([*words, *keys, *options]) == 0
    rows = [line.split(" | ") for line in page.read_text().splitlines() if "%" not in line]
    stable = {row[0].strip("| "): row[-1].strip("| ") for row in rows if len(row) == 7}
    # "none" is lower in every picture and seed.
    assert stable["cross"] == stable["serial"] == "yes"
    assert stable["none"] == "no"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--key", "data.seed", "--values", "1,2"], "cannot be swept"),
        (["--key", "model.memory_size", "--values", "0"], "memory_size"),
        (["--key", "model.memory_sise", "--values", "4"], "memory_sise"),
        (["--key", "model.top_k"], "needs one --values"),
        ([], "--key"),
        (["--key", "model.top_k", "--values", "2", "--seeds", "0"], "seeds"),
    ],
)
def test_mistakes_show_before_the_first_training(
    words: list[str],
    said: str,
    options: list[str],
    trainings: Trainings,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["sweep", "--study", str(tmp_path / "s"), *words, *options]) == 2
    assert said in capsys.readouterr().err
    assert not trainings.done


def test_an_ablation_needs_its_modules(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["ablate", "--study", str(tmp_path), *options, "--model.eab", "false"]
    assert main(words) == 2
    assert "model.eab is False" in capsys.readouterr().err


def test_kfold_scores_every_picture_once(
    options: list[str], trainings: Trainings, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    words = ["kfold", "--study", str(tmp_path / "s"), "--folds", "3", "--page", str(page)]
    assert main([*words, *options]) == 0
    assert trainings.done == ["fold0-0", "fold1-0", "fold2-0"]
    ids = [row.id for r in read_results(tmp_path / "s") for row in r.parts["test"]]
    assert sorted(ids) == [f"synthetic_{i:06d}" for i in range(24)]
    text = page.read_text()
    assert "24 pictures out of fold, 3 of 3 folds" in text
    # Five folds are another study.
    assert main(["kfold", "--study", str(tmp_path / "s"), "--folds", "5"]) == 2
    assert main(["kfold", "--study", str(tmp_path / "s"), "--seeds", "2", "--page", str(page)]) == 0
    assert "over 2 seeds" in page.read_text()


def test_a_page_keeps_to_its_markers(tmp_path: Path) -> None:
    folder, document = tmp_path / "mine", tmp_path / "page.md"
    folder.mkdir()
    document.write_text("before\n<!-- begin mine -->\nold\n<!-- end mine -->\nafter\n")
    page = Page("Title", ["new", Table("numbers", ["a", "b"], [["<b>", "1|2"]])])
    for _ in range(2):
        page.insert(document, folder)
    text = document.read_text()
    assert text.startswith("before\n<!-- begin mine -->\nnew")
    assert text.endswith("<!-- end mine -->\nafter\n")
    assert "old" not in text
    assert "| <b> | 1/2 |" in text
    assert "&lt;b&gt;" in page.write(folder).read_text()
    document.write_text("<!-- begin mine -->")
    with pytest.raises(ValueError, match="not both"):
        page.insert(document, folder)


# --- real trainings ---------------------------------------------------------------------------


def test_same_seed_same_numbers_also_after_an_interruption(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several classes, so that this path is taken from end to end, too."""
    options = [*options, "--data.num_classes", "3"]
    first = ["sweep", "--study", str(tmp_path / "a"), "--seeds", "1", "--key", "model.memory_size"]
    assert main([*first, "--values", "4,8", *options]) == 0
    base, eight = read_results(tmp_path / "a")
    assert {row.label for row in eight.parts["test"]} == {1, 2}
    assert base.parameters < eight.parameters
    assert base.split == eight.split

    second = ["sweep", "--study", str(tmp_path / "b"), "--seeds", "1", "--key", "model.memory_size"]
    epochs: list[int] = []

    def broken(task: SegmentationTask) -> None:
        epochs.append(task.current_epoch)
        if len(epochs) == 2:
            raise RuntimeError("the machine went down")

    with monkeypatch.context() as patch:
        patch.setattr(SegmentationTask, "on_train_epoch_start", broken)
        assert main([*second, "--values", "8", *options]) == 2  # nothing to report on
        assert main(second[:-2]) == 0
    assert epochs == [0, 1, 1]
    (again,) = read_results(tmp_path / "b")
    assert again.parts == eight.parts
    assert again.configuration == eight.configuration
    assert again.parts != base.parts

    def none_is_left(study: Study, trial: Trial) -> Result:
        raise AssertionError(f"{trial.stem} was trained again")

    # Another study takes over what has the same configuration, whatever it is called there.
    monkeypatch.setattr(Study, "_train", none_is_left)
    third = ["ablate", "--variants", "fusions", "--seeds", "1", "--reuse", str(tmp_path / "a")]
    assert main([*third, "--study", str(tmp_path / "c"), *options]) == 1
    (cross,) = read_results(tmp_path / "c")
    assert (cross.name, cross.overrides) == ("cross", {"model.cmam": "cross"})
    assert cross.parts == base.parts
    for other in (["--seed_everything", "1"], ["--data.seed", "1"], ["--model.top_k", "3"]):
        study = Study(tmp_path / other[0], "sweep", [*options, *other])
        study.split()
        trial = Trial("base", int(other[0] == "--seed_everything"), {})
        assert study.reuse([trial], [tmp_path / "a"]) == []


def test_nuclei_by_two_folds(options: list[str], tmp_path: Path) -> None:
    """Pictures that are not of skin, read from files."""
    if not NUCLEI.is_dir():
        pytest.skip(f"{NUCLEI} is not there")
    for name in ("images", "masks"):
        (tmp_path / "nuclei" / name).mkdir(parents=True)
        for path in sorted((NUCLEI / name).iterdir())[:12]:
            with Image.open(path) as image:
                image.resize((48, 40), Image.Resampling.NEAREST).save(
                    tmp_path / "nuclei" / name / f"{path.stem}.png"
                )
    words = ["kfold", "--study", str(tmp_path / "s"), "--folds", "2", *options]
    words += ["--data.dataset", "folder", "--data.root", str(tmp_path / "nuclei")]
    assert main([*words, "--trainer.max_epochs", "1", "--keep", "nothing"]) == 0
    results = read_results(tmp_path / "s")
    assert sum(len(r.parts["test"]) for r in results) == 12
    assert {(row.height, row.width) for r in results for row in r.parts["test"]} == {(40, 48)}
