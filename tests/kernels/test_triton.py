"""The Triton backend without a GPU: interpreted, compiled ahead of time, and where it is missing.

`test_interpreted` runs the conformance suite, and the tests here that need the interpreter, in a
process of their own: Triton decides when a kernel is defined whether it will be interpreted.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import eamnet_kernels
from eamnet_kernels import backends, tune
from eamnet_kernels import triton as package

from .operators import OPERATORS

ROOT = Path(__file__).resolve().parents[2]
TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
INTERPRETED = pytest.mark.skipif(
    not package.interpreted(), reason="for TRITON_INTERPRET=1; test_interpreted runs it"
)
COMPILED = pytest.mark.skipif(package.interpreted(), reason="interpreted kernels do not compile")
BACKEND = backends.get("triton")


@TRITON
@COMPILED
@pytest.mark.parametrize("part", [*BACKEND.operators, "the rest"])
def test_interpreted(part: str) -> None:
    tests = (__file__, str(Path(__file__).with_name("test_conformance.py")))
    chosen = f"not ({' or '.join(OPERATORS)})" if part == "the rest" else part
    # float16 is bfloat16 with another conversion.
    chosen = f"triton and not float16 and {chosen}"
    options = ("-q", "-x", "-p", "no:cacheprovider", "-k", chosen)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        env={**os.environ, "TRITON_INTERPRET": "1", "EAMNET_TEST_DEVICE": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr
    assert int(done.stdout.split(" passed")[0].split()[-1]) > (2 if part == "the rest" else 15)


@INTERPRETED
@pytest.mark.parametrize("name", BACKEND.operators)
def test_wide_offsets_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from .test_conformance import draw, evaluate

    operator = OPERATORS[name]
    case = next(iter(operator.cases.values()))
    inputs = draw(operator, case, torch.float32)
    results = []
    for wide in (False, True):
        monkeypatch.setattr(BACKEND.module(name), "wide", lambda *_, _wide=wide: _wide)
        with eamnet_kernels.use_backend("triton"):
            values, grads, _ = evaluate(operator.run, inputs, case)
        results.append((*values, *grads))
    for narrow, wide_ in zip(*results, strict=True):
        assert torch.equal(narrow, wide_)


@INTERPRETED
@pytest.mark.parametrize("name", BACKEND.operators)
def test_a_program_takes_several_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over pixels on large pictures, which no case of the conformance suite is."""
    from eamnet_kernels.triton import products

    from .test_conformance import draw, evaluate

    operator = OPERATORS[name]
    case = list(operator.cases.values())[-1]
    inputs = draw(operator, case, torch.float32)
    results = []
    for programs in (1024, 1):
        monkeypatch.setattr(products, "_PROGRAMS", programs)
        with eamnet_kernels.use_backend("triton"):
            values, grads, _ = evaluate(operator.run, inputs, case)
        results.append((*values, *grads))
    for short, long in zip(*results, strict=True):
        scale = float(short.abs().max())
        torch.testing.assert_close(long, short, rtol=0, atol=1e-5 * scale)


@INTERPRETED
def test_auto_passes_the_interpreter_over() -> None:
    explanation = eamnet_kernels.explain("gate_statistics", torch.ones(1, 4, 3, 3))
    assert explanation.chosen != "triton"
    assert "interpreted" in str(explanation.reasons["triton"])


@TRITON
@COMPILED
def test_auto_leaves_few_channels_to_the_cuda_kernels_where_they_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = BACKEND.module("multi_dilation_conv")

    def declined(
        channels: int,
        dense: bool,
        channels_last: bool,
        backward: bool,
        dtype: torch.dtype = torch.bfloat16,
    ) -> bool:
        x = torch.empty(1, channels, 8, 8, dtype=dtype, device="meta")
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        group = channels // 4
        branches = [x.new_empty(group, group if dense else 1, 3, 3)] * 3
        arguments = {"x": x, "w_branches": branches, **({"grad_out": x} if backward else {})}
        return module.declines(arguments) is not None

    monkeypatch.setattr(backends.Backend, "reason_not", lambda *_: None)
    forms = [(d, last, back) for d in (True, False) for last in (True, False)
             for back in (True, False)]  # fmt: skip
    found = {c: [f for f in forms if declined(c, *f)] for c in (32, 64, 128)}
    assert found[128] == []
    assert found[64] == [(True, True, False), (True, False, False)]
    assert found[32] == [f for f in forms if f[1] or f == (True, False, False)]
    assert not any(declined(32, *f, torch.float32) for f in forms)  # not measured
    with monkeypatch.context() as patch:
        patch.setattr(backends, "names", lambda: ("triton", "cpu", "reference"))
        assert not any(declined(32, *f) for f in forms)
    monkeypatch.setattr(backends.Backend, "reason_not", lambda *_: "they are not built")
    assert not any(declined(32, *f) for f in forms)


@TRITON
@COMPILED
def test_large_heads_need_the_shared_memory_of_a_large_card(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = BACKEND.module("cross_mix_pixels")

    def reason(dims: int, dtype: torch.dtype, available: int) -> str | None:
        card = SimpleNamespace(shared_memory_per_block_optin=available)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
        q = SimpleNamespace(shape=(1, 2, 9, dims), dtype=dtype, is_cuda=True, device="cuda")
        found: str | None = module.can_run({"q_s": q})
        return found

    monkeypatch.setattr(module, "refuses", lambda _: None)
    assert "takes more shared memory" in str(reason(80, torch.bfloat16, 101376))  # RTX 4090
    assert reason(80, torch.bfloat16, 166912) is None  # A100
    assert reason(64, torch.bfloat16, 101376) is None
    assert reason(80, torch.float32, 101376) is None


@TRITON
@COMPILED
@pytest.mark.parametrize("operator", ["external_memory", "cross_mix_channels"])
def test_auto_leaves_exact_float32_to_reference_where_that_was_faster(
    operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = BACKEND.module(operator)

    def declined(shape: tuple[int, ...], last: bool, dtype: torch.dtype = torch.float32) -> str:
        x = torch.empty(shape, dtype=dtype, device="meta")
        if last:
            x = x.to(memory_format=torch.channels_last)
        passes = {"forward": {"x": x}, "backward": {"x": x, "grad_out": x}}
        return " ".join(name for name, of in passes.items() if module.declines(of) is not None)

    sizes = [(4, 32, 256, 256), (4, 64, 128, 128), (4, 128, 64, 64), (4, 256, 32, 32)]
    found = [[declined(size, last) for size in sizes] for last in (False, True)]
    if operator == "external_memory":
        both = "forward backward"
        assert found == [["", "", "backward", "backward"], ["forward", "forward", both, both]]
        # Not beyond what was measured: `reference` takes memory for all pixels.
        assert not any(declined((16, 128, 256, 256), last) for last in (False, True))
    else:
        assert found == [["", "", "", "forward"], [""] * 4]
        assert not declined((4, 256, 64, 64), False)
    assert not any(declined(s, last, torch.bfloat16) for s in sizes for last in (False, True))
    monkeypatch.setattr("eamnet_kernels.triton.products.precision", lambda dtype: "tf32")
    assert not any(declined(size, last) for size in sizes for last in (False, True))


@INTERPRETED
def test_bfloat16_is_rounded_to_nearest_even() -> None:
    import numpy as np

    from eamnet_kernels.triton import interpreter

    bits = torch.randint(-(2**31), 2**31, (10000,), generator=torch.Generator().manual_seed(0))
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, 1e-40])
    values = torch.cat((bits.to(torch.int32).view(torch.float32), special))
    got = torch.from_numpy(interpreter._to_bfloat16(values.numpy()).view(np.int16))
    torch.testing.assert_close(got.view(torch.bfloat16), values.bfloat16(), equal_nan=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@COMPILED
def test_a_machine_without_a_gpu_says_so() -> None:
    explanation = eamnet_kernels.explain("gate_statistics", torch.ones(1, 4, 3, 3))
    assert explanation.chosen != "triton"
    reason = explanation.reasons["triton"]
    assert reason is not None
    assert "no CUDA device" in reason or "not installed" in reason
    with (
        eamnet_kernels.use_backend("triton"),
        pytest.raises(RuntimeError, match="'triton' cannot run gate_statistics here"),
    ):
        eamnet_kernels.functional.gate_statistics(torch.ones(1, 4, 3, 3))


def test_a_machine_without_triton_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    package.unavailable.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    try:
        assert package.unavailable() == "Triton is not installed"
    finally:
        package.unavailable.cache_clear()


def test_importing_the_library_does_not_import_triton() -> None:
    code = (
        "import sys, torch; before = 'triton' in sys.modules;"
        "import eamnet_kernels; eamnet_kernels.explain('gate_statistics', torch.ones(1, 1, 1, 1));"
        "assert before or 'triton' not in sys.modules or torch.cuda.is_available()"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@TRITON
def test_wide_is_where_an_offset_passes_31_bits() -> None:
    from eamnet_kernels.triton.launch import wide

    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    assert not wide(meta(2**10, 2**11, 2**10, 2**10))  # samples are counted in 64 bits anyway
    assert wide(meta(1, 2**11 + 1, 2**10, 2**10))
    assert wide(meta(2, 2), meta(1, 2, 2**31 + 5)[:, :, ::2])
    assert not wide(meta(0, 2**11 + 1, 2**10, 2**10))


@TRITON
def test_the_assembler_is_told_of_all_registers_where_it_would_spill() -> None:
    from eamnet_kernels.triton import gate_statistics
    from eamnet_kernels.triton.launch import recorded

    with recorded() as launches:
        for shape in ((8, 256, 32, 32), (2, 20, 9, 11)):
            gate_statistics.forward(torch.empty(shape, device="meta"))
    even, _, odd, _ = launches
    assert "maxnreg" not in even.options
    assert odd.options["maxnreg"] == 255
    for hard in ({"WIDE": True}, {"PRECISION": "tf32"}):
        assert replace(even, constants={**even.constants, **hard}).options["maxnreg"] == 255
    many = replace(odd, configuration=replace(odd.configuration, num_warps=16))
    assert many.options["maxnreg"] == 128
    left = replace(odd, configuration=replace(odd.configuration, all_registers=False))
    assert "maxnreg" not in left.options


@TRITON
def test_tables_take_the_first_rule_that_holds() -> None:
    from eamnet_kernels.triton import configurations
    from eamnet_kernels.triton.configurations import Configuration, Rule, Table

    small, other, rest = (Configuration({"N": n}) for n in (1, 2, 3))
    try:
        table = Table(
            "example.kernel",
            Rule({"pixels": 8, "layout": "nchw"}, small),
            Rule({"pixels": 16}, other),
            Rule({}, rest),
        )
        assert table.configuration(pixels=8, layout="nchw") is small
        assert table.configuration(pixels=8, layout="channels-last") is other
        assert table.configuration(pixels=17, layout="nchw") is rest
    finally:
        del configurations.TABLES["example.kernel"]
    with pytest.raises(ValueError, match="must hold for every key"):
        Table("example.kernel", Rule({"pixels": 8}, small))


@TRITON
def test_tuning_is_kept_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eamnet_kernels.triton.configurations import Configuration
    from eamnet_kernels.triton.gate_statistics import JOIN

    monkeypatch.setenv("EAMNET_CACHE", str(tmp_path))
    device = torch.device("cpu")
    chosen: list[Configuration] = []

    def function() -> None:
        chosen.append(JOIN.configuration(device, tiles=9, channels=8))

    def milliseconds(function: Any) -> float:
        function()
        if chosen[-1].num_warps == 2:
            raise RuntimeError("out of resource")
        return abs(chosen[-1].blocks["TILES"] - 300) + chosen[-1].num_stages

    function()
    assert chosen[-1].blocks["TILES"] == 64
    written = tune.tune(function, device="cpu", milliseconds=milliseconds)
    (result,) = written.values()
    assert result["configuration"]["blocks"]["TILES"] == 256
    assert result["after_ms"] < result["before_ms"]
    function()
    assert chosen[-1] == Configuration(**result["configuration"])
    JOIN.configuration(device, tiles=10, channels=8)  # another shape keeps its rule
    assert JOIN.configuration(device, tiles=10, channels=8).blocks["TILES"] == 64
    # Another source, card or version of Triton is another name.
    assert json.loads(tune.path().read_text()) == written
    monkeypatch.setattr(tune, "_source", lambda _: "changed")
    assert JOIN.configuration(device, tiles=9, channels=8).blocks["TILES"] == 64


@COMPILED
def test_results_of_tuning_that_cannot_be_read_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tuning.json").write_text("{")
    (tmp_path / "folder" / "tuning.json").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "folder"):
        monkeypatch.setenv("EAMNET_CACHE", str(folder))
        with pytest.warns(UserWarning, match="results of tuning are not used"):
            assert tune.kept(torch.device("cpu"), "a.kernel", ()) is None


@pytest.fixture(scope="module")
def audit() -> Any:
    pytest.importorskip("triton", reason="Triton is not installed")
    from eamnet_kernels.triton import audit

    return audit


@pytest.fixture(scope="module")
def committed(audit: Any) -> dict[str, Any]:
    table = json.loads((ROOT / "docs" / "triton-audit.json").read_text())
    if table["versions"] != audit.versions():
        pytest.skip(f"the table is of {table['versions']}; here is {audit.versions()}")
    return table


@COMPILED
def test_every_rule_is_audited(audit: Any) -> None:
    assert audit.unmet_rules() == []


@COMPILED
def test_the_audit_lists_what_ships(audit: Any, committed: dict[str, Any]) -> None:
    """A kernel or table that was changed without `audit --write docs` fails here."""
    rows = [audit.Row(**row) for row in committed["rows"]]
    assert sorted({row.name for row in rows}) == sorted(v.name for v in audit.variants())
    assert not [fault for row in rows for fault in row.faults()]
    for form, other in (("WIDE=1", "WIDE=0"), ("PRECISION=tf32", "PRECISION=ieee")):
        forms = [{row.kernel for row in rows if f in row.constants} for f in (form, other)]
        assert forms[0] == forms[1] != set()


@COMPILED
def test_compiling_again_gives_the_committed_rows(audit: Any, committed: dict[str, Any]) -> None:
    """One form of each kernel on sm_90."""
    rows = [audit.Row(**row) for row in committed["rows"]]
    named = {row.name: row for row in rows if row.architecture == 90}
    seen = set()
    for variant in audit.variants(dtypes=[torch.bfloat16]):
        if variant.kernel not in seen:
            seen.add(variant.kernel)
            assert audit.compile_variant(variant, 90) == named[variant.name]


@COMPILED
def test_the_audit_finds_what_it_is_for(audit: Any) -> None:
    variant = next(audit.variants(["gate_statistics"], [torch.float32]))
    row = audit.compile_variant(variant, 90)
    assert row.faults() == []
    # The same kernel with too few registers spills.
    spilled = audit.compile_variant(variant, 90, maxnreg=24)
    assert spilled.spills > 0
    assert "local memory" in spilled.faults()[0]
    for change, word in (
        ({"shared": 228 << 10}, "shared memory"),
        ({"low_precision_dots": 1}, "scalar arithmetic"),
        ({"exact_dots": 1, "matrix": 1}, "TF32"),
        ({"exact_dots": 1, "constants": "PRECISION=tf32"}, "stayed exact"),
    ):
        (fault,) = replace(row, **change).faults()
        assert word in fault
