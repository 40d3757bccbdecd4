"""Search for better block sizes on the card at hand, and keep what was found.

>>> import eamnet_kernels                                         # doctest: +SKIP
>>> eamnet_kernels.tune.tune(lambda: model(x).sum().backward())   # doctest: +SKIP

`tune` runs a function, sees which Triton kernels it launches at which shapes, and changes their
configurations one number at a time for as long as the function gets faster. The result is written
to a file and used from then on for those kernels, on the same kind of card, with the same kernel
source and the same versions of torch and Triton: at all shapes that have the same key, which is
often the width of an element and one padded dimension, so tune with shapes that are used. Nothing
searches unless asked to.

The file is `tuning.json` in `$EAMNET_CACHE`, by default `~/.cache/eamnet_kernels`.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from eamnet_kernels.triton.configurations import Configuration

Entry = tuple[str, tuple[tuple[str, int | str], ...]]
"""A kernel, `<operator>.<kernel>`, and the key of a shape."""


def path() -> Path:
    """The file that results are kept in."""
    return Path(_folder()).expanduser() / "tuning.json"


def _folder() -> str:
    return os.environ.get("EAMNET_CACHE", "~/.cache/eamnet_kernels")


@cache
def _source(operator: str) -> str:
    source = Path(__file__).parent / "triton" / f"{operator}.py"
    return hashlib.sha256(source.read_bytes()).hexdigest()[:16]


@cache
def _card(device: torch.device) -> str:
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, torch {torch.__version__}, triton {triton.__version__}"


def _name(device: torch.device, kernel: str, key: tuple[tuple[str, int | str], ...]) -> str:
    source = _source(kernel.split(".")[0])
    shape = ",".join(f"{name}={value}" for name, value in key)
    return f"{_card(device)}, {source}, {kernel}, {shape}"


@cache
def _found(folder: str) -> dict[str, Any]:
    """What the file in `folder` holds; read once, because every launch asks."""
    try:
        content: dict[str, Any] = json.loads(path().read_text())
    except FileNotFoundError:
        return {}
    except (OSError, RuntimeError, ValueError) as error:  # no home, no access, half a file
        warnings.warn(f"results of tuning are not used: {folder}: {error}", stacklevel=2)
        return {}
    return content


def kept(
    device: torch.device | None, kernel: str, key: tuple[tuple[str, int | str], ...]
) -> Configuration | None:
    """What an earlier search found for a kernel and a shape on this device, or None."""
    from eamnet_kernels.triton.configurations import Configuration

    found = _found(_folder())
    if not found or device is None:
        return None
    entry = found.get(_name(device, kernel, key))
    return None if entry is None else Configuration(**entry["configuration"])


def neighbours(configuration: Configuration) -> Iterator[Configuration]:
    """The configurations that differ in one number: halved or doubled, stages by one.

    Not in DEPTH, the summands of one product: with more of them sums lose precision.
    """
    for name, block in configuration.blocks.items():
        if name == "DEPTH":
            continue
        for changed in (block // 2, block * 2):
            if changed > 0:
                yield replace(configuration, blocks={**configuration.blocks, name: changed})
    for warps in (configuration.num_warps // 2, configuration.num_warps * 2):
        if 1 <= warps <= 16:
            yield replace(configuration, num_warps=warps)
    for stages in (configuration.num_stages - 1, configuration.num_stages + 1):
        if stages >= 1:
            yield replace(configuration, num_stages=stages)


def _milliseconds(function: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(function, warmup=20, rep=100, return_mode="median"))


def tune(
    function: Callable[[], Any],
    *,
    device: torch.device | str = "cuda",
    milliseconds: Callable[[Callable[[], Any]], float] = _milliseconds,
    least_gain: float = 0.02,
) -> dict[str, dict[str, Any]]:
    """Make the Triton kernels that `function` launches faster on `device`, and keep the result.

    A configuration that does not compile or does not fit the card is passed over. A change is taken
    where it shortens the whole function by at least the fraction `least_gain`. Returns what was
    written, by name: the configuration and the function's time before and after, in milliseconds.
    """
    from eamnet_kernels.triton import configurations

    device = torch.device(device)
    with configurations.watched() as seen:
        function()
    written = {}
    for entry, start in seen.items():
        best = start
        with configurations.overridden(entry, start):
            before = least = milliseconds(function)
        tried = {json.dumps(start.as_dict())}
        improved = True
        while improved:
            improved = False
            for candidate in neighbours(best):
                if json.dumps(candidate.as_dict()) in tried:
                    continue
                tried.add(json.dumps(candidate.as_dict()))
                with configurations.overridden(entry, candidate):
                    try:
                        time = milliseconds(function)
                    except Exception as error:  # Triton's errors have no common class
                        if isinstance(error, torch.AcceleratorError):
                            raise  # the device is lost to this process
                        continue
                if time < least * (1 - least_gain):
                    best, least, improved = candidate, time, True
        if best != start:
            written[_name(device, *entry)] = {
                "configuration": best.as_dict(),
                "before_ms": before,
                "after_ms": least,
            }
            _write(written)
    return written


def _write(entries: dict[str, dict[str, Any]]) -> None:
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    _found.cache_clear()
    content = {**_found(_folder()), **entries}
    # Whole or not at all, beside other processes that read.
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    partial.replace(file)
    _found.cache_clear()
