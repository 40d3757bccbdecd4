"""`python -m bench.compare OLD NEW`: what became slower between two result files.

Exit code 1 where anything is slower by more than the tolerance, 0 otherwise, 2 for unusable files.
Medians of different machines are not comparable: such files are refused unless --force is given.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.results import Record, read


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.1, help="slower by this part fails")
    parser.add_argument("--force", action="store_true", help="compare results of other machines")
    options = parser.parse_args(arguments)
    try:
        old, new = read(options.old), read(options.new)
        for field in ("cpu", "gpu", "threads"):
            pair = old["environment"][field], new["environment"][field]
            if pair[0] != pair[1] and not options.force:
                raise ValueError(f"{field} differs: {pair[0]} and {pair[1]}; --force compares")
    except (OSError, ValueError, KeyError) as error:
        print(f"bench.compare: {error}", file=sys.stderr)
        return 2

    def timed(content: dict[str, object]) -> dict[tuple[str, ...], Record]:
        rows: list[Record] = content["rows"]  # type: ignore[assignment]
        return {
            (r["subject"], r["case"], r["mode"], r["dtype"], r["candidate"]): r
            for r in rows
            if r["median_ms"] is not None
        }

    before, after = timed(old), timed(new)
    slower = 0
    for key in before.keys() & after.keys():
        ratio = after[key]["median_ms"] / before[key]["median_ms"]
        # Slower only where even the fast side of the new run is behind the slow side of the old.
        apart = after[key]["p20_ms"] > before[key]["p80_ms"]
        if ratio > 1 + options.tolerance and apart and before[key]["ours"]:
            slower += 1
            print(f"slower {ratio:.2f}x: {' '.join(key)}")
    for key in sorted(before.keys() - after.keys()):
        print(f"gone: {' '.join(key)}")
    common = len(before.keys() & after.keys())
    print(f"{common} compared, {slower} slower by more than {options.tolerance:.0%}")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
