"""Decoded and resized pictures, kept on disk or in memory."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]

from eamnet.data.source import MaskError, Picture, Pixels, Record, Source, UnreadablePictureError
from eamnet.data.transforms import RESIZE_VERSION, resize_image, resize_mask

#: Decoding releases the interpreter lock, so threads pay; more than this rarely does.
_THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Prepared:
    """A picture at network size.

    Attributes:
        image: uint8 ``(S, S, 3)``.
        mask: uint8 class indices ``(S, S)``, or ``None``.
        native_size: (height, width) to report at.
        notes: as the source gave them.
    """

    image: Pixels
    mask: Pixels | None
    native_size: tuple[int, int]
    notes: tuple[str, ...] = ()


@dataclass
class Findings:
    """What reading every picture once brought to light, by id.

    Attributes:
        unreadable: why a picture cannot be read.
        notes: as the source gave them, where it gave any.
        contents: hashes of the resized pictures, equal for equal ones.
    """

    unreadable: dict[str, str] = field(default_factory=dict)
    notes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)


class PictureStore:
    """Pictures of one source at one size.

    On disk, each is one file whose name is a hash of the source's fingerprint (for files: path,
    size and time of change of picture and mask, and how masks are read), the size and the resize
    method: what has changed is simply not found. It is asked for once per picture and store.
    Files are written beside and moved into place, so that any number of processes may share a
    folder, and begin with a CRC-32 of the rest; a damaged one is made again. (NumPy's ``.npz``
    would do as well, but takes 0.7 ms to read where this takes under 0.1.)

    Args:
        source: where pictures come from.
        size: side of the square pictures in pixels.
        cache_dir: folder to keep them in; made if missing.
        in_memory: keep them in this process; workers started later share them where processes
            are forked.
    """

    def __init__(
        self,
        source: Source,
        size: int,
        cache_dir: str | Path | None = None,
        in_memory: bool = False,
    ) -> None:
        if size < 8:
            raise ValueError(f"size must be at least 8 pixels, got {size}")
        self.source = source
        self.size = size
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.in_memory = in_memory
        self._memory: dict[str, Prepared] = {}
        self._paths: dict[str, Path] = {}

    def __getitem__(self, record: Record) -> Prepared:
        """The picture, from memory, from disk, or from the source.

        Raises:
            UnreadablePictureError, MaskError: as :meth:`Source.read`.
        """
        prepared = self._memory.get(record.id)
        if prepared is None:
            path = None if self.cache_dir is None else self._path(record, self.cache_dir)
            prepared = None if path is None else _read(path)
            if prepared is None:
                prepared = self._prepare(record, self.source.read(record))
                if path is not None:
                    _write(path, prepared)
            if self.in_memory:
                self._memory[record.id] = prepared
        return prepared

    def fill(self, records: Sequence[Record], strict: bool = False) -> Findings:
        """Read every record once, so that problems show before a long job and not inside it.

        Args:
            records: what to read.
            strict: raise at the first unreadable picture instead of recording it.

        Raises:
            UnreadablePictureError: if ``strict``.
            ValueError: for masks that cannot be used, naming them.
        """
        findings = Findings()
        unusable: list[str] = []

        def visit(record: Record) -> Exception | tuple[tuple[str, ...], bytes]:
            try:
                prepared = self[record]
            except (UnreadablePictureError, MaskError) as error:
                return error
            content = hashlib.blake2b(prepared.image.tobytes(), digest_size=16)
            return prepared.notes, content.digest()

        pool = ThreadPoolExecutor(_THREADS)
        try:
            results = tqdm(
                pool.map(visit, records),
                total=len(records),
                desc=f"Reading {self.source.name}",
                unit="picture",
                delay=2,
                leave=False,
                disable=None,  # no bar in files and pipes
            )
            for record, result in zip(records, results, strict=True):
                if isinstance(result, UnreadablePictureError):
                    if strict:
                        raise result
                    findings.unreadable[record.id] = str(result)
                elif isinstance(result, Exception):
                    unusable.append(str(result))
                else:
                    notes, findings.contents[record.id] = result
                    if notes:
                        findings.notes[record.id] = notes
        finally:
            # After an error or Ctrl-C, without waiting for thousands that are still to come.
            pool.shutdown(cancel_futures=True)
        if unusable:
            shown = "\n  ".join(unusable[:5])
            more = f"\n  and {len(unusable) - 5} more" if len(unusable) > 5 else ""
            raise ValueError(
                f"{len(unusable)} of {len(records)} masks cannot be used:\n  {shown}{more}"
            )
        return findings

    def _prepare(self, record: Record, picture: Picture) -> Prepared:
        height, width = record.native_size or picture.image.shape[:2]
        mask = None if picture.mask is None else resize_mask(picture.mask, self.size)
        return Prepared(
            resize_image(picture.image, self.size), mask, (height, width), picture.notes
        )

    def _path(self, record: Record, cache_dir: Path) -> Path:
        if record.id not in self._paths:
            parts = (self.source.fingerprint(record), record.native_size, self.size, RESIZE_VERSION)
            key = "/".join(map(str, parts))
            name = hashlib.sha256(key.encode()).hexdigest()[:40]
            folder = cache_dir / f"{self.source.name}-{self.size}"
            self._paths[record.id] = folder / f"{name}.picture"
        return self._paths[record.id]


def _write(path: Path, prepared: Prepared) -> None:
    header = {
        "size": len(prepared.image),
        "native_size": prepared.native_size,
        "notes": prepared.notes,
        "has_mask": prepared.mask is not None,
    }
    mask = b"" if prepared.mask is None else prepared.mask.tobytes()
    body = json.dumps(header).encode() + b"\n" + prepared.image.tobytes() + mask
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
        try:
            file.write(zlib.crc32(body).to_bytes(4, "big") + body)
        except BaseException:
            Path(file.name).unlink()
            raise
    Path(file.name).replace(path)


def _read(path: Path) -> Prepared | None:
    """The file's content, or ``None`` if it is not there or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    body = memoryview(content)[4:]
    if not body or zlib.crc32(body) != int.from_bytes(content[:4], "big"):
        return None
    start = content.index(b"\n", 4) + 1
    header = json.loads(content[4:start])
    size = header["size"]
    pixels = np.frombuffer(content, np.uint8, offset=start)
    height, width = header["native_size"]
    return Prepared(
        pixels[: size * size * 3].reshape(size, size, 3),
        pixels[size * size * 3 :].reshape(size, size) if header["has_mask"] else None,
        (height, width),
        tuple(header["notes"]),
    )
