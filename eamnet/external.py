"""``eamnet external``: train on one data set, test on another that shares no picture with it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from eamnet import runs
from eamnet.data import SegmentationData, Split
from eamnet.data.overlap import LIKENESS, Overlap, find_overlaps
from eamnet.metrics import write_atomic

__all__ = ["external"]

#: Options that describe the data set that was trained on and must not be handed on to another.
_OWN = (
    *("--data.split", "null", "--data.protocol", "external", "--data.parts", "null"),
    *("--data.exclude", "null", "--data.palette", "null", "--data.resize_masks", "false"),
    *("--data.missing_masks", "error", "--data.root", "null"),
)


def external(arguments: list[str]) -> int:
    """``eamnet external``: train unless the run is finished, compare the data sets, test."""
    parser = argparse.ArgumentParser(
        prog="eamnet external",
        usage="eamnet external --run_dir FOLDER [options of fit] --external.dataset NAME "
        "--external.root FOLDER [options]",
        description="Train on one data set and test on another. --data.* describe the first, as "
        "for `eamnet fit`, --external.* the second, with the same names. A run that is trained "
        "already is only tested. Pictures that both have are searched for first.",
        allow_abbrev=False,
    )
    parser.add_argument("--run_dir", type=Path, required=True, help="folder of the run")
    parser.add_argument(
        "--overlap",
        choices=("refuse", "leave_out", "allow"),
        default="refuse",
        help="where pictures of the test are like pictures of the training: refuse to go on, "
        "leave them out of the test, or test on them all the same (default: refuse)",
    )
    parser.add_argument(
        "--likeness",
        type=float,
        default=LIKENESS,
        help=f"correlation from which on two pictures are the same (default: {LIKENESS})",
    )
    parser.add_argument(
        "--name",
        help="of the evaluation's folder, test-NAME; default: the data set's name, for `folder` "
        "that of the folder",
    )
    options, words = parser.parse_known_args(arguments)
    ours, theirs = _divide(words)
    run: Path = options.run_dir
    recorded = run / "config.yaml"
    if recorded.is_file():
        ours = ["--config", str(recorded), *ours]
    parsed = runs.Options(ours)
    trained_on = parsed.config.clone()
    if trained_on.data.split is None and (run / "split.json").is_file():
        trained_on.data.split = str(run / "split.json")
    tested_on = parsed.parse([*ours, *_OWN, *theirs])
    name = options.name or (
        Path(tested_on.data.root).name
        if tested_on.data.dataset == "folder"
        else tested_on.data.dataset
    )
    folder = run / f"test-{name}"

    _, first = parsed.build(trained_on)
    _, second = parsed.build(tested_on)
    overlaps = _compare(first, second, options.likeness)
    _report(overlaps, first, second, options, folder)
    if overlaps and options.overlap == "leave_out":
        known = {overlap.second for overlap in overlaps}
        kept = tuple(name for name in second.split.test if name not in known)
        protocol = f"{second.split.protocol}, without those of the training"
        split = Split(second.split.dataset, protocol, 0, (), (), kept)
    else:
        split = second.split
    if not split.test:
        raise ValueError(f"no picture of {second.source.name} is left to test on")
    split.write(folder / "split.json")

    if not (run / "best.safetensors").is_file():
        runs.fit([*ours, "--run_dir", str(run), "--ckpt_path", "last"])
    return runs.test([*ours, *_OWN, *theirs, "--run_dir", str(run), "--evaluation", folder.name])


def _divide(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options of the training, and those of the other data set as ``--data.*``."""
    ours: list[str] = []
    theirs: list[str] = []
    current = ours
    for word in words:
        if word.startswith("--"):
            current = theirs if word.startswith("--external.") else ours
        current.append(word.replace("--external.", "--data.", 1) if current is theirs else word)
    if not any(word.startswith("--data.dataset") for word in theirs):
        raise ValueError("name the data set to test on with --external.dataset")
    return ours, theirs


def _compare(first: SegmentationData, second: SegmentationData, likeness: float) -> list[Overlap]:
    """Pictures that trained the network or chose its checkpoint, and are in the test as well."""
    learnt_from = first.index()
    tested = second.index().test
    return find_overlaps(
        (first.source, [*learnt_from.train, *learnt_from.val]),
        (second.source, tested),
        likeness=likeness,
        cache_dir=first.cache_dir,
    )


def _report(
    overlaps: Sequence[Overlap],
    first: SegmentationData,
    second: SegmentationData,
    options: argparse.Namespace,
    folder: Path,
) -> None:
    """Write ``overlap.json``, say what was found, and refuse where that is asked for."""
    names = first.source.name, second.source.name
    content = {
        "trained_on": {"dataset": names[0], "split": first.split.hash},
        "tested_on": names[1],
        "likeness": options.likeness,
        "action": options.overlap,
        "pairs": [list(overlap) for overlap in overlaps],
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "overlap.json", (json.dumps(content, indent=1) + "\n").encode())
    if not overlaps:
        print(f"no picture of the test on {names[1]} is among those of the training")
        return
    count = len({o.second for o in overlaps})
    shown = "".join(f"\n  {o.second} is {o.first} ({o.likeness:.3f})" for o in overlaps[:10])
    more = f"\n  and more: {folder / 'overlap.json'}" if len(overlaps) > 10 else ""
    text = (
        f"{count} of {len(second.split.test)} pictures of the test on {names[1]} are among those "
        f"of the training:{shown}{more}"
    )
    if options.overlap == "refuse":
        raise ValueError(
            f"{text}\nThis is no external test. --overlap leave_out tests on the others, "
            "--overlap allow on all"
        )
    print(text)
