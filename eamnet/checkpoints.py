"""Checkpoints that are either whole or not there.

A training run may be killed at any moment, and a disk may lose the end of a file. Checkpoints are
therefore written beside their name, flushed to the disk, read back and only then renamed; and
before one is resumed from, its checksums are verified. Nothing is loaded through an unrestricted
pickle.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

__all__ = [
    "AtomicCheckpointIO",
    "MovableCheckpoint",
    "check_whole",
    "last_whole_checkpoint",
    "load_checkpoint",
]


def check_whole(path: str | Path) -> None:
    """Verify that a checkpoint file is complete.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or damaged, with what is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    # torch.save writes a zip archive: its table of contents stands at the end, so that a truncated
    # file has none, and each member carries a CRC-32.
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise ValueError(f"checkpoint {path} is not whole: {error}") from error
    if damaged is not None:
        raise ValueError(f"checkpoint {path} is not whole: wrong checksum in {damaged}")


def load_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Load a whole checkpoint, tensors and plain containers only.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds anything but tensors and plain containers.
    """
    check_whole(path)
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        raise ValueError(
            f"checkpoint {path} cannot be loaded with weights_only=True, the only way it may be: "
            f"{error}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint {path} holds a {type(content).__name__}, expected a dict")
    return content


def last_whole_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint of a run's ``checkpoints`` folder.

    The checkpoints of the last epochs (``last-epoch=*.ckpt``) come first, newest epoch first, then
    ``best.ckpt``. A damaged one is passed over with a warning.

    Returns:
        Its path, or None where the folder holds no checkpoint at all.

    Raises:
        ValueError: there are checkpoints, and every one is damaged.
    """
    folder = Path(folder)
    candidates = sorted(folder.glob("last-epoch=*.ckpt"), reverse=True)
    candidates += [path for path in [folder / "best.ckpt"] if path.is_file()]
    reasons = []
    for path in candidates:
        try:
            check_whole(path)
        except ValueError as error:
            reasons.append(str(error))
            rank_zero_warn(f"{error}; falling back to the one before")
        else:
            return path
    if reasons:
        raise ValueError("no whole checkpoint to resume from: " + "; ".join(reasons))
    return None


class MovableCheckpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint`` for a run folder that may be moved or copied.

    Lightning's own forgets the best score when it is resumed elsewhere, and then takes the first
    epoch that follows for the best.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of a checkpoint, with its paths brought into this run's folder."""
        old, new = state_dict["dirpath"], self.dirpath

        def moved(value: Any) -> Any:
            if isinstance(value, dict):
                return {moved(k): v for k, v in value.items()}
            if isinstance(value, str) and value.startswith(old):
                return f"{new}{value.removeprefix(old)}"
            return value

        super().load_state_dict({name: moved(value) for name, value in state_dict.items()})


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's checkpoint reading and writing, made safe against kills and pickles.

    Local files only.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write ``checkpoint`` so that ``path`` is at any time the old file or the new one.

        Raises:
            ValueError: the content could not be loaded again under ``weights_only=True``; ``path``
                is left as it was.
        """
        if storage_options is not None:
            raise TypeError("storage_options is not supported: checkpoints are local files")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            try:
                # Memory mapping reads the structure and not the tensors: a cheap check.
                torch.load(temporary, weights_only=True, map_location="cpu", mmap=True)
            except Exception as error:
                raise ValueError(f"checkpoint {path} could not be loaded back: {error}") from error
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        # The rename itself is safe from a power cut only once the folder is on the disk.
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a whole checkpoint; always with ``weights_only=True``, whatever the caller says."""
        return load_checkpoint(path, map_location or "cpu")

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint file if it is there."""
        Path(path).unlink(missing_ok=True)
