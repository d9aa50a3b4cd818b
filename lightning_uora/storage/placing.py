"""Where an adapter belongs in a model: the part that its names are of, and what of a trained head fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lightning_uora.adapters import (
    OWNER,
    find_heads,
    named_layers,
    named_parameters,
    named_parts,
    unsupported,
)
from lightning_uora.storage.restoring import few

__all__ = ["Place", "place_of", "renamed"]


@dataclass(frozen=True)
class Place:
    """A part of a model and an adapter's names in it.

    Attributes:
        root: The part that the names are of.
        without: What all of the adapter's names begin with, and the part's do not; what begins otherwise is
            left aside.
        said: In words, where the names differ from the model's.
        head: Names in the part that train as its own head, where the adapter's is left aside.
        aside: Tensors of the adapter, by their names in the root, that are left aside.
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
    root, without, said = _part(model, manifest)
    names = list(renamed(dict.fromkeys(manifest["trained"]), Place(root, without)))
    outside = [n for n in manifest["trained"] if not n.startswith(without)]
    parameters = named_parameters(root, every=True)
    misfits = [n for n in names if n not in parameters or not _fits(parameters[n], tensors, without + n)]
    if head and (misfits or outside) and not lenient:
        what = [*outside, *misfits]
        sizes = _shapes(misfits, parameters, tensors, without)
        raise ValueError(
            f"this model has no place for {few(what)}, trained with the adapter{sizes}; pass "
            "head=False to load_adapter to leave its head out, or build the model with as many classes."
        )
    heads = () if head else find_heads(root)
    within = tuple(f"{one}." for one in heads)
    aside = {*misfits, *(n for n in names if n.startswith(within))}
    if not aside and not outside:
        return Place(root, without, said)
    told = f"Not loaded from the adapter: {few(sorted({*aside, *outside}))}." if head else ""
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


# Note [Finding the part]
# An adapter's names may begin with a prefix that the model's do not have (it was saved from a module around),
# lack one that they have (from a part), or begin with another one (another wrapper). The longest rest of the
# names that fits somewhere counts. Sizes decide too, so that a part of the same names and other sizes is not
# taken; where only names fit, the part is found as by names, and the error says which size differs.


def _part(model: nn.Module, manifest: Mapping[str, Any]) -> tuple[nn.Module, str, str]:
    """The part, what to take off the adapter's names, and a sentence where either is not as it was saved.

    See Note [Finding the part].
    """
    layers, modules = manifest["layers"], named_layers(model)
    if all(_fits_at(name, one, modules, same_size=not name) for name, one in layers.items()):
        return model, "", ""
    for same_size in (True, False):
        for prefix, places in _candidates(layers, modules, same_size):
            if len(places) > 1:
                raise ValueError(
                    f"the adapter fits several parts of this model: {few(places)}; pass the one that it is "
                    "for."
                )
            without, root = f"{prefix}." if prefix else "", modules[places[0]]
            if not places[0]:
                return root, without, ""
            if not prefix:
                said = f"The adapter was saved from a part of this model; it was loaded into {places[0]!r}."
                return root, without, said
            said = f"What the adapter calls {prefix!r} is {places[0]!r} in this model."
            return root, without, said
    lacking = [name for name in manifest["adapted"] if name not in modules]
    raise ValueError(
        f"another architecture: the adapter is for {few(manifest['adapted'])}, but this model has "
        f"no {few(lacking)}."
    )


def _candidates(
    layers: Mapping[str, Any], modules: Mapping[str, nn.Module], same_size: bool
) -> Iterator[tuple[str, list[str]]]:
    """Prefixes of the adapter's names with the parts that the rest fits, the likeliest first.

    Args:
        layers: The facts of each adapted layer, by name.
        modules: Of the model, by name.
        same_size: Whether layers of other sizes do not fit.
    """
    prefixes = _common_prefixes(list(layers))
    parts = [path for path in modules if path]
    searched = [(prefix, [""]) for prefix in prefixes if prefix] + [(prefix, parts) for prefix in prefixes]
    for prefix, paths in searched:
        rest = {name.removeprefix(f"{prefix}." if prefix else ""): one for name, one in layers.items()}
        found = [
            path
            for path in paths
            if all(
                _fits_at(f"{path}.{name}".strip("."), one, modules, same_size) for name, one in rest.items()
            )
        ]
        if found:
            yield prefix, found


def _common_prefixes(names: list[str]) -> list[str]:
    """What all names begin with and none is, from none to the longest."""
    pieces = [name.split(".") for name in names]
    shortest = min(map(len, pieces))
    cuts = [cut for cut in range(shortest) if all(one[:cut] == pieces[0][:cut] for one in pieces)]
    return [".".join(pieces[0][:cut]) for cut in cuts]


def _fits_at(path: str, layer: Mapping[str, Any], modules: Mapping[str, nn.Module], same_size: bool) -> bool:
    if path not in modules:
        return False
    module = modules[path]
    if not same_size:
        return True
    if unsupported(path, module) is not None:
        return False
    here = [(part.experts, part.m, part.n) for part in named_parts(module).values()]
    return here == [(layer.get("experts", 0), part[2], part[3]) for part in layer["parts"]]


def renamed(values: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """The same by names in the root, less what lies outside of the part; A and B keep their names."""
    return {
        n if n.startswith(OWNER) else place.name_of(n): v
        for n, v in values.items()
        if n.startswith((OWNER, place.without))
    }
