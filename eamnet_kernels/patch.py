"""Put the modules into somebody else's network, and take them out again.

Nothing is replaced behind the user's back: `patch` is called on one network, with a rule that says
which of its modules become what, and `unpatch` restores the very same objects.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

Rule = Callable[[str, nn.Module], "nn.Module | None"]
"""`rule(name, module)` returns the module to put in its place, or None to leave it."""

_ORIGINAL = "_eamnet_original"


def patch(network: nn.Module, rule: Rule) -> list[str]:
    """Replace the modules for which `rule` gives another; return their names.

    Neither a replaced module nor its replacement is searched further. What is new in a replacement
    goes to the original's device, dtype and training mode, where the original has parameters to
    tell. A module that the network holds under several names is asked about once and replaced
    under all of them.

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
    visited: set[nn.Module] = set()

    def visit(parent: nn.Module, prefix: str) -> None:
        if parent in visited:
            return
        visited.add(parent)
        for key, child in _children(parent):
            name = f"{prefix}.{key}" if prefix else key
            first = child not in answers
            if first:
                answers[child] = rule(name, child)
            new = answers[child]
            if new is None or new is child:
                visit(child, name)
                continue
            if not isinstance(new, nn.Module):
                raise TypeError(
                    f"rule returned a {type(new).__name__} for {name}; accepted: a module or None"
                )
            if first:
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
    visited: set[nn.Module] = set()

    def visit(parent: nn.Module, prefix: str) -> None:
        if parent in visited:
            return
        visited.add(parent)
        for key, child in _children(parent):
            name = f"{prefix}.{key}" if prefix else key
            original = child
            while _ORIGINAL in original.__dict__:  # more than one where it was patched again
                original = original.__dict__[_ORIGINAL][0]
            if original is not child:
                setattr(parent, key, original)
                restored.append(name)
            visit(original, name)

    visit(network, "")
    return restored


def _children(parent: nn.Module) -> list[tuple[str, nn.Module]]:
    """As `named_children`, with a child that has several names under each of them."""
    return [(key, child) for key, child in parent._modules.items() if child is not None]


def _match(new: nn.Module, original: nn.Module) -> None:
    """Bring what is new in the replacement, which may hold the original, to the latter's kind."""
    example = next(original.parameters(), None)

    def like(tensor: Tensor) -> Tensor:
        if example is None:
            return tensor
        floating = tensor.is_floating_point() and example.is_floating_point()
        return tensor.to(example.device, example.dtype if floating else None)

    kept = set(original.modules())
    for module in new.modules():
        if module not in kept:
            module.training = original.training
            module._apply(like, recurse=False)
