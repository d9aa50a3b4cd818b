"""What an adapted model trains, as numbers and as a table; its vectors and refreshes as figures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_uora.adapters import AdaptedModule, named_adapters, projections_of
from lightning_uora.distributed import whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LayerSummary", "Summary", "plot_refreshes", "plot_vectors", "summarize"]


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


def plot_vectors(model: nn.Module) -> Figure:
    """Heat map of the magnitudes of d by layer and direction, refreshed entries marked; histograms by layer.

    Args:
        model: The root that was given to ``attach_uora``. If it is sharded every rank must call this.

    Returns:
        A matplotlib figure that is not registered with pyplot (nothing to close).

    Raises:
        ImportError: matplotlib is not installed (extra ``plot``).
        ValueError: The model is not adapted.
    """
    record = projections_of(model).record
    layers = list(named_adapters(model))
    magnitudes = [whole(module.uora_d.detach()).abs().float().cpu().numpy() for _, module in layers]
    figure = _figure(10, 1.5 + 0.22 * len(layers))
    heat, histogram = figure.subplots(1, 2, width_ratios=[3, 1], sharey=True)
    image = heat.imshow(magnitudes, aspect="auto", interpolation="nearest", cmap="viridis")
    figure.colorbar(image, ax=heat, label="|d|", location="left", pad=0.22)
    for row, (_, module) in enumerate(layers):
        marked = sorted(_refreshed(record, module))
        heat.plot(marked, [row] * len(marked), "r.", markersize=3)
        counts, edges = _histogram(magnitudes[row])
        middles = (edges[:-1] + edges[1:]) / 2
        histogram.fill_between(
            middles, row + 0.45, row + 0.45 - 0.9 * counts / max(counts.max(), 1), alpha=0.7
        )
    heat.set(xlabel="direction (red: refreshed)", yticks=range(len(layers)))
    heat.set_yticklabels([name or "(root)" for name, _ in layers], fontsize=6)
    histogram.set(xlabel="|d|")
    return figure


def plot_refreshes(model_or_records: nn.Module | Sequence[dict[str, Any]]) -> Figure:
    """Timeline: which projections were refreshed after which step, and how many rows.

    Args:
        model_or_records: An adapted model, or ``callback.refreshes``.

    Returns:
        A matplotlib figure that is not registered with pyplot.

    Raises:
        ImportError: matplotlib is not installed (extra ``plot``).
        ValueError: The model is not adapted.
    """
    model = model_or_records
    records = projections_of(model).record if isinstance(model, nn.Module) else list(model)
    keys = list(dict.fromkeys(key for record in records for key in record["rows"]))
    figure = _figure(8, 1.5 + 0.18 * len(keys))
    axes = figure.subplots()
    points = [(r["step"], keys.index(key), len(rows)) for r in records for key, rows in r["rows"].items()]
    if points:
        steps, places, counts = zip(*points, strict=True)
        drawn = axes.scatter(steps, places, c=counts, s=30, cmap="plasma")
        figure.colorbar(drawn, ax=axes, label="rows refreshed")
    axes.set(xlabel="optimizer step", yticks=range(len(keys)), title=f"{len(records)} refreshes")
    axes.set_yticklabels(keys, fontsize=6)
    return figure


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'lightning-uora[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _histogram(values: Any) -> tuple[Any, Any]:
    import numpy

    return numpy.histogram(values, bins=30)


def _refreshed(record: Sequence[dict[str, Any]], module: AdaptedModule) -> set[int]:
    """Directions of a layer whose row of A was ever refreshed."""
    keys = {f"A_{part.n}{own}" for part in module.adapted_parts for own in ("", f"_{module.layer_index}")}
    return {i for entry in record for key, rows in entry["rows"].items() if key in keys for i in rows}
