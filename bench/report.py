"""One self-contained HTML page of the results, and the plots as PNG files."""

from __future__ import annotations

import base64
import html
import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

from bench.results import Record
from bench.summary import Comparison, comparisons, means
from bench.sweeps import fits

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:80rem;margin:2rem auto;padding:0 1rem;
color:#1a1a1a;
background:#fff}h1,h2{line-height:1.2}table{border-collapse:collapse;margin:1rem 0;display:block;
overflow-x:auto}td,th{padding:.25rem .6rem;border-bottom:1px solid #ddd;text-align:right;
white-space:nowrap}td:first-child,th:first-child{text-align:left}img{max-width:100%}
.lose{background:#fde3d3}.wrong{background:#f6b5b5}.ours{font-weight:600}.note{color:#555}
@media(prefers-color-scheme:dark){body{background:#151515;color:#e6e6e6}td,th{border-color:#444}
.lose{background:#5a3214}.wrong{background:#661c1c}.note{color:#aaa}}
"""


def _png(figure: Any, path: Path) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)
    path.write_bytes(buffer.getvalue())
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _speedups(found: list[Comparison], path: Path) -> str:
    averages = means(found)
    labels = [f"{s}\n{d}, {m}" for s, d, m in averages]
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(labels) + 1))
    axes.barh(labels, list(averages.values()), color="#0072B2")
    for c in found:
        row = list(averages).index((c.subject, c.dtype, c.mode))
        axes.plot(c.speedup, row, "o", color="#E69F00", markersize=4)
    axes.axvline(1, color="#444", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as the best rival (bar: geometric mean; dots: cases)")
    return _png(figure, path)


def _sweeps(rows: list[Record], path: Path) -> str:
    groups: dict[tuple[str, str], list[Record]] = {}
    for row in rows:
        groups.setdefault((row["subject"], row["axis"]), []).append(row)
    columns = 3
    lines = -(-len(groups) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(12, 3 * lines), squeeze=False)
    slopes = {(f["subject"], f["axis"]): f for f in fits(rows)}
    for axes, (key, group) in zip(grid.flat, groups.items(), strict=False):
        axes.loglog([r["value"] for r in group], [r["median_ms"] for r in group], "o-")
        fit = slopes.get(key)
        if fit is not None:
            axes.set_title(
                f"{key[0]}\nexponent {fit['time']:.2f}, expected {fit['expected']:g}", fontsize=9
            )
        axes.set_xlabel(key[1])
        axes.set_ylabel("ms")
    for axes in list(grid.flat)[len(groups) :]:
        axes.set_visible(False)
    figure.tight_layout()
    return _png(figure, path)


def _number(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else html.escape(str(value))


def _table(rows: list[Record], columns: dict[str, str], classes: Any = None) -> str:
    head = "".join(f"<th>{html.escape(title)}</th>" for title in columns.values())
    body = "".join(
        f'<tr class="{classes(row) if classes else ""}">'
        + "".join(f"<td>{_number(row.get(key))}</td>" for key in columns)
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _class(row: Record) -> str:
    if not row["correct"]:
        return "wrong"
    if row["ours"]:
        return "ours"
    return "lose" if row["speedup"] is not None and row["speedup"] < 1 else ""


def write(folder: Path, operators: Any, network: Any, sweeps: Any) -> Path:
    """Write `report.html` and PNG files from the result files' contents; None leaves one out."""
    parts = ["<h1>eamnet-kernels: benchmark</h1>"]
    for content in (operators, network, sweeps):
        if content:
            facts = ", ".join(f"{k} {v}" for k, v in content["environment"].items() if v)
            parts.append(f'<p class="note">{html.escape(facts)}</p>')
            break
    parts.append(
        "<p>Every candidate runs in turn in every round, on fresh inputs; ratios are medians of "
        "rounds, intervals are 95 % bootstrap intervals. A result is compared with float64 before "
        "it is timed: errors above what plain PyTorch makes in the same dtype (twice, gradients "
        "three times, plus one rounding) make a case wrong, and it gets no time. Rivals compute "
        "the definition in plain PyTorch, in both layouts, and under <code>torch.compile</code> "
        "(default mode, warmed up, static shapes). The floor is the fewest bytes over the copy "
        "bandwidth or the fewest operations over the GEMM peak, both measured in this run.</p>"
    )
    if operators:
        found = comparisons(operators["rows"])
        picture = _speedups(found, folder / "speedups.png")
        parts.append("<h2>Operators</h2>")
        parts.append(f'<img alt="speed-ups over the best rival" src="{picture}">')
        parts.append("<h3>Case by case, what <code>auto</code> takes against the best rival</h3>")
        columns = {
            "subject": "operator",
            "case": "case",
            "mode": "mode",
            "dtype": "dtype",
            "speedup": "times as fast",
            "ours_ms": "ours, ms",
            "chosen_backend": "by",
            "best_ms": "best rival, ms",
            "best": "which",
            "percent_of_floor": "% of floor",
        }
        cases = [{**asdict(c), "speedup": c.speedup} for c in found]
        parts.append(_table(cases, columns, lambda c: "lose" if c["speedup"] < 1 else ""))
        parts.append(
            "<p>Ceilings: "
            + "; ".join(
                f"{dtype}: copy {c['copy'] / 1e9:.1f} GB/s, GEMM {c['gemm'] / 1e9:.0f} GFLOP/s"
                for dtype, c in operators["ceilings"].items()
            )
            + "</p>"
        )
        parts.append(
            "<h3>All that were timed</h3><p>Bold: backends of the library. Shaded: rivals that "
            "were faster than what <code>auto</code> takes in their layout, and, darker, results "
            "with more than the allowed error; a backend of ours has no time then, a rival "
            "has.</p>"
        )
        columns = {
            "subject": "operator",
            "case": "case",
            "mode": "mode",
            "dtype": "dtype",
            "candidate": "candidate",
            "median_ms": "median ms",
            "speedup": "times auto's time",
            "speedup_low": "low",
            "speedup_high": "high",
            "percent_of_floor": "% of floor",
            "chosen": "auto",
            "p20_ms": "p20",
            "p80_ms": "p80",
            "floor_ms": "floor ms",
            "bytes": "bytes",
            "flop": "flop",
            "peak_extra_mb": "peak extra MB",
            "error": "error / allowed",
            "noisy": "noisy",
        }
        parts.append(_table(operators["rows"], columns, _class))
    if network:
        parts.append("<h2>The network</h2>")
        columns = {
            "network": "network",
            "mode": "mode",
            "batch": "batch",
            "size": "size",
            "median_ms": "median ms",
            "p20_ms": "p20",
            "p80_ms": "p80",
            "times_ours": "times EAM-Net's time",
            "times_ours_low": "low",
            "times_ours_high": "high",
            "parameters": "parameters",
            "macs": "MACs",
            "peak_extra_mb": "peak extra MB",
            "noisy": "noisy",
        }
        parts.append(_table(network["rows"], columns))
    if sweeps:
        picture = _sweeps(sweeps["rows"], folder / "sweeps.png")
        parts.append("<h2>Cost as the work grows</h2>")
        parts.append(f'<img alt="log-log plots of time against size" src="{picture}">')
        columns = {
            "subject": "operator",
            "axis": "axis",
            "expected": "expected exponent",
            "time": "exponent of time",
            "memory": "exponent of memory",
        }
        parts.append(_table(fits(sweeps["rows"]), columns))
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>eamnet-kernels: benchmark</title><style>{_STYLE}</style>{''.join(parts)}</html>"
    )
    path = folder / "report.html"
    path.write_text(page)
    return path
