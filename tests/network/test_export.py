"""Exported networks: the same logits at any size, without the project, with their facts."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import eamnet.export
from eamnet.cli import main
from eamnet.export import METADATA_KEY, export_file
from eamnet.model import EAMNet, EAMNetConfig

SMALL: dict[str, Any] = {
    "widths": (8, 8),
    "blocks": (1, 1),
    "decoder_widths": (8,),
    "decoder_blocks": (1,),
    "attend": ("channels", "pixels"),
    "memory_size": 4,
}


def weights(folder: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    network = EAMNet(EAMNetConfig(**{**SMALL, **options})).train()
    with torch.no_grad():
        network(torch.rand(4, 3, 16, 16))  # statistics that are not the initial ones
    path = folder / "weights.safetensors"
    return network.eval().save_pretrained(path, metadata={"eamnet_size": "24"})


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one network as .pt2 and, where the packages for it are there, as .onnx."""
    folder = tmp_path_factory.mktemp("export")
    saved = weights(folder)
    with pytest.MonkeyPatch.context() as patch:
        # To trace takes most of the time, and both formats begin with it.
        program = eamnet.export._trace(EAMNet.from_pretrained(saved))
        patch.setattr(eamnet.export, "_trace", lambda model: program)
        for ending in ("pt2", "onnx"):
            if ending == "onnx" and find_spec("onnxruntime") is None:
                continue
            words = ["--checkpoint", str(saved), "--output", str(folder / f"network.{ending}")]
            assert main(["export", *words]) == 0
    return folder


@pytest.fixture
def onnx_file(exported: Path) -> Path:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    return exported / "network.onnx"


SIZES = [(1, 24, 24), (3, 17, 40), (2, 3, 5)]


@pytest.mark.parametrize(("batch", "height", "width"), SIZES)
def test_onnx_gives_the_networks_logits(
    onnx_file: Path, batch: int, height: int, width: int
) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    x = torch.rand(batch, 3, height, width)
    (logits,) = session.run(None, {"picture": x.numpy()})
    network = EAMNet.from_pretrained(onnx_file.with_name("weights.safetensors"))
    with torch.no_grad():
        np.testing.assert_allclose(logits, network(x), atol=1e-3)


def test_onnx_is_one_file_of_plain_operators_with_its_facts(onnx_file: Path) -> None:
    import onnx

    names = sorted(p.name for p in onnx_file.parent.iterdir())
    assert names == ["network.onnx", "network.pt2", "weights.safetensors"]
    model = onnx.load(onnx_file)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    facts = json.loads({p.key: p.value for p in model.metadata_props}[METADATA_KEY])
    assert facts["size"] == 24
    assert facts["input"]["range"] == [0, 1]
    assert facts["output"]["activation"] == "sigmoid"
    assert facts["output"]["threshold"] == 0.5
    assert EAMNetConfig.from_dict(facts["network"]) == EAMNetConfig(**SMALL)
    assert [i.name for i in model.graph.input] == ["picture"]
    assert [o.name for o in model.graph.output] == ["logits"]


def test_pt2_runs_without_the_project(exported: Path, tmp_path: Path) -> None:
    x = torch.rand(2, 3, 9, 14)
    network = EAMNet.from_pretrained(exported / "weights.safetensors")
    with torch.no_grad():
        torch.save({"x": x, "expected": network(x)}, tmp_path / "x.pt")
    code = (
        "import sys, torch\n"
        "data = torch.load('x.pt')\n"
        "extra = {'eamnet.json': ''}\n"
        f"program = torch.export.load({str(exported / 'network.pt2')!r}, extra_files=extra)\n"
        "found = program.module()(data['x'])\n"
        "torch.testing.assert_close(found, data['expected'], rtol=0, atol=1e-3)\n"
        "assert 'sigmoid' in extra['eamnet.json']\n"
        "assert not any(name.startswith('eamnet') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={}, check=True)


def test_facts_of_several_classes(tmp_path: Path) -> None:
    _, facts = eamnet.export._load(str(weights(tmp_path, num_classes=3)))
    assert facts["output"]["activation"].startswith("softmax")
    assert facts["output"]["threshold"] is None
    assert facts["output"]["shape"][1] == 3


def test_ties_are_kept_as_the_operator_keeps_them() -> None:
    from eamnet_kernels.functional import external_memory

    torch.manual_seed(0)
    x, key = torch.randn(3, 8, 4, 5), torch.randn(4, 8)
    value = torch.randn(4, 3)[:, [0, 1, 1, 2, 0, 1, 2, 2]]  # scores that repeat exactly
    for top_k in range(1, 9):
        w_out = torch.eye(8)
        torch.testing.assert_close(
            eamnet.export._external_memory(x, key, value, w_out, top_k),
            external_memory(x, key, value, w_out, top_k),
        )


def test_a_wrong_export_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: EAMNet) -> torch.export.ExportedProgram:
        free = {0: torch.export.Dim("b"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")}
        other = torch.nn.Conv2d(3, 1, 3, padding=1)
        return torch.export.export(other, (torch.zeros(2, 3, 8, 9),), dynamic_shapes=(free,))

    monkeypatch.setattr(eamnet.export, "_trace", wrong)
    with pytest.raises(ValueError, match="off by"):
        export_file(str(tmp_path / "out" / "network.pt2"), str(weights(tmp_path)))
    assert not list((tmp_path / "out").iterdir())


def test_mistakes_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["export", "--output", str(tmp_path / "a.pb")]) == 2
    assert ".onnx or .pt2" in capsys.readouterr().err
    monkeypatch.setattr(eamnet.export.importlib.util, "find_spec", lambda name: None)
    assert main(["export", "--output", str(tmp_path / "a.onnx")]) == 2
    assert "eamnet-kernels[export]" in capsys.readouterr().err
