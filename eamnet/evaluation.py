"""Evaluation of a part: every picture, at the network's resolution and at its own."""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from eamnet.data import SegmentationData
from eamnet.data.transforms import resize_mask_nearest
from eamnet.inference import most_probable, probabilities
from eamnet.measures import contrast
from eamnet.metrics import (
    ImageMetrics,
    Resolution,
    Summary,
    calibration_bins,
    discretise,
    image_metrics,
    summarise,
    write_csv,
    write_summary,
)
from eamnet.report import save_test_picture, select_pictures, write_contact_sheet
from eamnet.subgroups import subgroups

__all__ = ["Evaluation"]


class Evaluation:
    """Collects the metrics of each picture of a part and writes them.

    The prediction at a picture's own size is the bilinearly resized probability, cut at the fixed
    threshold: what ``eamnet predict`` writes. Boundary metrics are computed, which take longer
    than the rest; training uses :class:`eamnet.metrics.SegmentationMetrics` instead.

    Args:
        data: the pictures' data module, set up.
        num_classes: channels of the network's output.
    """

    def __init__(self, data: SegmentationData, num_classes: int = 1) -> None:
        self.data = data
        self.num_classes = num_classes
        self._rows: dict[str, list[ImageMetrics]] = {}
        self._bins: dict[str, dict[Resolution, NDArray[np.float64]]] = {}
        # Compressed: the report shows a few of them, which ones is known at the end, and a
        # thousand masks of 24 megapixels do not fit into memory.
        self._masks: dict[str, bytes] = {}

    def __len__(self) -> int:
        """Pictures judged so far, in this process."""
        return len(self._rows)

    def add(self, batch: dict[str, Any], logits: Tensor) -> None:
        """Judge a batch.

        Args:
            batch: as :class:`eamnet.data.SegmentationDataset` makes it, on any device.
            logits: the network's output for it, ``(B, num_classes, H, W)``.

        Raises:
            ValueError: the output is NaN somewhere, with the picture's id.
        """
        truths = batch["mask"][:, 0].to("cpu").numpy().astype(np.uint8)
        small = discretise(logits)[:, 0].to("cpu").numpy()
        for index, name in enumerate(batch["id"]):
            truth = self.data.native_mask(name)
            height, width = truth.shape
            probability = probabilities(logits[index : index + 1], (height, width))
            try:
                native = most_probable(probability)[0].to("cpu").numpy()
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            as_seen = probabilities(logits[index : index + 1], truths[index].shape)
            bins = self._bins[name] = {
                "network": calibration_bins(truths[index], as_seen[0].to("cpu").numpy()),
                "native": calibration_bins(truth, probability[0].to("cpu").numpy()),
            }
            common: dict[str, Any] = {
                "num_classes": self.num_classes,
                "contrast": contrast(batch["image"][index].cpu().float().numpy(), truths[index]),
                "diagnosis": self.data.source[name].diagnosis or "",
            }
            self._rows[name] = [
                *image_metrics(
                    name,
                    truths[index],
                    small[index],
                    resolution="network",
                    native_size=(height, width),
                    bins=bins["network"],
                    **common,
                ),
                *image_metrics(
                    name, truth, native, resolution="native", bins=bins["native"], **common
                ),
            ]
            self._masks[name] = zlib.compress(native.tobytes(), level=1)

    def write(self, folder: Path) -> Summary | None:
        """Gather the rows of all processes and write the evaluation in the first one.

        Writes ``per_image.csv``, ``summary.json``, the best, median and worst pictures for the
        report, and them on one sheet, ``sheet.png``.

        Returns:
            The summary, None in the processes other than the first.
        """
        if dist.is_initialized() and dist.get_world_size() > 1:
            # By id, so that each would count once if several processes had it.
            for name in ("_rows", "_bins", "_masks"):
                parts: list[Any] = [None] * dist.get_world_size()
                dist.all_gather_object(parts, getattr(self, name))
                setattr(self, name, {k: v for part in parts for k, v in part.items()})
            if dist.get_rank() != 0:
                return None
        rows = [row for _, of in sorted(self._rows.items()) for row in of]
        folder.mkdir(parents=True, exist_ok=True)
        summary = summarise(rows, self._bins)
        summary["subgroups"] = subgroups(rows)
        write_csv(rows, folder / "per_image.csv")
        write_summary(summary, folder / "summary.json")
        shutil.rmtree(folder / "pictures", ignore_errors=True)  # another choice of an earlier time
        for name in {i for ids in select_pictures(rows).values() for i in ids}:
            image, _ = self.data.source.load(self.data.source[name])
            truth = self.data.native_mask(name)
            mask = np.frombuffer(zlib.decompress(self._masks[name]), np.uint8)
            # Where the files are reduced copies, the truth is larger than the picture.
            shown = [
                resize_mask_nearest(m, *image.shape[:2]) for m in (truth, mask.reshape(truth.shape))
            ]
            save_test_picture(folder / "pictures", name, image, *shown)
        write_contact_sheet(folder, folder / "sheet.png")
        return summary
