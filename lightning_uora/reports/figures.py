"""The vectors and the refreshes of an adapted model as figures, layers by their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_uora.adapters import AdaptedModule, attachment_of
from lightning_uora.distributed import whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_refreshes", "plot_vectors"]

QUANTILES = (0.05, 0.5, 0.95)


def plot_vectors(model: nn.Module) -> Figure:
    """Plot which directions each layer uses: a heat map of ``|d|``, beside it the spread of ``|b|``.

    Refreshed directions are marked. The scale starts at zero. For b, whose length differs by layer, median
    and 5-95 % range are drawn.

    Args:
        model: The model that you gave to ``attach_uora``. If it is sharded, every process must call this.

    Returns:
        A matplotlib figure that is not registered with pyplot (nothing to close).

    Raises:
        ImportError: matplotlib is not installed (extra ``plot``).
        ValueError: The model is not adapted.
    """
    one = attachment_of(model, "plot_vectors")
    record, layers = one.owner.record, one.layers
    magnitudes = [_magnitudes(module.uora_d) for _, module in layers]
    figure = _figure(10, 1.8 + 0.18 * len(layers))
    heat, spread = figure.subplots(1, 2, width_ratios=[3, 1], sharey=True)
    image = heat.imshow(
        torch.stack(magnitudes).numpy(), aspect="auto", interpolation="nearest", cmap="viridis", vmin=0
    )
    figure.colorbar(image, ax=heat, label="|d|", location="left", pad=0.02)
    for row, (_, module) in enumerate(layers):
        marked = sorted(_refreshed(record, module))
        heat.plot(marked, [row] * len(marked), "|", color="white", markersize=4)
        low, middle, high = _magnitudes(module.uora_b).quantile(torch.tensor(QUANTILES)).tolist()
        spread.plot([low, high], [row, row], color="tab:blue", linewidth=3, alpha=0.5)
        spread.plot(middle, row, "o", color="tab:blue", markersize=4)
    heat.set(xlabel="direction (white: refreshed at least once)", yticks=range(len(layers)))
    heat.set_yticklabels(_short([name for name, _ in layers]), fontsize=7)
    spread.set(xlabel="|b|: median, 5-95 %")
    spread.set_xlim(left=0)
    spread.grid(alpha=0.3, axis="x")
    return figure


def plot_refreshes(model_or_records: nn.Module | Sequence[dict[str, Any]]) -> Figure:
    """Plot how much of each layer was refreshed, and when: a heat map of layers by refreshes.

    The scale starts at zero. Columns of B that turn with the same layer's rows of A are not drawn again. From
    ``callback.refreshes`` alone, layers have numbers instead of names, and counts instead of shares.

    Args:
        model_or_records: An adapted model, or ``callback.refreshes``.

    Returns:
        A matplotlib figure that is not registered with pyplot.

    Raises:
        ImportError: matplotlib is not installed (extra ``plot``).
        ValueError: The model is not adapted.
    """
    model = model_or_records if isinstance(model_or_records, nn.Module) else None
    one = None if model is None else attachment_of(model, "plot_refreshes")
    records = list(model_or_records) if one is None else one.owner.record  # type: ignore[arg-type]
    layers = [] if one is None else one.layers
    rank = layers[0][1].uora_d.shape[-1] if layers else None
    counts: dict[str, list[float]] = {}
    for column, entry in enumerate(records):
        for key, rows in entry["rows"].items():
            if not _turns_with_a(key, entry["rows"]):
                total = int(key.split("_")[1].partition(":")[0]) if key.endswith(":rows") else rank
                share = 100 * len(rows) / total if rank and total else float(len(rows))
                counts.setdefault(key, [0.0] * len(records))[column] = share
    names = _short([name for name, _ in layers])
    keys = sorted(counts, key=_place)
    figure = _figure(max(5, 3.5 + 0.6 * len(records)), 1.8 + 0.18 * len(keys))
    axes = figure.subplots()
    axes.set(xlabel="refresh after optimizer step", title=f"{len(records)} refreshes")
    if not keys:
        axes.set(xlabel="", xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no direction was turned", ha="center", va="center", transform=axes.transAxes)
    else:
        table = torch.tensor([counts[key] for key in keys]).numpy()
        drawn = axes.imshow(table, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0)
        label = "directions turned, % of the layer's" if rank else "directions turned"
        figure.colorbar(drawn, ax=axes, label=label)
        axes.set(xticks=range(len(records)), yticks=range(len(keys)))
        axes.set_xticklabels([str(entry["step"]) for entry in records])
        axes.set_yticklabels([_label(key, names) for key in keys], fontsize=7)
    return figure


def _magnitudes(vector: Tensor) -> Tensor:
    found = whole(vector.detach()).abs().float().cpu()
    return found.mean(0) if found.dim() > 1 else found  # of experts, their mean


def _turns_with_a(key: str, rows: dict[str, list[int]]) -> bool:
    """Whether columns of B are those of the layer's rows of A."""
    if not key.startswith("B_") or key.endswith(":rows") or key.count("_") < 2:
        return False
    layer = key.rpartition("_")[2]
    return any(a.startswith("A_") and a.endswith(f"_{layer}") and rows[a] == rows[key] for a in rows)


def _place(key: str) -> tuple[int, str]:
    """Layers in model order, what is shared before them."""
    name = key.removesuffix(":rows")
    return (int(name.rpartition("_")[2]) if name.count("_") == 2 else -1), key


def _label(key: str, names: Sequence[str]) -> str:
    """A projection in words: a layer by its name, what all layers share by its size."""
    side, size, *layer = key.removesuffix(":rows").split("_")
    whose = f"all of {'width' if side == 'A' else 'height'} {size}"
    if layer:
        whose = names[int(layer[0])] if names else f"layer {layer[0]}"
    if key.endswith(":rows"):
        return f"{whose}, rows of B"
    return whose if side == "A" else f"{whose}, columns of B"


def _short(names: Sequence[str]) -> list[str]:
    """Names without the path that all of them begin with."""
    paths = [name.split(".") for name in names]
    common = 0
    while len(names) > 1 and all(len(p) > common + 1 and p[common] == paths[0][common] for p in paths):
        common += 1
    return [".".join(path[common:]) or "(root)" for path in paths]


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'lightning-uora[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _refreshed(record: Sequence[dict[str, Any]], module: AdaptedModule) -> set[int]:
    """Directions of a layer whose row of A was ever refreshed."""
    keys = {f"A_{part.n}{own}" for part in module.adapted_parts for own in ("", f"_{module.layer_index}")}
    return {i for entry in record for key, rows in entry["rows"].items() if key in keys for i in rows}
