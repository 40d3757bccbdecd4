"""A tiny training run for the tests of the commands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from eamnet.cli import main

TINY = [
    *("--trainer.accelerator", "cpu"),
    *("--trainer.enable_progress_bar", "false"),
    *("--trainer.enable_model_summary", "false"),
    *("--model.widths", "[8,8,16,16]"),
    *("--model.decoder_widths", "[8,8,8]"),
    *("--model.blocks", "[1,1,1,1]"),
    *("--model.memory_size", "8"),
    *("--model.learning_rate", "0.03"),  # so high that the best epoch is not the last
    *("--data.dataset", "synthetic"),
    *("--data.protocol", "random"),
    *("--data.synthetic_count", "24"),
    *("--data.size", "32"),
    *("--data.batch_size", "4"),
]


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Options of ``eamnet fit`` that train a narrow network on 17 pictures of 32x32."""
    return TINY


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of two epochs; to be read, not changed."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["fit", *TINY, "--run_dir", str(folder), "--trainer.max_epochs", "2"]) == 0
    return folder


@pytest.fixture
def deterministic() -> Iterator[Callable[[], None]]:
    """Undo what ``--trainer.deterministic true`` sets for the whole process."""
    before = torch.are_deterministic_algorithms_enabled()
    yield lambda: None
    torch.use_deterministic_algorithms(before)
