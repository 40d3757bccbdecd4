"""The ``eamnet`` command.

Every command is one entry of :data:`COMMANDS`; its module is imported only when the command runs,
so that ``eamnet --help`` and ``eamnet doctor`` do not wait for the training stack.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple

__all__ = ["COMMANDS", "Command", "main"]


class Command(NamedTuple):
    """One ``eamnet`` command: ``run`` is called with the arguments that follow its name."""

    summary: str
    module: str
    function: str

    def load(self) -> Callable[[list[str]], int]:
        """Import the command; its function takes a list of arguments and returns an exit code."""
        function: Callable[[list[str]], int] = getattr(import_module(self.module), self.function)
        return function


COMMANDS: dict[str, Command] = {
    "fit": Command("train, evaluate the best checkpoint, write a report", "eamnet.runs", "fit"),
    "validate": Command("evaluate a run on its validation part", "eamnet.runs", "validate"),
    "test": Command("evaluate a run on its test part", "eamnet.runs", "test"),
    "predict": Command("segment picture files or folders", "eamnet.inference", "predict"),
    "ablate": Command("compare networks with and without modules", "eamnet.studies", "ablate"),
    "sweep": Command("compare the values of an option", "eamnet.studies", "sweep"),
    "kfold": Command("cross-validate", "eamnet.studies", "kfold"),
    "external": Command("train on one data set, test on another", "eamnet.external", "external"),
    "attention": Command("heat maps of CMAM, channels of EAB", "eamnet.attention", "attention"),
    "average": Command("mean of a run's weights and its init's", "eamnet.averaging", "average"),
    "card": Command("export a tested run: float16 weights, model card", "eamnet.card", "card"),
    "export": Command("write a network as ONNX or .pt2, checked", "eamnet.export", "export"),
    "bench": Command("time the operators beside their rivals", "eamnet.benchmark", "bench"),
    "doctor": Command("show versions, backends and what cannot run", "eamnet.doctor", "doctor"),
    "demo": Command("short training on synthetic pictures, with report", "eamnet.demo", "demo"),
}


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: eamnet COMMAND [options]",
            "",
            "EAM-Net: segmentation of dermoscopy pictures.",
            "",
            "commands:",
            *lines,
            "",
            "`eamnet COMMAND --help` lists the options of a command,",
            "`eamnet --version` shows the version.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after ``eamnet``; ``sys.argv[1:]`` by default.

    Returns:
        The process exit code: 0 on success, 2 for a wrong command line or wrong input, 141 where
        what read the output stopped reading, otherwise what the command returns.
    """
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _nobody_reads():
            raise  # another pipe's
        # As in `eamnet doctor | head`. What is left in the buffer has nowhere to go; Python would
        # try once more when it ends, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # what a shell reports for SIGPIPE


def _nobody_reads() -> bool:
    """Whether standard output is a pipe of which the other end is closed."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _run(arguments: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if words else 2
    if words[0] == "--version":
        from importlib.metadata import version

        print(version("eamnet-kernels"))
        return 0
    if words[0] not in COMMANDS:
        print(f"eamnet: no command {words[0]!r}; there are: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return COMMANDS[words[0]].load()(words[1:])
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("eamnet", "eamnet_kernels"):
            raise
        print(
            f"eamnet {words[0]}: {error}; pip install 'eamnet-kernels[train]' brings what the "
            "commands need",
            file=sys.stderr,
        )
        return 2
    except (ValueError, TypeError, FileNotFoundError, FileExistsError) as error:
        # What a user can mend is told in a sentence; the trace is for those who ask for it.
        if os.environ.get("EAMNET_TRACEBACK"):
            raise
        print(f"eamnet {words[0]}: {error}", file=sys.stderr)
        print("(EAMNET_TRACEBACK=1 shows where this came from)", file=sys.stderr)
        return 2
