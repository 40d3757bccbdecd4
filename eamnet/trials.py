"""Trials, the trainings that a study is made of, and the study's folder::

    config.yaml               the configuration that all trials share
    study.json                what is compared
    split.json                the pictures of each part (kfold: one file for each fold)
    results/NAME-SEED.json    one for each finished trial: all that the study's page is made from
    trials/NAME-SEED/         the run folder of a trial, as `eamnet fit` makes it
    failures/NAME-SEED.txt    why a trial failed

A study may be killed at any moment: started again, it goes on from the last epoch of the trial
that was interrupted and never repeats a finished one. Several processes may work on one study.
"""

from __future__ import annotations

import csv
import dataclasses
import fcntl
import gc
import json
import os
import shutil
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import yaml  # type: ignore[import-untyped, unused-ignore]
from jsonargparse import Namespace

from eamnet import runs
from eamnet.data import Split
from eamnet.metrics import JACCARD_THRESHOLD, ImageMetrics, rates, read_csv, write_atomic
from eamnet.model import EAMNet
from eamnet.versions import versions

__all__ = ["SPLIT_OPTIONS", "Keep", "Result", "Study", "Trial", "read_plan", "read_results"]

Keep = Literal["weights", "all", "nothing"]

SCHEMA = 1

#: Options that decide where and how a training runs and not what comes out of it.
_WHERE = (
    "run_dir",
    "ckpt_path",
    "data.root",
    "data.cache_dir",
    "data.num_workers",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "trainer.log_every_n_steps",
    "evaluate",
    "evaluation",
    "trainer.devices",  # one for each trial
)

#: What the trials of a study may differ in, whatever is compared.
_INDIFFERENT = (*_WHERE, "seed_everything", "data.order_seed")

#: What the split is drawn from: the same for all trials of a study.
SPLIT_OPTIONS = tuple(
    f"data.{name}"
    for name in (
        *("dataset", "root", "split", "protocol", "seed", "val_fraction", "test_fraction"),
        *("folds", "fold", "parts", "exclude", "synthetic_count"),
    )
)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training and its evaluation.

    Attributes:
        name: of the configuration; with the seed, of the trial's files.
        seed: of the initial weights, the order of the pictures and their augmentation.
        overrides: what differs from the study's configuration, by dotted key.
        split: the study's split file that it uses.
    """

    name: str
    seed: int
    overrides: Mapping[str, Any]
    split: str = "split.json"

    @property
    def stem(self) -> str:
        """Name of the trial's files."""
        return f"{self.name}-{self.seed}"

    @property
    def words(self) -> list[str]:
        """What it adds to the study's command line."""
        return [
            *override_words(self.overrides),
            *("--seed_everything", str(self.seed), "--data.order_seed", str(self.seed)),
        ]


def override_words(overrides: Mapping[str, Any]) -> list[str]:
    """Command-line words that set keys to values."""
    words = []
    for key, value in overrides.items():
        words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return words


class _Row(NamedTuple):
    """One picture and class, at native resolution: what the other metrics follow from."""

    id: str
    label: int
    height: int
    width: int
    tp: int
    fp: int
    fn: int
    tn: int
    hd95: float
    assd: float
    nsd: float
    ece: float

    def metrics(self) -> ImageMetrics:
        counts = np.array([self.tp, self.fp, self.fn, self.tn])
        values: dict[str, Any] = {name: float(value) for name, value in rates(counts).items()}
        iou = values["iou"]
        return ImageMetrics(
            **self._asdict(),
            **values,
            resolution="native",
            native_height=self.height,
            native_width=self.width,
            threshold_jaccard=iou if iou >= JACCARD_THRESHOLD else 0.0,
        )


@dataclasses.dataclass(frozen=True)
class Result:
    """What is kept of a finished trial.

    Attributes:
        name, seed, overrides: the trial's.
        configuration: all options of the training.
        split: hash of the split.
        parameters: of the network.
        epochs: that were trained.
        seconds: of training and evaluation, since the trial was last resumed.
        versions: of software and machine.
        parts: for "val" (which chose the checkpoint) and "test" a row for each picture and class,
            at native resolution.
    """

    name: str
    seed: int
    overrides: dict[str, Any]
    configuration: dict[str, Any]
    split: str
    parameters: int
    epochs: int
    seconds: float
    versions: dict[str, Any]
    parts: dict[str, list[ImageMetrics]]

    def mean(self, metric: str, part: str = "test") -> float:
        """Mean over pictures and classes of a metric."""
        return float(np.mean([getattr(row, metric) for row in self.parts[part]]))

    def write(self, path: Path) -> None:
        """Write the result as JSON, one picture a line, whole or not at all."""
        head = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "parts"
        }
        scores = {
            part: {metric: self.mean(metric, part) for metric in ("iou", "dice")}
            for part in self.parts
        }
        text = json.dumps({"schema": SCHEMA, **head, "scores": scores}, indent=1)[:-2]
        text += f',\n "columns": {json.dumps(_Row._fields)},\n "parts": {{'
        for place, (part, rows) in enumerate(self.parts.items()):
            lines = [json.dumps([getattr(row, name) for name in _Row._fields]) for row in rows]
            text += f'{"," if place else ""}\n  "{part}": [\n   ' + ",\n   ".join(lines) + "]"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (text + "}\n}\n").encode())

    @staticmethod
    def read(path: Path) -> Result:
        """Read a result file.

        Raises:
            ValueError: no result file, or one of another schema.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("schema") != SCHEMA or content.pop("columns") != list(_Row._fields):
                raise ValueError(f"is not of schema {SCHEMA}")
            content.pop("scores")
            parts = content.pop("parts")
            rows = {part: [_Row(*row).metrics() for row in of] for part, of in parts.items()}
            return Result(**content, parts=rows)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a trial's result: {error}") from error


class Study:
    """A study's folder: opened, or made where there is none.

    Args:
        folder: of the study.
        kind: of the study; a folder is of one kind for ever.
        arguments: options of ``fit``. A folder that exists brings its own, and refuses those that
            would make its trials incomparable.
        keep: what to keep of a finished trial's run folder.

    Raises:
        ValueError: the folder holds another study or something else, or trials would take several
            devices.
    """

    def __init__(
        self, folder: Path, kind: str, arguments: Sequence[str] = (), keep: Keep = "weights"
    ) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("a study's trials are trained by one process each, not by a group")
        self.folder = folder
        self.kind = kind
        self.keep = keep
        self.arguments = list(arguments)
        self._plan: dict[str, Any] = {}
        recorded = folder / "config.yaml"
        known = (folder / "study.json").is_file()
        if folder.is_dir() and not known:
            foreign = sorted(p.name for p in folder.iterdir() if not p.match("split*.json"))
            if foreign:
                raise ValueError(
                    f"{folder} is not the folder of a study and holds {foreign[0]!r}: a new study "
                    "takes a folder that is empty or has a split.json alone"
                )
        # Until its first trial a study may still be put right.
        begun = (folder / "trials").is_dir() or (folder / "results").is_dir()
        if begun:
            self._plan = read_plan(folder, kind)
        if begun or (recorded.is_file() and not arguments):
            self.arguments = ["--config", str(recorded), *self.arguments]
        self.options = runs.Options(self.arguments)
        self.config = self.options.config
        devices = self.config.trainer.devices
        if devices not in ("auto", 1, "1") and not (
            isinstance(devices, list) and len(devices) == 1
        ):
            raise ValueError(
                f"a study's trials are trained on one device each: trainer.devices must be 'auto', "
                f"1 or a list of one, got {devices!r}"
            )
        text = self.options.dump(self.config)
        if begun:
            _refuse_differences(recorded, text)
            return
        if known:  # of options that are given up now
            for left_over in folder.glob("split*.json"):
                left_over.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(recorded, text.encode())
        self.record_plan({})
        self.arguments = ["--config", str(recorded), *self.arguments]

    @property
    def plan(self) -> dict[str, Any]:
        """What ``study.json`` says is compared."""
        return self._plan

    def record_plan(self, plan: Mapping[str, Any]) -> None:
        """Write what is compared."""
        self._plan = dict(plan)
        content = {"schema": SCHEMA, "kind": self.kind, "plan": self._plan}
        text = json.dumps(content, indent=1) + "\n"
        write_atomic(self.folder / "study.json", text.encode())

    def configure(self, overrides: Mapping[str, Any]) -> Namespace:
        """The configuration of trials with these overrides, made sure to be valid.

        Raises:
            ValueError, TypeError: it is not.
        """
        words = [*self.arguments, *override_words(overrides)]
        try:
            config = self.options.parse(words)
            self.options.build(config)
        except SystemExit as error:  # the parser has said what is wrong
            raise ValueError(f"{dict(overrides)} is not a valid configuration") from error
        return config

    def split(self, overrides: Mapping[str, Any] | None = None, name: str = "split.json") -> Split:
        """The split of trials with these overrides, drawn once and written to ``name``.

        Raises:
            ValueError: the file holds another split than the options give.
        """
        config = self.configure(overrides or {})
        path = self.folder / name
        if path.is_file() and config.data.split is None:
            config.data.split = str(path)
        _, data = self.options.build(config)
        split = data.index()
        if not split.test:
            raise ValueError(f"the split ({split.protocol}) has no test pictures to compare on")
        split.write(path)
        return split

    def run(self, trials: Sequence[Trial]) -> bool:
        """Train and evaluate what is not finished yet.

        Returns:
            Whether all of them are finished now. A trial that fails does not end the study.
        """
        for number, trial in enumerate(trials, 1):
            if self._result_path(trial).is_file():
                continue
            with self._claim(trial) as free:
                if not free or self._result_path(trial).is_file():
                    continue  # another process has it
                print(f"\ntrial {number} of {len(trials)}: {trial.name}, seed {trial.seed}")
                failure = self.folder / "failures" / f"{trial.stem}.txt"
                try:
                    result = self._train(trial)
                except Exception:
                    failure.parent.mkdir(exist_ok=True)
                    failure.write_text(traceback.format_exc())
                    print(f"trial {trial.stem} failed: {failure}")
                    continue
                failure.unlink(missing_ok=True)
                result.write(self._result_path(trial))
                self._tidy(trial)
                print(f"trial {trial.stem}: IoU {result.mean('iou'):.4f}")
            gc.collect()  # Lightning's objects refer to each other in circles
        unfinished = [t for t in trials if not self._result_path(t).is_file()]
        for trial in unfinished:
            failure = self.folder / "failures" / f"{trial.stem}.txt"
            reason = (
                failure.read_text().strip().splitlines()[-1]
                if failure.is_file()
                else "another process is at work on it"
            )
            print(f"not finished: {trial.stem}: {reason}")
        return not unfinished

    def reuse(self, trials: Sequence[Trial], studies: Sequence[Path]) -> list[Trial]:
        """Take over what other studies have trained with the same configuration, seed and split.

        Returns:
            The trials that are finished by it.

        Raises:
            ValueError: no study, or one without a finished trial.
        """
        others = {
            (_training(result.configuration), result.split): result
            for folder in studies
            for result in read_results(folder)
        }
        found = []
        for trial in trials if others else ():
            if self._result_path(trial).is_file():
                continue
            words = [*self.arguments, "--data.split", "null", *trial.words]
            configuration = yaml.safe_load(self.options.dump(self.options.parse(words)))
            split = Split.read(self.folder / trial.split)
            result = others.get((_training(configuration), split.hash))
            if result is not None:
                own = dataclasses.replace(result, name=trial.name, overrides=dict(trial.overrides))
                own.write(self._result_path(trial))
                print(f"trial {trial.stem}: IoU {own.mean('iou'):.4f}, trained as {result.name}")
                found.append(trial)
        return found

    def _result_path(self, trial: Trial) -> Path:
        return self.folder / "results" / f"{trial.stem}.json"

    @contextmanager
    def _claim(self, trial: Trial) -> Iterator[bool]:
        """Whether this process may have the trial; the system frees what a dead one had."""
        locks = self.folder / "trials"
        locks.mkdir(exist_ok=True)
        with (locks / f".{trial.stem}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    def _train(self, trial: Trial) -> Result:
        folder = self.folder / "trials" / trial.stem
        folder.mkdir(parents=True, exist_ok=True)
        split = Split.read(self.folder / trial.split)
        split.write(folder / "split.json")
        words = [*self.arguments, "--data.split", "null", *trial.words, "--run_dir", str(folder)]
        if self.config.trainer.devices == "auto":  # several would be several processes
            words += ["--trainer.devices", "1"]
        start = time.perf_counter()
        runs.fit([*words, "--ckpt_path", "last", "--evaluate", "true"])
        runs.test(words)
        seconds = time.perf_counter() - start
        configuration = yaml.safe_load((folder / "config.yaml").read_text())
        del configuration["run_dir"]  # the same training may lie anywhere
        network = EAMNet.from_pretrained(folder / "best.safetensors")
        with (folder / "metrics.csv").open(newline="") as file:
            epochs = {row["epoch"] for row in csv.DictReader(file)}
        return Result(
            name=trial.name,
            seed=trial.seed,
            overrides=dict(trial.overrides),
            configuration=configuration,
            split=split.hash,
            parameters=sum(p.numel() for p in network.parameters()),
            epochs=len(epochs),
            seconds=round(seconds, 1),
            versions=versions(),
            parts={
                part: [row for row in read_csv(folder / place) if row.resolution == "native"]
                for part, place in (
                    ("val", "validation/per_image.csv"),
                    ("test", "test/per_image.csv"),
                )
            },
        )

    def _tidy(self, trial: Trial) -> None:
        folder = self.folder / "trials" / trial.stem
        if self.keep == "nothing":
            shutil.rmtree(folder)
        elif self.keep == "weights":
            for name in ("checkpoints", "tensorboard", "validation/pictures", "test/pictures"):
                shutil.rmtree(folder / name, ignore_errors=True)


def read_results(folder: Path) -> list[Result]:
    """All finished trials of a study, by name and seed.

    Raises:
        ValueError: there is none, or a file is damaged.
    """
    results = [Result.read(path) for path in sorted((folder / "results").glob("*.json"))]
    if not results:
        raise ValueError(f"study {folder} has no finished trial yet")
    return sorted(results, key=lambda result: (result.name, result.seed))


def read_plan(folder: Path, kind: str) -> dict[str, Any]:
    """What a study's folder says is compared.

    Raises:
        ValueError: it is no study's folder, or the study is of another kind.
    """
    try:
        content = json.loads((folder / "study.json").read_text(encoding="utf-8"))
        found, plan = content["kind"], content["plan"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is not the folder of a study: {error}") from error
    if found != kind:
        raise ValueError(f"study {folder} is of the kind {found!r}, not {kind!r}")
    result: dict[str, Any] = plan
    return result


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            result.update(_flat(value, f"{prefix}{key}."))
        else:
            result[f"{prefix}{key}"] = value
    return result


def _training(configuration: Mapping[str, Any]) -> str:
    """All that decides what a training comes to, beside its pictures and the machine."""
    values = _flat(configuration)
    return json.dumps({key: values[key] for key in sorted(values.keys() - set(_WHERE))})


def _refuse_differences(recorded: Path, text: str) -> None:
    before, now = (_flat(yaml.safe_load(t)) for t in (recorded.read_text(), text))
    differing = [
        f"{key} is {now.get(key)!r}, the study has {before.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in _INDIFFERENT
    ]
    if differing:
        raise ValueError(
            f"study {recorded.parent} was begun with another configuration, and its trials would "
            f"not compare: {'; '.join(differing)}; give another --study"
        )
