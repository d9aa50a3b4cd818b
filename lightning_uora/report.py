"""What an adapted model trains, as numbers and as a table."""

from __future__ import annotations

import io
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_uora.injection import named_adapters

__all__ = ["LayerSummary", "Summary", "summarize"]


@dataclass(frozen=True)
class LayerSummary:
    """One adapted module: class before it was adapted, weight read as (m, n), rank, r + m."""

    name: str
    kind: str
    m: int
    n: int
    rank: int
    adapter_params: int


@dataclass(frozen=True)
class Summary:
    """Parameter counts of an adapted model. ``str()`` gives :meth:`table` as plain text."""

    adapter_params: int
    trainable_params: int
    total_params: int
    layers: tuple[LayerSummary, ...]

    @property
    def trainable_fraction(self) -> float:
        """Share of all parameters that train; A and B are buffers and count on neither side."""
        return self.trainable_params / self.total_params

    def table(self) -> Table:
        """A rich table: layers of one shape in one line, then the totals."""
        table = Table(title="UORA adapters")
        for column in ("layers", "kind", "m x n", "rank", "trainable"):
            table.add_column(column, justify="left" if column in ("layers", "kind") else "right")
        groups: dict[tuple[str, int, int, int], list[LayerSummary]] = {}
        for layer in self.layers:
            groups.setdefault((layer.kind, layer.m, layer.n, layer.rank), []).append(layer)
        for (kind, m, n, rank), layers in groups.items():
            more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
            trainable = sum(layer.adapter_params for layer in layers)
            table.add_row(
                f"{layers[0].name or '(root)'}{more}", kind, f"{m} x {n}", str(rank), f"{trainable:,}"
            )
        table.add_section()
        table.add_row("adapters", "", "", "", f"{self.adapter_params:,}")
        table.add_row("heads and others", "", "", "", f"{self.trainable_params - self.adapter_params:,}")
        table.add_row(f"of {self.total_params:,}", "", "", "", f"{self.trainable_fraction:.3%}")
        return table

    def __str__(self) -> str:
        console = Console(width=100, file=io.StringIO())
        with console.capture() as capture:
            console.print(self.table())
        return capture.get().rstrip()


def summarize(model: nn.Module) -> Summary:
    """Count what trains. Works for a model without adapters too (then ``layers`` is empty)."""
    layers = []
    for name, module in named_adapters(model):
        parts = module.adapted_parts
        m, n, rank = sum(part.m for part in parts), parts[0].n, module.uora_d.numel()
        layers.append(LayerSummary(name, module.original_class.__name__, m, n, rank, rank + m))
    parameters = list(model.parameters())
    return Summary(
        adapter_params=sum(layer.adapter_params for layer in layers),
        trainable_params=sum(p.numel() for p in parameters if p.requires_grad),
        total_params=sum(p.numel() for p in parameters),
        layers=tuple(layers),
    )
