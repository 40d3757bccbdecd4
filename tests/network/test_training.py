"""The task itself: it learns, its schedule, its numbers under autocast."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch

from eamnet.cli import main
from eamnet.data import SegmentationDataset, SyntheticSource
from eamnet.metrics import SegmentationMetrics
from eamnet.model import EAMNet
from eamnet.training import SegmentationTask

NARROW = {
    "widths": (8, 8, 16, 16),
    "decoder_widths": (8, 8, 8),
    "blocks": (1, 1, 1, 1),
    "memory_size": 8,
}


def pictures(count: int, size: int, num_classes: int = 1) -> dict[str, torch.Tensor]:
    source = SyntheticSource(count, 3, size, num_classes)
    dataset = SegmentationDataset(source, [r.id for r in source.records], size)
    items = [dataset[i] for i in range(count)]
    return {key: torch.stack([item[key] for item in items]) for key in ("image", "mask")}


def test_it_learns_four_pictures_by_heart() -> None:
    torch.manual_seed(0)
    task = SegmentationTask(learning_rate=5e-3, restart_epochs=0, **NARROW)
    optimizer = task.configure_optimizers()
    batch = pictures(4, 32)
    losses = []
    for _ in range(120):
        output = task(batch["image"])
        loss = task.loss(output.logits, output.auxiliary, batch["mask"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]
    metrics = SegmentationMetrics()
    with torch.no_grad():
        metrics.update(task.eval()(batch["image"]), batch["mask"])
    assert metrics.compute()["dice"] > 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_no_nan_at_512(dtype: torch.dtype) -> None:
    # The network of the paper's size in training mode. The backward stops at its output: through
    # it all, the CPU's float16 convolutions would take minutes; the test below goes through.
    torch.manual_seed(0)
    task = SegmentationTask().train()
    batch = pictures(1, 512)
    with torch.autocast("cpu", dtype=dtype):
        with torch.no_grad():
            output = task(batch["image"])
        assert output.logits.shape == (1, 1, 512, 512)
        # A picture as it is; one that is all lesion; one without any; and logits at the far end.
        for mask in (batch["mask"], torch.ones(1, 1, 512, 512), torch.zeros(1, 1, 512, 512)):
            for scale in (1, 60000):
                logits = (output.logits * scale).clamp(-60000, 60000).requires_grad_()
                auxiliary = output.auxiliary.detach().clone().requires_grad_()
                loss = task.loss(logits, auxiliary, mask)
                assert loss.dtype == torch.float32
                assert loss.isfinite()
                loss.backward()
                assert logits.grad.isfinite().all()
                assert auxiliary.grad.isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.bfloat16, 512), (torch.float16, 64), (torch.bfloat16, 64)]
)
@pytest.mark.parametrize("num_classes", [1, 4])
def test_steps_under_autocast_stay_finite(dtype: torch.dtype, size: int, num_classes: int) -> None:
    torch.manual_seed(0)
    task = SegmentationTask(num_classes=num_classes, **NARROW)
    optimizer = task.configure_optimizers()["optimizer"]
    batch = pictures(1, size, num_classes)
    for _ in range(2):
        with torch.autocast("cpu", dtype=dtype):
            output = task(batch["image"])
            loss = task.loss(output.logits, output.auxiliary, batch["mask"])
        assert loss.dtype == torch.float32
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in task.parameters() if p.grad is not None)
        optimizer.step()
    assert loss.isfinite()


def test_the_learning_rate_restarts(tiny: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = [
        *("--model.restart_epochs", "1", "--model.restart_factor", "2"),
        *("--model.learning_rate", "0.01", "--model.minimum_learning_rate", "0.001"),
        *("--trainer.max_epochs", "4", "--trainer.log_every_n_steps", "1"),
        *("--trainer.limit_val_batches", "0"),
    ]
    assert main(["fit", *tiny, *options, "--run_dir", str(run)]) == 0
    with (run / "metrics.csv").open() as file:
        found = [float(row["lr"]) for row in csv.DictReader(file) if row["lr"]]
    # Cycles of one, two and four epochs: at the start of epochs 0, 1, 2 (half way) and 3.
    half = 0.001 + 0.009 * (1 + math.cos(math.pi / 2)) / 2
    assert found == pytest.approx([0.01, 0.01, half, 0.01], rel=1e-6)
    # Without validation there is no best checkpoint; the last ones are there.
    assert not (run / "checkpoints" / "best.ckpt").exists()
    assert (run / "checkpoints" / "last-epoch=0003.ckpt").exists()


def test_the_order_in_memory_changes_nothing() -> None:
    results = []
    for channels_last in (True, False):
        torch.manual_seed(0)
        task = SegmentationTask(channels_last=channels_last, **NARROW).double().eval()
        with torch.no_grad():
            results.append(task(pictures(2, 32)["image"].double()))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_compiling_keeps_the_names_of_the_weights() -> None:
    plain, compiled = SegmentationTask(**NARROW), SegmentationTask(compile=True, **NARROW)
    assert list(plain.state_dict()) == list(compiled.state_dict())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"optimizer": "sgd"}, "optimizer"),
        ({"restart_epochs": -1}, "restart_epochs"),
        ({"restart_factor": 0}, "restart_factor"),
        ({"auxiliary_weight": -1.0}, "auxiliary_weight"),
        ({"widths": (3, 5)}, "widths"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SegmentationTask(**options)


def test_weight_decay_and_optimizer_reach_the_optimizer() -> None:
    task = SegmentationTask(optimizer="adamw", weight_decay=0.1, restart_epochs=0, **NARROW)
    optimizer = task.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


def test_fit_starts_from_given_weights(
    tiny: list[str], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init = trained / "best.safetensors"
    options = ["fit", *tiny, "--trainer.max_epochs", "1", "--init", str(init)]
    still = ["--model.learning_rate", "1e-12", "--run_dir", str(tmp_path / "still")]
    assert main([*options, *still]) == 0
    given = EAMNet.from_pretrained(init).named_parameters()
    got = dict(EAMNet.from_pretrained(tmp_path / "still" / "best.safetensors").named_parameters())
    for name, value in given:
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-8)
    # The run's configuration, with the weights it started from, serves its evaluation as well.
    assert main(["validate", "--run_dir", str(tmp_path / "still")]) == 0

    other = ["--model.memory_size", "16", "--run_dir", str(tmp_path / "other")]
    assert main([*options, *other]) == 2
    assert "memory_size: 8 there, 16 here" in capsys.readouterr().err
