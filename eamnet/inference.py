"""From picture files to masks: the predictor and the command ``eamnet predict``."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from eamnet.data.source import (
    IMAGE_EXTENSIONS,
    UnreadablePictureError,
    named_as_picture,
    read_image,
)
from eamnet.data.transforms import resize_image, to_float
from eamnet.folding import fold, native_bfloat16
from eamnet.metrics import THRESHOLD, write_atomic
from eamnet.model import EAMNet, EAMNetConfig, weights_metadata
from eamnet.report import outline_overlay
from eamnet.tta import augmented_logits

__all__ = [
    "Predictor",
    "export_weights",
    "most_probable",
    "predict",
    "probabilities",
]

Precision = Literal["float32", "bfloat16", "float16", "auto"]
DEFAULT_SIZE = 256
"""Network size where the weights do not say at which they were trained: the paper's."""
DEFAULT_WEIGHTS = "isic2017"
"""The bundled weights that ``eamnet predict`` uses where it is given none."""
NETWORK_PREFIX = "network."
"""Before the names of the network's tensors in a checkpoint's `state_dict`."""
_SIZE_KEY = "eamnet_size"


def probabilities(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring a prediction to another size, as probabilities, bilinearly.

    Args:
        logits: ``(B, C, H, W)``; one channel means a sigmoid, more a softmax.
        size: ``(h, w)``.

    Returns:
        float32 ``(B, C, h, w)``.
    """
    logits = logits.float()
    result = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)
    if tuple(result.shape[-2:]) == tuple(size):
        return result
    # Without the filter, shrinking would sample single pixels; enlarging is the same either way.
    return F.interpolate(result, tuple(size), mode="bilinear", antialias=True)


def most_probable(probability: Tensor) -> Tensor:
    """The class of each pixel, uint8 ``(B, H, W)``, from probabilities ``(B, C, H, W)``.

    One channel is foreground above the fixed threshold
    :data:`eamnet.metrics.THRESHOLD`; of several the largest wins.

    Raises:
        ValueError: a probability is NaN, which is no class and would pass for background.
    """
    if bool(probability.isnan().any()):
        raise ValueError("the network's output is not a number (NaN) somewhere in the picture")
    if probability.shape[1] == 1:
        return (probability[:, 0] > THRESHOLD).to(torch.uint8)
    return probability.argmax(1).to(torch.uint8)


class Predictor:
    """A trained network, from a picture of any size to probabilities at that size.

    Args:
        model: the network; it stays as it is, a folded copy (:func:`eamnet.folding.fold`) runs.
        size: side in pixels of the square to which pictures are resized for the network, as in
            training.
        device: where it runs.
        precision: dtype of the folded network: ``float32``, ``bfloat16`` or ``float16``; ``auto``
            is ``bfloat16`` where the device multiplies it natively, else ``float32``.
        tta: average over the eight flips and quarter turns of a picture.

    Raises:
        ValueError: ``size`` is not positive or ``precision`` is unknown.
    """

    def __init__(
        self,
        model: EAMNet,
        size: int = DEFAULT_SIZE,
        device: str | torch.device = "cpu",
        precision: Precision = "float32",
        tta: bool = False,
    ) -> None:
        if size < 1:
            raise ValueError(f"size must be positive, got {size}")
        if precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {get_args(Precision)}, got {precision!r}")
        self.device = torch.device(device)
        if precision == "auto":
            precision = "bfloat16" if native_bfloat16(self.device) else "float32"
        self.dtype: torch.dtype = getattr(torch, precision)
        self.model = fold(model, self.dtype).to(self.device)
        self.size = size
        self.tta = tta

    @classmethod
    def from_file(
        cls,
        checkpoint: str | os.PathLike[str],
        size: int | None = None,
        device: str | torch.device = "cpu",
        precision: Precision = "float32",
        tta: bool = False,
    ) -> Predictor:
        """Load a ``.ckpt`` of training, a ``.safetensors`` file, or bundled weights by name.

        Args:
            checkpoint: path or name.
            size: network size; by default the one that the weights were trained at.
            device, precision, tta: as for the class.

        Raises:
            FileNotFoundError: no such file and no bundled weights of that name.
            ValueError: the file is damaged or of another kind.
        """
        model, trained_size = _load(checkpoint)
        return cls(model, size or trained_size or DEFAULT_SIZE, device, precision, tta)

    def __call__(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probabilities for one picture.

        Args:
            image: uint8 ``(H, W, 3)``.

        Returns:
            float32 ``(H, W)`` for one class, ``(num_classes, H, W)`` for more.

        Raises:
            TypeError: another dtype.
            ValueError: another shape.
        """
        return self.batch([image])[0]

    def batch(self, images: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
        """Probabilities for several pictures, of any sizes, in one pass of the network."""
        return [
            (p[0, 0] if p.shape[1] == 1 else p[0]).cpu().numpy() for p in self.probabilities(images)
        ]

    def masks(self, images: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        """Class indices ``(H, W)`` for several pictures, of any sizes.

        Raises:
            ValueError: a probability is NaN.
        """
        return [most_probable(p)[0].cpu().numpy() for p in self.probabilities(images)]

    @torch.inference_mode()
    def probabilities(self, images: Sequence[NDArray[np.uint8]]) -> Iterator[Tensor]:
        """One by one, float32 ``(1, C, H, W)`` on the network's device, of any sizes."""
        if not images:
            return
        for image in images:
            _check_image(image)
        x = torch.stack([to_float(resize_image(image, self.size)) for image in images])
        x = x.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last)
        logits = augmented_logits(self.model, x) if self.tta else self.model(x)
        for index, image in enumerate(images):
            yield probabilities(logits[index : index + 1], image.shape[:2])


def _check_image(image: NDArray[np.uint8]) -> None:
    if image.dtype != np.uint8:
        raise TypeError(f"image must be uint8, got {image.dtype}")
    if image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"image must be a non-empty (H, W, 3), got shape {image.shape}")


def _load(checkpoint: str | os.PathLike[str]) -> tuple[EAMNet, int | None]:
    path = Path(checkpoint)
    if path.suffix == ".ckpt":
        from eamnet.checkpoints import load_checkpoint

        content = load_checkpoint(path)
        return _from_checkpoint(content, path), content.get("eamnet", {}).get("size")
    size = weights_metadata(checkpoint).get(_SIZE_KEY)
    return EAMNet.from_pretrained(checkpoint), int(size) if size else None


def _from_checkpoint(content: dict[str, Any], path: str | os.PathLike[str]) -> EAMNet:
    if "eamnet" not in content:
        raise ValueError(f"checkpoint {path} was not written by `eamnet fit`")
    model = EAMNet(EAMNetConfig.from_dict(content["eamnet"]["network"]))
    model.load_state_dict(
        {
            k.removeprefix(NETWORK_PREFIX): v
            for k, v in content["state_dict"].items()
            if NETWORK_PREFIX in k
        }
    )
    return model.eval()


def export_weights(checkpoint: str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
    """Write the network of a ``.ckpt`` as safetensors, with its configuration and input size.

    Args:
        checkpoint: a checkpoint of ``eamnet fit``.
        path: a name ending in ``.safetensors``; :meth:`Predictor.from_file` and
            :meth:`eamnet.model.EAMNet.from_pretrained` read it.

    Returns:
        The file's path.
    """
    model, size = _load(checkpoint)
    # Weights that do not say at which size they were trained are used at the wrong one.
    return model.save_pretrained(path, metadata={_SIZE_KEY: str(size)} if size else None)


def predict(arguments: list[str]) -> int:
    """``eamnet predict``: masks and overlays for picture files and folders."""
    parser = ArgumentParser(
        prog="eamnet predict",
        description="Segment pictures: writes masks and overlays at each picture's own size.",
    )
    parser.add_argument(
        "inputs", nargs="+", type=str, help="Picture files, or folders of picture files."
    )
    parser.add_function_arguments(predict_files, skip={"inputs"})
    options = parser.parse_args(arguments)
    return predict_files(**vars(options))


def predict_files(
    inputs: Sequence[str],
    checkpoint: str = DEFAULT_WEIGHTS,
    output: str = "predictions",
    recursive: bool = False,
    overwrite: bool = False,
    overlays: bool = True,
    size: int | None = None,
    batch_size: int = 4,
    device: str = "auto",
    precision: Precision = "float32",
    tta: bool = False,
) -> int:
    """Segment picture files; go on past those that cannot be read and name them at the end.

    Masks are ``OUTPUT/masks/NAME.png``: single-channel, 0 for background and 255 for the lesion,
    or, for networks of several classes, the class index. Overlays are ``OUTPUT/overlays/NAME.jpg``.
    Both have the size of the picture as it is seen, that is with its EXIF orientation applied. A
    folder's pictures keep their place within it.

    Args:
        inputs: picture files and folders.
        checkpoint: a ``.ckpt`` or ``.safetensors`` file of ``eamnet fit``, or bundled weights by
            name (``eamnet/weights/NAME.md`` says what they are).
        output: folder for the results.
        recursive: search folders within the folders, too.
        overwrite: replace results that are there already.
        overlays: write overlays, too.
        size: side of the square that the network sees; default: as in training.
        batch_size: pictures in one pass of the network.
        device: ``cpu``, ``cuda``, ``cuda:1``; ``auto`` takes an accelerator where there is one.
        precision: dtype of the network: ``float32``, ``bfloat16`` or ``float16``; ``auto`` is
            ``bfloat16`` where the device multiplies it natively, else ``float32``.
        tta: average over the eight flips and quarter turns of a picture; takes eight times as long.

    Returns:
        0, or 1 if a picture failed.

    Raises:
        FileNotFoundError: an input is not there, or no picture is.
        FileExistsError: results are there already and ``overwrite`` is off.
        ValueError: two pictures would share a result, or an argument is out of range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    folder = Path(output)
    jobs = _jobs([Path(i) for i in inputs], folder, recursive, overlays)
    existing = [t for targets in jobs.values() for t in targets if t.exists()]
    if existing and not overwrite:
        raise FileExistsError(
            f"{len(existing)} results are there already, the first is {existing[0]}: give "
            "--overwrite true to replace them, or another --output"
        )
    if device == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        device = found.type if found else "cpu"
    predictor = Predictor.from_file(checkpoint, size, device, precision, tta)
    binary = predictor.model.config.num_classes == 1
    failures: list[str] = []
    paths = list(jobs)
    for start in range(0, len(paths), batch_size):
        batch: dict[Path, NDArray[np.uint8]] = {}
        for path in paths[start : start + batch_size]:
            try:
                batch[path] = read_image(path)
            except UnreadablePictureError as error:
                failures.append(str(error))
        predictions = predictor.probabilities(list(batch.values()))
        for (path, image), probability in zip(batch.items(), predictions, strict=True):
            try:
                mask = most_probable(probability)[0].cpu().numpy()
            except ValueError as error:
                failures.append(f"{path}: {error}")
                continue
            targets = jobs[path]
            _write_picture(targets[0], mask * np.uint8(255) if binary else mask)
            if overlays:
                _write_picture(targets[1], outline_overlay(image, None, mask))
        print(f"{min(start + batch_size, len(paths))}/{len(paths)}", end="\r", file=sys.stderr)
    print(f"{len(paths) - len(failures)} pictures segmented, in {folder}")
    if failures:
        print(f"{len(failures)} failed:", file=sys.stderr)
        for reason in failures:
            print(f"  {reason}", file=sys.stderr)
    return 1 if failures else 0


def _jobs(
    inputs: Sequence[Path], output: Path, recursive: bool, overlays: bool
) -> dict[Path, list[Path]]:
    """Results of each picture; refuses inputs that are not there and results that collide."""
    pictures: dict[Path, Path] = {}
    results = [(output / name).resolve() for name in ("masks", "overlays")]
    for path in inputs:
        if path.is_dir():
            found = sorted(path.rglob("*") if recursive else path.glob("*"))
            for file in found:
                # Earlier results inside the folder are no input.
                own = any(folder in file.resolve().parents for folder in results)
                if named_as_picture(file) and file.is_file() and not own:
                    pictures[file] = file.relative_to(path)
        elif path.is_file():
            pictures[path] = Path(path.name)
        else:
            raise FileNotFoundError(f"input {path} does not exist")
    if not pictures:
        raise FileNotFoundError(
            f"no pictures ({', '.join(sorted(IMAGE_EXTENSIONS))}) in {', '.join(map(str, inputs))}"
            + ("" if recursive else "; --recursive true searches the folders within, too")
        )
    taken: dict[Path, Path] = {}
    jobs: dict[Path, list[Path]] = {}
    for picture, name in pictures.items():
        mask = output / "masks" / name.with_suffix(".png")
        if mask in taken:
            raise ValueError(
                f"{taken[mask]} and {picture} would both be written to {mask}; predict them into "
                "different folders"
            )
        taken[mask] = picture
        jobs[picture] = [mask]
        if overlays:
            jobs[picture].append(output / "overlays" / name.with_suffix(".jpg"))
    return jobs


def _write_picture(path: Path, pixels: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    kind = "PNG" if path.suffix == ".png" else "JPEG"
    Image.fromarray(pixels).save(data, kind, **({} if kind == "PNG" else {"quality": 92}))
    write_atomic(path, data.getvalue())
