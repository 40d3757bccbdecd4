"""The choice of a backend: by name or automatic, with reasons, and never in silence."""

from __future__ import annotations

import subprocess
import sys
import threading
from types import ModuleType

import pytest
import torch

import eamnet_kernels
import eamnet_kernels.functional as F
from eamnet_kernels import backends, use_backend
from eamnet_kernels.reference import gate_statistics as reference

X = torch.randn(1, 4, 3, 3)


def test_context_restores_what_was_selected() -> None:
    before = backends.selected()
    with use_backend("reference"):
        assert backends.selected() == "reference"
        with use_backend("auto"):
            assert backends.selected() == "auto"
        assert backends.selected() == "reference"
    assert backends.selected() == before


def test_context_can_be_entered_again() -> None:
    before = backends.selected()
    reference = use_backend("reference")
    for _ in range(2):
        with reference:
            assert backends.selected() == "reference"
        assert backends.selected() == before


def test_context_restores_after_an_error() -> None:
    before = backends.selected()
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert backends.selected() == before


def test_unknown_backend_names_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"'fast' is not known.*'reference'"):
        use_backend("fast")


def test_selection_belongs_to_its_thread() -> None:
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.selected()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_a_named_backend_that_cannot_run_says_why() -> None:
    half = X.half()
    reason = backends.explain("gate_statistics", half).reasons["cpu"]
    assert reason is not None
    with use_backend("cpu"), pytest.raises(RuntimeError, match="cannot run gate_statistics here"):
        F.gate_statistics(half)
    F.gate_statistics(half)  # auto finds another


def test_explain_shows_the_choice_and_the_reasons() -> None:
    explanation = eamnet_kernels.explain("gate_statistics", X.half())
    assert explanation.chosen == "reference"
    assert "float16" in str(explanation)
    with pytest.raises(TypeError, match="takes 1 arguments, 2 were given"):
        eamnet_kernels.explain("gate_statistics", X, X)


def test_environment_variable_sets_the_default() -> None:
    code = (
        "import torch, eamnet_kernels.functional as F; from eamnet_kernels import backends;"
        "print(backends.selected()); F.gate_statistics(torch.ones(1, 1, 1, 1))"
    )

    def run(name: str) -> subprocess.CompletedProcess[str]:
        command = ["env", f"EAMNET_BACKEND={name}", sys.executable, "-c", code]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert run("reference").stdout.strip() == "reference"
    assert "'nonsense' is not known" in run("nonsense").stderr


def test_registering_a_name_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="registered already"):
        backends.register(backends.get("reference"))


def test_a_registered_backend_comes_and_goes() -> None:
    class Negative(backends.Backend):
        def module(self, operator: str) -> ModuleType:
            module = ModuleType(operator)
            module.__dict__.update(
                can_run=lambda arguments: None,
                forward=lambda x: tuple(-s for s in reference.forward(x)),
            )
            return module

    expected = F.gate_statistics(X)
    backends.register(Negative("negative", "", lambda: None, ("gate_statistics",)))
    try:
        with use_backend("negative"):
            torch.testing.assert_close(F.gate_statistics(X).pixel_max, -expected.pixel_max)
        torch.testing.assert_close(F.gate_statistics(X), expected)  # the last is auto's last choice
    finally:
        backends.unregister("negative")
    with pytest.raises(ValueError, match="'negative' is not known"):
        use_backend("negative")
    with pytest.raises(ValueError, match="'negative' is not known"):
        backends.unregister("negative")


@pytest.mark.skipif(torch.__version__ < "2.14", reason="it keeps the selection of its first call")
def test_a_compiled_function_obeys_the_selection() -> None:
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(x: torch.Tensor) -> torch.Tensor:
        return F.gate_statistics(x).pixel_mean

    with use_backend("cpu"), pytest.raises(RuntimeError, match="cannot run"):
        compiled(X.half())
    with use_backend("reference"):
        compiled(X.half())
