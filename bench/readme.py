"""`python -m bench.readme`: renew the tables in the pages from the committed result files.

A page says where a table belongs with a pair of comments; what stands between them is replaced:

    <!-- table: bench/results/epyc-2core/operators.json -->
    <!-- end -->

`--check` changes nothing and exits with 1 where a page is not what its result files give.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from bench import results, summary, sweeps

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md",
    "docs/benchmarks.md",
    "docs/data.md",
    "docs/experiments.md",
    "docs/metrics.md",
    "docs/results.md",
    "docs/training.md",
)
_TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

_MARKDOWN: dict[str, Callable[[list[results.Record]], str]] = {
    "operators": lambda rows: summary.markdown(summary.comparisons(rows)),
    "network": summary.network_markdown,
    "sweeps": lambda rows: summary.sweeps_markdown(sweeps.fits(rows)),
    "freed_memory": summary.freed_memory_markdown,
    "precision": summary.precision_markdown,
    "magnified": summary.magnified_markdown,
    "picture_intervals": summary.picture_intervals_markdown,
    "study_intervals": summary.study_intervals_markdown,
    "loading": summary.loading_markdown,
}
"""The table of a result file by its name."""


def table(path: Path) -> str:
    """The table of one result file, with its machine, date and ceilings above it."""
    content = results.read(path)
    facts = content["environment"]
    where = f"{facts['gpu'] or facts['cpu']}, {facts['threads']} threads"
    lines = [
        f"{facts['date']}, {where}, torch {facts['torch']}, commit `{facts['commit']}`"
        + "".join(
            f"; {dtype}: copy {c['copy'] / 1e9:.1f} GB/s, GEMM {c['gemm'] / 1e9:.0f} GFLOP/s"
            for dtype, c in content.get("ceilings", {}).items()
        )
        + ".",
        "",
    ]
    lines.append(_MARKDOWN[path.stem](content["rows"]))
    return "\n".join(lines)


def renewed(text: str) -> str:
    def replace(match: re.Match[str]) -> str:
        return f"{match[1]}{table(ROOT / match[2])}\n{match[3]}"

    return _TABLE.sub(replace, text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="say what is stale; change nothing")
    options = parser.parse_args(arguments)
    stale = 0
    for page in PAGES:
        path = ROOT / page
        text = path.read_text()
        new = renewed(text)
        if new != text:
            stale += 1
            print(f"{page} {'is stale' if options.check else 'renewed'}")
            if not options.check:
                path.write_text(new)
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
