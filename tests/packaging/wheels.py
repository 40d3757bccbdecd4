"""Build the CPU wheel and the CUDA wheel into `dist/` and try each where nothing else of it is.

`make wheels`. The second needs nvcc, but no GPU. Each is installed into a fresh environment, which
sees the torch of this one, and passes the smoke suite below; sizes go to `docs/wheels.json`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMOKE = """
import sys
import torch
import eamnet_kernels as ek
from eamnet_kernels import CMAM, EAB, MRCF, native
assert ek.__file__.startswith(sys.prefix), ek.__file__
assert native.load(), native.error()
x = torch.randn(2, 32, 9, 11, requires_grad=True)
for module in (CMAM(32), EAB(32), MRCF(32)):
    module(x).sum().backward()
assert x.grad.isfinite().all()
with ek.use_backend("cpu"):
    statistics = ek.functional.gate_statistics(x)
torch.testing.assert_close(statistics.pixel_mean, x.mean(1, keepdim=True))
has_cuda = native._LIBRARY.with_name("_C_cuda.so").exists()
assert has_cuda == (sys.argv[1] == "cuda")
if has_cuda and torch.version.cuda:
    assert native.cuda_error() is None, native.cuda_error()
    if torch.cuda.is_available():
        with ek.use_backend("cuda"):
            on_card = ek.functional.gate_statistics(x.cuda())
        torch.testing.assert_close(on_card.pixel_mean.cpu(), statistics.pixel_mean)
print(ek.explain("multi_dilation_conv", x, [], torch.eye(32), None, [], "relu", False))
"""


def build(kind: str, folder: Path) -> Path:
    """The wheel of that kind."""
    for old in folder.glob("*.whl"):
        if ("-1cu" in old.name) == (kind == "cuda"):
            old.unlink()
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder))
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, str(ROOT)],
        env={**os.environ, "EAMNET_CUDA": str(int(kind == "cuda"))},
        check=True,
    )
    (wheel,) = (w for w in folder.glob("*.whl") if ("-1cu" in w.name) == (kind == "cuda"))
    return wheel


def smoke(kind: str, wheel: Path, folder: Path) -> None:
    """Install the wheel into a new environment and run the smoke suite there."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    python = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python*/site-packages")
    # A plain line: what is installed there as editable is not found through it.
    (packages / "torch_of_the_builder.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([python, "-c", SMOKE, kind], cwd=folder, env=environment, check=True)


def main() -> None:
    """Build, try and record both."""
    folder = ROOT / "dist"
    folder.mkdir(exist_ok=True)
    record = {}
    for kind in ("cpu", "cuda"):
        wheel = build(kind, folder)
        smoke(kind, wheel, ROOT / "build" / f"smoke-{kind}")
        record[wheel.name] = wheel.stat().st_size
        print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB, smoke suite passed")
    (ROOT / "docs" / "wheels.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
