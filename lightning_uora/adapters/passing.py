"""What a choice of targets leaves out or takes in beside its letter: frozen parts, experts, tied weights."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from lightning_uora.adapters.kinds import is_supported
from lightning_uora.adapters.names import named_parameters
from lightning_uora.adapters.opaque import is_quantised
from lightning_uora.adapters.own_layers import library_models
from lightning_uora.adapters.stacked import routers, stacks_in
from lightning_uora.config import PRESETS

__all__ = ["frozen_networks", "frozen_parts", "passed_by", "tied_beyond"]

# Note [Frozen by the user]
# A loss network or a teacher is frozen as a whole beside parts that train. Patterns and presets match its
# layers too, and adapters there would train it. So where some of the layers that were found are frozen and
# others are not, the frozen ones stay as they are, unless they are named in full. Where all are frozen, it is
# the backbone that its user froze before a fit, and adapters are what it is waiting for. A quantised weight
# never wants a gradient: of such a layer the parameters around it tell. Of several models of timm,
# transformers or torchvision a frozen one beside one that trains is such a part too, whatever the targets
# find, and its head stays as it is.

SMALL = re.compile(r"bias|table|embed|pos|token|scale|norm", re.IGNORECASE)
"""Parameters of two axes and more that are no weights of a layer."""
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def frozen_networks(modules: dict[str, nn.Module]) -> tuple[str, ...]:
    """Models of a library that the user froze beside another one. See Note [Frozen by the user]."""
    found: list[str] = []
    for name in library_models(modules):
        if not any(not outer or name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    frozen = tuple(name for name in found if _is_frozen(modules[name]))
    return frozen if len(frozen) < len(found) else ()


def frozen_parts(
    modules: dict[str, nn.Module], chosen: set[str], targets: tuple[str, ...]
) -> tuple[tuple[str, ...], set[str]]:
    """The largest parts that the user froze and ``chosen`` reaches into, and what it finds there.

    See Note [Frozen by the user].
    """
    named = [name for name in chosen if name in targets and name not in PRESETS]
    still = {name for name in chosen if _is_frozen(_telling(modules, name))}
    frozen = still - set(named)
    if not frozen or still == chosen:
        return (), set()
    parts: dict[str, None] = {}
    for name in modules:
        if name in frozen:
            path = name.split(".")
            ends = (".".join(path[:end]) for end in range(1, len(path) + 1))
            around = (end for end in ends if not any(f"{one}.".startswith(f"{end}.") for one in named))
            parts[next((end for end in around if _is_frozen(modules[end])), name)] = None
    return tuple(parts), frozen


def _telling(modules: dict[str, nn.Module], name: str) -> nn.Module:
    """The layer, or the smallest part around it that has a parameter which could want a gradient."""
    while name and all(is_quantised(p) for p in modules[name].parameters()):
        name = name.rpartition(".")[0]
    return modules[name]


def _is_frozen(module: nn.Module) -> bool:
    parameters = [p for p in module.parameters() if not is_quantised(p)]
    return bool(parameters) and not any(p.requires_grad for p in parameters)


def tied_beyond(model: nn.Module, trained: tuple[str, ...]) -> Iterator[str]:
    """Sentences on what trains because it is one weight with something that is named to train."""
    within = tuple(f"{name}." for name in trained)
    every = named_parameters(model, every=True)
    named = {id(p): name for name, p in every.items() if name.startswith(within) or name in trained}
    for name, p in every.items():
        mine = named.get(id(p))
        if mine is not None and mine != name and not (name.startswith(within) or name in trained):
            yield f"{mine} and {name} are one weight: training one trains both."


def passed_by(
    modules: dict[str, nn.Module],
    adapted: tuple[str, ...],
    others: tuple[str, ...],
    targets: tuple[str, ...],
) -> Iterator[str]:
    """A sentence on the weights in the adapted blocks that a preset for all layers cannot adapt."""
    presets = [target for target in targets if target in ("all-linear", "all")]
    blocks = {match.group() for name in adapted if (match := re.match(r".*\.\d+\.", f"{name}."))}
    elsewhere = tuple(f"{name}." for name in others)
    if not presets:
        return
    sizes = [
        sum(p.numel() for p in modules[name].parameters(recurse=False) if p.dim() > 1) for name in adapted
    ]
    found: dict[str, int] = {}
    choosing = routers(modules)
    for name, module in modules.items():
        path = f"{name}." if name else ""
        if (
            name in choosing
            or is_supported(module)
            or isinstance(module, EMBEDDINGS)
            or path.startswith(elsewhere)
        ):
            continue
        for leaf, p in module.named_parameters(recurse=False):
            weight = sum(size > 1 for size in p.shape) > 1 and 2 * p.numel() >= min(sizes)
            anywhere = leaf in stacks_in(module) or "expert" in f"{path}{type(module).__name__}".lower()
            taken = f"{path}{leaf}".lstrip(".") in adapted or SMALL.search(leaf)
            if weight and not taken and (anywhere or any(path.startswith(block) for block in blocks)):
                place = re.sub(r"(?<=\.)\d+(?=\.)", "*", f".{path}{leaf}")[1:]
                found[place] = found.get(place, 0) + p.numel()
    if found:
        share = sum(found.values()) / (sum(found.values()) + sum(sizes))
        yield (
            f"target_modules={presets[0]!r} does not adapt {', '.join(map(repr, found))}: {share:.0%} "
            "of the weights in the adapted blocks are in modules that UORA cannot adapt, and stay "
            "frozen. If they are experts, set is_transposed on their module (False: experts, "
            "outputs, inputs)."
        )
