"""Build the CPU wheel and the CUDA wheel into `dist/` and try each where nothing else of it is.

`make wheels`. The second needs nvcc, but no GPU. Each is installed into a fresh environment, which
sees the torch of this one, and passes the smoke suite below. `--torch VERSION` installs that torch
into the environment instead, once for each time it is given, and tries both wheels there as well:
the CUDA kernels must load where torch has the same CUDA major, and say why not elsewhere.

    python tests/packaging/wheels.py --torch 2.10.0 --torch 2.12.1 --torch 2.13.0+cpu

Sizes and what passed go to `docs/wheels.json`. `--built` takes the wheels that `dist/` has.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMOKE = """
import json
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
if has_cuda:
    record = json.loads(native._LIBRARY.with_name("_C_cuda.json").read_text())
    majors = [(v or "").partition(".")[0] for v in (record["cuda_version"], torch.version.cuda)]
    assert (native.cuda_error() is None) == (majors[0] == majors[1]), native.cuda_error()
    if native.cuda_error() is None and torch.cuda.is_available():
        with ek.use_backend("cuda"):
            on_card = ek.functional.gate_statistics(x.cuda())
        torch.testing.assert_close(on_card.pixel_mean.cpu(), statistics.pixel_mean)
print(ek.explain("multi_dilation_conv", x, [], torch.eye(32), None, [], "relu", False))
print(torch.__version__)
"""


def find(kind: str, folder: Path) -> list[Path]:
    """The wheels of that kind which a folder has; the CUDA wheel is known by its build tag."""
    return [w for w in folder.glob("*.whl") if ("-1cu" in w.name) == (kind == "cuda")]


def build(kind: str, folder: Path) -> None:
    """Put the wheel of that kind into the folder, in place of an older one."""
    for old in find(kind, folder):
        old.unlink()
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder))
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, str(ROOT)],
        env={**os.environ, "EAMNET_CUDA": str(int(kind == "cuda"))},
        check=True,
    )


def smoke(kind: str, wheel: Path, folder: Path, torch: str | None = None) -> str:
    """Run the smoke suite in a new environment with the wheel; the torch that it ran on."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = (python, "-m", "pip", "install", "--quiet")
    # Without it pip and the suite would take the package from a checkout that the path names.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if torch is None:
        (packages,) = folder.glob("lib/python*/site-packages")
        # A plain line: what is installed there as editable is not found through it.
        (packages / "torch_of_the_builder.pth").write_text(sysconfig.get_path("purelib") + "\n")
    else:
        subprocess.run([*install, f"torch=={torch}", "numpy"], env=environment, check=True)
    subprocess.run([*install, "--no-deps", wheel], env=environment, check=True)
    done = subprocess.run(
        [python, "-c", SMOKE, kind],
        cwd=folder,
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.stdout.split()[-1]


def main() -> None:
    """Build, try and record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torch", action="append", default=[], metavar="VERSION")
    parser.add_argument("--built", action="store_true", help="take the wheels that dist/ has")
    options = parser.parse_args()
    folder = ROOT / "dist"
    folder.mkdir(exist_ok=True)
    record = {}
    for kind in ("cpu", "cuda"):
        if not options.built:
            build(kind, folder)
        (wheel,) = find(kind, folder)
        record[wheel.name] = {"bytes": wheel.stat().st_size, "passed_on_torch": []}
        for torch in (None, *options.torch):
            version = smoke(kind, wheel, ROOT / "build" / f"smoke-{kind}", torch)
            record[wheel.name]["passed_on_torch"].append(version)
            print(f"{wheel.name}, torch {version}: smoke suite passed", flush=True)
    (ROOT / "docs" / "wheels.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
