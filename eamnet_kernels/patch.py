"""Put the modules into somebody else's network, and take them out again.

Nothing is replaced behind the user's back: `patch` is called on one network, with a rule that says
which of its modules become what, and `unpatch` restores the very same objects.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

Rule = Callable[[str, nn.Module], "nn.Module | None"]
"""`rule(name, module)` returns the module to put in its place, or None to leave it."""

_ORIGINAL = "_eamnet_original"


def patch(network: nn.Module, rule: Rule) -> list[str]:
    """Replace the modules for which `rule` gives another; return their names.

    A replaced module is not searched further. The replacement goes to the original's device, dtype
    and training mode, where the original has parameters to tell. A module that the network holds
    under several names is asked about once and replaced under all of them.

    Example: a CMAM after each of a network's last convolutions of a stage

    >>> def rule(name, module):                           # doctest: +SKIP
    ...     if name.endswith("layer4"):
    ...         return nn.Sequential(module, CMAM(512))
    >>> patch(model, rule)                                # doctest: +SKIP
    ['layer4']

    Raises:
        TypeError: `rule` returned something that is not a module.
        ValueError: nothing was replaced; the error names the modules there are.
    """
    replaced: list[str] = []
    answers: dict[nn.Module, nn.Module | None] = {}

    def visit(parent: nn.Module, prefix: str) -> None:
        for key, child in list(parent.named_children()):
            name = f"{prefix}.{key}" if prefix else key
            if child not in answers:
                answers[child] = rule(name, child)
            new = answers[child]
            if new is None or new is child:
                visit(child, name)
                continue
            if not isinstance(new, nn.Module):
                raise TypeError(
                    f"rule returned a {type(new).__name__} for {name}; accepted: a module or None"
                )
            _match(new, child)
            # In a list, so that the original is not itself registered as a child.
            object.__setattr__(new, _ORIGINAL, [child])
            setattr(parent, key, new)
            replaced.append(name)

    visit(network, "")
    if not replaced:
        names = ", ".join(name for name, _ in network.named_modules() if name)
        raise ValueError(f"rule replaced none of the network's modules: {names}")
    return replaced


def unpatch(network: nn.Module) -> list[str]:
    """Put the originals back wherever `patch` replaced them; return their names."""
    restored: list[str] = []

    def visit(parent: nn.Module, prefix: str) -> None:
        for key, child in list(parent.named_children()):
            name = f"{prefix}.{key}" if prefix else key
            original = child.__dict__.get(_ORIGINAL)
            if original is None:
                visit(child, name)
            else:
                setattr(parent, key, original[0])
                restored.append(name)

    visit(network, "")
    return restored


def _match(new: nn.Module, original: nn.Module) -> None:
    new.train(original.training)
    example = next(original.parameters(), None)
    if example is not None:
        new.to(device=example.device)
        if example.is_floating_point():
            new.to(dtype=example.dtype)
