"""Run the operators' tests on a compiled library with sanitizers in it: `make sanitize`.

The package is built with AddressSanitizer and UndefinedBehaviorSanitizer into
`build/sanitized-address` and with ThreadSanitizer into `build/sanitized-thread`, apart from the one
installed, and pytest runs there with the sanitizer's runtime preloaded. Arguments go to pytest.

Under the thread sanitizer the library runs its loops on threads of its own (`csrc/parallel.cpp`):
torch's OpenMP runtime is not instrumented, and every hand-over there would look like a race.
Watched is what the chunks of a loop read and write. Not watched: the hand-over to OpenMP's threads,
torch itself, and, as with the address sanitizer, masked loads and stores by intrinsics (AVX-512).
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}  # the first with libubsan behind it


def main() -> None:
    """Build and test with each sanitizer; exit with the first failure."""
    build = runpy.run_path(str(ROOT / "setup.py"), run_name="definitions")
    command, _ = build["compiler"]()
    for name, runtime in RUNTIMES.items():
        target = ROOT / "build" / f"sanitized-{name}"
        subprocess.run(
            [sys.executable, "setup.py", "--quiet", "build", "--build-lib", str(target)],
            cwd=ROOT,
            env={**os.environ, "EAMNET_SANITIZE": name},
            check=True,
        )
        # The C++ library as well: the sanitizer looks for its functions before torch brings it.
        preload = [
            subprocess.run(
                [*command, f"-print-file-name={library}"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()
            for library in (runtime, "libstdc++.so.6")
        ]
        environment = {
            **os.environ,
            "LD_PRELOAD": " ".join(preload),
            # Python and torch keep much until the process ends.
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            # Nor are the hand-overs between threads of torch's own operators seen.
            "TSAN_OPTIONS": "ignore_noninstrumented_modules=1",
            "PYTHONPATH": f"{target}{os.pathsep}{ROOT}",
        }
        code = (
            "import sys; from eamnet_kernels import native; assert native.load(), native.error();"
            f"assert native.facts()['sanitizer'] == {name!r}, native.facts();"
            "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
        )
        options = ("-p", "no:cacheprovider", "-q")
        # Those that run the library; compiling around it gives nothing more to watch, and what the
        # process holds in memory is the sanitizer's doing: its shadow, and freed blocks kept back.
        chosen = ("-m", "not slow", "-k", "cpu and not compile and not memory_is_linear")
        tests = sys.argv[1:] or [str(ROOT / "tests" / "kernels"), *chosen]
        print(f"sanitizer: {name}", flush=True)
        # From another folder, so that the package in the checkout is not found first.
        done = subprocess.run(
            # Not capturing the process's own output: that is where a sanitizer reports.
            [
                *build["FIXED_ADDRESSES"],
                sys.executable,
                "-c",
                code,
                "--capture=sys",
                f"--rootdir={ROOT}",
                *options,
                *tests,
            ],
            cwd=ROOT / "tests",
            env=environment,
            check=False,
        )
        if done.returncode != 0:
            raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
