"""What an adapted model trains, as numbers and as a table."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_uora.adapters import (
    Attachment,
    activated,
    adapter_names,
    attachments,
    is_opaque,
    named_adapters,
    named_modules,
    sizes,
    trained_names,
    trained_parameters,
)

__all__ = ["LayerSummary", "Summary", "summarize", "trained_parts"]

WIDTH, NARROWEST = 80, 12
"""Columns that the table fits, and the least for its names."""


@dataclass(frozen=True)
class LayerSummary:
    """One adapted module: its class before, its weight read as (m, n), its rank, the numbers in d and b."""

    name: str
    kind: str
    m: int
    n: int
    rank: int
    adapter_params: int


@dataclass(frozen=True)
class Summary:
    """Parameter counts of an adapted model. ``str()`` gives :meth:`table` as plain text, 80 columns wide.

    Attributes:
        adapter_params: Numbers in d and b.
        trainable_params: All that trains.
        total_params: All parameters. A and B are buffers and not counted anywhere.
        layers: The adapted modules, in model order.
        trained: What trains besides the vectors, by name ("biases" if only biases train), and how many
            numbers.
        left: Your own layers that stay frozen at their random start.
        kept: Parts that you froze and that stay frozen.
        waiting: Names of the inactive adapters.
    """

    adapter_params: int
    trainable_params: int
    total_params: int
    layers: tuple[LayerSummary, ...]
    trained: tuple[tuple[str, int], ...] = ()
    left: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()

    @property
    def trainable_fraction(self) -> float:
        """Share of all parameters that train."""
        return self.trainable_params / self.total_params

    def table(self, rates: Mapping[str, str] | None = None) -> Table:
        """A rich table of what is adapted and what trains; layers that repeat in every block share a line.

        Args:
            rates: Learning rates by the names in :attr:`trained` and ``"vectors"``, ready to print.
        """
        rates = rates or {}
        within, groups = grouped(self.layers)
        lines = [[name, f"{len(of):,}", _size(of), _trained(of)] for name, of in groups.items()]
        ranks = ", ".join(dict.fromkeys(str(layer.rank) for layer in self.layers))
        vectors = [(f"vectors d and b, rank {ranks}", "vectors", self.adapter_params)] if self.layers else []
        trained = [*vectors, *((name, name, count) for name, count in self.trained)]
        below = [
            [label, "", "", f"{count:,}", *([rates.get(name, "none")] if rates else [])]
            for label, name, count in trained
        ]
        share = f"all that trains, {self.trainable_fraction:.3%} of {self.total_params:,}"
        below.append([share, "", "", f"{self.trainable_params:,}"])
        told = {"frozen at their start": self.left, "frozen by you": self.kept}
        told |= {"inactive adapters": self.waiting}
        below += [[f"{what}: {', '.join(names)}", "", "", "0"] for what, names in told.items() if names]
        table = Table(title="UORA adapters", caption=f"names within {within}" if within else None)
        headings = ["what", "layers", "m x n", "trainable", *(["lr"] if rates else [])]
        table.add_column(headings[0], overflow="fold")
        for heading in headings[1:]:
            table.add_column(heading, justify="right", no_wrap=True)
        columns = list(zip_longest(headings, *lines, *below, fillvalue=""))
        room = WIDTH - 3 * len(headings) - 1 - sum(max(map(len, cells)) for cells in columns[1:])
        for cells in lines:
            table.add_row(_broken(cells[0], room), *cells[1:])
        table.add_section()
        for cells in below:
            table.add_row(_broken(cells[0], room), *cells[1:])
        return table

    def __str__(self) -> str:
        console = Console(width=WIDTH, file=io.StringIO())
        with console.capture() as capture:
            console.print(self.table())
        return capture.get().rstrip()


def grouped(layers: Sequence[LayerSummary]) -> tuple[str, dict[str, list[LayerSummary]]]:
    """Layers at one place of every block in one line, those beside with the same sizes too.

    Returns:
        The path that all names begin with, and the layers of each line: ``blocks.*.attn.q, k, v``.
    """
    paths = [layer.name.split(".")[:-1] for layer in layers]
    within: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1 or parts[0].isdigit():
            break
        within.append(parts[0])
    found: dict[tuple[str, str], list[LayerSummary]] = {}
    for layer in layers:
        *path, leaf = ("*" if part.isdigit() else part for part in layer.name.split(".")[len(within) :])
        found.setdefault(("".join(f"{part}." for part in path), leaf or "(root)"), []).append(layer)
    beside: dict[tuple[str, tuple[tuple[int, int], ...]], list[str]] = {}
    for (place, leaf), same in found.items():
        beside.setdefault((place, tuple((layer.m, layer.n) for layer in same)), []).append(leaf)
    lines: dict[str, list[LayerSummary]] = {}
    for (place, sizes_there), leaves in beside.items():
        together = [layer for leaf in leaves for layer in found[place, leaf]]
        if leaves == ["*"] and len(together) == len(set(sizes_there)) == 2:  # named rather than starred
            start = len(".".join([*within, ""]))
            lines |= {layer.name[start:]: [layer] for layer in together}
        else:
            lines[f"{place}{', '.join(leaves)}"] = together
    return ".".join(within), lines


def _size(layers: Sequence[LayerSummary]) -> str:
    """Of one of them, or of the largest."""
    found = {(layer.m, layer.n) for layer in layers}
    m, n = max(found, key=math.prod)
    return f"up to {m} x {n}" if len(found) > 1 else f"{m} x {n}"


def _trained(layers: Sequence[LayerSummary]) -> str:
    return f"{sum(layer.adapter_params for layer in layers):,}"


def _broken(name: str, room: int) -> str:
    """In lines of at most ``room`` letters, which end after a dot or a word where they can."""
    lines = [""]
    for part in re.findall(r"[^. ]+[. ]?|[. ]", name):
        if len(lines[-1]) + len(part.rstrip()) > max(room, NARROWEST) and lines[-1]:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def summarize(model: nn.Module, name: str | None = None) -> Summary:
    """Count what trains. Works for a model without adapters too (then ``layers`` is empty).

    Args:
        model: Any module.
        name: Which adapter; None: the active one. The inactive ones are listed by name.
    """
    with activated(model, name):
        return _summary(model)


def _summary(model: nn.Module) -> Summary:
    layers = []
    for name, module in named_adapters(model):
        parts = module.adapted_parts
        m, n, rank = sum(part.m for part in parts), parts[0].n, module.uora_d.shape[-1]
        count = module.uora_d.numel() + module.uora_b.numel()
        layers.append(LayerSummary(name, module.original_class.__name__, m, n, rank, count))
    parameters = list(model.parameters())
    found = attachments(model)
    return Summary(
        adapter_params=sum(layer.adapter_params for layer in layers),
        trainable_params=sum(p.numel() for p in trained_parameters(model).values()),
        total_params=sum(p.numel() for p in parameters) + _packed_away(model),
        layers=tuple(layers),
        trained=tuple((name, sum(p.numel() for p in found)) for name, found in trained_parts(model).items()),
        left=tuple(name for one in found for name in _still_left(model, one)),
        kept=tuple(f"{one.prefix}{name}" for one in found for name in one.owner.kept),
        waiting=tuple(n for n in _names(model, found) if n != found[0].owner.name),
    )


def _packed_away(model: nn.Module) -> int:
    """How many numbers quantised weights stand for beyond those that they are packed into."""
    weights = {
        id(w): (m, w)
        for m in model.modules()
        if is_opaque(m) and (w := m._parameters.get("weight")) is not None
    }
    return sum(math.prod(sizes(module)) - weight.numel() for module, weight in weights.values())


def _names(model: nn.Module, found: list[Attachment]) -> list[str]:
    return adapter_names(model) if len(found) == 1 and found[0].key is not None else []


def _still_left(model: nn.Module, one: Attachment) -> list[str]:
    """What was left frozen when adapters were attached, and no other adapter or hand has taken since."""
    trained = (*trained_names(model), *(name for name, _ in named_adapters(model)))
    names = [f"{one.prefix}{name}" for name in one.owner.left]
    return [name for name in names if not any(f"{t}.".startswith(f"{name}.") for t in trained)]


def trained_parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """What trains besides the vectors: by module where all of it does, by parameter else, biases together."""
    trained = trained_names(model)
    found: dict[str, list[nn.Parameter]] = {}
    covered: tuple[str, ...] = ()
    for name, module in named_modules(model).items():
        inner = [f"{name}.{leaf}" for leaf, _ in module.named_parameters()] if name else []
        if inner and not f"{name}.".startswith(covered) and all(full in trained for full in inner):
            found[name] = [trained[full] for full in inner]
            covered += (f"{name}.",)
    rest = {full: p for full, p in trained.items() if not full.startswith(covered)}
    biases = [p for full, p in rest.items() if full.rpartition(".")[2].endswith("bias")]
    found |= {full: [p] for full, p in rest.items() if not full.rpartition(".")[2].endswith("bias")}
    return found | ({"biases": biases} if biases else {})
