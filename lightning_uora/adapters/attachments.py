"""Where adapters are: every root that was attached to, whose layers are whose, and what trains there."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from torch import nn

from lightning_uora.adapters.layers import AdaptedModule, adapted_modules
from lightning_uora.adapters.names import named_modules, named_parameters
from lightning_uora.adapters.projections import Projections

__all__ = [
    "Attachment",
    "adopt",
    "attachment_of",
    "attachments",
    "is_adapted",
    "recorded_ids",
    "require_attachments",
    "trained_names",
    "trained_parameters",
    "vectors_in",
    "whole_of",
]

# Note [What trains]
# It is decided when adapters are attached and written down, by name, with the owner of A and B. It is not
# read back from requires_grad, which freeze(), GANs and callbacks move for a while. What the user lets train
# besides, by hand, is added when training starts and when something is saved; also what lies outside of the
# root, as it is named there. Names find parameters, which are then matched by identity: a tied one counts
# under any of its names. The owner holds no module, or a copy of one layer would copy the whole model.


@dataclass(frozen=True)
class Attachment:
    """What one call of ``attach_uora`` left behind, as it is seen from a module around it or inside it.

    Attributes:
        path: Plain name of ``root`` in the module that was looked at.
        root: The module that was attached to; or a part inside of it, if that was looked at.
        owner: Of A and B.
        key: What the owner is registered as at the root; None for a part.
    """

    path: str
    root: nn.Module
    owner: Projections
    key: str | None

    @property
    def prefix(self) -> str:
        """Of names inside the root."""
        return f"{self.path}." if self.path else ""

    @property
    def within(self) -> str:
        """What names of the whole begin with in a part; empty for the whole."""
        if self.key is not None:
            return ""
        name, layer = self.layers[0]
        return self.owner.adapted[layer.layer_index].removesuffix(name)

    @property
    def layers(self) -> list[tuple[str, AdaptedModule]]:
        """(plain name within the root, module) of this owner's adapted modules, in model order."""
        return [
            (name, module)
            for name, module in named_modules(self.root).items()
            if isinstance(module, AdaptedModule) and module._uora.owner is self.owner
        ]


def attachments(model: nn.Module) -> list[Attachment]:
    """Every adapted root in ``model``, in model order; of a part of one, that part."""
    found = [
        Attachment(path, module, child, key)
        for path, module in named_modules(model).items()
        for key, child in module._modules.items()
        if isinstance(child, Projections)
    ]
    for one in found:
        one.owner.root = weakref.ref(one.root)  # a copy does not know its own yet
    if found:
        return found
    owners = {id(module._uora.owner): module._uora.owner for _, module in adapted_modules(model)}
    return [Attachment("", model, owner, None) for owner in owners.values()]


def whole_of(part: Attachment) -> Attachment | None:
    """Of a part what it is a part of; None where that is gone, or the part is a copy."""
    root = part.owner.root() if part.owner.root is not None else None
    found = [] if root is None else attachments(root)
    return next((one for one in found if one.owner is part.owner), None)


def require_attachments(model: nn.Module, action: str) -> list[Attachment]:
    """As :func:`attachments`; raises ``ValueError`` where there is none."""
    found = attachments(model)
    if not found:
        raise ValueError(f"{action}: {type(model).__name__} holds no adapted model; call attach_uora first.")
    return found


def attachment_of(model: nn.Module, action: str) -> Attachment:
    """The only one in ``model``.

    Raises:
        ValueError: There is none, or there are several.
    """
    found = require_attachments(model, action)
    if len(found) > 1:
        where = ", ".join(f"{one.path or 'the module itself'} ({_layers_in_words(one)})" for one in found)
        raise ValueError(
            f"{action} takes one adapted model, but there are several here: {where}; pass one of them."
        )
    return found[0]


def _layers_in_words(one: Attachment) -> str:
    names = [name for name, _ in one.layers]
    return f"{names[0]!r}, {len(names)} layers" if names else "no layer"


def is_adapted(model: nn.Module) -> bool:
    """Whether ``model`` or anything in it has adapters."""
    return any(True for _ in adapted_modules(model))


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All that trains in ``model`` by plain name, d and b among it; see Note [What trains]."""
    trained = _trained_ids(model)
    return {name: p for name, p in named_parameters(model).items() if id(p) in trained}


def trained_names(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains besides d and b, by plain name."""
    vectors = {id(v) for v in vectors_in(model)}
    return {name: p for name, p in trained_parameters(model).items() if id(p) not in vectors}


def vectors_in(model: nn.Module) -> list[nn.Parameter]:
    """D and b of every adapted module whose A and B are in ``model``, in model order, each once."""
    return _vectors_of(attachments(model))


def _vectors_of(found: list[Attachment]) -> list[nn.Parameter]:
    layers = [layer for one in found for _, layer in one.layers]
    return list({id(v): v for layer in layers for v in (layer.uora_d, layer.uora_b)}.values())


def recorded_ids(model: nn.Module) -> set[int]:
    """Identities of d, b and what is written down to train in ``model``; see Note [What trains]."""
    there, every = attachments(model), named_parameters(model, every=True)
    found = {id(v) for v in _vectors_of(there)}
    for one in there:
        inside = [n.removeprefix(one.within) for n in one.owner.trained if n.startswith(one.within)]
        names = [f"{one.prefix}{name}" for name in inside] + one.owner.outside.get(one.prefix, [])
        found |= {id(every[name]) for name in names if name in every}
    return found


def _trained_ids(model: nn.Module) -> set[int]:
    wanting = (p for m in named_modules(model).values() for p in m._parameters.values() if p is not None)
    return recorded_ids(model) | {id(p) for p in wanting if p.requires_grad}


def adopt(model: nn.Module) -> None:
    """Write down what trains besides by the user's hand."""
    found, known = [one for one in attachments(model) if one.key is not None], recorded_ids(model)
    for name, p in named_parameters(model).items():
        if not found or not p.requires_grad or id(p) in known:
            continue
        home = next((one for one in found if name.startswith(one.prefix)), None)
        if home is not None:
            home.owner.trained.append(name.removeprefix(home.prefix))
        else:
            found[0].owner.outside.setdefault(found[0].prefix, []).append(name)
