"""Attention that is computed again: it is the modules' own, and shown of the right pictures."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from eamnet.attention import attention_maps, choose, cross_weights, kept, maps
from eamnet.cli import main
from eamnet.model import EAMNet, EAMNetConfig
from eamnet.report import write_report
from eamnet_kernels.modules import CMAM, EAB

SMALL: dict[str, Any] = {
    "widths": (8, 8),
    "blocks": (1, 1),
    "decoder_widths": (8,),
    "decoder_blocks": (1,),
    "attend": ("channels", "pixels"),
    "memory_size": 4,
}


@pytest.mark.parametrize("attend", ["channels", "pixels"])
@pytest.mark.parametrize("heads", [1, 4])
def test_the_weights_give_the_modules_own_output(attend: Any, heads: int) -> None:
    torch.manual_seed(heads)
    module = CMAM(8, attend=attend, heads=heads)
    x = torch.randn(2, 8, 5, 6)
    with torch.no_grad():
        weights = cross_weights(module, x)
        mixed = weights.spatial @ weights.v_c + weights.channel @ weights.v_s
        if attend == "pixels":
            mixed = mixed.transpose(2, 3)
        added = (module.w_out @ mixed.flatten(1, 2)).view_as(x)
        torch.testing.assert_close(x + added, module(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights.spatial.sum(3), torch.ones_like(weights.spatial[..., 0]))


def test_maps_of_each_fusion() -> None:
    torch.manual_seed(0)
    x, lesion = torch.randn(2, 8, 5, 6), torch.zeros(2, 5, 6)
    lesion[0, 1:3, 2:4] = 1  # the second picture has none
    with torch.no_grad():
        for fusion in ("cross", "serial", "parallel"):
            for attend in ("channels", "pixels"):
                module = CMAM(8, attend=attend, heads=2, fusion=fusion)  # type: ignore[arg-type]
                found = maps(module, x, lesion)
                assert found.pixels.shape == found.gain.shape == (2, 5, 6)
                assert found.channels.shape == (2, 8)
                ratio = module(x).norm(dim=1) / x.norm(dim=1)
                torch.testing.assert_close(found.gain, ratio)
                if fusion == "cross":
                    # What is received adds up to what is given: 1 on average.
                    torch.testing.assert_close(found.pixels.mean((1, 2)), torch.ones(2))
                    if attend == "channels":
                        torch.testing.assert_close(found.channels.mean(1), torch.ones(2))
        parallel = CMAM(8, fusion="parallel")
        found = maps(parallel, x, lesion)
        joined = x * found.pixels[:, None] + x * found.channels[:, :, None, None]
        torch.testing.assert_close(joined, parallel(x))
        serial = CMAM(8, fusion="serial")
        found = maps(serial, x, lesion)
        joined = x * found.channels[:, :, None, None] * found.pixels[:, None]
        torch.testing.assert_close(joined, serial(x))


def test_attention_is_that_of_the_lesions_queries() -> None:
    torch.manual_seed(0)
    module, x = CMAM(8, attend="pixels", heads=1), torch.randn(1, 8, 3, 4)
    lesion = torch.zeros(1, 3, 4)
    lesion[0, 1, 2] = 1  # query 6
    with torch.no_grad():
        weights = cross_weights(module, x)
        row = (weights.spatial + weights.channel)[0, 0, 6] / 2 * 12
        torch.testing.assert_close(maps(module, x, lesion).pixels.flatten(), row)


def test_kept_channels_are_those_of_the_output() -> None:
    torch.manual_seed(0)
    module = EAB(8, memory_size=4, top_k=3).eval()
    x = torch.rand(2, 8, 5, 6)  # positive: the last ReLU hides nothing
    with torch.no_grad():
        mask = kept(module, x)
        assert mask.sum(1).tolist() == [3, 3]
        module.w_out.copy_(torch.eye(8))  # the output is the selected channels themselves
        untouched = torch.relu(module.norm(torch.zeros_like(x)) + x)
        assert torch.equal((module(x) != untouched).flatten(2).any(2), mask)


def test_pictures_are_chosen_by_measure_once() -> None:
    measures = {
        name: {"area": area, "solidity": solid, "contrast": faint}
        for name, area, solid, faint in (
            ("a", 0.01, 0.5, 0.1),
            ("b", 0.02, 0.9, 0.05),
            ("c", 0.30, 0.6, 0.30),
            ("d", 0.05, 0.95, 0.20),
            ("e", 0.04, 0.96, 0.25),
            ("none", 0.0, math.nan, math.nan),
        )
    }
    assert choose(measures, 1) == {"irregular": ["a"], "low contrast": ["b"], "small": ["e"]}
    assert choose(measures, 2) == {
        "irregular": ["a", "c"],
        "low contrast": ["b", "d"],
        "small": ["e"],
    }


def test_a_run_shows_its_attention_beside_others(trained: Path, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "serial.safetensors"
    shutil.copytree(trained, run)
    torch.manual_seed(0)
    network = EAMNet(
        EAMNetConfig(**{**SMALL, "cmam": "serial", "eab": False, "attend": ("pixels",) * 2})
    )
    with pytest.raises(ValueError, match="one input size"):
        attention_maps(run_dir=[str(run)], checkpoint=[str(network.save_pretrained(other))])
    config = EAMNet.from_pretrained(trained / "best.safetensors").config.to_dict()
    network = EAMNet(EAMNetConfig.from_dict({**config, "cmam": "serial", "eab": False}))
    network.save_pretrained(other, metadata={"eamnet_size": "32"})
    words = ["attention", "--run_dir", str(run), "--checkpoint", str(other), "--count", "1"]
    assert main([*words, "--part", "test"]) == 0
    folder = run / "attention"
    found = json.loads((folder / "attention.json").read_text())
    split = json.loads((run / "split.json").read_text())
    assert found["pictures"] == len(split["test"])
    assert [n["name"] for n in found["networks"]] == ["cross", "serial"]
    chosen = [name for names in found["chosen"].values() for name in names]
    assert len(set(chosen)) == 3
    assert set(chosen) <= set(split["test"])
    eab = found["networks"][0]["eab"]["0"]
    assert sum(eab["kept"]) == pytest.approx(4)  # of 8 channels
    assert found["networks"][1]["eab"] == {}
    with (folder / "attention.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * len(split["test"])
    focus = [float(r["focus"]) for r in rows if r["network"] == "cross" and r["scale"] == "0"]
    mean = found["networks"][0]["attention"]["channels"]["focus"]
    assert mean["value"] == pytest.approx(np.mean(focus))
    assert mean["low"] <= mean["value"] <= mean["high"]
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.width > 5 * 200  # the picture, two maps of each network
        assert sheet.height > 3 * 200
    report = (run / "report.html").read_text()
    assert "attention maps of each network" in report
    assert f"{mean['low']:.2f}–{mean['high']:.2f}" in report
    (folder / "sheet.png").write_bytes(b"")
    assert "attention/sheet.png could not be read" in write_report(run).read_text()


def test_pictures_may_be_named(trained: Path, tmp_path: Path) -> None:
    out = ["--output", str(tmp_path / "out")]
    val = json.loads((trained / "split.json").read_text())["val"]
    assert main(["attention", val[1], "--run_dir", str(trained), *out]) == 0
    chosen = json.loads((tmp_path / "out" / "attention.json").read_text())["chosen"]
    assert chosen == {"asked for": [val[1]]}
    assert not (trained / "attention").exists()
    Image.fromarray(np.full((40, 30, 3), 150, np.uint8)).save(tmp_path / "mine.png")
    weights = ["--checkpoint", str(trained / "best.safetensors")]
    assert main(["attention", str(tmp_path / "mine.png"), *weights, *out]) == 0
    found = json.loads((tmp_path / "out" / "attention.json").read_text())
    assert (found["part"], found["chosen"]) == (None, {"asked for": ["mine"]})


def test_mistakes_are_named(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = EAMNet(EAMNetConfig(**SMALL, cmam="none")).save_pretrained(tmp_path / "p.safetensors")
    for words, said in (
        ([], "a network is missing"),
        (["--checkpoint", str(plain)], "has no CMAM"),
        (["nobody", "--run_dir", str(trained)], "nobody"),
        (["--checkpoint", str(trained / "best.safetensors")], "pictures are missing"),
    ):
        assert main(["attention", *words]) == 2
        assert said in capsys.readouterr().err
