"""From ``results/one_line.csv`` to ``results/one_line.md`` and ``results/one_line.png``.

Every method is trained by the code of a new user: AdamW on all parameters at the base learning rate, constant
or with linear warm-up and cosine. "The one line" adds `callbacks=[UORACallback(rank=64, ...)]` to it and
nothing else. Best rates are those of the adapters alone, in a group of their own, chosen on the validation
rows of four seeds; the head trains at the base rate everywhere. Scores are means on the test rows, in points,
with standard errors, over eight seeds where no other number stands behind them. Differences are paired by
seed; their intervals are Student's, at 95 %.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from intervals import Interval, paired, standard_error
from looks import marked
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from one_line_runs import CONVNET, GRIDS, LINES, METHODS, SAME, TASKS, Line, LineRun, rate, run_at
from runs import SEEDS, read

NAMES = {
    "head": "head alone",
    "lora": "PEFT LoRA r 8",
    "lora-own": "PEFT LoRA r 8, best rate",
    "line": "UORA, the one line",
    "line+inputs": 'UORA, the one line, `init="inputs"`',
    "groups": "UORA, groups by hand, best rate",
    "full": "full fine-tuning",
}
DRAWN = {"head": "head", "lora": "lora", "lora-own": "lora-own", "line": "uora", "line+inputs": "uora+inputs"}
DRAWN |= {"groups": "groups", "full": "full"}
"""Whose looks each method has."""
SCHEDULES = {"constant": "constant", "cosine": "warm-up, cosine"}
CLASSIFICATION = TASKS[:3]
TITLES = {CONVNET: "fashion, a pretrained ConvNet"}
Place = tuple[str, str, Line]


@dataclass(frozen=True)
class Table:
    """Test scores seed by seed, and the rates chosen, by task, method and line."""

    scores: dict[Place, dict[int, float]]
    rates: dict[Place, float]
    runs: int
    hours: float

    def difference(self, task: str, one: str, other: str, line: Line) -> Interval | None:
        """``one`` less ``other``, over the seeds that both have; None for fewer than three."""
        return paired(*(self.scores.get((task, method, line), {}) for method in (one, other)))


def tabulate(path: Path) -> Table:
    """The chosen runs of the table of all runs."""
    done = read(path, LineRun)
    with path.open(newline="") as file:
        hours = sum(float(row["seconds"]) for row in csv.DictReader(file) if row["split"] == "test") / 3600
    table, seeds = Table({}, {}, len(done), hours), sorted({run.seed for run in done})
    for place in ((task, method, line) for task in [*TASKS, CONVNET] for method in METHODS for line in LINES):
        task, method, line = place
        task = SAME.get((task, method), task)
        lr, _ = rate(task, method, line, done)
        runs = {seed: run_at(task, method, line, seed, lr) for seed in seeds if lr is not None}
        if found := {seed: done[run]["test"] for seed, run in runs.items() if run in done}:
            table.scores[place], table.rates[place] = found, lr
    return table


def scores(table: Table, task: str) -> Iterator[str]:
    """A line of Markdown for each method of a task."""
    yield from _heading("method")
    for method, name in NAMES.items():
        cells = [_score(table.scores.get((task, method, line), {})) for line in LINES]
        if any(cells):
            yield f"| {name} | {' | '.join(cells)} |"
    copied = [NAMES[method] for (other, method) in SAME if other == task]
    if copied:
        source = SAME[task, "head"]
        yield f"\nNot run again but copied from {source}, which has the same runs: {', '.join(copied)}."


def _heading(first: str) -> Iterator[str]:
    yield f"| {first} | " + " | ".join(_name(line) for line in LINES) + " |"
    yield "|---|" + "---|" * len(LINES)


def _name(line: Line) -> str:
    mantissa, _, exponent = f"{line[0]:.0e}".partition("e")
    return f"{mantissa}e{int(exponent)}, {SCHEDULES[line[1]]}"


def _score(values: dict[int, float]) -> str:
    if not values:
        return ""
    seeds = f" ({len(values)})" if len(values) != SEEDS else ""
    error = f" ± {standard_error(values.values()):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values.values()):.1f}{error}{seeds}"


def goals(table: Table) -> Iterator[str]:
    """Where each of the three goals stands, as Markdown."""
    yield "### The one line, less groups by hand at their best rate\n"
    yield "Goal: within 1 point (the mean above -1), on every task at every base rate.\n"
    yield from _differences(table, "groups", TASKS, LINES, lambda found: found.mean > -1.0)
    yield "\n### The one line, less LoRA r 8 in the same line\n"
    yield "Goal: the whole interval above 0 at 1e-4 and 2e-5, on the three classification tasks.\n"
    yield from _differences(
        table, "lora", CLASSIFICATION, LINES[1:], lambda found: found.mean - found.half > 0.0
    )
    yield "\n### The one line, less the head alone\n"
    yield "Goal: never below (the mean).\n"
    yield from _differences(table, "head", TASKS, LINES, lambda found: found.mean >= 0.0)


def convnet(table: Table) -> Iterator[str]:
    """The one line on the pretrained ConvNet, less the other methods at the same rate."""
    yield "| base rate | less | difference | seeds |"
    yield "|---|---|---|---|"
    for line in LINES:
        for other in ("lora", "full", "head"):
            found = table.difference(CONVNET, "line", other, line)
            if found is not None:
                yield f"| {_name(line)} | {NAMES[other]} | {found} | {found.pairs} |"


def _differences(
    table: Table, other: str, tasks: list[str], lines: tuple[Line, ...], holds: Callable[[Interval], bool]
) -> Iterator[str]:
    """A line for each task, base rate and draw of A, then how many hold of those that should."""
    yield "| task | base rate | A | difference | seeds | holds |"
    yield "|---|---|---|---|---|---|"
    places = [(task, line, one) for task in tasks for line in lines for one in ("line", "line+inputs")]
    verdicts = []
    for task, line, one in places:
        found = table.difference(task, one, other, line)
        if found is not None:
            verdicts.append(holds(found))
            draw, verdict = "inputs" if one == "line+inputs" else "random", "yes" if verdicts[-1] else "no"
            yield f"| {task} | {_name(line)} | {draw} | {found} | {found.pairs} | {verdict} |"
    missing = len(places) - len(verdicts)
    yield f"\nHolds in {sum(verdicts)} of {len(verdicts)}{f'; {missing} not measured' if missing else ''}."


def chosen(table: Table) -> Iterator[str]:
    """The rates that the validation rows chose."""
    yield from _heading("task, method")
    for task in TASKS:
        for method in (method for method in NAMES if method in GRIDS):
            rates = [table.rates.get((task, method, line)) for line in LINES]
            if any(rates):
                cells = ("" if lr is None else f"{lr:g}" for lr in rates)
                yield f"| {task}, {NAMES[method]} | {' | '.join(cells)} |"


def draw(table: Table) -> Figure:
    """Score against base rate and schedule, a panel for each task; bars are standard errors."""
    figure = Figure(figsize=(15, 9.5), layout="constrained")
    *panels, empty = list(figure.subplots(2, 3).flat)
    for axes, task in zip(panels, [*TASKS, CONVNET], strict=True):
        _panel(axes, table, task)
    handles = {
        label: h for axes in panels for h, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    empty.axis("off")
    empty.legend(handles.values(), handles.keys(), loc="center", fontsize=15, frameon=False)
    figure.supylabel("test score, points", fontsize=16)
    for axes in panels[2:]:  # the lowest of each column
        axes.set_xlabel("base learning rate, schedule", fontsize=16)
    return figure


def _panel(axes: Axes, table: Table, task: str) -> None:
    for place, (method, looks) in enumerate(DRAWN.items()):
        measured = [i for i, line in enumerate(LINES) if (task, method, line) in table.scores]
        values = [list(table.scores[task, method, LINES[i]].values()) for i in measured]
        if values:
            axes.errorbar(
                [i + 0.03 * (place - 3) for i in measured],
                [statistics.mean(v) for v in values],
                [standard_error(v) for v in values],
                **marked(looks, NAMES[method].replace("`", "")),
            )
    labels = [_name(line).replace(", ", "\n", 1) for line in LINES]
    axes.set_xticks(range(len(LINES)), labels, fontsize=13)
    axes.set_xlim(-0.35, 2.35)
    axes.tick_params("y", labelsize=14)
    axes.set_title(TITLES.get(task, task), fontsize=17)
    axes.grid(alpha=0.3)


def report(folder: Path) -> None:
    """Write the Markdown and the plot, and print where they are."""
    table = tabulate(folder / "one_line.csv")
    lines = ["# The one line\n", f"{__doc__.partition(chr(10) * 2)[2]}"]
    lines += [
        f"{table.runs:,} runs, the search for rates among them, trained for {table.hours:.1f} core-hours."
    ]
    for task in dict.fromkeys(task for task, _, _ in table.scores):
        lines += [f"\n## {task}\n", *scores(table, task)]
    lines += ["\n## The one line on the pretrained ConvNet\n", *convnet(table)]
    lines += ["\n## The goals\n", *goals(table), "\n## Learning rates chosen\n", *chosen(table), ""]
    (folder / "one_line.md").write_text("\n".join(lines))
    draw(table).savefig(folder / "one_line.png", dpi=110)
    print(folder / "one_line.md", folder / "one_line.png")
