"""From ``results/step_time.csv`` to ``results/step_time.md`` and ``results/step_time.png``."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from looks import LOOKS, marked
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, NullFormatter

Groups = dict[tuple[str, ...], dict[str, dict[str, str]]]
DRAWN = {
    "uora": ("uora", "UORA"),
    "peft vera": ("vera", "PEFT VeRA"),
    "peft lora r 8": ("lora", "PEFT LoRA r 8"),
    "full": ("full", "full fine-tuning"),
}
"""Whose looks each method has, and its name."""


def groups(rows: list[dict[str, str]], *parts: str) -> Groups:
    """Rows of those parts by model and size, then by method."""
    found: Groups = {}
    for row in rows:
        if row["part"] in parts:
            key = tuple(row[name] for name in ("shape", "precision", "layers", "rank", "batch", "tokens"))
            found.setdefault(key, {})[row["method"]] = row
    return found


def table(rows: list[dict[str, str]]) -> Iterator[str]:
    """Ratios to the floor, one line for each model."""
    yield (
        "| model, layers, rank, tokens | floor, ms | UORA | merged | factored | PEFT VeRA | PEFT LoRA r 8 "
        "| full | UORA / VeRA | saved, MiB: UORA, VeRA, LoRA | peak, MiB: UORA, VeRA, LoRA |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for (shape, precision, layers, rank, _, tokens), by in groups(rows, "table").items():
        against = float(by["uora"]["ms"]) / float(by["peft vera"]["ms"])
        three = [by[name] for name in ("uora", "peft vera", "peft lora r 8")]
        saved, peak = (", ".join(f"{float(row[k]):.0f}" for row in three) for k in ("saved_mib", "peak_mib"))
        name = f"{shape}, {layers}, {rank}, {tokens}" + ("" if precision == "32" else f", {precision}")
        yield (
            f"| {name} | {float(by['floor']['ms']):.0f} | {_ratio(by['uora'])} | "
            f"{_short(by['uora merged'])} | {_short(by['uora factored'])} | "
            f"{_short(by['peft vera'])} | {_short(by['peft lora r 8'])} | "
            f"{_short(by['full'])} | {against:.2f} | {saved} | {peak} |"
        )


def _ratio(row: dict[str, str]) -> str:
    return f"**{float(row['ratio']):.3f}** [{float(row['low']):.3f}, {float(row['high']):.3f}]"


def _short(row: dict[str, str]) -> str:
    return f"{float(row['ratio']):.2f}"


def choices(rows: list[dict[str, str]]) -> Iterator[str]:
    """How good the automatic choice is: of whole models, then of single layers."""
    worst = []
    for key, by in groups(rows, "table", "rank", "tokens", "layers").items():
        auto, better = (
            float(by["uora"]["ratio"]),
            min(float(by[f"uora {how}"]["ratio"]) for how in ("merged", "factored")),
        )
        worst.append((auto / better, key))
    if worst:
        ratio, key = max(worst)
        near = sum(r <= 1.1 for r, _ in worst)
        yield (
            f"Whole models: the automatic choice is within 10 % of the better form in {near} of "
            f"{len(worst)}; at worst {ratio:.2f} x ({', '.join(key)})."
        )
    layers = groups(rows, "crossing")
    lost = {key: float(by["auto"]["ratio"]) for key, by in layers.items()}
    if lost:
        key = max(lost, key=lambda k: lost[k])
        near = sum(r <= 1.1 for r in lost.values())
        yield (
            f"Single layers: within 10 % in {near} of {len(lost)}; at worst {lost[key]:.2f} x "
            f"(layer {key[0]}, rank {key[3]}, {key[5]} tokens)."
        )


def once(rows: list[dict[str, str]]) -> Iterator[str]:
    """What is done once."""
    found = {row["method"]: row for row in rows if row["part"] == "life"}
    if found:
        names = ("attach", "refresh of a quarter", "save", "load", "merge")
        what = ", ".join(f"{name} {float(found[name]['ms']) / 1e3:.2f} s" for name in names)
        shape = f"{found['attach']['shape']}, rank {found['attach']['rank']}, `qkv`"
        yield (
            f"{shape}: {what}. Attaching takes {float(found['attach']['peak_mib']):.0f} MiB at its peak; "
            f"evaluation without gradients {float(found['evaluation']['ratio']):.3f} x the plain model."
        )


def draw(rows: list[dict[str, str]]) -> Figure:
    """Time against rank, tokens and layers, and the crossing of the two forms."""
    figure = Figure(figsize=(12, 9), layout="constrained")
    places = list(figure.subplots(2, 2).flat)
    _line(places[0], groups(rows, "rank"), 3, "rank (4 layers, 1,576 tokens)")
    tokens = groups(rows, "tokens")
    _line(places[1], {k: v for k, v in tokens.items() if k[3] == "1024"}, 5, "tokens (4 layers, rank 1024)")
    _line(places[2], groups(rows, "layers"), 2, "layers (rank 256, 788 tokens)")
    if places[0].has_data():
        places[0].legend(fontsize=14)
    for by in groups(rows, "crossing").values():
        merged, factored = float(by["merged"]["ms"]), float(by["factored"]["ms"])
        places[3].loglog(
            float(by["auto"]["low"]), factored / merged, "o", color=LOOKS["uora"][0], markersize=7
        )
    for axis in (places[3].xaxis, places[3].yaxis):
        axis.set_major_formatter(FormatStrFormatter("%g"))
        axis.set_minor_formatter(NullFormatter())
    places[3].set_yticks([0.5, 1, 2, 5])
    places[3].axvline(1, color="grey", linewidth=0.8)
    places[3].axhline(1, color="grey", linewidth=0.8)
    places[3].set_xlabel("factored / merged, counted operations", fontsize=14)
    places[3].set_ylabel("factored / merged, measured time", fontsize=14)
    for place in places:
        place.grid(alpha=0.3)
        place.tick_params(labelsize=13)
    return figure


def _line(
    place: Axes, found: dict[tuple[str, ...], dict[str, dict[str, str]]], field: int, name: str
) -> None:
    """Ratio with quartiles of every method over one field of the key."""
    if not found:
        place.set(xlabel=f"{name}: not measured")
        return
    for method, looks in DRAWN.items():
        rows = [(int(key[field]), by[method]) for key, by in found.items() if method in by]
        x, y = [k for k, _ in rows], [float(row["ratio"]) for _, row in rows]
        low = [float(row["ratio"]) - float(row["low"]) for _, row in rows]
        high = [float(row["high"]) - float(row["ratio"]) for _, row in rows]
        place.errorbar(x, y, [low, high], **marked(*looks))
    measured = sorted({int(key[field]) for key in found})
    place.set(xscale="log")
    place.set_xlabel(name, fontsize=14)
    place.set_ylabel("step, times the frozen floor", fontsize=14)
    place.set_xticks(measured, [f"{value:,}" for value in measured])
    place.xaxis.set_minor_formatter(NullFormatter())


def report(folder: Path) -> None:
    """Write the Markdown and the plot."""
    with (folder / "step_time.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = ["# Step time and memory\n", *table(rows), "", *choices(rows), "", *once(rows), ""]
    (folder / "step_time.md").write_text("\n".join(lines))
    draw(rows).savefig(folder / "step_time.png", dpi=110)
    print("\n".join(lines))
