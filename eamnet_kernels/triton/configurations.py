"""How a kernel is cut into blocks, by shape: a table per kernel that ships with the package.

A table is written beside its kernel as rules over a key, most special first. What `tune` found on a
card goes before the rules. Nothing is ever searched for during an ordinary call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Key = Mapping[str, int | str]


@dataclass(frozen=True)
class Configuration:
    """Block sizes by the names of the kernel's constants, and what Triton is told beside them.

    `all_registers`: where it would else spill, that it may use all (`Launch.options`).
    """

    blocks: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 2
    all_registers: bool = True

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "blocks": dict(self.blocks),
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "all_registers": self.all_registers,
        }


@dataclass(frozen=True)
class Rule:
    """Use `configuration` where every number of the key is at most, every word equal to, `where`'s.

    Numbers that a rule does not name may have any value.
    """

    where: Key
    configuration: Configuration

    def holds(self, key: Key) -> bool:
        """Whether the rule is for `key`."""
        return all(
            key[name] == bound if isinstance(bound, str) else int(key[name]) <= bound
            for name, bound in self.where.items()
        )


TABLES: dict[str, Table] = {}
"""All tables whose modules were imported, by their names."""

_overrides: dict[tuple[str, tuple[tuple[str, int | str], ...]], Configuration] = {}
_watchers: list[dict[tuple[str, tuple[tuple[str, int | str], ...]], Configuration]] = []


class Table:
    """The configurations of one kernel. `name` is `<operator>.<kernel>`."""

    def __init__(self, name: str, *rules: Rule) -> None:
        if not rules or rules[-1].where:
            raise ValueError(f"{name}: the last rule must hold for every key")
        self.name = name
        self.rules = rules
        TABLES[name] = self

    def configuration(self, device: Any = None, **key: int | str) -> Configuration:
        """The configuration for a shape: tuned on this card, else by the first rule that holds."""
        from eamnet_kernels import tune

        entry = (self.name, tuple(sorted(key.items())))
        found = _overrides.get(entry) or tune.kept(device, *entry)
        if found is None:
            found = next(rule.configuration for rule in self.rules if rule.holds(key))
        for watcher in _watchers:
            watcher[entry] = found
        return found


@contextmanager
def overridden(
    entry: tuple[str, tuple[tuple[str, int | str], ...]], configuration: Configuration
) -> Iterator[None]:
    """Within, one kernel at one key runs in the given configuration."""
    _overrides[entry] = configuration
    try:
        yield
    finally:
        del _overrides[entry]


@contextmanager
def watched() -> Iterator[dict[tuple[str, tuple[tuple[str, int | str], ...]], Configuration]]:
    """Within, every choice of a configuration is noted in the dictionary that it gives."""
    seen: dict[tuple[str, tuple[tuple[str, int | str], ...]], Configuration] = {}
    _watchers.append(seen)
    try:
        yield seen
    finally:
        _watchers.remove(seen)
