"""What `eamnet.memory` asks of the C library, seen by page faults in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc is asked")

SCRIPT = """
import resource
import numpy as np
from eamnet.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty(64 << 20, np.uint8).fill(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(keep_freed_memory(), faults(), faults())
"""


def run(**variables: str) -> list[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**kept, **variables}, check=True, capture_output=True,
        text=True,
    )  # fmt: skip
    return done.stdout.split()


def test_freed_memory_is_used_again() -> None:
    done, first, second = run()
    if done == "False":
        pytest.skip("another C library")
    assert 10 * int(second) < int(first)


def test_the_environment_has_the_last_word() -> None:
    done, first, second = run(MALLOC_ARENA_MAX="2")
    assert done == "False"
    assert 10 * int(second) > int(first)
