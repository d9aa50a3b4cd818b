"""The table of ``one_line.py``: methods, base rates and schedules, and which rates won."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from runs import COLUMNS, GRID, Results, Run, climb

COLUMNS = [*COLUMNS, "base_lr", "schedule"]
TASKS = ["digits", "docstrings", "docstrings-all", "manual"]
CONVNET = "fashion-frozen-norm"
"""A pretrained ConvNet, by fewer methods and seeds: a run takes 50 seconds."""
LINES = ((1e-3, "constant"), (1e-4, "cosine"), (2e-5, "cosine"))
METHODS = {"line": 64, "lora": 8, "head": 0, "groups": 64, "line+inputs": 64, "full": 0, "lora-own": 8}
"""Ranks, in the order of the runs: what the goals need first."""
CONVNET_METHODS, CONVNET_SEEDS = ("line", "lora", "head", "full"), 4
GRIDS = {
    "groups": tuple(sorted({*GRID, 2e-2, 5e-2})),
    "lora-own": tuple(rate for rate in GRID if rate <= 3e-2),
}
"""Rates of the methods that have one of their own; the others take the base rate."""
STARTS = {"groups": 3e-2, "lora-own": 3e-3}
REFRESH = {"line": "lambda-0.2", "line+inputs": "lambda-0.2", "groups": "lambda-0.2"}
"""As in ``quality_methods.POLICIES``: the callback's default of version 0.1; the ConvNet has today's."""
SAME = {("docstrings-all", method): "docstrings" for method in ("head", "full")}
"""Where a run does not depend on which layers are adapted: whose it is."""

Line = tuple[float, str]


@dataclass(frozen=True)
class LineRun(Run):
    """A run with what the user wrote into ``configure_optimizers``."""

    base_lr: float
    schedule: str


def run_at(task: str, method: str, line: Line, seed: int, lr: float | None = None) -> LineRun:
    """A run at a rate, or at the base rate."""
    refresh = "threshold-0.05" if (task, method) == (CONVNET, "line") else REFRESH.get(method, "off")
    return LineRun(task, method, METHODS[method], refresh, line[0] if lr is None else lr, seed, *line)


def rate(task: str, method: str, line: Line, done: Results[LineRun]) -> tuple[float | None, list[LineRun]]:
    """The rate of a method's own parameters, or None and the runs that are still needed for it."""
    if method not in GRIDS:
        return line[0], []
    grid = GRIDS[method]
    at = lambda lr, seed: run_at(task, method, line, seed, lr)  # noqa: E731
    return climb(grid, grid.index(STARTS[method]), at, done)


def has(task: str, method: str) -> bool:
    """Whether the table has runs of its own there."""
    return (task, method) not in SAME and (task != CONVNET or method in CONVNET_METHODS)


def _seeds(task: str, seeds: int) -> range:
    return range(min(seeds, CONVNET_SEEDS) if task == CONVNET else seeds)


def wanted(tasks: list[str], methods: list[str], seeds: int, done: Results[LineRun]) -> Iterator[LineRun]:
    """Runs that can be made now, seed by seed over all tasks and schedules, the searches' among them."""
    left = []
    for method in (method for method in METHODS if method in methods):
        for line in LINES:
            for task in (task for task in tasks if has(task, method)):
                lr, needed = rate(task, method, line, done)
                if lr is not None:
                    needed = [run_at(task, method, line, seed, lr) for seed in _seeds(task, seeds)]
                left += [run for run in needed if run not in done]
    yield from sorted(left, key=lambda run: run.seed)
