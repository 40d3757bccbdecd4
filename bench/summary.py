"""From rows to what people ask: how much faster than the best alternative, case by case."""

from __future__ import annotations

from dataclasses import dataclass

from bench.results import Record
from bench.timing import geometric_mean

RIVALS = ("plain", "plain, channels-last", "torch.compile")


@dataclass(frozen=True)
class Comparison:
    """One case: what `auto` takes against the best rival, each in the better of its layouts."""

    subject: str
    case: str
    mode: str
    dtype: str
    ours_ms: float
    best_ms: float
    best: str  # the rival's name
    fastest_backend: str
    chosen_backend: str
    percent_of_floor: float | None  # None for modules, whose work is not counted
    noisy: bool
    slower: bool  # than the best rival, in the rival's layout, and the interval agrees

    @property
    def speedup(self) -> float:
        return self.best_ms / self.ours_ms


def comparisons(rows: list[Record]) -> list[Comparison]:
    cases: dict[tuple[str, ...], list[Record]] = {}
    for row in rows:
        key = (row["subject"], row["case"], row["mode"], row["dtype"])
        cases.setdefault(key, []).append(row)
    found = []
    for (subject, case, mode, dtype), group in cases.items():
        timed = [r for r in group if r["median_ms"] is not None]
        rivals = [r for r in timed if r["candidate"] in RIVALS]
        chosen = [r for r in timed if r["chosen"]]
        ours = [r for r in timed if r["ours"]]
        if not rivals or not chosen:
            continue
        mine = min(chosen, key=lambda r: r["median_ms"])
        best = min(rivals, key=lambda r: r["median_ms"])
        fastest = min(ours, key=lambda r: r["median_ms"])
        found.append(
            Comparison(
                subject,
                case,
                mode,
                dtype,
                mine["median_ms"],
                best["median_ms"],
                best["candidate"],
                fastest["candidate"].split(",")[0],
                mine["candidate"].split(",")[0],
                mine["percent_of_floor"],
                mine["noisy"] or best["noisy"],
                best["speedup_high"] is not None and best["speedup_high"] < 1,
            )
        )
    return found


def means(found: list[Comparison]) -> dict[tuple[str, str, str], float]:
    """Geometric mean of the speed-ups by (subject, dtype, mode)."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for c in found:
        groups.setdefault((c.subject, c.dtype, c.mode), []).append(c.speedup)
    return {key: geometric_mean(values) for key, values in groups.items()}


def failures(rows: list[Record], found: list[Comparison]) -> list[str]:
    """What makes the suite fail: wrong results, and `auto` being slower than plain PyTorch.

    Slower is: by more than 5 % of the medians, with an interval of the paired ratio that leaves
    equality out. A noisy case does not fail; it is marked in the table instead.
    """
    problems = [
        f"{r['subject']} {r['case']} {r['mode']} {r['dtype']}: {r['candidate']} is wrong "
        f"({r['error']:.3g} times the allowed error)"
        for r in rows
        if r["ours"] and not r["correct"]
    ]
    problems += [
        f"{c.subject} {c.case} {c.mode} {c.dtype}: what auto takes ({c.chosen_backend}) is slower "
        f"than {c.best} ({c.ours_ms:.3g} ms against {c.best_ms:.3g} ms)"
        for c in found
        if c.speedup < 0.95 and c.slower and not c.noisy
    ]
    return problems


def markdown(found: list[Comparison]) -> str:
    """The table of geometric means, and the range over the cases."""
    lines = [
        "| operator | dtype | mode | speed-up (geometric mean) | range | % of floor |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (subject, dtype, mode), mean in means(found).items():
        group = [c for c in found if (c.subject, c.dtype, c.mode) == (subject, dtype, mode)]
        speedups = sorted(c.speedup for c in group)
        floors = sorted(c.percent_of_floor for c in group if c.percent_of_floor is not None)
        floor = f"{floors[0]:.0f}–{floors[-1]:.0f}" if floors else "–"
        words = "forward" if mode == "forward" else "forward + backward"
        lines.append(
            f"| `{subject}` | {dtype} | {words} | {mean:.2f}× | "
            f"{speedups[0]:.2f}–{speedups[-1]:.2f}× | {floor} |"
        )
    return "\n".join(lines)


def network_markdown(rows: list[Record]) -> str:
    """The networks' table: time, its ratio to EAM-Net's, size and memory."""
    lines = [
        "| network | mode | size, batch | median ms | times EAM-Net's time [95 %] | parameters, M "
        "| MACs, G | peak extra MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        memory = "–" if r["peak_extra_mb"] is None else f"{r['peak_extra_mb']:.0f}"
        macs = "–" if r["macs"] is None else f"{r['macs'] / 1e9:.1f}"
        lines.append(
            f"| {r['network']} | {r['mode']} | {r['size']}², {r['batch']} | {r['median_ms']:.0f} | "
            f"{r['times_ours']:.2f} [{r['times_ours_low']:.2f}, {r['times_ours_high']:.2f}] | "
            f"{r['parameters'] / 1e6:.2f} | {macs} | {memory} |"
        )
    return "\n".join(lines)


def sweeps_markdown(fits: list[Record]) -> str:
    """The exponents of cost against size, beside those that the operation count expects."""
    lines = ["| operator | against | expected | time | memory |", "| --- | --- | --- | --- | --- |"]
    for f in fits:
        memory = "–" if f["memory"] is None else f"{f['memory']:.2f}"
        lines.append(
            f"| `{f['subject']}` | {f['axis']} | {f['expected']} | {f['time']:.2f} | {memory} |"
        )
    return "\n".join(lines)


def freed_memory_markdown(rows: list[Record]) -> str:
    """Training steps with freed memory kept by the process and returned to the system."""
    lines = [
        "| network | size, batch | freed memory | median step, ms | times the first's [lowest, "
        "highest] | peak of the process, MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        lines.append(
            f"| {r['network']} | {r['size']}², {r['batch']} | {r['freed_memory']} | "
            f"{r['median_ms']:.0f} | {r['times_first']:.2f} "
            f"[{r['times_first_low']:.2f}, {r['times_first_high']:.2f}] | {r['peak_mb']:.0f} |"
        )
    return "\n".join(lines)


def precision_markdown(rows: list[Record]) -> str:
    """Mean Dice per picture of a network in several precisions, and the paired change."""
    lines = [
        "| network | pictures | mean Dice [95 %] | change [95 %] | largest change of a picture |",
        "| --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        lines.append(
            f"| {r['network']} | {r['pictures']} | {_dice_cells(r, 5)} | "
            f"{r['largest_change']:.4f} |"
        )
    return "\n".join(lines)


def magnified_markdown(rows: list[Record]) -> str:
    """Mean Dice per picture of networks on pictures cropped about their lesion, by factor."""
    lines = [
        "| magnified | lesion's share, median | network | mean Dice [95 %] | change [95 %] "
        "| failed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        lines.append(
            f"| {r['factor']:g}× | {r['median_share']:.0%} | {r['network']} | "
            f"{_dice_cells(r, 4)} | {r['failed']} of {r['pictures']} |"
        )
    return "\n".join(lines)


def _dice_cells(r: Record, digits: int) -> str:
    """The mean Dice and its change, with their intervals; the change to so many digits."""
    dice = f"{r['dice']:.4f} [{r['dice_low']:.4f}, {r['dice_high']:.4f}]"
    if r["change"] is None:
        return f"{dice} | –"
    change, low, high = (f"{r[key]:+.{digits}f}" for key in ("change", "change_low", "change_high"))
    return f"{dice} | {change} [{low}, {high}]"


def picture_intervals_markdown(rows: list[Record]) -> str:
    """How often the interval of an average over pictures holds the population's."""
    lines = ["| pictures | mean over pictures | pooled |", "| ---: | ---: | ---: |"]
    lines += [f"| {r['pictures']} | {r['mean']:.0%} | {r['pooled']:.0%} |" for r in rows]
    return "\n".join(lines)


def study_intervals_markdown(rows: list[Record]) -> str:
    """How often the interval of the difference of two equal networks holds zero."""
    seeds = list(dict.fromkeys(r["seeds"] for r in rows))
    held: dict[float, list[str]] = {}
    for r in rows:
        held.setdefault(r["spread"], []).append(f"{r['held']:.0%} ({r['pictures_alone']:.0%})")
    lines = [
        f"| spread of a training's mean | {' | '.join(f'{s} seeds' for s in seeds)} |",
        "| ---: |" + " ---: |" * len(seeds),
    ]
    lines += [f"| {spread} | {' | '.join(cells)} |" for spread, cells in held.items()]
    return "\n".join(lines)


def loading_markdown(rows: list[Record]) -> str:
    """Processor time of a picture's way into a batch, at several sizes."""
    sizes = list(dict.fromkeys(r["size"] for r in rows))
    cells: dict[str, list[str]] = {}
    for r in rows:
        cells.setdefault(r["what"], []).append(
            f"{r['median_ms']:.2g} [{r['p20_ms']:.2g}, {r['p80_ms']:.2g}]"
        )
    lines = [
        f"| ms of a picture [20th, 80th percentile] | {' | '.join(f'{s}×{s}' for s in sizes)} |",
        "| --- |" + " --- |" * len(sizes),
    ]
    lines += [f"| {what} | {' | '.join(row)} |" for what, row in cells.items()]
    return "\n".join(lines)
