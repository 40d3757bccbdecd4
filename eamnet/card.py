"""Weights to hand out: a tested run's network in float16, and the card that says what it is.

``eamnet card`` makes the two files that :meth:`eamnet.model.EAMNet.from_pretrained` finds by name::

    eamnet/weights/NAME.safetensors    weights, configuration, input size, the facts of the card
    eamnet/weights/NAME.md             the model card, written from those facts and nothing else

The card's numbers are those of the weights that are handed out, rounding included, and not of the
checkpoint they come from.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shlex
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped, unused-ignore]
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jsonargparse import ArgumentParser

from eamnet.averaging import AVERAGE
from eamnet.data import SegmentationData
from eamnet.evaluation import Evaluation
from eamnet.inference import export_weights
from eamnet.metrics import METRICS, Estimate, Summary, read_csv, read_summary, write_atomic
from eamnet.model import EAMNet, weights_metadata
from eamnet.report import METRIC_NAMES, format_metric

__all__ = [
    "CARD_KEY",
    "MAX_BYTES",
    "MAX_DICE_CHANGE",
    "card",
    "card_facts",
    "render_card",
    "results_table",
    "write_card",
]

CARD_KEY = "eamnet_card"
"""Where the card's facts stand in the metadata of a file of weights, as JSON."""
MAX_BYTES = 20_000_000
"""Of a file of weights: they travel through Git."""
MAX_DICE_CHANGE = 1e-3
"""Between the run's own test and the weights that are handed out, in the mean Dice."""


def card(arguments: list[str]) -> int:
    """``eamnet card``: export a tested run as float16 weights with their model card."""
    parser = ArgumentParser(
        prog="eamnet card",
        description="Export a finished and tested run: float16 weights, scored again after "
        "rounding, and a model card.",
    )
    parser.add_function_arguments(write_card)
    options = parser.parse_args(arguments)
    for path in write_card(**vars(options)):
        print(path)
    return 0


def write_card(
    run_dir: str, weights: str, data_root: str | None = None, notes: str = ""
) -> tuple[Path, Path]:
    """Round a run's best weights to float16, score them on the test part, write both files.

    Args:
        run_dir: a run on which ``eamnet test`` has been done.
        weights: where to, without an ending: ``eamnet/weights/isic2017``.
        data_root: where the pictures lie now, if not where the run found them.
        notes: more to say on the card, for example how long the training took.

    Returns:
        The paths of the weights and of the card.

    Raises:
        FileNotFoundError: the run is not finished or not tested.
        ValueError: float16 cannot hold the weights, changes the score, or the file is too large.
    """
    run = Path(run_dir)
    needed = [
        ("checkpoints/best.ckpt", "fit"),
        ("split.json", "fit"),
        ("test/summary.json", "test"),
    ]
    if (run / AVERAGE).is_file():
        needed.append(("validation/summary.json", "validate"))
    for name, command in needed:
        if not (run / name).is_file():
            raise FileNotFoundError(f"{run / name} is missing: do `eamnet {command}` first")
    target = Path(weights).with_suffix("")
    with tempfile.TemporaryDirectory() as folder:
        best = export_weights(run / "checkpoints" / "best.ckpt", Path(folder, "best.safetensors"))
        metadata = weights_metadata(best)
        rounded = EAMNet.from_pretrained(best).save_pretrained(
            Path(folder, "rounded.safetensors"), torch.float16
        )
        model = EAMNet.from_pretrained(rounded)
        if rounded.stat().st_size > MAX_BYTES:
            raise ValueError(
                f"weights of {rounded.stat().st_size} bytes are more than the {MAX_BYTES} allowed"
            )
        summary = _evaluate(model, run, data_root, Path(folder, "test"))
        facts = {
            "schema": 1,
            "name": target.name,
            **_facts(run, model),
            "rounding": _rounding(run / "test", Path(folder, "test")),
            "summary": summary,
            "notes": notes,
        }
    own = {key: metadata[key] for key in metadata if key == "eamnet_size"}
    path = model.save_pretrained(
        target.with_suffix(".safetensors"), torch.float16, {**own, CARD_KEY: json.dumps(facts)}
    )
    page = target.with_suffix(".md")
    write_atomic(page, render_card(facts).encode())
    return path, page


def card_facts(name_or_path: str | Path) -> dict[str, Any]:
    """The facts of a card, out of the weights' own header.

    Args:
        name_or_path: as for :meth:`eamnet.model.EAMNet.from_pretrained`.

    Raises:
        ValueError: these weights were not written by ``eamnet card``.
    """
    metadata = weights_metadata(name_or_path)
    if CARD_KEY not in metadata:
        raise ValueError(f"{name_or_path} holds no card: it was not written by `eamnet card`")
    facts: dict[str, Any] = json.loads(metadata[CARD_KEY])
    return facts


def render_card(facts: dict[str, Any]) -> str:
    """The model card as Markdown, from :func:`card_facts`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    template = environment.get_template("card.md")
    return template.render(
        **facts,
        table=results_table(facts["summary"]),
        format_metric=format_metric,
        estimate=_estimate,
    )


def results_table(summary: Summary) -> str:
    """Both averagings at both resolutions, with their intervals, as a Markdown table."""
    columns = [
        (resolution, averaging)
        for resolution in ("native", "network")
        for averaging in ("mean", "pooled")
    ]
    names = {"mean": "mean over pictures", "pooled": "pooled pixels"}
    lines = [
        "| metric | " + " | ".join(f"{r}: {names[a]}" for r, a in columns) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    for metric in METRICS:
        cells = []
        for resolution, averaging in columns:
            macro: Any = summary["resolutions"][resolution]["macro"]
            found = macro[averaging].get(metric)
            cells.append(_estimate(metric, found) if found else "–")
        if set(cells) != {"–"}:
            lines.append(f"| {METRIC_NAMES[metric]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _estimate(metric: str, estimate: Estimate) -> str:
    value, low, high = (
        format_metric(metric, x) for x in (estimate["value"], estimate["low"], estimate["high"])
    )
    return f"{value} [{low}, {high}]"


def _evaluate(model: EAMNet, run: Path, data_root: str | None, folder: Path) -> Summary:
    options = yaml.safe_load((run / "config.yaml").read_text())["data"]
    options |= {"split": str(run / "split.json"), "augment": False}
    if data_root is not None:
        options["root"] = data_root
    data = SegmentationData(**options)
    data.setup("test")
    evaluation = Evaluation(data, model.config.num_classes)
    with torch.inference_mode():
        for batch in data.test_dataloader():
            evaluation.add(batch, model(batch["image"]))
    summary = evaluation.write(folder)
    assert summary is not None  # there is one process
    return summary


def _rounding(before: Path, after: Path) -> dict[str, float]:
    """How far the handed-out weights are from the run's own test; refuses more than a little."""
    means = [
        read_summary(f / "summary.json")["resolutions"]["native"]["macro"]["mean"]["dice"]["value"]
        for f in (before, after)
    ]
    change = means[1] - means[0]
    if abs(change) > MAX_DICE_CHANGE:
        raise ValueError(
            f"rounded to float16, the weights have a mean Dice of {means[1]:.4f} and not "
            f"{means[0]:.4f} as the run's own test has it (in its own precision)"
        )
    dice = [
        {(r.id, r.label, r.resolution): r.dice for r in read_csv(f / "per_image.csv")}
        for f in (before, after)
    ]
    largest = max(abs(dice[0][key] - dice[1][key]) for key in dice[1])
    return {"mean_dice_change": change, "largest_picture_change": largest}


def _facts(run: Path, model: EAMNet) -> dict[str, Any]:
    """What the run's files say about it; no path of the machine that it ran on."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    split = json.loads((run / "split.json").read_text())
    versions = json.loads((run / "versions.json").read_text())
    notes = json.loads((run / "data_report.json").read_text())
    root = str(config["data"]["root"] or "")
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    scores = {int(row["epoch"]): float(row["val_dice"]) for row in rows if row["val_dice"]}
    best = max(scores, key=lambda epoch: scores[epoch])
    return {
        "dataset": split["dataset"],
        "protocol": split["protocol"],
        "split_hash": split["hash"],
        "parts": {part: len(split[part]) for part in ("train", "val", "test")},
        "data_notes": [
            line.replace(root, Path(root).name) if Path(root).name else line for line in notes
        ],
        "num_classes": model.config.num_classes,
        "parameters": sum(p.numel() for p in model.parameters()),
        "size": config["data"]["size"],
        "command": _command(config),
        "training": {
            "epochs": max(scores) + 1,
            "steps": max(int(row["step"]) for row in rows) + 1,
            "batch_size": config["data"]["batch_size"],
            "precision": config["trainer"]["precision"] or "32-true",  # Lightning's default
            "best_epoch": best + 1,
            "val_dice": scores[best],
        },
        "average": _average(run) if (run / AVERAGE).is_file() else None,
        "commit": versions["commit"],
        "versions": {
            "torch": versions["packages"]["torch"],
            "python": versions["python"],
            "processor": versions["gpu"] or f"{versions['cpu']}, {versions['threads']} threads",
            "backend": versions["backend"],
        },
    }


def _average(run: Path) -> dict[str, Any]:
    """What `eamnet average` left in a run, with the score that it was chosen by."""
    summary = read_summary(run / "validation" / "summary.json")
    score = summary["resolutions"]["network"]["macro"]["mean"]["dice"]["value"]
    facts: dict[str, Any] = json.loads((run / AVERAGE).read_text())
    return {**facts, "val_dice": score}


def _command(config: dict[str, Any]) -> str:
    """``eamnet fit`` with the options that differ from the defaults."""
    from eamnet.runs import fit

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        fit(["--data.dataset", config["data"]["dataset"], "--print_config"])
    defaults = _flat(yaml.safe_load(printed.getvalue()))
    words = ["eamnet", "fit"]
    for name, value in _flat(config).items():
        if name in ("run_dir", "ckpt_path"):
            continue
        if name in ("init", "data.root", "data.cache_dir", "data.split") and value is not None:
            value = Path(value).name
        if name in ("data.dataset", "seed_everything") or value != defaults.get(name):
            text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
            words += [f"--{name}", shlex.quote(text)]
    return " ".join(words)


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
