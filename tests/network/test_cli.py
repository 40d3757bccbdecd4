"""The command line: what a user types, what stands in the run folder, what is said on mistakes."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from eamnet import cli, doctor
from eamnet.cli import main
from eamnet.data import Split
from eamnet.metrics import read_csv, read_summary
from eamnet.model import EAMNet
from eamnet.report import write_report

CONFIGS = sorted(p.stem for p in (Path(cli.__file__).parent / "configs").glob("*.yaml"))


def printed_config(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    with pytest.raises(SystemExit) as end:
        main([*words, "--print_config"])
    assert end.value.code == 0
    config: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return config


def test_help_names_every_command_and_imports_no_torch() -> None:
    code = (
        "import sys; from eamnet.cli import main; main(['--help'])\n"
        "assert not {'torch', 'lightning', 'numpy'} & set(sys.modules)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=True,
    ).stdout
    for name, command in cli.COMMANDS.items():
        assert name in shown
        assert command.summary in shown


def test_output_that_nobody_reads_is_no_traceback() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "eamnet", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141


def test_every_command_is_there() -> None:
    for command in cli.COMMANDS.values():
        assert callable(command.load())


@pytest.mark.parametrize("words", [["trian"], []])
def test_an_unknown_command_is_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    said = capsys.readouterr()
    assert all(name in said.out + said.err for name in cli.COMMANDS)


def test_a_misspelt_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["fit", "--model.lerning_rate", "1"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "lerning_rate" in said
    assert len(said.splitlines()) < 10


def test_help_of_fit_explains_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["fit", "--help"])
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in (
        "--model.learning_rate",
        "The highest learning rate",
        "--model.widths",
        "Channels of each encoder stage",  # from EAMNetConfig itself
        "--data.dataset",
        "--trainer.precision",
        "--early_stopping",
        "--run_dir",
    ):
        assert text in shown


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configurations_that_come_along_are_valid(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fit", "--config", name, "--data.root", "somewhere"]
    if name == "cpu":
        words += ["--data.dataset", "isic2017"]
    config = printed_config(words, capsys)
    given = yaml.safe_load((Path(cli.__file__).parent / "configs" / f"{name}.yaml").read_text())
    for section, values in given.items():
        for key, value in values.items() if isinstance(values, dict) else ():
            assert config[section][key] == value


def test_the_command_line_overrides_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    config = printed_config(["fit", "--config=demo", "--data.size", "40"], capsys)
    assert config["data"]["size"] == 40
    assert config["data"]["dataset"] == "synthetic"


def test_defaults_are_those_of_the_definition(capsys: pytest.CaptureFixture[str]) -> None:
    config = printed_config(["fit", "--data.dataset", "synthetic"], capsys)
    model, data = config["model"], config["data"]
    assert (model["learning_rate"], model["optimizer"], model["weight_decay"]) == (1e-3, "adam", 0)
    assert (model["restart_epochs"], model["restart_factor"]) == (10, 2)
    assert model["auxiliary_weight"] == 0.4
    assert (data["batch_size"], data["size"]) == (8, 256)


def test_the_run_folder_holds_all_about_the_run(trained: Path, tiny: list[str]) -> None:
    names = {p.name for p in trained.iterdir()}
    assert names >= {
        "config.yaml",
        "versions.json",
        "split.json",
        "data_report.json",
        "metrics.csv",
        "tensorboard",
        "checkpoints",
        "best.safetensors",
        "validation",
        "report.html",
    }
    # Nothing is known of the test part yet: it had no say in the choice of the checkpoint.
    assert "test" not in names
    versions = json.loads((trained / "versions.json").read_text())
    assert versions["packages"]["torch"] == torch.__version__.split("+")[0]
    assert versions["cpu"]
    assert list((trained / "tensorboard").glob("events*"))
    with (trained / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in ("train_loss", "val_loss", "val_dice", "val_iou", "lr"):
        assert sum(row[name] != "" for row in rows) == 2, name
    split = json.loads((trained / "split.json").read_text())
    evaluated = {row.id for row in read_csv(trained / "validation" / "per_image.csv")}
    assert evaluated == set(split["val"])
    assert json.loads((trained / "validation" / "speed.json").read_text())["device"] == "cpu"


def test_the_report_is_one_file_and_names_the_split(trained: Path) -> None:
    report = (trained / "report.html").read_text()
    assert json.loads((trained / "split.json").read_text())["hash"][:12] in report
    assert "data:image/png" in report
    assert 'src="http' not in report
    assert 'href="http' not in report


def test_the_saved_configuration_gives_the_same_run_again(trained: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert main(["fit", "--config", f"{trained / 'config.yaml'}", "--run_dir", str(again)]) == 0
    for name in ("metrics.csv", "split.json", "validation/per_image.csv"):
        assert (again / name).read_text() == (trained / name).read_text()


def test_the_checkpoint_carries_the_configuration(trained: Path) -> None:
    path = trained / "checkpoints" / "best.ckpt"
    content = torch.load(path, weights_only=True)
    assert content["eamnet"]["network"]["widths"] == [8, 8, 16, 16]
    assert content["eamnet"]["size"] == 32
    from eamnet.training import SegmentationTask

    task = SegmentationTask.load_from_checkpoint(path, weights_only=True)
    assert task.network.config.widths == (8, 8, 16, 16)


def test_the_exported_weights_are_the_best_checkpoints(trained: Path) -> None:
    content = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    expected = {k.removeprefix("network."): v for k, v in content["state_dict"].items()}
    assert load_file(trained / "best.safetensors").keys() == expected.keys()
    network = EAMNet.from_pretrained(trained / "best.safetensors")
    for name, value in network.state_dict().items():
        assert torch.equal(value, expected[name])


def test_the_best_checkpoint_is_that_of_the_highest_validation_dice(trained: Path) -> None:
    with (trained / "metrics.csv").open() as file:
        dice = [float(row["val_dice"]) for row in csv.DictReader(file) if row["val_dice"]]
    content = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    assert content["epoch"] == dice.index(max(dice))
    found = read_summary(trained / "validation" / "summary.json")
    network = found["resolutions"]["network"]["macro"]["mean"]["dice"]["value"]
    assert network == pytest.approx(max(dice), abs=1e-6)


def test_test_evaluates_the_test_part_and_says_where(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    before = (run / "metrics.csv").read_text()
    (run / "test" / "pictures" / "old").mkdir(parents=True)  # of an earlier evaluation
    assert main(["test", "--run_dir", str(run)]) == 0
    said = capsys.readouterr().out
    assert f"report: {run / 'report.html'}" in said
    split = json.loads((run / "split.json").read_text())
    rows = read_csv(run / "test" / "per_image.csv")
    assert {row.id for row in rows} == set(split["test"])
    assert {row.resolution for row in rows} == {"network", "native"}
    assert read_summary(run / "test" / "summary.json")["images"] == len(split["test"])
    assert list((run / "test" / "pictures").glob("*/prediction.png"))
    assert not (run / "test" / "pictures" / "old").exists()
    assert (run / "metrics.csv").read_text() == before
    dice = read_summary(run / "test" / "summary.json")["resolutions"]["native"]["macro"]["mean"]
    assert f"{dice['dice']['value']:.4f}" in said


def test_a_run_keeps_the_split_that_it_was_given(
    tiny: list[str], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, run = tmp_path / "mine.json", tmp_path / "run"
    split = Split.read(trained / "split.json")
    Split(split.dataset, split.protocol, 0, split.train, split.test, split.val).write(given)
    words = ["--data.split", str(given), "--trainer.max_epochs", "1", "--run_dir", str(run)]
    assert main(["fit", *tiny, *words, "--evaluate", "false"]) == 0
    given.unlink()
    assert main(["test", "--run_dir", str(run)]) == 0
    assert {row.id for row in read_csv(run / "test" / "per_image.csv")} == set(split.val)
    (run / "split.json").unlink()
    capsys.readouterr()
    assert main(["test", "--run_dir", str(run)]) == 2
    assert "split.json, the split of the run, is missing" in capsys.readouterr().err
    assert not (run / "split.json").exists()


def test_a_folder_named_like_a_configuration_is_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ph2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "ph2", "--data.root", "ph2"]) == 2
    assert "holds no" in capsys.readouterr().err


def test_another_data_set_is_evaluated_in_its_own_place(trained: Path, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(trained, run)
    generator = np.random.default_rng(0)
    for name in ("images", "masks"):
        (other / name).mkdir(parents=True)
    for index in range(3):
        pixels = generator.integers(0, 255, (40, 60, 3), np.uint8)
        Image.fromarray(pixels).save(other / "images" / f"{index}.png")
        Image.fromarray(pixels[..., 0] // 128 * np.uint8(255)).save(
            other / "masks" / f"{index}.png"
        )
    words = ["--data.dataset", "folder", "--data.root", str(other), "--data.protocol", "external"]
    assert main(["test", "--run_dir", str(run), *words]) == 0
    assert len(read_csv(run / "test-folder" / "per_image.csv")) == 6
    shutil.copytree(trained / "validation", run / "test-tta")
    write_report(run)
    report = (run / "report.html").read_text()
    for title in ("Test on folder", "Test part, test-time augmentation", "Validation part"):
        assert report.count(f"{title}: all metrics</h2>") == 1
    assert not (run / "test").exists()
    assert (run / "split.json").read_text() == (trained / "split.json").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fit", "--run_dir", "RUN"], "--ckpt_path last"),
        (["test"], "--run_dir"),
        (["test", "--run_dir", "RUN", "--data.num_classes", "3"], "num_classes=1"),
        (["test", "--run_dir", "EMPTY", "--ckpt_path", "last"], "holds no checkpoint"),
        (["test", "--run_dir", "RUN", "--ckpt_path", "nowhere.ckpt"], "nowhere.ckpt"),
        (
            ["fit", "--data.dataset", "folder", "--data.root", "/nowhere", "--run_dir", "X"],
            "/nowhere",
        ),
        (["fit", "--data.dataset", "isic2018", "--run_dir", "X"], "root"),
        (["fit", "--data.dataset", "synthetic", "--model.learning_rate", "-1"], "learning_rate"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    words: list[str],
    said: str,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EAMNET_TRACEBACK", raising=False)
    data_known = "--data.dataset" in words or "RUN" in words
    required = [] if data_known else ["--data.dataset", "synthetic"]
    words = [str(trained) if word == "RUN" else word for word in words]
    assert main([*words, *required]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_fit_stops_early_and_takes_lightnings_options(tiny: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = [
        *("--early_stopping", "1", "--trainer.max_epochs", "8", "--model.learning_rate", "1e-9"),
        *("--trainer.gradient_clip_val", "1", "--trainer.accumulate_grad_batches", "2"),
        *("--trainer.precision", "bf16-mixed"),
    ]
    assert main(["fit", *tiny, *options, "--run_dir", str(run)]) == 0
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert max(int(row["epoch"]) for row in rows) == 1
    assert max(int(row["step"]) for row in rows) == 3  # two steps of two batches in each epoch
    # What was ended is not taken up again.
    before = (run / "metrics.csv").read_text()
    assert main(["fit", "--run_dir", str(run), "--ckpt_path", "last"]) == 0
    assert (run / "metrics.csv").read_text() == before


def test_fit_leaves_the_evaluation_to_validate_where_asked(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options = ["--evaluate", "false", "--trainer.max_epochs", "1", "--run_dir", str(run)]
    assert main(["fit", *tiny, *options]) == 0
    assert (run / "best.safetensors").is_file()
    assert not (run / "validation").exists()
    assert f"eamnet validate --run_dir {run}" in "".join(capsys.readouterr())
    assert main(["validate", "--run_dir", str(run)]) == 0
    assert (run / "validation" / "per_image.csv").is_file()


def test_several_classes(tiny: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--data.num_classes", "3", "--trainer.max_epochs", "1", "--run_dir", str(run)]
    assert main(["fit", *tiny, *options]) == 0
    assert {row.label for row in read_csv(run / "validation" / "per_image.csv")} == {1, 2}


def test_doctor_finds_the_installation_sound(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor"])
    said = capsys.readouterr().out
    assert code == (1 if "problems" in said else 0)
    for text in ("torch", "cpu", "memory", "gate_statistics", "cross_mix_channels", "reference"):
        assert text in said
    from eamnet_kernels import native

    if native.load():
        assert code == 0, said


def test_doctor_tells_a_library_that_does_not_load(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from eamnet_kernels import native

    monkeypatch.setattr(native, "load", lambda: False)
    monkeypatch.setattr(native, "error", lambda: ImportError("undefined symbol: abc"))
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "undefined symbol: abc" in said.partition("problems")[2]


def test_doctor_notices_a_wrong_operator(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from eamnet_kernels import functional

    right = functional.external_memory
    monkeypatch.setattr(
        functional,
        "external_memory",
        lambda x, **kwargs: right(x=x, **kwargs) * (1.1 if x.dtype != torch.float64 else 1),
    )
    assert main(["doctor"]) == 1
    assert "external_memory on cpu" in capsys.readouterr().out.partition("problems")[2]


def test_doctor_works_without_the_training_packages(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = doctor.package_versions()
    monkeypatch.setattr(doctor, "package_versions", lambda: {**found, "monai": None})
    assert main(["doctor"]) == 1
    assert "pip install 'eamnet-kernels[train]'" in capsys.readouterr().out


def test_a_command_without_its_packages_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(self: cli.Command) -> Any:
        raise ModuleNotFoundError("No module named 'lightning'", name="lightning")

    monkeypatch.setattr(cli.Command, "load", missing)
    assert main(["fit"]) == 2
    assert "eamnet-kernels[train]" in capsys.readouterr().err


def test_demo_ends_by_naming_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "demo"
    assert main(["demo", "--run_dir", str(run), "--epochs", "1", "--pictures", "40"]) == 0
    assert capsys.readouterr().out.rstrip().endswith(str(run.resolve() / "report.html"))
    assert (run / "report.html").is_file()
    assert read_summary(run / "test" / "summary.json")["images"] == 8
