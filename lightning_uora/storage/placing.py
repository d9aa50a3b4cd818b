"""Where an adapter belongs in a model: the part that its names are of, and what of a trained head fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lightning_uora.adapters import OWNER, find_heads, named_layers, named_parameters
from lightning_uora.storage.restoring import few

__all__ = ["Place", "place_of", "renamed"]


@dataclass(frozen=True)
class Place:
    """A part of a model and an adapter's names in it.

    Attributes:
        root: The part that the names are of.
        without: What all of the adapter's names begin with, and the part's do not.
        said: In words, where the names differ from the model's.
        head: Names in the part that train as its own head, where the adapter's is left aside.
        aside: Tensors of the adapter that are left aside.
        below: What its names in the root begin with, and the adapter's do not.
    """

    root: nn.Module
    without: str = ""
    said: str = ""
    head: tuple[str, ...] = ()
    aside: frozenset[str] = frozenset()
    below: str = ""

    def name_of(self, name: str) -> str:
        """A name of the adapter as it is in the root."""
        return f"{self.below}{name.removeprefix(self.without)}"

    def within(self, root: nn.Module, path: str) -> Place:
        """The same place, seen from a module that holds the part at ``path``."""
        below = f"{path}." if path else ""
        head = tuple(f"{below}{name}" for name in self.head)
        aside = frozenset(f"{below}{name}" for name in self.aside)
        return replace(self, root=root, head=head, aside=aside, below=below)


def place_of(
    model: nn.Module, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], head: bool, lenient: bool
) -> Place:
    """Find the part of ``model`` that an adapter is for.

    Args:
        model: A plain model.
        manifest: Of the adapter.
        tensors: Likewise.
        head: Whether the head that was trained with it is wanted.
        lenient: Whether a head that does not fit may be left aside.

    Raises:
        ValueError: The model lacks modules that the adapter is for, or has several parts that fit; its head
            does not fit.
    """
    root, without, said = _part(model, list(manifest["adapted"]))
    names = [n.removeprefix(without) for n in manifest["trained"]]
    outside = [n for n in manifest["trained"] if not n.startswith(without)]
    parameters = named_parameters(root, every=True)
    misfits = [n for n in names if n not in parameters or not _fits(parameters[n], tensors, without + n)]
    misfits = [n for n in misfits if n not in outside]
    if head and (misfits or outside) and not lenient:
        what = [*outside, *misfits]
        sizes = _shapes(misfits, parameters, tensors, without)
        raise ValueError(
            f"{few(what)} trained with the adapter and do(es) not fit this model{sizes}; pass head=False to "
            "load the adapter without the head."
        )
    heads = () if head else find_heads(root)
    within = tuple(f"{one}." for one in heads)
    aside = {*misfits, *outside, *(n for n in names if n.startswith(within))}
    if not aside:
        return Place(root, without, said)
    told = f"{few(sorted(aside))} of the adapter is left aside." if head else ""
    mine = find_heads(root) if manifest["config"].get("trainable_modules", "auto") else ()
    return Place(root, without, " ".join(filter(None, (said, told))), tuple(mine), frozenset(aside))


def _fits(parameter: nn.Parameter, tensors: Mapping[str, Tensor], name: str) -> bool:
    return name in tensors and tensors[name].shape == parameter.shape


def _shapes(
    misfits: list[str], parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], without: str
) -> str:
    for name in misfits:
        if name in parameters and without + name in tensors:
            saved, here = tuple(tensors[without + name].shape), tuple(parameters[name].shape)
            return f" ({name} has shape {saved} in the adapter and {here} in the model)"
    return ""


def _part(model: nn.Module, names: list[str]) -> tuple[nn.Module, str, str]:
    """The part, what to take off the adapter's names, and a sentence where either is not as it was saved."""
    modules = named_layers(model)
    if all(name in modules for name in names):
        return model, "", ""
    pieces = [name.split(".") for name in names]
    for cut in range(1, min(map(len, pieces))):
        prefix = ".".join(pieces[0][:cut])
        if all(p[:cut] == pieces[0][:cut] for p in pieces) and all(
            ".".join(p[cut:]) in modules for p in pieces
        ):
            return (
                model,
                f"{prefix}.",
                f"The adapter was saved from a model around this one: {prefix!r} is it.",
            )
    around = [path for path in modules if path and all(f"{path}.{name}" in modules for name in names)]
    if len(around) > 1:
        raise ValueError(
            f"the adapter fits several parts of this model: {few(around)}; give the one that it is for."
        )
    if around:
        said = f"The adapter was saved from a part of this model, and is loaded into {around[0]!r}."
        return modules[around[0]], "", said
    lacking = [name for name in names if name not in modules]
    raise ValueError(
        f"another architecture: the adapter is for {few(names)}, and this model has no {few(lacking)}."
    )


def renamed(values: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """The same by names in the root; A and B keep theirs."""
    return {n if n.startswith(OWNER) else place.name_of(n): v for n, v in values.items()}
