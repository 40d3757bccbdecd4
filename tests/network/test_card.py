"""Weights that are handed out: float16 that scores the same, a card that says what the header says.

The tests over bundled weights pass where there are none: they come with a release.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml  # type: ignore[import-untyped, unused-ignore]
from PIL import Image
from safetensors.torch import load_file

import eamnet.model
from eamnet import card as cards
from eamnet.averaging import average_run
from eamnet.card import MAX_BYTES, card_facts, render_card, results_table, write_card
from eamnet.checkpoints import last_whole_checkpoint, load_checkpoint
from eamnet.cli import main
from eamnet.inference import Predictor
from eamnet.metrics import METRICS, read_summary
from eamnet.model import EAMNet, available_weights

BUNDLED = available_weights()


@pytest.fixture(scope="module")
def tested(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its test part scored; to be read, not changed."""
    run = tmp_path_factory.mktemp("runs") / "tested"
    shutil.copytree(trained, run)
    assert main(["test", "--run_dir", str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def folder(tested: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of bundled weights, as the package has one, with those of the tested run."""
    weights = tmp_path_factory.mktemp("weights")
    words = ["--run_dir", str(tested), "--weights", str(weights / "isic2017")]
    assert main(["card", *words, "--notes", "Took a moment."]) == 0
    return weights


def test_the_files_are_named_loaded_and_half_as_large(
    folder: Path, tested: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["isic2017.md", "isic2017.safetensors"]
    stored = load_file(folder / "isic2017.safetensors")
    assert {t.dtype for t in stored.values() if t.is_floating_point()} == {torch.float16}
    monkeypatch.setattr(eamnet.model, "_WEIGHTS", folder)
    network = EAMNet.from_pretrained("isic2017")
    best = EAMNet.from_pretrained(tested / "best.safetensors")
    assert network.config == best.config
    for name, value in best.state_dict().items():
        assert torch.equal(network.state_dict()[name], value.half().to(value.dtype)), name
    assert Predictor.from_file("isic2017").size == 32


def test_the_card_says_where_the_numbers_come_from(folder: Path, tested: Path) -> None:
    facts = card_facts(folder / "isic2017.safetensors")
    page = (folder / "isic2017.md").read_text()
    split = json.loads((tested / "split.json").read_text())
    for text in (
        split["hash"],
        "not a medical device".capitalize(),
        "`synthetic`",
        f"{len(split['train'])} pictures trained",
        "--model.widths '[8,8,16,16]'",
        "--data.synthetic_count 24",
        "2 epochs, 8 steps of 4 pictures",
        "Took a moment.",
        "Intended use",
        "Limits",
    ):
        assert text in page, text
    assert page == render_card(facts)
    assert str(tested) not in page, "no machine's paths on a card"
    assert facts["summary"]["images"] == len(split["test"])


def test_the_command_on_the_card_trains_these_weights(
    folder: Path, trained: Path, tmp_path: Path
) -> None:
    import shlex

    words = shlex.split(card_facts(folder / "isic2017.safetensors")["command"])
    assert words[:2] == ["eamnet", "fit"]
    assert main([*words[1:], "--run_dir", str(tmp_path / "again")]) == 0
    again = load_file(tmp_path / "again" / "best.safetensors")
    for name, value in load_file(trained / "best.safetensors").items():
        assert torch.equal(again[name], value), name


def test_the_score_is_that_of_the_rounded_weights(folder: Path, tested: Path) -> None:
    facts = card_facts(folder / "isic2017.safetensors")
    own = read_summary(tested / "test" / "summary.json")["resolutions"]["native"]["macro"]["mean"]
    ours = facts["summary"]["resolutions"]["native"]["macro"]["mean"]
    change = ours["dice"]["value"] - own["dice"]["value"]
    assert facts["rounding"]["mean_dice_change"] == pytest.approx(change)
    assert abs(change) < 1e-3


def test_every_estimate_is_in_the_table(folder: Path) -> None:
    summary = card_facts(folder / "isic2017.safetensors")["summary"]
    table = results_table(summary)
    assert len(table.splitlines()) == 2 + len(
        set(METRICS) & set(summary["resolutions"]["native"]["macro"]["mean"])
    )
    for resolution in summary["resolutions"].values():
        for averaging in ("mean", "pooled"):
            for estimate in resolution["macro"][averaging].values():
                digits = [f"{estimate[k]:.3f}" for k in ("value", "low", "high")]
                short = [f"{estimate[k]:.1f}" for k in ("value", "low", "high")]
                assert any("{} [{}, {}]".format(*d) in table for d in (digits, short))


def test_rounding_that_changes_the_score_is_refused(
    tested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = EAMNet.save_pretrained

    def coarse(self: EAMNet, path: Path, *options: Any) -> Path:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_((parameter * 2).round() / 2)
        return original(self, path, *options)

    monkeypatch.setattr(EAMNet, "save_pretrained", coarse)
    monkeypatch.setattr(cards, "export_weights", lambda *_: tested / "best.safetensors")
    with pytest.raises(ValueError, match="mean Dice"):
        write_card(str(tested), str(tmp_path / "w"))
    assert not list(tmp_path.iterdir())


def test_unfinished_runs_are_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--weights", str(tmp_path / "w")]
    assert main(["card", "--run_dir", str(tmp_path / "nothing"), *words]) == 2
    assert "eamnet fit" in capsys.readouterr().err
    assert main(["card", "--run_dir", str(trained), *words]) == 2
    assert "eamnet test" in capsys.readouterr().err


def test_weights_without_a_card_are_named(tested: Path) -> None:
    with pytest.raises(ValueError, match="holds no card"):
        card_facts(tested / "best.safetensors")


def test_predict_uses_the_bundled_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eamnet.model, "_WEIGHTS", folder)
    Image.fromarray(np.full((20, 30, 3), 120, np.uint8)).save(tmp_path / "a.png")
    assert main(["predict", str(tmp_path / "a.png"), "--output", str(tmp_path / "out")]) == 0
    with Image.open(tmp_path / "out" / "masks" / "a.png") as mask:
        assert mask.size == (30, 20)


def test_predict_without_weights_names_those_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(eamnet.model, "_WEIGHTS", tmp_path)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    assert main(["predict", str(tmp_path / "a.png"), "--output", str(tmp_path / "out")]) == 2
    assert "'isic2017' is neither" in (said := capsys.readouterr().err)
    assert "there are none" in said


@pytest.mark.parametrize("name", BUNDLED or [None])
def test_bundled_weights_are_whole(name: str | None) -> None:
    if name is None:
        pytest.skip("no weights are bundled")
    path = eamnet.model._WEIGHTS / f"{name}.safetensors"
    assert path.stat().st_size <= MAX_BYTES
    facts = card_facts(name)
    assert facts["name"] == name
    network = EAMNet.from_pretrained(name)
    assert sum(p.numel() for p in network.parameters()) == facts["parameters"]
    assert Predictor.from_file(name).size == facts["size"]
    page = path.with_suffix(".md").read_text()
    assert results_table(facts["summary"]) in page
    assert facts["split_hash"] in page
    assert facts["command"] in page
    assert "Not a medical device" in page


def test_an_average_is_a_run_and_its_card_says_so(trained: Path, tmp_path: Path) -> None:
    """The mean of the last weights and of those that `--init` named, batch counters aside."""
    run, mean = tmp_path / "run", tmp_path / "mean"
    shutil.copytree(trained, run)
    with pytest.raises(ValueError, match="did not start from other weights"):
        average_run(str(run), str(mean))
    start = EAMNet.from_pretrained(trained / "best.safetensors")
    with torch.no_grad():
        for parameter in start.parameters():
            parameter.add_(0.25)
    start.save_pretrained(tmp_path / "start.safetensors")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["init"] = str(tmp_path / "start.safetensors")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["average", "--run_dir", str(run), "--output", str(mean), "--share", "0.75"]) == 0

    checkpoint = last_whole_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    after = load_checkpoint(checkpoint)["state_dict"]
    got = load_file(mean / "best.safetensors")
    for name, before in start.state_dict().items():
        wanted = after[f"network.{name}"]
        if wanted.is_floating_point():
            wanted = 0.25 * before + 0.75 * wanted
        torch.testing.assert_close(got[name], wanted)
    with pytest.raises(FileExistsError, match="exists"):
        average_run(str(run), str(mean))

    for command in ("validate", "test"):
        assert main([command, "--run_dir", str(mean)]) == 0
    assert main(["card", "--run_dir", str(mean), "--weights", str(tmp_path / "mean-card")]) == 0
    page = (tmp_path / "mean-card.md").read_text()
    assert "mean of those after epoch 2, with a share of 0.75, and of those it started" in page
    assert str(tmp_path) not in page
