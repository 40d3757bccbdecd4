"""The commands ``ablate``, ``sweep`` and ``kfold``: what is compared, and the page about it.

``docs/experiments.md`` explains how the pages are to be read.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import numpy as np
import yaml  # type: ignore[import-untyped, unused-ignore]
from matplotlib.figure import Figure
from numpy.typing import NDArray

from eamnet.metrics import METRICS, RATES, summarise
from eamnet.page import Page, Plot, Table
from eamnet.statistics import CONFIDENCE, RESAMPLES, Effect, Scores, contrast, holm
from eamnet.trials import (
    SPLIT_OPTIONS,
    Keep,
    Result,
    Study,
    Trial,
    read_plan,
    read_results,
)

__all__ = ["ablate", "kfold", "sweep"]

_NAMES = {"iou": "IoU", "dice": "Dice", "hd95": "HD95"}
_BLUE, _GREEN, _GREY = "#0072b2", "#009e73", "#8a949e"

#: The paper's modules: the option of each and what switches it off.
MODULES: dict[str, tuple[str, Any]] = {
    "mrcf": ("model.mrcf", False),
    "cmam": ("model.cmam", "none"),
    "eab": ("model.eab", False),
}


# --- the commands -----------------------------------------------------------------------------


def ablate(arguments: list[str]) -> int:
    """``eamnet ablate``: the network with every subset of its modules, or CMAM's three fusions."""
    parser = _parser("ablate", "Train the network with and without its modules and compare.", 3)
    parser.add_argument(
        "--variants",
        choices=("modules", "fusions"),
        default="modules",
        help="modules: none, each, each pair and all of MRCF, CMAM and EAB; fusions: CMAM as "
        "cross, serial and parallel (default: modules)",
    )
    options, words = parser.parse_known_args(arguments)
    kind = f"ablate {options.variants}"
    if options.report_only:
        return _report(options, kind, words)
    study = Study(options.study, kind, words, options.keep)
    if options.variants == "fusions":
        variants = {name: {"model.cmam": name} for name in ("cross", "serial", "parallel")}
    else:
        model = study.config.model
        for module, (key, off) in MODULES.items():
            if model[key.removeprefix("model.")] == off:
                raise ValueError(f"{key} is {off!r}: an ablation begins with {module} switched on")
        variants = {
            _subset_name(subset): {k: off for m, (k, off) in MODULES.items() if m not in subset}
            for size in range(len(MODULES) + 1)
            for subset in combinations(MODULES, size)
        }
    return _run(study, options, variants)


def _subset_name(subset: Sequence[str]) -> str:
    return {0: "baseline", len(MODULES): "full"}.get(len(subset), "+".join(subset))


def sweep(arguments: list[str]) -> int:
    """``eamnet sweep``: one training for each value of an option, several keys one by one."""
    parser = _parser("sweep", "Train with each value of an option and compare.", 3)
    parser.add_argument(
        "--key",
        action="append",
        default=[],
        help="an option of fit, such as model.memory_size; may be repeated, each followed by its "
        "--values",
    )
    parser.add_argument(
        "--values",
        action="append",
        default=[],
        help="its values: 16,32,64 or [3,5,7],[1,2,3] or cross,serial",
    )
    options, words = parser.parse_known_args(arguments)
    if options.report_only:
        return _report(options, "sweep", words)
    if len(options.key) != len(options.values):
        raise ValueError("each --key needs one --values, and the other way round")
    for key in options.key:
        if key in SPLIT_OPTIONS or not key.startswith(("model.", "data.", "trainer.")):
            raise ValueError(
                f"key {key!r} cannot be swept: it must be an option of model, data or trainer "
                "from which the split is not drawn"
            )
    study = Study(options.study, "sweep", words, options.keep)
    if not options.key and not study.plan:
        raise ValueError("name what is to be swept with --key and --values")
    plan: dict[str, dict[str, Any]] = {k: dict(v) for k, v in study.plan.items()}
    base = study.configure({})
    for key, text in zip(options.key, options.values, strict=True):
        # The same value twice, also in another sweep of the study, is one trial.
        for value in yaml.safe_load(f"[{text}]"):
            at_base = study.configure({key: value}) == base
            plan.setdefault(key, {})["base" if at_base else _value_name(key, value)] = value
    study.record_plan(plan)
    variants = {
        name: {} if name == "base" else {key: value}
        for key, values in plan.items()
        for name, value in values.items()
    }
    return _run(study, options, variants)


def _value_name(key: str, value: object) -> str:
    text = re.sub(r"[^\w.+-]+", "_", str(value)).strip("_")
    return f"{key.rpartition('.')[2]}={text}"


def kfold(arguments: list[str]) -> int:
    """``eamnet kfold``: one training for each fold, each picture scored by one of them."""
    parser = _parser("kfold", "Cross-validate: score every picture by a network new to it.", 1)
    parser.add_argument("--folds", type=int, help="number of folds (default: 5)")
    options, words = parser.parse_known_args(arguments)
    if options.report_only:
        return _report(options, "kfold", words)
    words += ["--data.protocol", "kfold"]
    if options.folds is not None:
        words += ["--data.folds", str(options.folds)]
    study = Study(options.study, "kfold", words, options.keep)
    variants = {f"fold{fold}": {"data.fold": fold} for fold in range(study.config.data.folds)}
    for name, overrides in variants.items():
        study.split(overrides, f"split-{name}.json")
    return _run(study, options, variants, split="split-{}.json")


def _parser(command: str, description: str, seeds: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"eamnet {command}",
        usage=f"eamnet {command} --study FOLDER [options] [options of fit]",
        description=f"{description} All other options are those of `eamnet fit`, the same for "
        "every trial. A study that was interrupted goes on with the same command.",
        allow_abbrev=False,
    )
    parser.add_argument("--study", type=Path, required=True, help="folder of the study")
    parser.add_argument(
        "--seeds", type=int, default=seeds, help=f"trainings of each variant (default: {seeds})"
    )
    parser.add_argument(
        "--keep",
        choices=get_args(Keep),
        default="weights",
        help="of a finished trial's run folder: weights and tables, all, or nothing; the result "
        "file is always kept (default: weights)",
    )
    parser.add_argument(
        "--reuse",
        type=Path,
        action="append",
        default=[],
        metavar="STUDY",
        help="take over what another study has trained with the same configuration, seed and "
        "split; may be repeated",
    )
    parser.add_argument(
        "--metric",
        choices=("iou", "dice", "threshold_jaccard", "hd95"),
        default="iou",
        help="what is compared, per picture at native resolution (default: iou)",
    )
    parser.add_argument(
        "--part",
        choices=("test", "val"),
        default="test",
        help="which pictures are compared: the test part, or, to choose a value by, those that "
        "chose the checkpoint (default: test)",
    )
    parser.add_argument(
        "--report_only",
        type=_boolean,
        default=False,
        metavar="{true,false}",
        help="train nothing, write the page from the results that are there",
    )
    parser.add_argument(
        "--page",
        type=Path,
        help="a Markdown document to put the page into, between <!-- begin NAME --> and "
        "<!-- end NAME -->, NAME being the study folder's",
    )
    return parser


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"true or false is accepted, got {text!r}")
    return text.lower() == "true"


def _run(
    study: Study,
    options: argparse.Namespace,
    variants: Mapping[str, Mapping[str, Any]],
    split: str = "split.json",
) -> int:
    """Check every configuration, then train: seed by seed, so that there is early a whole table."""
    if options.seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {options.seeds}")
    for overrides in variants.values():
        study.configure(overrides)
    if split == "split.json":
        study.split()
    trials = [
        Trial(name, seed, overrides, split.format(name))
        for seed in range(options.seeds)
        for name, overrides in variants.items()
    ]
    study.reuse(trials, options.reuse)
    finished = study.run(trials)
    return _report(options, study.kind, []) or int(not finished)


def _report(options: argparse.Namespace, kind: str, words: Sequence[str]) -> int:
    if words:
        raise ValueError(f"--report_only true trains nothing and takes no options of fit: {words}")
    folder: Path = options.study
    plan = read_plan(folder, kind)
    results = read_results(folder)
    page = _PAGES[kind](results, plan, options.metric, options.part)
    page.blocks.insert(0, _setting(results, kind, options.part))
    page.blocks += [_trials_table(results, options.part), _footer(folder, kind, options)]
    page.configuration = (folder / "config.yaml").read_text()
    print(f"\nreport: {page.write(folder)}")
    if options.page is not None:
        page.insert(options.page, folder)
        print(f"page: {options.page}")
    return 0


# --- scores -----------------------------------------------------------------------------------


def image_scores(result: Result, metric: str, part: str) -> dict[str, float]:
    """A metric of each picture, the mean over its classes."""
    values: dict[str, list[float]] = defaultdict(list)
    for row in result.parts[part]:
        values[row.id].append(getattr(row, metric))
    return {name: float(np.mean(of)) for name, of in values.items()}


def collect(results: Sequence[Result], metric: str, part: str) -> dict[str, NDArray[np.float64]]:
    """``(seeds, images)`` for each configuration.

    Raises:
        ValueError: the trials were not scored on the same pictures.
    """
    scored = [image_scores(result, metric, part) for result in results]
    ids = sorted(scored[0])
    for result, values in zip(results, scored, strict=True):
        if sorted(values) != ids or result.split != results[0].split:
            raise ValueError(
                f"trial {result.name}, seed {result.seed}, was scored on other pictures than "
                f"{results[0].name}, seed {results[0].seed}"
            )
    tables: dict[str, list[list[float]]] = defaultdict(list)
    for result, values in zip(results, scored, strict=True):
        tables[result.name].append([values[name] for name in ids])
    return {name: np.array(rows) for name, rows in tables.items()}


def differences(scores: Scores, reference: str) -> dict[str, Effect]:
    """Every configuration but the reference minus it; ``p`` corrected for their number."""
    effects = {
        name: contrast(scores, {name: 1, reference: -1}) for name in scores if name != reference
    }
    corrected = holm([effect.p for effect in effects.values()])
    return {
        name: effect._replace(p=p)
        for (name, effect), p in zip(effects.items(), corrected, strict=True)
    }


def main_effects(scores: Scores) -> dict[str, Effect]:
    """What each module adds, averaged over the subsets of the others; all eight are needed."""
    subsets = [s for size in range(len(MODULES) + 1) for s in combinations(MODULES, size)]
    share = 2 / len(subsets)
    effects = {
        module: contrast(
            scores, {_subset_name(s): share if module in s else -share for s in subsets}
        )
        for module in MODULES
    }
    corrected = holm([effect.p for effect in effects.values()])
    return {m: e._replace(p=p) for (m, e), p in zip(effects.items(), corrected, strict=True)}


# --- pages ------------------------------------------------------------------------------------


def _modules_page(results: list[Result], plan: object, metric: str, part: str) -> Page:
    scores = _ordered(collect(results, metric, part), ["baseline", *MODULES])
    page = _comparison("Ablation of the modules", results, scores, ("baseline", "full"), metric)
    if len(scores) == 2 ** len(MODULES):
        effects = main_effects(scores)
        page.blocks.append(
            Table(
                "What each module adds, averaged over the four networks with and without the "
                "other two",
                ["module", f"{_label(metric)}: difference [95 %]", "p (Holm)"],
                [[m.upper(), _difference(e, metric), _p(e.p)] for m, e in effects.items()],
            )
        )
    return page


def _ordered(scores: Scores, first: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Small sets of modules first."""
    place = {name: index for index, name in enumerate(first)}
    names = sorted(scores, key=lambda n: (n == "full", "+" in n, place.get(n, len(place)), n))
    return {name: scores[name] for name in names}


def _fusions_page(results: list[Result], plan: object, metric: str, part: str) -> Page:
    scores = collect(results, metric, part)
    return _comparison("Fusions of CMAM", results, scores, ("cross",), metric)


def _comparison(
    title: str, results: list[Result], scores: Scores, references: Sequence[str], metric: str
) -> Page:
    """A table of means and of differences to each reference, and a plot of the differences."""
    references = [name for name in references if name in scores]
    of = {reference: differences(scores, reference) for reference in references}
    parameters = {result.name: result.parameters for result in results}
    header = ["network", "parameters", "seeds", f"{_label(metric)} [95 %]"]
    for reference in references:
        header += [f"minus {reference} [95 %]", "p (Holm)"]
    rows = []
    for name, table in scores.items():
        row = [name, f"{parameters[name]:,}", str(len(table))]
        row.append(_interval(contrast(scores, {name: 1}), metric))
        for reference in references:
            effect = of[reference].get(name)
            row += [_difference(effect, metric), _p(effect.p)] if effect else ["", ""]
        rows.append(row)
    page = Page(title, [Table(f"Mean {_label(metric)} over pictures and seeds", header, rows)])
    if references and len(scores) > 1:
        page.blocks.append(_forest(scores, references[0], of[references[0]], metric))
    return page


def _forest(scores: Scores, reference: str, effects: Mapping[str, Effect], metric: str) -> Plot:
    figure = Figure(figsize=(7, 1.2 + 0.4 * len(effects)), layout="constrained")
    axes = figure.subplots()
    base = scores[reference].mean()
    for place, (name, effect) in enumerate(effects.items()):
        axes.plot([effect.low, effect.high], [place, place], color=_BLUE, linewidth=2)
        axes.plot(effect.value, place, "o", color=_BLUE)
        seeds = scores[name].mean(1) - base
        axes.plot(seeds, np.full(len(seeds), place + 0.2), "|", color=_GREY)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(effects)), list(effects))
    axes.set_ylim(len(effects) - 0.4, -0.6)
    axes.set_xlabel(f"{_label(metric)} minus that of {reference}; 95 % interval, grey: each seed")
    _clean(figure)
    shown = ", ".join(f"{n} {_difference(e, metric)}" for n, e in effects.items())
    return Plot("differences", figure, f"{_label(metric)} minus that of {reference}: {shown}")


def _sweep_page(
    results: list[Result], plan: Mapping[str, Mapping[str, Any]], metric: str, part: str
) -> Page:
    scores = collect(results, metric, part)
    parameters = {result.name: result.parameters for result in results}
    page = Page("Sweep of " + ", ".join(plan), [])
    better = min if metric == "hd95" else max
    for key, names in plan.items():
        values = _by_value({n: v for n, v in names.items() if n in scores})
        if not values:
            continue
        means = {name: contrast(scores, {name: 1}) for name in values}
        best = better(values, key=lambda n: means[n].value)
        to_best = differences({n: scores[n] for n in values}, best)
        stable = {n for n in values if n == best or not to_best[n].certain}
        page.blocks.append(
            Table(
                f"Mean {_label(metric)} over pictures and seeds, against {key}",
                [
                    *(key, "parameters", "seeds", f"{_label(metric)} [95 %]"),
                    *("minus the best [95 %]", "p (Holm)", "not told apart from it"),
                ],
                [
                    [
                        str(value),
                        f"{parameters[name]:,}",
                        str(len(scores[name])),
                        _interval(means[name], metric),
                        _difference(to_best[name], metric) if name != best else "best",
                        _p(to_best[name].p) if name != best else "",
                        "yes" if name in stable else "no",
                    ]
                    for name, value in values.items()
                ],
            )
        )
        page.blocks.append(_sweep_plot(key, values, scores, means, stable, metric))
    return page


def _by_value(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers in their order, anything else as given."""
    items = list(values.items())
    if all(isinstance(v, (int, float)) for _, v in items):
        items.sort(key=lambda item: item[1])
    return dict(items)


def _sweep_plot(
    key: str,
    values: Mapping[str, Any],
    scores: Scores,
    means: Mapping[str, Effect],
    stable: set[str],
    metric: str,
) -> Plot:
    figure = Figure(figsize=(1.6 + 1.1 * max(3, len(values)), 3.4), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(values):
        if name in stable:
            axes.axvspan(place - 0.5, place + 0.5, color=_GREEN, alpha=0.15, linewidth=0)
        mean = means[name]
        axes.plot([place, place], [mean.low, mean.high], color=_BLUE)
        seeds = scores[name].mean(1)
        axes.plot(np.full(len(seeds), place + 0.12), seeds, "_", color=_GREY)
    axes.plot(range(len(values)), [means[n].value for n in values], "o-", color=_BLUE)
    axes.set_xticks(range(len(values)), [str(value) for value in values.values()])
    axes.set(xlabel=key, ylabel=_label(metric), xlim=(-0.6, len(values) - 0.4))
    axes.set_title("green: not told apart from the best; grey: each seed", fontsize=9)
    _clean(figure)
    shown = ", ".join(f"{v}: {_interval(means[n], metric)}" for n, v in values.items())
    name = key.rpartition(".")[2]
    return Plot(name, figure, f"{_label(metric)} against {key}: {shown}")


def _kfold_page(results: list[Result], plan: object, metric: str, part: str) -> Page:
    page = Page("Cross-validation", [])
    by_seed: dict[int, list[Result]] = defaultdict(list)
    for result in results:
        by_seed[result.seed].append(result)
    folds = results[0].configuration["data"]["folds"]
    whole = {seed: of for seed, of in by_seed.items() if len(of) == folds}
    for seed, of in by_seed.items():
        rows = [row for result in of for row in result.parts[part]]
        # A picture may have been in the validation part of several folds, in one test part only.
        if part == "test":
            macro = summarise(rows)["resolutions"]["native"]["macro"]
            table = []
            for name in METRICS:
                line = [_label(name), _interval(macro["mean"][name], name)]
                line.append(_interval(macro["pooled"][name], name) if name in RATES else "")
                table.append(line)
            count = len({row.id for row in rows})
            page.blocks.append(
                Table(
                    f"Seed {seed}: {count} pictures out of fold, {len(of)} of {folds} folds",
                    ["metric", "mean over pictures [95 %]", "pooled [95 %]"],
                    table,
                )
            )
    if part == "test" and len(whole) > 1:
        tables = [image_scores(_joined(of), metric, part) for of in whole.values()]
        scores = {"all": np.array([[t[i] for i in sorted(t)] for t in tables])}
        page.blocks.append(
            f"Mean {_label(metric)} over {len(whole)} seeds: "
            f"{_interval(contrast(scores, {'all': 1}), metric)}, over pictures and seeds."
        )
    figure = Figure(figsize=(1.6 + 0.9 * len(results), 3.4), layout="constrained")
    axes = figure.subplots()
    of_trial = [list(image_scores(result, metric, part).values()) for result in results]
    axes.boxplot(of_trial, showmeans=True)
    labels = [f"{r.name}\nseed {r.seed}" for r in results]
    axes.set_xticks(range(1, len(results) + 1), labels, fontsize=8)
    axes.set_ylabel(f"{_label(metric)} of a picture")
    _clean(figure)
    shown = ", ".join(
        f"{r.name} (seed {r.seed}) mean {np.mean(v):.3f}"
        for r, v in zip(results, of_trial, strict=True)
    )
    page.blocks.append(Plot("folds", figure, f"{_label(metric)} by fold: {shown}"))
    return page


def _joined(results: Sequence[Result]) -> Result:
    """The folds of one seed as one result."""
    parts = {"test": [row for result in results for row in result.parts["test"]]}
    return replace(results[0], parts=parts)


_PAGES: dict[str, Callable[[list[Result], Any, str, str], Page]] = {
    "ablate modules": _modules_page,
    "ablate fusions": _fusions_page,
    "sweep": _sweep_page,
    "kfold": _kfold_page,
}


# --- words and numbers ------------------------------------------------------------------------


def _setting(results: Sequence[Result], kind: str, part: str) -> str:
    def used(section: str, key: str) -> str:
        return "/".join(sorted({str(r.configuration[section][key]) for r in results}))

    images = {len({row.id for row in result.parts[part]}) for result in results}
    count = f"{min(images)} to {max(images)}" if len(images) > 1 else f"{min(images)}"
    seeds = len({result.seed for result in results})
    trained = Counter(result.name for result in results)
    once = sorted(name for name, trainings in trained.items() if trainings == 1)
    splits = ", ".join(sorted({result.split[:12] for result in results}))
    epochs = used("trainer", "max_epochs")
    at_most = f"{epochs} {'epoch' if epochs == '1' else 'epochs'}"
    return (
        f"{len(results)} trainings, {seeds} {'seed' if seeds == 1 else 'seeds'}, on "
        f"{used('data', 'dataset')} at {used('data', 'size')} pixels squared, at most "
        f"{at_most}, batch {used('data', 'batch_size')}; scored at native "
        f"resolution on the {count} pictures of the {part} part, which "
        + ("had no say in the training" if part == "test" else "also chose the checkpoints")
        + f". Split hash {splits}. "
        + (
            "Intervals of a table: 95 % by bootstrap draws of pictures."
            if kind == "kfold"
            else f"Intervals: {CONFIDENCE * 100:g} % by {RESAMPLES} bootstrap draws of pictures "
            "and of seeds"
            + (
                f"; of {', '.join(once)} there is a single training, and what another would change "
                "is not in their intervals"
                if once
                else ""
            )
            + ". p: Wilcoxon signed-rank test over pictures, Holm-corrected within a column."
        )
    )


def _trials_table(results: Sequence[Result], part: str) -> Table:
    return Table(
        "Trials",
        ["trial", "seed", "IoU", "Dice", "epochs", "minutes", "commit"],
        [
            [
                result.name,
                str(result.seed),
                f"{result.mean('iou', part):.4f}",
                f"{result.mean('dice', part):.4f}",
                str(result.epochs),
                f"{result.seconds / 60:.1f}",
                _commit(result),
            ]
            for result in results
        ],
    )


def _commit(result: Result) -> str:
    """The commit, with a + where files had been changed."""
    name = str(result.versions.get("commit") or "")
    return name[:9] + "+" * name.endswith("-dirty")


def _footer(folder: Path, kind: str, options: argparse.Namespace) -> str:
    command, _, variants = kind.partition(" ")
    words = ["eamnet", command, f"--study {folder}"]
    if variants == "fusions":
        words.append(f"--variants {variants}")
    if options.metric != "iou":
        words.append(f"--metric {options.metric}")
    if options.part != "test":
        words.append(f"--part {options.part}")
    words.append("--report_only true")
    if options.page is not None:
        words.append(f"--page {options.page}")
    return f"Made from the files in results/ by: `{' '.join(words)}`"


def _label(metric: str) -> str:
    return _NAMES.get(metric, metric.replace("_", " "))


def _digits(metric: str) -> int:
    return 1 if metric == "hd95" else 3


def _interval(value: Any, metric: str) -> str:
    value, low, high = (
        (value["value"], value["low"], value["high"]) if isinstance(value, dict) else value[:3]
    )
    digits = _digits(metric)
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _difference(effect: Effect, metric: str) -> str:
    digits = _digits(metric) + 1
    value, low, high = (f"{v:+.{digits}f}".replace("-", "−") for v in effect[:3])
    return f"{value} [{low}, {high}]"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _clean(figure: Figure) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
