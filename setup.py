"""Builds `eamnet_kernels/_C.so`, the compiled operators, beside the Python packages.

The library uses the LibTorch stable ABI and no Python C API: one build serves every Python and
every torch from 2.10 on. Loading it is the business of `eamnet_kernels/native.py`. `_C.json` beside
it records what it was built from.

- `csrc/*.cpp` is compiled once.
- `csrc/cpu/*.cpp` is compiled once per instruction set ("level", see `csrc/cpu/dispatch.h`) and
  the right one is chosen at run time, never by the machine that builds.
- `csrc/cuda/*.cu` makes a second library, `_C_cuda.so`, with implementations only: one that needs
  CUDA could not be loaded by a torch without it. It is built when asked for, never by looking for
  a GPU, and needs nvcc but no torch with CUDA. `python setup.py build_cuda` builds it alone, in
  place.

Environment
- `EAMNET_BUILD_NATIVE=0`: no compiled library; the operators run on their other backends.
- `EAMNET_CUDA=1` or `=0`: with or without `_C_cuda.so`; else with it where `CUDA_HOME` is set.
- `CUDA_HOME`: where nvcc is (in `bin`); else nvcc from the path, then `/usr/local/cuda`.
- `TORCH_CUDA_ARCH_LIST`: compute capabilities, as for torch; else 8.0;9.0+PTX, which serves every
  card from 8.0 on, later ones by compiling the PTX of 9.0 when it is first loaded.
- `CXX`: the C++ compiler (GCC 11, Clang 14 or later); else `c++`, `g++`, `clang++` from the path.
- `CXXFLAGS`, `LDFLAGS`: appended to the flags below.
- `MAX_JOBS`: compilations at once; else as many as processors and free memory allow.
- `EAMNET_SANITIZE=address|thread`: an instrumented build, the first with checks for undefined
  behaviour as well; see `make sanitize`.
- `SOURCE_DATE_EPOCH`: the date for `_C.json`, for reproducible builds.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import setuptools

if int(setuptools.__version__.partition(".")[0]) < 77:  # without build isolation it is the user's
    raise SystemExit(
        f"setuptools is {setuptools.__version__}; needed is setuptools>=77. Leave out "
        "--no-build-isolation, or: pip install 'setuptools>=77' wheel ninja"
    )

from setuptools import Command, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "eamnet_kernels"
LIBRARY, FACTS = "_C.so", "_C.json"
# The oldest torch whose ABI the library asks for: major and minor in the two highest bytes.
TARGET = (2, 10)

AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
LEVELS: dict[str, dict[str, list[str]]] = {
    "x86_64": {
        "baseline": [],
        "avx2": AVX2,
        "avx512": AVX512,
        "amx_bf16": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    },
    "aarch64": {"baseline": []},
}
COMPILE = [
    "-std=c++20",
    "-O3",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",  # vectors are passed between inlined functions only
    # Kernels write a*b + c for a fused multiply-add; NaN and infinities keep their meaning.
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-DTORCH_STABLE_ONLY",
    f"-DTORCH_TARGET_VERSION=0x{TARGET[0]:02x}{TARGET[1]:02x}000000000000",
]
NVCC = [
    "-std=c++20",
    "-O3",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-g0",
    "-Xfatbin=-compress-all",
    "-DUSE_CUDA",
    *COMPILE[-2:],
]
CUDA_LIBRARY, CUDA_FACTS = "_C_cuda.so", "_C_cuda.json"
CUDA_ARCHITECTURES = "8.0;9.0+PTX"
LINK = ["-shared", "-Wl,--no-undefined", "-Wl,--as-needed", "-Wl,-z,relro", "-Wl,-z,now"]
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}
# -O2 takes the compiler 2.5 times as long. At -O1 alone GCC makes no fused multiply-add: the tests
# of accuracy would see another arithmetic than the one that ships.
SANITIZED = ["-fno-omit-frame-pointer", "-O1", "-fexpensive-optimizations"]
# Before a program with GCC's ThreadSanitizer, which does not know the addresses that recent Linux
# kernels give at random.
FIXED_ADDRESSES = ["setarch", platform.machine(), "-R"] if shutil.which("setarch") else []


def fail(what: str, remedy: str) -> NoReturn:
    """End the build with a message that stands out in pip's output."""
    lines = [
        f"{PACKAGE}: the compiled library could not be built.",
        what,
        remedy,
        "Or install without it: EAMNET_BUILD_NATIVE=0 pip install . (same results, slower)",
    ]
    raise SystemExit("\n".join(["", "=" * 80, *lines, "=" * 80]))


def native_wanted() -> bool:
    """Whether to build the library: on Linux, unless switched off."""
    switch = os.environ.get("EAMNET_BUILD_NATIVE", "1")
    if switch not in ("0", "1"):
        raise SystemExit(f"EAMNET_BUILD_NATIVE is '{switch}'; accepted are 0 and 1")
    return switch == "1" and sys.platform == "linux"


def cuda_wanted() -> bool:
    """Whether to build the CUDA library: by the switch, else by CUDA_HOME."""
    switch = os.environ.get("EAMNET_CUDA", "")
    if switch not in ("", "0", "1"):
        raise SystemExit(f"EAMNET_CUDA is '{switch}'; accepted are 0 and 1")
    return native_wanted() and (switch == "1" or (not switch and bool(os.environ.get("CUDA_HOME"))))


def nvcc() -> tuple[Path, str]:
    """The CUDA compiler and its version."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc")
    places = [Path(home) / "bin" / "nvcc"] if home else [Path("/usr/local/cuda/bin/nvcc")]
    if found and not home:
        places.insert(0, Path(found))
    program = next((p for p in places if p.is_file()), None)
    if program is None:
        fail(
            f"The CUDA library was asked for and nvcc was not found (looked for: {places[0]}).",
            "Install the CUDA toolkit or point CUDA_HOME to it; EAMNET_CUDA=0 builds without.",
        )
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release (\d+\.\d+)", said)
    if version is None or int(version[1].partition(".")[0]) < 12:
        fail(f"{program} says: {said}", "CUDA 12 or later is needed (C++20).")
    return program, version[1]


def cuda_architectures() -> list[str]:
    """nvcc's flags for the architectures of TORCH_CUDA_ARCH_LIST."""
    flags = []
    for item in re.split(r"[; ,]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if match is None or int(match[1]) < 8:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST has '{item}'; accepted are numbers from 8.0 on, with +PTX"
            )
        number = f"{match[1]}{match[2]}{match[3]}"
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def compiler() -> tuple[list[str], str]:
    """The C++ compiler's command and the first line of its --version."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    command = next((shlex.split(c) for c in candidates if shutil.which(shlex.split(c)[0])), None)
    if command is None:
        fail(
            f"No C++ compiler was found (looked for: {', '.join(candidates)}).",
            "Install GCC 11 or later (Debian, Ubuntu: apt install g++) or point CXX to a compiler.",
        )
    version = subprocess.run(
        [*command, "--version"], capture_output=True, text=True, check=False
    ).stdout.partition("\n")[0]
    number = re.search(r"(\d+)\.\d+", re.sub(r"\(.*?\)", "", version))
    least = 14 if "clang" in version else 11
    if number is None or int(number[1]) < least:
        fail(
            f"{shlex.join(command)} is '{version}'.",
            "GCC 11 or Clang 14 or later is needed; point CXX to one.",
        )
    return command, version


def torch_install() -> tuple[Path, str]:
    """The folder and the version of the torch whose headers are used, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        fail(
            "torch was not found in the environment of the build.",
            "Leave out --no-build-isolation, or install torch>=2.10 first.",
        )
    folder = Path(spec.origin).parent
    version: str = runpy.run_path(str(folder / "version.py"))["__version__"]
    if tuple(int(part) for part in version.split(".")[:2]) < TARGET:
        fail(f"torch is {version}.", f"torch>={TARGET[0]}.{TARGET[1]} is needed to build.")
    return folder, version


def ninja() -> str:
    """The ninja program: that of the Python package, else one on the path."""
    spec = importlib.util.find_spec("ninja")
    if spec is not None:
        import ninja as package

        return str(Path(package.BIN_DIR) / "ninja")
    program = shutil.which("ninja")
    if program is None:
        fail("ninja was not found.", "pip install ninja")
    return program


def jobs(gibibytes: int = 1) -> int:
    """Compilations at once: one per processor, each with so much memory to itself."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    free = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return max(
        1, min(len(os.sched_getaffinity(0)), (int(free[1]) >> 20) // gibibytes if free else 1)
    )


def schemas() -> list[dict[str, str]]:
    """The tables of operator schemas, without importing the package (which needs torch)."""
    names = runpy.run_path(str(ROOT / PACKAGE / "ops" / "schemas.py"))
    return [names["SCHEMAS"], names["NATIVE_SCHEMAS"]]


def git_commit() -> str | None:
    """The commit of the checkout, `-dirty` appended where tracked files differ from it."""
    if not (ROOT / ".git").exists():
        return None
    git = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_if_changed(path: Path, text: str) -> None:
    """Keeps the date of an unchanged file, so that ninja rebuilds nothing for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def ninja_path(path: Path | str) -> str:
    """A path as it is written in a ninja file."""
    return re.sub(r"([ :$])", r"$\1", str(path))


def ninja_file(build: Path, cxx: list[str], torch: Path, extra: list[str]) -> str:
    """The text of build.ninja: compile each source for each of its levels, then link."""
    includes = [f"-I{ROOT / 'csrc'}", f"-I{build}", f"-isystem{torch / 'include'}"]
    # No path of the building machine in messages and debugging information.
    includes += [f"-ffile-prefix-map={ROOT}/=", f"-ffile-prefix-map={torch}/=torch/"]
    compile_flags = [*COMPILE, *extra, *includes, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    link_flags = [
        *LINK,
        *extra,
        f"-L{torch / 'lib'}",
        f"-Wl,-rpath-link,{torch / 'lib'}",
        *shlex.split(os.environ.get("LDFLAGS", "")),
    ]
    compile_command = [*cxx, "-MMD", *compile_flags]
    lines = [
        "ninja_required_version = 1.5",
        "rule compile",
        f"  command = {shlex.join(compile_command)} $level -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {shlex.join([*cxx, *link_flags])} $in -ltorch_cpu -o $out",
    ]
    objects: list[str] = []

    def compile_source(source: Path, obj: str, level: list[str]) -> None:
        lines.append(f"build {obj}: compile {ninja_path(source)}")
        lines.append(f"  level = {shlex.join(level)}")
        objects.append(obj)

    for source in sorted((ROOT / "csrc").glob("*.cpp")):
        compile_source(source, f"{source.stem}.o", [])
    # Lowest level first: of an inline function that several objects hold (the standard library's,
    # say) the linker keeps the first, which every processor that calls it can run.
    for name, flags in LEVELS[platform.machine()].items():
        defines = [f"-DEAMNET_LEVEL={name}", *(["-DEAMNET_HOST"] if name == "baseline" else [])]
        for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
            compile_source(source, f"{source.stem}.{name}.o", [*flags, *defines])
    lines.append(f"build {LIBRARY}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def cuda_ninja_file(cxx: list[str], program: Path, torch: Path) -> str:
    """The text of build.ninja for the CUDA library.

    libtorch_cuda.so, in which the current stream is asked for, need not be there to build: a stub
    of that name stands in for it. CUDA's run-time library is linked in, so that none has to match.
    """
    flags = [*NVCC, *cuda_architectures(), f"-ccbin={cxx[0]}", *cxx[1:]]
    flags += [f"-I{ROOT / 'csrc'}", f"-isystem={torch / 'include'}"]
    # No path of the building machine in messages.
    maps = [f"-ffile-prefix-map={ROOT}/=", f"-ffile-prefix-map={torch}/=torch/"]
    flags += [f"-Xcompiler={option}" for option in maps]
    # nvcc links, because it knows where its run-time library is.
    hardening = ["-z", "relro", "-z", "now", "--exclude-libs", "ALL", "-s"]
    link = [str(program), "-shared", "-cudart=static", *(f"-Xlinker={a}" for a in hardening)]
    # To the linker alone: what nvcc is told of folders it writes into the library.
    link += [f"-ccbin={cxx[0]}", *cxx[1:], f"-Xlinker=-L{torch / 'lib'}", "-Xlinker=-L."]
    stub = "void aoti_torch_get_current_cuda_stream() {}"
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    objects = " ".join(f"{source.stem}.o" for source in sources)
    return "\n".join(
        [
            "ninja_required_version = 1.5",
            "rule compile",
            f"  command = {shlex.join([str(program), '-MD', '-MF'])} $out.d"
            f" {shlex.join(flags)} -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule stub",
            f"  command = echo '{stub}' | {shlex.join(cxx)} -x c -shared -fPIC"
            " -Wl,-soname,libtorch_cuda.so - -o $out",
            "rule link",
            f"  command = {shlex.join(link)} {objects} -ltorch_cpu -ltorch_cuda -o $out",
            "build libtorch_cuda.so: stub",
            *(f"build {source.stem}.o: compile {ninja_path(source)}" for source in sources),
            f"build {CUDA_LIBRARY}: link {objects} | libtorch_cuda.so",
            "",
        ]
    )


def run_ninja(build: Path, processes: int, what: str) -> None:
    """Bring what the build.ninja in `build` describes up to date."""
    import fcntl  # not on Windows, where this file runs as well but nothing is compiled

    with (build / "lock").open("w") as lock:
        # Ninja does not expect another ninja in its folder.
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [ninja(), "-C", str(build), "-j", str(processes)]
        returned = subprocess.run(command, check=False).returncode
    if returned != 0:
        fail(
            f"The compiler's messages stand above ({what}).",
            "If it ran out of memory, try MAX_JOBS=1.",
        )


def put(build: Path, target: Path, library: str, facts: dict[str, Any]) -> None:
    """Put a built library and what it was built from, as JSON beside it, into a package."""
    target.mkdir(parents=True, exist_ok=True)
    # Written under another name and moved: a process that has the old one open keeps it.
    shutil.copy2(build / library, target / f"{library}.new")
    (target / f"{library}.new").replace(target / library)
    (target / library).with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")


def common_facts(version: str, torch_version: str) -> dict[str, Any]:
    """What every library's record says."""
    return {
        "project_version": version,
        "git_commit": git_commit(),
        "date": datetime.datetime.fromtimestamp(
            int(os.environ.get("SOURCE_DATE_EPOCH", time.time())), datetime.timezone.utc
        ).isoformat(),
        "machine": platform.machine(),
        "platform": sys.platform,
        "torch_version": torch_version,
        "torch_target": ".".join(map(str, TARGET)),
    }


def build_cuda(target: Path, version: str) -> None:
    """Build the CUDA library and put it into the package folder `target`."""
    program, cuda_version = nvcc()
    cxx, cxx_version = compiler()
    torch, torch_version = torch_install()
    build = ROOT / "build" / "cuda"
    write_if_changed(build / "build.ninja", cuda_ninja_file(cxx, program, torch))
    run_ninja(build, jobs(gibibytes=2), f"nvcc {cuda_version}, torch {torch_version}")
    facts = {
        **common_facts(version, torch_version),
        "cuda_version": cuda_version,
        "compiler": cxx_version,
        "flags": [*NVCC, *cuda_architectures()],
    }
    put(build, target, CUDA_LIBRARY, facts)


class BuildCuda(Command):
    """The CUDA library alone, into the package of the checkout."""

    description = "build eamnet_kernels/_C_cuda.so in place"
    user_options: ClassVar[list[tuple[str, str, str]]] = []

    def initialize_options(self) -> None:
        """No options."""

    def finalize_options(self) -> None:
        """No options."""

    def run(self) -> None:
        """Build it."""
        build_cuda(ROOT / PACKAGE, self.distribution.get_version())


class BuildNative(build_ext):
    """Replaces setuptools' compiler by ninja: no file here has the Python ABI in its name."""

    def run(self) -> None:
        """Build the library and put it, with its facts, into the package."""
        if platform.machine() not in LEVELS:
            fail(
                f"This machine is '{platform.machine()}'.",
                f"The library is written for: {', '.join(LEVELS)}.",
            )
        sanitizer = os.environ.get("EAMNET_SANITIZE", "")
        if sanitizer and sanitizer not in SANITIZERS:
            accepted = ", ".join(SANITIZERS)
            raise SystemExit(f"EAMNET_SANITIZE is '{sanitizer}'; accepted are: {accepted}")
        extra = [*SANITIZERS[sanitizer], *SANITIZED] if sanitizer else []
        cxx, cxx_version = compiler()
        torch, torch_version = torch_install()

        build = ROOT / "build" / ("native" + (f"-{sanitizer}" if sanitizer else ""))
        tables = schemas()
        headers = ("eamnet_schemas", "eamnet_native_schemas")
        for table, header in zip(tables, headers, strict=True):
            definitions = "".join(f"m.def({json.dumps(schema)});\n" for schema in table.values())
            write_if_changed(build / f"{header}.inc", definitions)
        write_if_changed(build / "build.ninja", ninja_file(build, cxx, torch, extra))
        run_ninja(build, jobs(), f"{cxx_version}, torch {torch_version}")
        facts = {
            **common_facts(self.distribution.get_version(), torch_version),
            "compiler": cxx_version,
            "flags": [*COMPILE, *extra, *shlex.split(os.environ.get("CXXFLAGS", ""))],
            "levels": LEVELS[platform.machine()],
            "sanitizer": sanitizer or None,
            "schemas_sha256": hashlib.sha256(
                json.dumps(tables, sort_keys=True).encode()
            ).hexdigest(),
        }
        target = (ROOT if self.inplace or self.editable_mode else Path(self.build_lib)) / PACKAGE
        put(build, target, LIBRARY, facts)
        if cuda_wanted():
            build_cuda(target, self.distribution.get_version())
        else:  # one of an earlier build would not belong to this
            for name in (CUDA_LIBRARY, CUDA_FACTS) if not self.inplace else ():
                (target / name).unlink(missing_ok=True)

    def get_outputs(self) -> list[str]:
        """What belongs to the installation beside the Python files."""
        folder = ROOT if self.editable_mode else Path(self.build_lib)
        names = [LIBRARY, FACTS, *([CUDA_LIBRARY, CUDA_FACTS] if cuda_wanted() else [])]
        return [str(folder / PACKAGE / name) for name in names]

    def get_output_mapping(self) -> dict[str, str]:
        """Nothing is copied from build_lib into the source tree: run() writes there itself."""
        return {}


class PlatformWheel(bdist_wheel):
    """Tags the wheel for the platform but for any Python 3: the library has no Python ABI."""

    build_number: str | None = None

    def finalize_options(self) -> None:
        """Mark the wheel that has the CUDA library by a build tag, such as 1cu13."""
        if cuda_wanted():
            self.build_number = self.build_number or f"1cu{nvcc()[1].partition('.')[0]}"
        super().finalize_options()

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-<platform>, or py3-none-any without the library."""
        _, _, platform_tag = super().get_tag()
        return "py3", "none", platform_tag


if __name__ == "__main__":
    setup(
        ext_modules=[Extension(f"{PACKAGE}._C", sources=[])] if native_wanted() else [],
        cmdclass={
            "build_ext": BuildNative,
            "build_cuda": BuildCuda,
            "bdist_wheel": PlatformWheel,
        },
    )
