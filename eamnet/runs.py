"""The commands ``fit``, ``validate`` and ``test``, and the run folders that they fill.

A run folder holds everything about one training run::

    config.yaml        the full configuration, as --config takes it
    versions.json      versions of the software, the machine, the commit
    split.json         the pictures of each part, with the split's hash
    data_report.json   what there was to say about the pictures
    metrics.csv        losses, metrics and learning rate of each epoch
    tensorboard/       the same for TensorBoard
    checkpoints/       best.ckpt (by validation Dice), last-epoch=N.ckpt (the last two)
    best.safetensors   the weights of best.ckpt
    validation/ test/  per_image.csv, summary.json and pictures of an evaluation; with --tta
                       validation-tta/ and test-tta/
    report.html        all of it on one page
"""

from __future__ import annotations

import csv
import json
import logging
import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped, unused-ignore]
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from eamnet.checkpoints import (
    AtomicCheckpointIO,
    MovableCheckpoint,
    check_whole,
    last_whole_checkpoint,
    load_checkpoint,
)
from eamnet.data import SegmentationData
from eamnet.distributed import CrossProcessBatchNormSync
from eamnet.inference import export_weights
from eamnet.memory import keep_freed_memory
from eamnet.metrics import METRICS, Summary
from eamnet.model import EAMNet
from eamnet.report import write_report
from eamnet.training import SegmentationTask
from eamnet.versions import versions

__all__ = ["Options", "fit", "test", "validate"]

# The network's options are documented where they are defined, below each of their fields.
set_parsing_settings(docstring_parse_attribute_docstrings=True)

_CONFIGS = Path(__file__).parent / "configs"


def fit(arguments: list[str]) -> int:
    """``eamnet fit``: train, evaluate the best checkpoint on the validation part, report."""
    return _run("fit", arguments)


def validate(arguments: list[str]) -> int:
    """``eamnet validate``: evaluate a run's best checkpoint on its validation part."""
    return _run("validate", arguments)


def test(arguments: list[str]) -> int:
    """``eamnet test``: evaluate a run's best checkpoint on its test part."""
    return _run("test", arguments)


def _run(command: str, arguments: list[str]) -> int:
    # Noise: what is meant so (workers, folders that a resumed run finds filled, few batches), what
    # is Lightning's own affair, and advertising.
    for message in (
        ".*does not have many workers.*",
        ".*exists and is not empty.*",
        ".*smaller than the logging interval.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*callbacks used to create the checkpoint need to be provided.*",
    ):
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )
    keep_freed_memory()
    run = _RunCLI(command, _with_run_config(_with_packaged_configs(arguments)))
    if command == "fit":
        run.fit()
    else:
        run.evaluate(command)
    return 0


def _with_packaged_configs(arguments: list[str]) -> list[str]:
    """Replace the name of a configuration that comes with the package by its path."""
    result = list(arguments)
    for index, word in enumerate(result):
        previous = result[index - 1] if index else ""
        name = word.removeprefix("--config=") if word.startswith("--config=") else word
        if name == word and previous not in ("--config", "-c"):
            continue
        packaged = _CONFIGS / f"{name}.yaml"
        if not Path(name).is_file() and packaged.is_file():
            result[index] = word.removesuffix(name) + str(packaged)
    return result


def _with_run_config(arguments: list[str]) -> list[str]:
    """Let a run folder that exists bring its own configuration, unless another is named."""
    if any(w in ("--config", "-c") or w.startswith("--config=") for w in arguments):
        return arguments
    for index, word in enumerate(arguments):
        if word == "--run_dir" and index + 1 < len(arguments):
            folder = arguments[index + 1]
        elif word.startswith("--run_dir="):
            folder = word.removeprefix("--run_dir=")
        else:
            continue
        config = Path(folder, "config.yaml")
        return ["--config", str(config), *arguments] if config.is_file() else arguments
    return arguments


_DESCRIPTIONS = {
    "fit": "Train EAM-Net; evaluate the best checkpoint on the validation part; write a report.",
    "validate": "Evaluate a checkpoint of a run on its validation part; renew the report.",
    "test": "Evaluate a checkpoint of a run on its test part; renew the report.",
}


class _RunCLI(LightningCLI):
    """Lightning's command line over one :class:`SegmentationTask` and one data module."""

    def __init__(self, command: str, arguments: list[str]) -> None:
        self.command = command
        super().__init__(
            SegmentationTask,
            SegmentationData,
            args=arguments,
            # One parser for the one command that runs; to build those of all would triple the
            # start-up.
            run=False,
            seed_everything_default=0,
            save_config_callback=None,
            # Optimiser and schedule are the task's own options: they are in every checkpoint.
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            trainer_defaults={
                "max_epochs": 70,
                "log_every_n_steps": 10,
                "sync_batchnorm": True,
                "num_sanity_val_steps": 0,
            },
            parser_kwargs={
                "prog": f"eamnet {command}",
                # The full one fills three screens, and what went wrong stands below it.
                "usage": f"eamnet {command} [--config FILE] [--OPTION VALUE ...]",
                "description": _DESCRIPTIONS[command],
            },
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse ``args``; Lightning's own warns that ``sys.argv`` is filled as well."""
        self.config = parser.parse_args(args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The options that belong to the run and not to the task, the data or the trainer."""
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Folder of the run; default: runs/<date and time> for fit. Where it holds a run "
            "already, its config.yaml is the configuration unless --config is given.",
        )
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="A checkpoint file; `last` or `best` of the run. fit resumes from it; validate "
            "and test evaluate it (default: best).",
        )
        parser.add_argument(
            "--early_stopping",
            type=int | None,
            default=None,
            help="Let fit stop after this many epochs without a better val_dice; default: never.",
        )
        parser.add_argument(
            "--evaluate",
            type=bool,
            default=True,
            help="Whether fit ends with an evaluation of the best checkpoint on the validation "
            "part, at native size, which takes the processor minutes where pictures are large; "
            "`eamnet validate` makes it at any time.",
        )
        parser.add_argument(
            "--evaluation",
            type=str | None,
            default=None,
            help="Name of the folder in the run folder for an evaluation on other pictures than "
            "the run's own; default: that of the part, and the data set's name after it where it "
            "is another than the run's.",
        )
        parser.add_argument(
            "--init",
            type=str | None,
            default=None,
            help="Weights that fit starts from instead of random ones: a .safetensors file or the "
            "name of bundled ones. The network's options must be those of the weights.",
        )
        if self.command != "fit":
            parser.add_argument(
                "--tta",
                type=bool,
                default=False,
                help="Average the prediction over the eight flips and quarter turns of a picture; "
                "the evaluation goes into a folder of its own, such as test-tta.",
            )
        parser.link_arguments("data.num_classes", "model.num_classes")

    def before_instantiate_classes(self) -> None:
        """Find the run folder and the checkpoint; a checkpoint brings the network it needs."""
        options = self.config
        self.run_dir = Path(options.run_dir or _default_run_dir(self.command))
        options.run_dir = str(self.run_dir)
        self._choose_split()
        self.checkpoint = self._find_checkpoint(options.ckpt_path)
        self.resumed_step = 0
        if self.checkpoint is None:
            return
        content = load_checkpoint(self.checkpoint)
        self.resumed_step = int(content["global_step"])
        stored = dict(content["hyper_parameters"])
        classes = stored.pop("num_classes", 1)
        if classes != options.data.num_classes:
            raise ValueError(
                f"{self.checkpoint} was trained for num_classes={classes}, but data.num_classes "
                f"is {options.data.num_classes}"
            )
        for name, value in stored.items():
            options.model[name] = value

    def _choose_split(self) -> None:
        """Keep the run to one split: the first use writes it into the run folder."""
        data = self.config.data
        home = self.run_dir
        self.evaluation_folder = home / ("test" if self.command == "test" else "validation")
        if self.command != "fit" and self.config.evaluation is not None:
            self.evaluation_folder = home = home / self.config.evaluation
        elif self.command != "fit" and data.dataset != _trained_on(self.run_dir):
            # Another data set than the run's own has its own split and its own place.
            self.evaluation_folder = home = Path(f"{self.evaluation_folder}-{data.dataset}")
        if self.command != "fit" and self.config.tta:
            self.evaluation_folder = Path(f"{self.evaluation_folder}-tta")
        if data.split is None:
            data.split = str(home / "split.json")
            own = self.command != "fit" and home == self.run_dir
            if own and not Path(data.split).is_file():
                # Drawn anew, it might score pictures of the training.
                raise FileNotFoundError(f"{data.split}, the split of the run, is missing")

    def _find_checkpoint(self, given: str | None) -> Path | None:
        folder = self.run_dir / "checkpoints"
        if self.command == "fit":
            if given is None and (self.run_dir / "config.yaml").exists():
                raise FileExistsError(
                    f"run_dir {self.run_dir} holds a run already: resume it with --ckpt_path last "
                    "or give another --run_dir"
                )
        elif given is None:
            given = "best"
        if given == "last":
            found = last_whole_checkpoint(folder)
            if found is None and self.command != "fit":
                raise FileNotFoundError(f"{folder} holds no checkpoint")
            if found is None:
                rank_zero_info(f"{folder} holds no checkpoint yet: starting from the beginning")
            return found
        if given is None:
            return None
        path = folder / "best.ckpt" if given == "best" else Path(given)
        check_whole(path)
        return path

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer with the run's loggers, checkpoints and plugins beside what the user asks."""
        options = self.config_init
        config = {**options.trainer, **kwargs, "default_root_dir": str(self.run_dir)}
        config["plugins"] = [*_as_list(config.get("plugins")), AtomicCheckpointIO()]
        config["callbacks"] = _as_list(config.get("callbacks"))
        on_cpu = config["accelerator"] == "cpu" or not torch.accelerator.is_available()
        if config["sync_batchnorm"] and on_cpu:
            config["plugins"].append(CrossProcessBatchNormSync())
        if self.command == "fit":
            config["logger"] = [*self._loggers(), *_as_list(config.get("logger"))]
            if config["enable_checkpointing"] is not False and not config["fast_dev_run"]:
                config["callbacks"] += self._checkpoint_callbacks()
            if options.early_stopping is not None:
                every = config["check_val_every_n_epoch"] or 1
                config["callbacks"].append(
                    _EarlyStopping(
                        "val_dice", mode="max", patience=-(-options.early_stopping // every)
                    )
                )
            if not config["fast_dev_run"]:
                config["callbacks"].append(_RunRecord(self))
        else:
            config["logger"] = False
        return Trainer(**config)

    def _checkpoint_callbacks(self) -> list[Callback]:
        folder = self.run_dir / "checkpoints"
        best = MovableCheckpoint(
            folder, "best", monitor="val_dice", mode="max", enable_version_counter=False
        )
        # Whole epochs only, so that a resumed run sees each picture as often as an unbroken one;
        # two of them, so that one is left should the disk damage the other. After `best`, so that
        # they hold its state.
        last = MovableCheckpoint(
            folder,
            "last-{epoch:04d}",
            monitor="epoch",
            mode="max",
            save_top_k=2,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        return [best, last]

    def _loggers(self) -> list[Any]:
        table = CSVLogger(self.run_dir, name="", version="", flush_logs_every_n_steps=1)
        if _rank() == 0:
            # The CSV logger starts its file anew: a resumed run puts back what belongs to the
            # epochs before its checkpoint.
            rows = _metrics_before(self.run_dir / "metrics.csv", self.resumed_step)
            table.experiment.metrics.extend(rows)
            table.save()
        return [table, TensorBoardLogger(self.run_dir, name="tensorboard", version="")]

    def fit(self) -> None:
        """Train, export the best weights, evaluate them on the validation part, report."""
        if self.config.init is not None and self.checkpoint is None:
            self._start_from(self.config.init)
        self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=self.checkpoint)
        self.checkpoint = self.run_dir / "checkpoints" / "best.ckpt"
        if not self.checkpoint.is_file():
            rank_zero_info("no checkpoint was written: nothing to evaluate")
            return
        if self.trainer.is_global_zero:
            export_weights(self.checkpoint, self.run_dir / "best.safetensors")
        if self.config.evaluate:
            self.evaluate("validate")
        elif self.trainer.is_global_zero:
            print(f"not evaluated yet: eamnet validate --run_dir {self.run_dir}")

    def _start_from(self, name_or_path: str) -> None:
        """Give the network the weights of a file, or of the package."""
        given = EAMNet.from_pretrained(name_or_path)
        network = self.model.network
        theirs, ours = given.config.to_dict(), network.config.to_dict()
        differing = [f"{k}: {v} there, {ours[k]} here" for k, v in theirs.items() if v != ours[k]]
        if differing:
            raise ValueError(
                f"init={name_or_path} is of another network than the options ask for: "
                + "; ".join(differing)
            )
        network.load_state_dict(given.state_dict())

    def evaluate(self, command: str) -> None:
        """Evaluate the checkpoint on the part that the command names, and renew the report."""
        self.model.evaluation_folder = self.evaluation_folder
        self.model.tta = self.command != "fit" and self.config.tta
        run = self.trainer.validate if command == "validate" else self.trainer.test
        run(self.model, datamodule=self.datamodule, ckpt_path=self.checkpoint, verbose=False)
        if self.model.summary is not None:
            print(_table(self.model.summary))
            print(f"evaluation: {self.model.evaluation_folder}")
            print(f"report: {write_report(self.run_dir)}")


class Options(_RunCLI):
    """The options of ``fit``, without anything done with them.

    Args:
        arguments: words of the command line.

    Attributes:
        config: what they say, with defaults.
    """

    def __init__(self, arguments: list[str]) -> None:
        super().__init__("fit", _with_packaged_configs(arguments))

    def _set_seed(self) -> None:
        pass

    def before_instantiate_classes(self) -> None:
        """Nothing: there is no run."""

    def instantiate_classes(self) -> None:
        """Nothing is built."""

    def parse(self, arguments: list[str]) -> Namespace:
        """The options that other words give."""
        return self.parser.parse_args(_with_packaged_configs(arguments))

    def build(self, config: Namespace) -> tuple[SegmentationTask, SegmentationData]:
        """The network and the data of a configuration, which shows whether it is valid."""
        # Renamed in jsonargparse 4.49.
        instantiate = getattr(self.parser, "instantiate", self.parser.instantiate_classes)
        built = instantiate(config)
        return built.model, built.data

    def dump(self, config: Namespace) -> str:
        """A configuration as YAML, without what belongs to one run alone."""
        config = config.clone()
        config.run_dir = config.ckpt_path = config.data.split = None
        return str(self.parser.dump(config, skip_unset=False))


class _EarlyStopping(EarlyStopping):
    """Lightning's, but a run that it ended is not trained further when resumed."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Stop before the first epoch where the checkpoint's patience was at its end."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True


class _RunRecord(Callback):
    """Writes what identifies a run into its folder before the first step."""

    def __init__(self, cli: _RunCLI) -> None:
        self.cli = cli

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Write split.json, config.yaml, versions.json and data_report.json."""
        if stage != "fit" or not trainer.is_global_zero:
            return
        folder = self.cli.run_dir
        for leftover in (folder / "checkpoints").glob(".*.tmp"):
            leftover.unlink()
        config = self.cli.config.clone()
        # Which checkpoint a run was resumed from is no part of its configuration, and the split is
        # the run's own from now on, wherever it came from.
        config.ckpt_path = config.data.split = None
        text = self.cli.parser.dump(config, skip_unset=False)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            trainer.datamodule.split.write(folder / "split.json")  # type: ignore[attr-defined]
        except ValueError as error:
            raise ValueError(f"{error}; training cannot go on with other pictures") from error
        (folder / "config.yaml").write_text(text)
        (folder / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n")
        report = trainer.datamodule.report  # type: ignore[attr-defined]
        (folder / "data_report.json").write_text(json.dumps(report, indent=2) + "\n")
        for line in report:
            print(line)


def _table(summary: Summary) -> str:
    """The metrics of an evaluation, for the terminal."""
    resolutions = {k: v["macro"] for k, v in summary["resolutions"].items()}
    lines = [
        f"\n{summary['images']} pictures: mean over pictures [95 % interval], pooled",
        " " * 18 + "".join(f"{f'{name} resolution':<34}" for name in resolutions),
    ]
    for metric in METRICS:
        line = f"{metric:<18}"
        for values in resolutions.values():
            if metric not in values["mean"]:
                continue
            mean, pooled = values["mean"][metric], values["pooled"].get(metric)
            cell = f"{mean['value']:.4f} [{mean['low']:.4f}, {mean['high']:.4f}]"
            cell += f", {pooled['value']:.4f}" if pooled else ""
            line += f"{cell:<34}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _default_run_dir(command: str) -> str:
    if command != "fit":
        raise ValueError("run_dir is missing: name the folder of the run with --run_dir")
    # Lightning starts the further processes of a job with the first one's environment.
    folder = os.environ.get("EAMNET_RUN_DIR") if "LOCAL_RANK" in os.environ else None
    if folder is None:
        if any(int(os.environ.get(name, "1")) > 1 for name in ("WORLD_SIZE", "SLURM_NTASKS")):
            raise ValueError(
                "run_dir is missing: processes that are started from outside (torchrun, SLURM) "
                "cannot agree on a date, so name the folder with --run_dir"
            )
        folder = os.environ["EAMNET_RUN_DIR"] = f"runs/{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    return folder


def _rank() -> int:
    """This process's place among those of a job, before the trainer is there to tell."""
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


def _trained_on(run_dir: Path) -> str | None:
    """The data set of a run folder."""
    try:
        config = yaml.safe_load((run_dir / "config.yaml").read_text())
        return str(config["data"]["dataset"])
    except FileNotFoundError:
        return None


def _as_list(value: Any) -> list[Any]:
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _metrics_before(path: Path, step: int) -> list[dict[str, Any]]:
    """Rows of a metrics.csv logged before optimiser step ``step``; without a torn last line."""
    if not path.is_file():
        return []
    whole_lines, _, _ = path.read_text().rpartition("\n")
    return [
        {key: value for key, value in row.items() if value != ""}
        for row in csv.DictReader(whole_lines.splitlines())
        if int(row["step"]) < step
    ]
