"""Each instruction set, forced by EAMNET_CPU_LEVEL, gives the right results; others are refused."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.usefixtures("loaded")

_COMPARE = """if True:
    import itertools
    import torch
    import eamnet_kernels as ek
    from eamnet_kernels import native

    torch.manual_seed(0)
    # Whole vectors and tails of every width, one and several tiles.
    shapes = [(2, 16, 8, 8), (1, 3, 5, 7), (2, 33, 9, 11), (1, 20, 50, 64)]
    dtypes = [torch.float32, torch.float64, torch.bfloat16]
    formats = [torch.contiguous_format, torch.channels_last]
    for shape, dtype, layout in itertools.product(shapes, dtypes, formats):
        x = torch.randint(-3, 4, shape).to(dtype).contiguous(memory_format=layout)
        x[0, 0, 0, 1] = float("nan")
        results = []
        for backend in ("cpu", "reference"):
            leaf = x.clone().requires_grad_()
            with ek.use_backend(backend):
                values = ek.functional.gate_statistics(leaf)
                grads = torch.autograd.grad(sum((v * v.detach()).nansum() for v in values), leaf)
            results.append((*values, *grads))
        for ours, wanted in zip(*results):
            torch.testing.assert_close(ours, wanted, equal_nan=True)
    print(native.cpu_level())
"""


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512", "amx_bf16"])
def test_forced_level(level: str, python) -> None:
    done = python("-c", _COMPARE, EAMNET_CPU_LEVEL=level)
    if done.returncode != 0 and f"EAMNET_CPU_LEVEL is '{level}'" in done.stderr:
        pytest.skip(f"this processor cannot run {level}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [level]


def test_unknown_level_is_refused(python) -> None:
    done = python("-c", _COMPARE, EAMNET_CPU_LEVEL="sse9")
    assert done.returncode != 0
    assert "EAMNET_CPU_LEVEL is 'sse9'; this processor accepts: baseline" in done.stderr


def test_level_by_itself(python) -> None:
    """Without the variable: the highest one, which is not the baseline where there is AVX2."""
    code = (
        "import torch; from eamnet_kernels import native;"
        "print(native.cpu_level(), torch.backends.cpu.get_cpu_capability())"
    )
    level, capability = python("-c", code, EAMNET_CPU_LEVEL="").stdout.split()
    highest = {
        "DEFAULT": ("baseline",),
        "AVX2": ("avx2",),
        "AVX512": ("avx512", "amx_bf16"),
    }
    assert level in highest[capability]
