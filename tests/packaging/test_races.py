"""ThreadSanitizer sees a race between the chunks of a loop, as `make sanitize` runs them.

The loop is smaller than those of most kernels' tests, and its accesses are whole vectors.
"""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

_LOOP = """
#include <vector>
#include "cpu/parallel.h"
#include "cpu/simd.h"

// Each chunk adds to its own vector, or, where an argument is given, all add to the first.
int main(int arguments, char**) {
  using V = eamnet::EAMNET_LEVEL::Vec<float>;
  std::vector<float> sums(4 * V::width, 0.0f);
  eamnet::parallel_for(4, 0, [&](int64_t chunk, eamnet::Scratch&) {
    float* own = sums.data() + (arguments > 1 ? 0 : chunk * V::width);
    (V::load(own) + V(1.0f)).store(own);
  });
}
"""


def test_race_between_chunks_is_reported(
    tmp_path: Path, root: Path, build: SimpleNamespace
) -> None:
    command, _ = build.compiler()
    torch, _ = build.torch_install()
    flags = [*build.COMPILE, *build.SANITIZERS["thread"], *build.SANITIZED]
    flags += ["-DEAMNET_LEVEL=baseline", f"-I{root / 'csrc'}", f"-isystem{torch / 'include'}"]
    program = tmp_path / "loop"
    sources = [str(root / "csrc" / "parallel.cpp"), "-x", "c++", "-"]
    compiled = subprocess.run(
        [*command, *flags, "-o", str(program), *sources],
        input=_LOOP,
        capture_output=True,
        text=True,
        check=False,
    )
    if "cannot find" in compiled.stderr:
        pytest.skip(f"{shlex.join(command)} has no ThreadSanitizer installed")
    assert compiled.returncode == 0, compiled.stderr
    own, shared = (
        subprocess.run(
            [*build.FIXED_ADDRESSES, program, *a], capture_output=True, text=True, check=False
        )
        for a in ([], ["shared"])
    )
    assert own.returncode == 0, own.stderr
    assert shared.returncode != 0
    assert "data race" in shared.stderr
