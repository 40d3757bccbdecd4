"""`eamnet bench`, also `python -m bench`: measure, write result files, tables, plots and a page."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from bench import floor, operators, results, summary
from bench.subjects import SUBJECTS
from eamnet.memory import keep_freed_memory

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def _line(row: results.Record) -> str:
    """A row in words, for those who watch."""
    what = [str(row.get(k, "")) for k in ("subject", "case", "network", "axis", "value", "mode")]
    what += [str(row.get(k, "")) for k in ("dtype", "candidate")]
    words = " ".join(w for w in what if w)
    if row["median_ms"] is None:
        return f"{words:90} {'too slow to time' if row['correct'] else 'wrong'}"
    ratio = row.get("speedup", row.get("times_ours"))
    relative = "" if ratio is None else f" {ratio:6.2f}x ours"
    return f"{words:90} {row['median_ms']:10.3f} ms{relative}{' noisy' if row.get('noisy') else ''}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="eamnet bench",
        description="Compare the operators and the network with what one would use otherwise.",
    )
    parser.add_argument("--op", action="append", help=f"of: {'; '.join(SUBJECTS)}; prefixes do")
    parser.add_argument("--backend", help="only this backend beside the rivals, instead of auto")
    parser.add_argument("--mode", choices=("forward", "backward", "both"), default=None)
    parser.add_argument("--dtype", action="append", choices=tuple(_DTYPES))
    parser.add_argument("--shape", help="BxCxHxW, or BxhxNxd for pixels, instead of the list")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes, under two minutes")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument(
        "--compile-mode",
        choices=("default", "max-autotune-no-cudagraphs"),
        default="default",
        help="torch.compile's; the other one, for a GPU, searches up to a minute a case",
    )
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--budget", type=float, default=None, help="seconds per case")
    parser.add_argument(
        "--parts",
        default=None,
        help="of operators,network,sweeps; all without --quick, the first with it",
    )
    parser.add_argument("--output", type=Path, default=Path("bench-results"))
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    # Ours are exact in float32 unless told otherwise, cuDNN is not: compare like with like.
    torch.backends.cudnn.allow_tf32 = False
    names = list(SUBJECTS)
    if options.op:
        names = [n for n in names if any(n.startswith(op) for op in options.op)]
        if not names:
            parser.error(f"--op {options.op}: none of {'; '.join(SUBJECTS)}")
    try:
        shape = tuple(int(s) for s in options.shape.split("x")) if options.shape else None
    except ValueError:
        parser.error(f"--shape {options.shape}: accepted are numbers joined by x")
    if shape is not None and len(shape) != 4:
        parser.error(f"--shape {options.shape}: four numbers")
    dtypes = [_DTYPES[d] for d in options.dtype or ["float32"]]
    # "backward" alone has no meaning to a user's clock; what is timed is forward and backward.
    modes = {None: ["forward", "both"], "forward": ["forward"]}.get(options.mode, ["both"])
    default = "operators" if options.quick or options.op else "operators,network,sweeps"
    parts = (options.parts or default).split(",")
    rounds = options.rounds or (9 if options.quick else 15)
    budget = options.budget or (1.0 if options.quick else 5.0)
    compiled = None if options.no_compile or options.quick else options.compile_mode
    # For all that are compared: the floor knows nothing of pages that the system fills with zeros,
    # two thirds of a call that allocates 32 MiB.
    keep_freed_memory()
    facts = results.environment(device)
    written: list[Path] = []
    contents: dict[str, Any] = {}
    problems: list[str] = []

    def keep(part: str, rows: Iterable[results.Record], **more: Any) -> list[results.Record]:
        """Write the part's files anew with every row, so that a run which is stopped loses none."""
        kept: list[results.Record] = []
        contents[part] = {"environment": facts, **more, "rows": kept}
        start = time.monotonic()
        for row in rows:
            kept.append(row)
            print(_line(row), flush=True)
            results.write(options.output, part, contents[part])
        contents[part]["seconds"] = round(time.monotonic() - start)
        return kept

    if "operators" in parts:
        ceilings = {dtype: floor.measure(dtype, device) for dtype in dtypes}
        measured = operators.run(
            names, modes, dtypes, device, ceilings, options.quick, shape, rounds, budget, compiled,
            options.backend,
        )  # fmt: skip
        rows = keep(
            "operators",
            (row.as_dict() for row in measured),
            ceilings={
                str(d).removeprefix("torch."): {"copy": c.copy, "gemm": c.gemm}
                for d, c in ceilings.items()
            },
        )
        found = summary.comparisons(rows)
        problems = summary.failures(rows, found)
        print(f"\n{summary.markdown(found)}\n")
    if "network" in parts:
        from bench import network

        size, batch = (64, 2) if options.quick else (256, 8)
        rows = keep(
            "network",
            network.measure(
                size, batch, max(3, rounds // 2), 4 * budget, compiled is not None, device
            ),
        )
        print(f"\n{summary.network_markdown(rows)}\n")
    if "sweeps" in parts:
        from bench import sweeps

        keep("sweeps", sweeps.measure(max(3, rounds // 3), budget / 4))
    for name, content in contents.items():
        written += results.write(options.output, name, content)
    try:
        from bench import report

        page = report.write(
            options.output,
            contents.get("operators"),
            contents.get("network"),
            contents.get("sweeps"),
        )
        written.append(page)
    except ModuleNotFoundError as error:
        print(f"no page: {error}", file=sys.stderr)
    print("\n".join(f"wrote {path}" for path in written))
    for problem in problems:
        print(f"FAIL {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
