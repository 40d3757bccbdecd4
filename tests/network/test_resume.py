"""A killed run goes on as if nothing had happened; no file is ever half written."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eamnet.checkpoints import (
    AtomicCheckpointIO,
    check_whole,
    last_whole_checkpoint,
    load_checkpoint,
)
from eamnet.cli import main

EPOCHS = ["--trainer.max_epochs", "3", "--trainer.deterministic", "true"]

# The run's own configuration keeps the callback, so a variable decides whether it kills.
KILL = """
import os, signal
from lightning.pytorch import Callback

class Kill(Callback):
    def on_train_batch_end(self, trainer, *_):
        if os.environ.get("KILL_AT_STEP") == str(trainer.global_step):
            os.kill(os.getpid(), signal.SIGKILL)
"""


def weights(run: Path, name: str) -> dict[str, torch.Tensor]:
    return load_checkpoint(run / "checkpoints" / name)["state_dict"]


def assert_equal_runs(resumed: Path, unbroken: Path) -> None:
    for name in ("last-epoch=0002.ckpt", "best.ckpt"):
        expected, found = weights(unbroken, name), weights(resumed, name)
        assert expected.keys() == found.keys()
        different = [k for k in expected if not torch.equal(expected[k], found[k])]
        assert not different
    # The learning curves, with those of the epochs before the kill, and the evaluation.
    for name in ("metrics.csv", "split.json", "validation/per_image.csv"):
        assert (resumed / name).read_text() == (unbroken / name).read_text()


@pytest.fixture(scope="module")
def unbroken(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    assert main(["fit", *tiny, *EPOCHS, "--run_dir", str(folder)]) == 0
    torch.use_deterministic_algorithms(False)
    return folder


@pytest.fixture(scope="module")
def killed(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in the middle of its third epoch: step 10 of 4 per epoch."""
    home = tmp_path_factory.mktemp("killed")
    (home / "kill.py").write_text(KILL)
    folder = home / "run"
    process = subprocess.run(
        [
            *(sys.executable, "-m", "eamnet", "fit", *tiny, *EPOCHS, "--run_dir", str(folder)),
            *("--trainer.callbacks+=kill.Kill",),
        ],
        env={
            **os.environ,
            "KILL_AT_STEP": "10",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(home), str(Path(__file__).parents[2])]),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert {p.name for p in (folder / "checkpoints").iterdir()} >= {
        "last-epoch=0000.ckpt",
        "last-epoch=0001.ckpt",
    }
    return folder


def resume(killed: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(killed, folder)
    # What a kill in the middle of a write leaves: a part of a row and of a checkpoint.
    with (folder / "metrics.csv").open("a") as file:
        file.write("2,,9,0.1")
    leftover = folder / "checkpoints" / ".last-epoch=0002.ckpt.123.tmp"
    leftover.write_bytes(b"half")
    monkeypatch.syspath_prepend(str(killed.parent))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main(["fit", "--run_dir", str(folder), "--ckpt_path", "last"]) == 0
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    assert not leftover.exists()
    return folder


def test_a_killed_run_resumes_to_the_same_weights_and_metrics(
    killed: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed = resume(killed, tmp_path / "run", monkeypatch)
    assert_equal_runs(resumed, unbroken)
    with (resumed / "metrics.csv").open() as file:
        assert {row["epoch"] for row in csv.DictReader(file)} == {"0", "1", "2"}


def test_a_truncated_last_checkpoint_is_passed_over_with_a_warning(
    killed: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(killed, damaged)
    last = damaged / "checkpoints" / "last-epoch=0001.ckpt"
    last.write_bytes(last.read_bytes()[:-1000])
    shutil.copy(killed.parent / "kill.py", tmp_path)
    with pytest.warns(UserWarning, match=r"last-epoch=0001.ckpt is not whole"):
        resumed = resume(damaged, tmp_path / "run", monkeypatch)
    assert_equal_runs(resumed, unbroken)


def test_resuming_with_other_pictures_is_refused(
    killed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    monkeypatch.syspath_prepend(str(killed.parent))
    words = ["fit", "--run_dir", str(folder), "--ckpt_path", "last"]
    assert main([*words, "--data.split", str(tmp_path / "other.json"), "--data.seed", "1"]) == 2
    assert "training cannot go on with other pictures" in capsys.readouterr().err


def test_every_flipped_or_missing_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"w": torch.arange(1000.0)}}, path)
    check_whole(path)
    content = path.read_bytes()
    middle = content.index(torch.arange(500.0, 502.0).numpy().tobytes()) + 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(ValueError, match="not whole"):
        check_whole(path)
    for length in (0, 10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="not whole"):
            check_whole(path)


def test_all_checkpoints_damaged_is_an_error_and_none_is_not(tmp_path: Path) -> None:
    assert last_whole_checkpoint(tmp_path) is None
    (tmp_path / "best.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match="no whole checkpoint"), pytest.warns(match="best.ckpt"):
        last_whole_checkpoint(tmp_path)


def test_the_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    for name in ("best", "last-epoch=0009", "last-epoch=0010"):
        torch.save({}, tmp_path / f"{name}.ckpt")
    assert last_whole_checkpoint(tmp_path) == tmp_path / "last-epoch=0010.ckpt"
    (tmp_path / "last-epoch=0010.ckpt").unlink()
    (tmp_path / "last-epoch=0009.ckpt").unlink()
    assert last_whole_checkpoint(tmp_path) == tmp_path / "best.ckpt"


def test_a_write_that_fails_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.ckpt"
    files = AtomicCheckpointIO()
    files.save_checkpoint({"epoch": 1}, path)

    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        files.save_checkpoint({"epoch": 2}, path)
    assert load_checkpoint(path) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


class Unsafe:
    """Something that only an unrestricted pickle restores."""


def test_what_needs_an_unrestricted_pickle_is_neither_written_nor_read(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    with pytest.raises(ValueError, match="could not be loaded back"):
        AtomicCheckpointIO().save_checkpoint({"object": Unsafe()}, path)
    assert not list(tmp_path.iterdir())
    torch.save({"object": Unsafe()}, path)
    with pytest.raises(ValueError, match="weights_only=True"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
