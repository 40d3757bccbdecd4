"""The network as Lightning trains it: loss, optimiser, learning rate, metrics."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from eamnet.evaluation import Evaluation
from eamnet.losses import SegmentationLoss
from eamnet.metrics import SegmentationMetrics, Summary
from eamnet.model import EAMNet, EAMNetConfig, EAMNetOutput
from eamnet.tta import augmented_logits
from eamnet_kernels.backends import selected

__all__ = ["SegmentationTask"]


class SegmentationTask(L.LightningModule):
    """EAM-Net with its loss, optimiser and schedule.

    The learning rate follows a cosine with warm restarts, stepped after every optimiser step as a
    function of the (fractional) epoch alone: a resumed run therefore continues on the same curve.
    Cycles end after ``restart_epochs * (1 + restart_factor + restart_factor**2 + ...)`` epochs, by
    default 10, 30, 70 and 150: good numbers for ``--trainer.max_epochs``.

    Batches are dictionaries as :class:`eamnet.data.SegmentationDataset` makes them: ``image``
    ``(B, 3, H, W)`` float in [0, 1]; ``mask`` ``(B, 1, H, W)``.

    Args:
        learning_rate: The highest learning rate.
        optimizer: ``adam`` (L2 regularisation, if any, inside the gradient) or ``adamw``.
        weight_decay: L2 regularisation or, for ``adamw``, decoupled weight decay.
        restart_epochs: Epochs of the first cosine cycle; 0 keeps the learning rate constant.
        restart_factor: Each cycle is this many times as long as the one before.
        minimum_learning_rate: The learning rate at the end of a cycle.
        auxiliary_weight: Weight of the loss on the encoder's prediction (MSEF).
        channels_last: Keep pictures and features in channels-last order. With bfloat16 on a CPU
            that has matrix units this is what makes them pay.
        compile: Compile the network with ``torch.compile``.
        network: The fields of :class:`eamnet.model.EAMNetConfig`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        learning_rate: float = 1e-3,
        optimizer: Literal["adam", "adamw"] = "adam",
        weight_decay: float = 0.0,
        restart_epochs: int = 10,
        restart_factor: int = 2,
        minimum_learning_rate: float = 0.0,
        auxiliary_weight: float = 0.4,
        channels_last: bool = True,
        compile: bool = False,
        **network: Any,
    ) -> None:
        super().__init__()
        if not learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {learning_rate}")
        if optimizer not in ("adam", "adamw"):
            raise ValueError(f"optimizer must be 'adam' or 'adamw', got {optimizer!r}")
        if restart_epochs < 0:
            raise ValueError(f"restart_epochs must be 0 or more, got {restart_epochs}")
        if restart_factor < 1:
            raise ValueError(f"restart_factor must be 1 or more, got {restart_factor}")
        self.save_hyperparameters(logger=False)
        self.network = EAMNet(EAMNetConfig(**network))
        classes = self.network.config.num_classes
        self.loss = SegmentationLoss(classes, auxiliary_weight)
        self.metrics = SegmentationMetrics(classes)
        self.channels_last = channels_last
        self.evaluation_folder: Path | None = None
        self.tta = False
        self.summary: Summary | None = None
        self._evaluation: Evaluation | None = None
        self._seconds = 0.0
        if channels_last:
            self.network.to(memory_format=torch.channels_last)
        if compile:
            self.network.compile()

    def forward(self, image: Tensor) -> Tensor | EAMNetOutput:
        """What :meth:`eamnet.model.EAMNet.forward` returns for ``image``."""
        if self.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        result: Tensor | EAMNetOutput = self.network(image)
        return result

    def on_train_epoch_start(self) -> None:
        """Log the learning rate at the start of the epoch as ``lr``."""
        if self.trainer.optimizers:
            self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"], sync_dist=True)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss of one batch; logs ``train_loss``."""
        output = self(batch["image"])
        loss: Tensor = self.loss(output.logits, output.auxiliary, batch["mask"])
        self.log(
            "train_loss",
            loss,
            on_step=False,
            on_epoch=True,
            prog_bar=True,
            batch_size=len(batch["image"]),
            sync_dist=True,
        )
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """During ``fit`` the quick metrics of an epoch, otherwise the full evaluation.

        The quick ones, at network resolution, are ``val_loss`` (without the auxiliary term),
        ``val_dice`` and ``val_iou`` (means over pictures and over foreground classes).
        """
        if self._evaluation is not None:
            self._evaluate(batch)
            return
        logits = self(batch["image"])
        self.metrics.update(logits, batch["mask"])
        self.log(
            "val_loss",
            self.loss(logits, None, batch["mask"]),
            on_epoch=True,
            batch_size=len(logits),
            sync_dist=True,
        )

    def on_validation_epoch_start(self) -> None:
        """Begin the full evaluation, unless this is the validation of a training epoch."""
        if self.trainer.state.fn == TrainerFn.VALIDATING:
            self._begin_evaluation()

    def on_validation_epoch_end(self) -> None:
        """Log the quick metrics, or write the full evaluation into ``validation/``."""
        if self._evaluation is not None:
            self._end_evaluation("validation")
            return
        values = self.metrics.compute()
        self.metrics.reset()
        # `compute` has gathered all processes' pictures: the mean over processes changes nothing.
        self.log_dict(
            {"val_dice": values["dice"], "val_iou": values["iou"]}, prog_bar=True, sync_dist=True
        )

    def on_test_epoch_start(self) -> None:
        """Begin the full evaluation."""
        self._begin_evaluation()

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Judge a batch at network and at native resolution."""
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        """Write the evaluation into ``test/``."""
        self._end_evaluation("test")

    def _begin_evaluation(self) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self._evaluation = Evaluation(data, self.network.config.num_classes)
        self._seconds = 0.0

    def _evaluate(self, batch: dict[str, Any]) -> None:
        assert self._evaluation is not None
        start = time.perf_counter()
        image = batch["image"]
        logits = (augmented_logits(self, image) if self.tta else self(image)).float()
        if logits.is_cuda:
            torch.cuda.synchronize()
        self._seconds += time.perf_counter() - start
        self._evaluation.add(batch, logits)

    def _end_evaluation(self, part: str) -> None:
        """Write the evaluation and how long the network took for it."""
        assert self._evaluation is not None
        evaluation, self._evaluation = self._evaluation, None
        seconds = self._seconds / len(evaluation)
        folder = self.evaluation_folder or Path(self.trainer.default_root_dir, part)
        self.summary = evaluation.write(folder)
        if self.summary is None:
            return
        speed = {"seconds_per_picture": seconds, **self._setting()}
        (folder / "speed.json").write_text(json.dumps(speed, indent=2) + "\n")

    def _setting(self) -> dict[str, Any]:
        """What the network's speed depends on."""
        return {
            "device": str(self.device),
            "precision": str(self.trainer.precision),
            "threads": torch.get_num_threads(),
            "backend": selected(),
            **({"test-time augmentation": "8 views"} if self.tta else {}),
        }

    def configure_optimizers(self) -> Any:
        """Adam and, unless ``restart_epochs`` is 0, cosine annealing with warm restarts."""
        options = self.hparams
        kind = torch.optim.Adam if options["optimizer"] == "adam" else torch.optim.AdamW
        optimizer = kind(
            self.parameters(), lr=options["learning_rate"], weight_decay=options["weight_decay"]
        )
        if options["restart_epochs"] == 0:
            return optimizer
        scheduler = CosineAnnealingWarmRestarts(
            optimizer,
            T_0=options["restart_epochs"],
            T_mult=options["restart_factor"],
            eta_min=options["minimum_learning_rate"],
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Move the learning rate to where the epoch, with the part of it that is done, has it."""
        done = (self.trainer.fit_loop.batch_idx + 1) / self.trainer.num_training_batches
        scheduler.step(self.trainer.current_epoch + done)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what prediction needs: the network's configuration and the size of its input."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        checkpoint["eamnet"] = {"network": self.network.config.to_dict(), "size": data.size}
