"""The network as a file that runs without this project: ONNX, or PyTorch's ``.pt2``.

The operators are written out in plain operations, the ones that defines them, so that neither the
project nor its compiled library is needed to run the result; it takes pictures of any size, and
carries in its metadata what has to be done to a picture before and to the logits after.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from eamnet.inference import DEFAULT_SIZE, DEFAULT_WEIGHTS, export_weights
from eamnet.metrics import THRESHOLD
from eamnet.model import EAMNet, weights_metadata
from eamnet_kernels import functional
from eamnet_kernels.reference import (
    cross_mix_channels,
    cross_mix_pixels,
    external_memory,
    multi_dilation_conv,
)

__all__ = ["METADATA_KEY", "TOLERANCE", "export", "export_file"]

METADATA_KEY = "eamnet"
"""Of the JSON text in an ONNX file's metadata; in a ``.pt2`` the extra file ``eamnet.json``."""
TOLERANCE = 1e-3
"""Of the logits of the exported network against those of the network itself: other libraries add
up in another order."""


def export(arguments: list[str]) -> int:
    """``eamnet export``: write a network as ONNX or as PyTorch's exported program."""
    parser = ArgumentParser(
        prog="eamnet export",
        description="Write a network as .onnx or .pt2 that runs without this project, and compare "
        "its output with the network's own.",
    )
    parser.add_function_arguments(export_file)
    options = parser.parse_args(arguments)
    error = export_file(**vars(options))
    print(f"{options.output}: logits differ from the network's own by at most {error:.1e}")
    return 0


def export_file(output: str, checkpoint: str = DEFAULT_WEIGHTS) -> float:
    """Export and check; the file is there only if the check passed.

    Args:
        output: a name that ends in ``.onnx`` or ``.pt2``.
        checkpoint: a ``.ckpt`` or ``.safetensors`` file of ``eamnet fit``, or bundled weights by
            name.

    Returns:
        The largest difference between the exported and the network's own logits, on pictures of
        several sizes.

    Raises:
        ValueError: another ending, packages for ONNX missing, or a difference above
            :data:`TOLERANCE`.
    """
    path = Path(output)
    if path.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"output must end in .onnx or .pt2, got {output!r}")
    if path.suffix == ".onnx":
        packages = ("onnx", "onnxscript", "onnxruntime")
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(
                f"{', '.join(missing)} not found: pip install 'eamnet-kernels[export]'"
            )
    model, facts = _load(checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    program = _trace(model)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        unfinished = Path(folder, path.name)
        write, run = _FORMATS[path.suffix]
        write(program, unfinished, json.dumps(facts))
        error = _difference(model, run(unfinished), facts["size"])
        if not error <= TOLERANCE:
            raise ValueError(f"the exported logits are off by {error:.1e}, above {TOLERANCE}")
        unfinished.replace(path)
    return error


class _AnySize(nn.Module):
    """The network, padding and cropping by index.

    Its own way of padding makes the tracer decide whether there is anything to pad, once and for
    all sizes.
    """

    def __init__(self, network: EAMNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, picture: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> logits ``(B, num_classes, H, W)``."""
        stride = self.network.config.stride
        sizes = picture.shape[2:]
        for dim, size in zip((2, 3), sizes, strict=True):
            padded = torch.arange((size + stride - 1) // stride * stride, device=picture.device)
            picture = picture.index_select(dim, padded.clamp(max=size - 1))
        logits: Tensor = self.network(picture)
        for dim, size in zip((2, 3), sizes, strict=True):
            logits = logits.index_select(dim, torch.arange(size, device=picture.device))
        return logits


def _trace(model: EAMNet) -> torch.export.ExportedProgram:
    """An exported program of plain operations, free in batch, height and width."""
    free = torch.export.Dim
    # At one stride or less the coarsest map has a single row, which the tracer would fix.
    smallest = model.config.stride + 1
    shapes = {0: free("batch"), 2: free("height", min=smallest), 3: free("width", min=smallest)}
    stride = model.config.stride
    picture = torch.zeros(2, model.config.in_channels, 5 * stride + 3, 7 * stride + 1)
    with torch.no_grad(), patch.object(functional, "call", _plain):
        return torch.export.export(_AnySize(model).eval(), (picture,), dynamic_shapes=(shapes,))


def _plain(operator: str, *arguments: Any, backend: str) -> tuple[Tensor, ...]:
    """In place of a call of the dispatcher: the operator's result by its definition."""
    return _PLAIN[operator](*arguments)


def _external_memory(x: Tensor, key: Tensor, value: Tensor, w_out: Tensor, top_k: int) -> Tensor:
    """``external_memory`` whose selection needs no stable sort, which ONNX does not have."""
    attention = torch.softmax(key @ x.flatten(2), -1)
    attention = attention / (external_memory.EPSILON + attention.sum(1, keepdim=True))
    features = value.t() @ attention
    score = features.abs().sum(2)
    index = torch.arange(score.shape[1], device=score.device)
    ahead = (score[:, None, :] > score[:, :, None]) | (
        (score[:, None, :] == score[:, :, None]) & (index < index[:, None])
    )
    kept = ahead.sum(2) < top_k
    return (w_out @ torch.where(kept[:, :, None], features, 0.0)).view_as(x)


_PLAIN: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "gate_statistics": lambda x: (
        x.mean(1, keepdim=True),
        x.amax(1, keepdim=True),
        x.mean((2, 3)),
        x.amax((2, 3)),
    ),
    # The last argument of two is whether to save for the backward.
    "cross_mix_pixels": lambda *a: (cross_mix_pixels.direct(*a[:-1]),),
    "cross_mix_channels": lambda *a: (cross_mix_channels.direct(*a),),
    "external_memory": lambda *a: (_external_memory(*a),),
    "multi_dilation_conv": lambda *a: (multi_dilation_conv.direct(*a[:-1]),),
}


def _write_onnx(program: torch.export.ExportedProgram, path: Path, facts: str) -> None:
    exported = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=["picture"], output_names=["logits"]
    )
    assert exported is not None
    exported.model.metadata_props[METADATA_KEY] = facts
    exported.save(path, external_data=False)


def _run_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime  # type: ignore[import-untyped, unused-ignore]

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["logits"], {"picture": x.numpy()})[0])


def _write_pt2(program: torch.export.ExportedProgram, path: Path, facts: str) -> None:
    torch.export.save(program, path, extra_files={f"{METADATA_KEY}.json": facts})


def _run_pt2(path: Path) -> Callable[[Tensor], Tensor]:
    run: Callable[[Tensor], Tensor] = torch.export.load(path).module()
    return run


_Write = Callable[[torch.export.ExportedProgram, Path, str], None]
_Run = Callable[[Path], Callable[[Tensor], Tensor]]
_FORMATS: dict[str, tuple[_Write, _Run]] = {
    ".onnx": (_write_onnx, _run_onnx),
    ".pt2": (_write_pt2, _run_pt2),
}


def _difference(model: EAMNet, run: Callable[[Tensor], Tensor], size: int) -> float:
    """The largest difference of logits at the network's size and at others, batches of 1 and 2."""
    generator = torch.Generator().manual_seed(0)
    stride = model.config.stride
    worst = 0.0
    for shape in ((1, size, size), (2, 2 * stride, 4 * stride), (1, 3 * stride - 1, stride + 1)):
        batch, height, width = shape
        x = torch.rand(batch, model.config.in_channels, height, width, generator=generator)
        with torch.no_grad():
            error = float((run(x) - model(x)).abs().max())
        worst = float(np.maximum(worst, error))  # NaN wins
    return worst


def _load(checkpoint: str) -> tuple[EAMNet, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path: str | Path = checkpoint
        if Path(checkpoint).suffix == ".ckpt":
            path = export_weights(checkpoint, Path(folder, "weights.safetensors"))
        model, metadata = EAMNet.from_pretrained(path), weights_metadata(path)
    size = int(metadata.get("eamnet_size", DEFAULT_SIZE))
    several = model.config.num_classes > 1
    facts = {
        "schema": 1,
        "network": model.config.to_dict(),
        "size": size,
        "input": {
            "name": "picture",
            "dtype": "float32",
            "shape": ["batch", model.config.in_channels, "height", "width"],
            "channels": "RGB",
            "range": [0, 1],
            "preprocessing": f"resize the whole picture to {size}x{size} (bilinear, antialiased, "
            "aspect not kept), divide 8-bit values by 255; no mean or deviation is taken away",
        },
        "output": {
            "name": "logits",
            "shape": ["batch", model.config.num_classes, "height", "width"],
            "activation": "softmax over channels" if several else "sigmoid",
            "threshold": None if several else THRESHOLD,
            "postprocessing": "bring the probabilities to the picture's own size (bilinear), then "
            + ("take the most probable class" if several else f"cut: lesion above {THRESHOLD}"),
        },
        "intended_use": "research; not a medical device",
    }
    return model, facts
