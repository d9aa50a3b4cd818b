"""From ``results/quality.csv`` to ``results/quality.md`` and ``results/quality.png``.

Means are over seeds on the test rows, at the learning rate that the validation rows chose, with standard
errors. A difference is paired by seed; its interval is Student's, at 95 %. Policies of refreshes are
described in ``quality_methods.py``; which one is the default was chosen by the validation rows.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from intervals import Interval, paired, standard_error
from looks import LOOKS, line, marked
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from runs import Results, Run, read, search

Row = tuple[str, int, str]
NAMES = {
    "head": "head only",
    "full": "full fine-tuning",
    "lora": "PEFT LoRA",
    "vera": "PEFT VeRA",
    "uora": "UORA",
    "uora+inputs": 'UORA, `init="inputs"`',
}
DEFAULT = "lambda-0.2"


@dataclass(frozen=True)
class Table:
    """Scores by task and method, seed by seed: on the test rows, and ``validation``."""

    scores: dict[str, dict[Row, dict[int, float]]]
    validation: dict[str, dict[Row, dict[int, float]]]
    parameters: dict[tuple[str, Row], int]
    seconds: dict[tuple[str, Row], float]
    rates: dict[tuple[str, Row], float]
    runs: int
    hours: float

    def difference(self, task: str, one: Row, other: Row, validation: bool = False) -> Interval | None:
        """``one`` less ``other``, over the seeds that both have; None for fewer than three."""
        scores = (self.validation if validation else self.scores)[task]
        return paired(scores.get(one, {}), scores.get(other, {}))


def tabulate(path: Path) -> Table:
    """The chosen runs of the table of all runs."""
    done: Results[Run] = read(path, Run)
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    hours = sum(float(row["seconds"]) for row in rows) / 3600
    table = Table({}, {}, {}, {}, {}, len(rows), hours)
    for key in dict.fromkeys((r["task"], r["method"], int(r["rank"]), r["refresh"]) for r in rows):
        task, *method = key
        row: Row = tuple(method)
        lr, _ = search(task, row, done)
        seeds = sorted({run.seed for run in done if (run.task, run.method, run.rank, run.refresh) == key})
        runs = {seed: Run(task, *row, lr, seed) for seed in seeds} if lr else {}
        found = {seed: done[run] for seed, run in runs.items() if run in done}
        if not found:
            continue
        for split, scores in (("test", table.scores), ("val", table.validation)):
            scores.setdefault(task, {})[row] = {seed: values[split] for seed, values in found.items()}
        mine = [r for r in rows if (r["task"], r["method"], int(r["rank"]), r["refresh"]) == key]
        mine = [r for r in mine if float(r["lr"]) == lr]
        table.parameters[task, row] = int(mine[0]["adapter_params"])
        table.seconds[task, row] = statistics.median(float(r["seconds"]) for r in mine)
        table.rates[task, row] = lr
    return table


def scores(table: Table, task: str) -> Iterator[str]:
    """A line of Markdown for each method of a task."""
    yield "| method | rank | refresh | lr | adapter parameters | score | - LoRA r 8 | seconds | seeds |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row, values in sorted(table.scores[task].items(), key=lambda item: _place(item[0])):
        method, rank, refresh = row
        mean, error = statistics.mean(values.values()), standard_error(values.values())
        against = table.difference(task, row, ("lora", 8, "off")) if row != ("lora", 8, "off") else None
        score = f"{mean:.1f} ± {error:.1f}" if len(values) > 1 else f"{mean:.1f}"
        yield (
            f"| {NAMES[method]} | {rank or ''} | {refresh} | {table.rates[task, row]:g} | "
            f"{table.parameters[task, row]:,} | {score} | {against or ''} | "
            f"{table.seconds[task, row]:.0f} | {len(values)} |"
        )


def _place(row: Row) -> tuple[int, int, str]:
    return list(NAMES).index(row[0]), row[1], "" if row[2] == "off" else row[2]


def goals(table: Table) -> Iterator[str]:
    """Where each of the three goals stands, as Markdown."""
    yield "### UORA at rank r against PEFT's VeRA at rank 4 r\n"
    yield "Goal: on every task the whole interval above -0.5.\n"
    yield from _differences(table, _against_vera(table), lambda found: found.mean - found.half > -0.5)
    yield "\n### UORA against LoRA r 8, and how many times fewer parameters it trains\n"
    yield "Goal: within 1 point (the mean), at 15 x fewer, 8 x on `manual`.\n"
    yield from _differences(table, _against_lora(table), lambda found: found.mean > -1.0)
    yield "\n### Refreshes on, less off\n"
    yield "Goal: the interval above zero on two tasks at ranks up to 16; at the defaults never below -0.3.\n"
    yield from _differences(table, _on_off(table), _above_zero)
    yield from _defaults(table)
    yield "\n### At equal rank: UORA less PEFT's VeRA, and A from the inputs less random A\n"
    yield from _differences(table, _at_equal_rank(table), _above_zero)
    yield "\n### Less LoRA r 1: UORA of the largest rank with no more parameters\n"
    yield from _differences(table, _against_smallest_lora(table), _above_zero)
    yield "\n### The pretrained ConvNet: what is adapted, what else trains\n"
    yield "| first | less | on test rows | seeds |"
    yield "|---|---|---|---|"
    for one, other in CONVNET:
        found = paired(*(table.scores.get(task, {}).get(row, {}) for task, row in (one, other)))
        if found is not None:
            yield f"| {_said(*one)} | {_said(*other)} | {found} | {found.pairs} |"


def _said(task: str, row: Row) -> str:
    return f"{task}: {NAMES[row[0]]}{f' r {row[1]}' if row[1] else ''}"


FROZEN, INPUTS = "fashion-frozen-norm", ("uora+inputs", 64, "off")
CONVNET = (
    (("fashion-frozen-dense", INPUTS), (FROZEN, INPUTS)),
    (("fashion-frozen-pointwise", INPUTS), (FROZEN, INPUTS)),
    (("fashion-norm-trained", INPUTS), ("fashion", INPUTS)),
    ((FROZEN, ("uora+inputs", 256, "off")), (FROZEN, ("full", 0, "off"))),
    ((FROZEN, INPUTS), (FROZEN, ("lora", 1, "off"))),
)
"""Pairs of a task and a row, whose difference docs/measured.md tells."""
Comparison = tuple[str, str, Row, Row]


def _against_vera(table: Table) -> Iterator[Comparison]:
    for task, methods in table.scores.items():
        for row in sorted(methods, key=_place):
            if row[0].startswith("uora") and row[2] == "off" and ("vera", 4 * row[1], "off") in methods:
                yield task, "", row, ("vera", 4 * row[1], "off")


def _against_lora(table: Table) -> Iterator[Comparison]:
    lora = ("lora", 8, "off")
    for task, methods in table.scores.items():
        for row in sorted(methods, key=_place):
            if row[0].startswith("uora") and row[2] == "off" and lora in methods:
                fewer = table.parameters[task, lora] / table.parameters[task, row]
                yield task, f"{fewer:.1f} x", row, lora


def _on_off(table: Table) -> Iterator[Comparison]:
    for task, methods in table.scores.items():
        for row in sorted(methods, key=_place):
            if row[0].startswith("uora") and row[2] != "off":
                yield task, row[2], row, (row[0], row[1], "off")


def _at_equal_rank(table: Table) -> Iterator[Comparison]:
    for task, methods in table.scores.items():
        for row in sorted(methods, key=_place):
            for other in ("vera", "uora") if row[0] == "uora+inputs" else ("vera",):
                if row[0].startswith("uora") and row[2] == "off" and (other, *row[1:]) in methods:
                    yield task, f"less {NAMES[other]}", row, (other, *row[1:])


def _against_smallest_lora(table: Table) -> Iterator[Comparison]:
    lora = ("lora", 1, "off")
    for task, methods in table.scores.items():
        for draw in ("uora", "uora+inputs"):
            most = table.parameters.get((task, lora), 0)
            fitting = [row for row in methods if row[0] == draw and row[2] == "off"]
            fitting = [row for row in fitting if table.parameters[task, row] <= most]
            for row in sorted(fitting, key=_place)[-1:]:
                yield task, f"{table.parameters[task, row]:,} and {most:,}", row, lora


def _defaults(table: Table) -> Iterator[str]:
    """One line on all settings with the default schedule."""
    pairs = [(task, one, other) for task, refresh, one, other in _on_off(table) if refresh == DEFAULT]
    found = [f for pair in pairs if (f := table.difference(*pair)) is not None]
    if found:
        means = [f.mean for f in found]
        above = sum(mean > -0.3 for mean in means), sum(f.mean - f.half > -0.3 for f in found)
        one_side = sum(abs(f.mean) > f.half for f in found)
        yield (
            f"\nAt the defaults of version 0.1 ({DEFAULT}), {len(found)} settings: {min(means):+.2f} to "
            f"{max(means):+.2f}, {statistics.mean(means):+.2f} in the mean; above -0.3 are {above[0]}, with "
            f"the whole interval {above[1]}; the interval lies on one side of zero in {one_side}."
        )


def _above_zero(found: Interval) -> bool:
    return found.mean - found.half > 0.0


def _differences(
    table: Table, pairs: Iterable[Comparison], holds: Callable[[Interval], bool]
) -> Iterator[str]:
    """A line for each pair; whether it ``holds`` is said of the test rows."""
    yield "| task | UORA | | on validation rows | on test rows | seeds | holds |"
    yield "|---|---|---|---|---|---|---|"
    for task, about, one, other in pairs:
        found, before = table.difference(task, one, other), table.difference(task, one, other, True)
        if found is not None:
            name, verdict = f"{NAMES[one[0]]}, r {one[1]}", "yes" if holds(found) else "no"
            yield f"| {task} | {name} | {about} | {before} | {found} | {found.pairs} | {verdict} |"


def draw(table: Table) -> Figure:
    """Score against trainable adapter parameters; bars are standard errors.

    A panel for each task, two in a row, but for tasks that ask about one method alone.
    """
    shown = {task: methods for task, methods in table.scores.items() if len({row[0] for row in methods}) > 2}
    down = math.ceil((len(shown) + 1) / 2)
    figure = Figure(figsize=(12, 4.4 * down), layout="constrained")
    places = list(figure.subplots(down, 2, squeeze=False).flatten())
    for place in places[len(shown) :]:
        place.axis("off")
    for place, (task, methods) in zip(places, shown.items(), strict=False):
        _panel(place, table, task, methods)
    handles = {
        label: h for axes in places for h, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    places[-1].legend(handles.values(), handles.keys(), loc="center", fontsize=15, frameon=False)
    return figure


def _panel(place: Axes, table: Table, task: str, methods: dict[Row, dict[int, float]]) -> None:
    for method in LOOKS:
        rows = [row for row in sorted(methods, key=_place) if row[0] == method and row[2] == "off"]
        if not rows:
            continue
        y = [statistics.mean(methods[row].values()) for row in rows]
        error = [standard_error(methods[row].values()) for row in rows]
        label = NAMES[method].replace("`", "")
        if method in ("head", "full"):
            place.axhline(y[0], **line(method, label))
        else:
            x = [table.parameters[task, row] for row in rows]
            place.errorbar(x, y, error, **marked(method, label))
    place.set(xscale="log")
    place.set_title(task, fontsize=16)
    place.set_xlabel("adapter parameters", fontsize=14)
    place.set_ylabel("test score, points", fontsize=14)
    place.tick_params(labelsize=13)
    place.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    place.xaxis.set_major_formatter(EngFormatter(sep=""))
    place.xaxis.set_minor_formatter(NullFormatter())
    place.grid(alpha=0.3)


def report(folder: Path) -> None:
    """Write the Markdown and the plot, and print where they are."""
    table = tabulate(folder / "quality.csv")
    lines = ["# Quality\n", f"{__doc__.partition(chr(10) * 2)[2]}"]
    lines += [
        f"{table.runs:,} runs, the search for rates among them, trained for {table.hours:.1f} core-hours."
    ]
    for task in table.scores:
        lines += [f"\n## {task}\n", *scores(table, task)]
    lines += ["\n## The goals\n", *goals(table), ""]
    (folder / "quality.md").write_text("\n".join(lines))
    draw(table).savefig(folder / "quality.png", dpi=110)
    print(folder / "quality.md", folder / "quality.png")
