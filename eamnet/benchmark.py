"""``eamnet bench``: the benchmark suite of the source checkout."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["bench"]


def bench(arguments: list[str]) -> int:
    """Run ``python -m bench`` from the checkout that this package is installed from.

    The suite is not part of the wheel: it needs the networks and tools that it compares with.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / "bench" / "__main__.py").is_file():
        print(
            "eamnet bench: the benchmark suite is in the source checkout, not in the wheel; "
            "install from there with pip install --editable '.[train]'",
            file=sys.stderr,
        )
        return 2
    sys.path.insert(0, str(root))
    from bench.__main__ import main

    return main(arguments)
