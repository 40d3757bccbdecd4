"""The benchmark's own arithmetic and refusals."""

from __future__ import annotations

import html
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import (
    compare,
    coverage,
    freed_memory,
    loading,
    magnified,
    precision,
    readme,
    results,
    summary,
)
from bench.__main__ import main
from bench.floor import Ceilings, count
from bench.operators import describe, measure
from bench.results import Record
from bench.subjects import SUBJECTS
from bench.sweeps import exponent, fits
from bench.test_bench import cases
from bench.timing import Times, interleaved, paired_ratio, peak_extra_bytes
from eamnet.data import SegmentationData, Split
from eamnet.metrics import read_csv
from eamnet.model import EAMNet, EAMNetConfig
from eamnet_kernels.ops.schemas import SCHEMAS

CPU = torch.device("cpu")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def test_ratios_are_paired_by_round() -> None:
    drift = np.array([1.0, 2.0, 4.0, 8.0, 16.0])  # a machine that slows down while it is measured
    ratio = paired_ratio(Times(3 * drift), Times(drift))
    assert (ratio.median, ratio.low, ratio.high) == (3, 3, 3)


def test_every_candidate_runs_in_every_round() -> None:
    calls: list[str] = []
    slow = 0.03

    def call(name: str) -> Any:
        def run(_: int) -> None:
            calls.append(name)
            __import__("time").sleep(slow)

        return run

    times = interleaved({name: call(name) for name in "abc"}, 4, CPU, 60)
    assert [len(t.seconds) for t in times.values()] == [4, 4, 4]
    timed = calls[6:]  # after two warm-up runs each
    rounds = ["".join(timed[i : i + 3]) for i in range(0, len(timed), 3)]
    assert [sorted(r) for r in rounds] == [list("abc")] * 4
    assert len(set(rounds)) > 1  # not always the same before it


def test_budget_stops_after_three_rounds() -> None:
    times = interleaved({"a": lambda _: __import__("time").sleep(0.03)}, 50, CPU, 0.01)
    assert len(times["a"].seconds) == 3


def test_peak_memory_sees_a_temporary() -> None:
    def call(_: int) -> None:
        torch.ones(8_000_000).sum()

    extra = peak_extra_bytes(call, CPU)
    if extra is None:
        pytest.skip("the system does not let the high-water mark be reset")
    assert 30e6 < extra < 45e6


def test_floor_is_the_slower_of_bytes_and_operations() -> None:
    counted = count("gate_statistics", {"shape": (4, 32, 256, 256)}, "forward", 4)
    assert counted.bytes == 4 * (4 * 32 * 65536 + 2 * 4 * 65536)
    assert counted.floor(Ceilings(copy=counted.bytes, gemm=1e30)) == 1
    assert counted.floor(Ceilings(copy=1e30, gemm=counted.flop / 2)) == 2


def test_floor_of_a_convolution_leaves_padding_out() -> None:
    case = {"shape": (2, 4, 5, 6), "dilations": (3,)}
    taps = (5 + 2 * 2) * (6 + 2 * 3)  # 2 rows and 3 columns have taps inside on a side
    ones = torch.ones(1, 1, 5, 6)
    kernel = torch.ones(1, 1, 3, 3)
    inside = torch.nn.functional.conv2d(ones, kernel, padding=3, dilation=3)
    assert taps == inside.sum()
    flop = 2 * 2 * (5 * 6 * 4 * 4 + taps * 2 * 2)
    assert count("multi_dilation_conv", case, "forward", 4).flop == flop


def test_exponent_of_a_power_law() -> None:
    values = [64.0, 128, 256, 512]
    assert exponent(values, [v**2 * 1e-6 for v in values]) == pytest.approx(2)


def test_the_table_of_sweeps_has_the_fits() -> None:
    rows = [
        {"subject": "f", "axis": "side", "value": v, "median_ms": 1e-3 * v**2, "peak_extra_mb": v,
         "expected_exponent": 2}
        for v in (64, 128, 256)
    ]  # fmt: skip
    assert "| `f` | side | 2 | 2.00 | 1.00 |" in summary.sweeps_markdown(fits(rows))


def test_a_wrong_backend_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from eamnet_kernels.reference import external_memory

    right = external_memory.forward
    monkeypatch.setattr(
        external_memory, "forward", lambda *a: (right(*a)[0] * 1.001, *right(*a)[1:])
    )
    rows = list(
        measure(
            SUBJECTS["external_memory"], {"shape": (1, 8, 8, 8)}, "forward", torch.float32, CPU,
            Ceilings(1e10, 1e11), 3, 0.1, False, "reference", memory=False,
        )
    )  # fmt: skip
    ours = [r for r in rows if r.ours]
    assert ours
    assert all(not r.correct and r.median_ms is None for r in ours)
    assert all(r.median_ms is not None for r in rows if not r.ours)
    as_rows = [r.as_dict() for r in rows]
    assert "is wrong" in summary.failures(as_rows, summary.comparisons(as_rows))[0]


def test_auto_must_not_be_slower() -> None:
    def row(candidate: str, ms: float, high: float | None = None, noisy: bool = False) -> Record:
        ours = high is None
        return {
            "subject": "f", "case": "1", "mode": "forward", "dtype": "float32", "ours": ours,
            "candidate": candidate, "chosen": ours, "correct": True, "error": 0.5, "noisy": noisy,
            "median_ms": ms, "percent_of_floor": None, "speedup_high": high,
        }  # fmt: skip

    def problems(*rows: Record) -> list[str]:
        return summary.failures(list(rows), summary.comparisons(list(rows)))

    ours = row("cpu", 10)
    (problem,) = problems(ours, row("plain", 9, high=0.95))
    assert "what auto takes (cpu) is slower than plain (10 ms against 9 ms)" in problem
    assert not problems(ours, row("plain", 9, high=1.1))
    assert not problems(ours, row("plain", 9.8, high=0.99))
    assert not problems(ours, row("plain", 9, high=0.95, noisy=True))
    assert not problems(ours, row("cpu, channels-last", 8), row("plain", 9, high=0.95))


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    main(
        ["--op", "gate_statistics", "--shape", "1x8x16x16", "--no-compile", "--rounds", "3",
         "--budget", "0.1", "--output", str(folder)]
    )  # fmt: skip
    return folder


def test_result_files_and_page(quick: Path) -> None:
    content = results.read(quick / "operators.json")
    assert {"date", "cpu", "torch", "commit"} <= content["environment"].keys()
    rows = content["rows"]
    assert any(r["candidate"] == "plain" for r in rows)
    assert (quick / "operators.csv").read_text().count("\n") == len(rows) + 1

    found: list[str] = []

    class Sources(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.extend(v or "" for k, v in attrs if k in ("src", "href"))

    Sources().feed((quick / "report.html").read_text())
    assert found
    assert all(source.startswith("data:image/png") for source in found)


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
def test_the_page_in_a_browser(quick: Path, tmp_path: Path) -> None:
    """It is laid out without an error, shows its plot, and asks for nothing that is not in it."""
    page = tmp_path / "page.html"
    seen = """<script>addEventListener('load', () => { document.title = JSON.stringify({
      pictures: [...document.images].map(i => i.naturalWidth),
      wide: document.documentElement.scrollWidth > innerWidth,
      asked: performance.getEntriesByType('resource').map(e => e.name.slice(0, 5)),
      rows: document.querySelectorAll('tbody tr').length}) })</script>"""
    page.write_text((quick / "report.html").read_text().replace("<style>", f"{seen}<style>", 1))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,800"]
    command += [f"--user-data-dir={tmp_path}", "--enable-logging=stderr", "--dump-dom"]
    run = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "CONSOLE" not in run.stderr
    found = json.loads(html.unescape(run.stdout.split("<title>")[1].split("</title>")[0]))
    assert found["pictures"]
    assert min(found["pictures"]) > 300
    assert not found["wide"]  # wide tables scroll by themselves
    assert set(found["asked"]) <= {"data:"}
    assert found["rows"] > len(results.read(quick / "operators.json")["rows"])


def test_compare_finds_what_became_slower(quick: Path, tmp_path: Path) -> None:
    old = quick / "operators.json"
    assert compare.main([str(old), str(old)]) == 0
    content = json.loads(old.read_text())
    for row in content["rows"]:
        for field in ("median_ms", "p20_ms", "p80_ms"):
            row[field] *= 100
    new = tmp_path / "new.json"
    new.write_text(json.dumps(content))
    assert compare.main([str(old), str(new)]) == 1
    assert compare.main([str(new), str(old)]) == 0
    content["environment"]["cpu"] = "another"
    new.write_text(json.dumps(content))
    assert compare.main([str(old), str(new)]) == 2
    assert compare.main([str(old), str(new), "--force"]) == 1
    new.write_text("{}")
    assert compare.main([str(old), str(new)]) == 2


def test_bad_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--op", "nothing"], ["--shape", "1x2"], ["--shape", "axbxcxd"]):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2
    assert "gate_statistics" in capsys.readouterr().err


def test_tables_in_the_pages_are_those_of_the_result_files() -> None:
    assert readme.main(["--check"]) == 0


def test_pytest_benchmark_times_operators() -> None:
    command = [sys.executable, "-m", "pytest", "bench/test_bench.py", "--benchmark-disable", "-q"]
    names = f"gate_statistics and {describe(SUBJECTS['gate_statistics'].cases[-1])}"
    ran = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-k", names],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert ran.returncode == 0, ran.stdout
    operators = {param.values[0].operator for param in cases()}
    assert operators == {name for name in SCHEMAS if not name.endswith("_backward")}


def test_a_table_is_renewed_between_its_marks(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme, "ROOT", quick)
    mark = "<!-- table: operators.json -->"
    page = readme.renewed(f"before\n{mark}\nold, typed\n<!-- end -->\nafter")
    assert "typed" not in page
    assert "| `gate_statistics` | float32 | forward |" in page
    assert page.startswith(f"before\n{mark}\n")
    assert page.endswith("<!-- end -->\nafter")
    assert readme.renewed(page) == page


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_measured_in_processes_of_both_kinds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not handed on: where it is set, no process can keep freed memory.
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    small = ["--side", "32", "--batch", "2", "--steps", "1", "--rounds", "1"]
    assert freed_memory.main([*small, "--output", str(tmp_path)]) == 0
    rows = results.read(tmp_path / "freed_memory.json")["rows"]
    assert [(r["network"], r["freed_memory"]) for r in rows] == [
        ("EAM-Net", "kept"),
        ("EAM-Net", "returned"),
        ("EAM-Net, plain", "kept"),
        ("EAM-Net, plain", "returned"),
    ]
    assert [r["times_first"] == 1 for r in rows] == [True, False, False, False]
    lines = readme.table(tmp_path / "freed_memory.json").splitlines()
    assert lines[-1].startswith("| EAM-Net, plain | 32², 2 | returned |")


def test_intervals_over_many_pictures_hold_the_truth_more_often(tmp_path: Path) -> None:
    population = [r for r in read_csv(coverage.SCORES) if r.resolution == "native"]
    few, many = coverage.of_pictures(population, 40, (5, 80))
    assert few["mean"] < many["mean"] >= 0.8
    assert (few["pictures"], many["pictures"]) == (5, 80)
    (row,) = coverage.of_studies(40, (0.02,), (3,))
    assert row["pictures_alone"] < 0.8 < row["held"]
    content = {"environment": results.environment(CPU), "rows": [row]}
    results.write(tmp_path, "study_intervals", content)
    line = readme.table(tmp_path / "study_intervals.json").splitlines()[-1]
    assert line == f"| 0.02 | {row['held']:.0%} ({row['pictures_alone']:.0%}) |"


def test_what_a_picture_costs_is_measured(tmp_path: Path) -> None:
    words = ["--size", "32", "--pictures", "2", "--rounds", "2", "--output", str(tmp_path)]
    threads = torch.get_num_threads()
    try:
        assert loading.main(words) == 0
    finally:
        torch.set_num_threads(threads)
    rows = {r["what"]: r for r in results.read(tmp_path / "loading.json")["rows"]}
    assert all(0 < r["p20_ms"] <= r["median_ms"] <= r["p80_ms"] for r in rows.values())
    table = readme.table(tmp_path / "loading.json")
    assert all(f"| {what} | " in table for what in rows)


@pytest.fixture
def two_pictures(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of ISIC 2017, of which each part has two pictures."""
    beside = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    pictures = Path(os.environ.get("EAMNET_DATA") or beside) / "isic2017"
    if not pictures.is_dir():
        pytest.skip(f"needs the pictures of ISIC 2017 in {pictures} (see EAMNET_DATA)")
    whole = SegmentationData.index

    def two(data: SegmentationData) -> Split:
        split = whole(data)
        data.split = replace(split, val=split.val[:2], test=split.test[:2])
        return data.split

    monkeypatch.setattr(SegmentationData, "index", two)
    return pictures


def test_precisions_are_compared_on_real_pictures(two_pictures: Path, tmp_path: Path) -> None:
    assert precision.main([str(two_pictures), "--output", str(tmp_path)]) == 0
    rows = {r["network"]: r for r in results.read(tmp_path / "precision.json")["rows"]}
    trained = rows.pop(precision.BASE)
    assert trained["pictures"] == 2
    assert trained["dice"] > 0.9
    assert trained["largest_change"] == 0
    assert rows["float32, folded"]["largest_change"] < 1e-3
    assert 0 < rows["bfloat16, folded"]["largest_change"] < 0.02
    assert 0 < rows["float32, folded, 8 views"]["largest_change"] < 0.1
    assert "| bfloat16, folded | 2 | 0.9" in readme.table(tmp_path / "precision.json")


def test_a_window_is_about_the_lesion_and_inside_the_picture() -> None:
    mask = np.zeros((12, 20), np.uint8)
    mask[4:6, 14:20] = 1
    rows, columns = magnified.window(mask, 2)
    assert (rows, columns) == (slice(2, 8), slice(10, 20))  # the centre, 17, is too far right
    assert magnified.window(mask, 1) == (slice(0, 12), slice(0, 20))
    empty = magnified.window(np.zeros((12, 20), np.uint8), 4)
    assert empty == (slice(4, 7), slice(8, 13))


def test_weights_are_compared_on_magnified_pictures(two_pictures: Path, tmp_path: Path) -> None:
    untrained = EAMNet(EAMNetConfig()).save_pretrained(tmp_path / "untrained.safetensors")
    split = Path(__file__).resolve().parents[2] / "docs/results/isic2017-256/split.json"
    words = [str(two_pictures), "--split", str(split), "--factors", "1", "1.5"]
    words += ["--checkpoint", "isic2017", str(untrained), "--output", str(tmp_path)]
    assert magnified.main(words) == 0
    rows = results.read(tmp_path / "magnified.json")["rows"]
    assert [(r["network"], r["factor"]) for r in rows] == [
        ("isic2017", 1),
        ("untrained", 1),
        ("isic2017", 1.5),
        ("untrained", 1.5),
    ]
    assert rows[2]["median_share"] > rows[0]["median_share"]
    for good, bad in (rows[:2], rows[2:]):
        assert good["dice"] > 0.8
        assert good["change"] is None
        assert bad["change"] == pytest.approx(bad["dice"] - good["dice"])
        assert bad["dice"] < good["dice"] - 0.1
    line = readme.table(tmp_path / "magnified.json").splitlines()[-1]
    assert line.startswith("| 1.5× | ")
    assert line.endswith(" of 2 |")


@pytest.mark.parametrize("name", ["CMAM", "EAB", "MRCF"])
@pytest.mark.parametrize("mode", ["forward", "both"])
def test_a_module_is_right_and_its_plain_form_another_computation(name: str, mode: str) -> None:
    rows = list(
        measure(
            SUBJECTS[name], {"shape": (2, 16, 12, 12)}, mode, torch.float32, CPU,
            Ceilings(1e10, 1e11), 3, 0.1, False, memory=False,
        )
    )  # fmt: skip
    assert {r.candidate for r in rows if r.ours} == {"auto", "auto, channels-last"}
    assert all(r.correct and r.chosen for r in rows if r.ours)
    assert all(r.floor_ms is None for r in rows)


def test_direct_definitions_replace_every_operator_of_the_modules() -> None:
    called = []
    for operator in ("gate_statistics", "cross_mix_channels", "external_memory"):
        assert getattr(torch.ops.eamnet_kernels, operator)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    for name in ("CMAM", "EAB", "MRCF"):
        subject = SUBJECTS[name]
        case = {"shape": (1, 16, 8, 8)}
        inputs = subject.make(case, lambda *shape: torch.randn(shape))
        with torch.no_grad(), Watch(), subject.scope():
            subject.plain(inputs, case)
        assert not any("eamnet_kernels" in c for c in called)
        with torch.no_grad(), Watch():
            subject.ours(inputs, case)
        assert any("eamnet_kernels" in c for c in called), name
        called.clear()
