"""Quality of UORA beside PEFT's LoRA and VeRA, full fine-tuning and a trained head, on four tasks.

    python benchmarks/quality.py            # all runs that results/quality.csv lacks, then table and plot
    python benchmarks/quality.py --quick    # every task and method in a small form; minutes, nothing is kept
    python benchmarks/quality.py --report   # only table and plot

Every run is one process on one thread, as many at a time as there are cores. For a seed all methods start
from the same weights and head and see the same batches. Learning rates come from one grid for all methods:
from a starting point the search goes on to the neighbours until none has a better mean on the validation rows
of the first four seeds; refreshes take the rate that was chosen without them. Only then are the other seeds
run. A run writes two rows to ``benchmarks/results/quality.csv``, validation and test, as soon as it is over,
and a run that is there is not made again.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from functools import partial

from runs import ALL_TASKS, GRID, RESULTS, SEEDS, STARTS, Results, Run, carry_out, search

RANKS = (16, 4, 64, 256)
DRAWS = ("uora+inputs", "uora")
ONE_ROW = ("fashion-dense", "fashion-frozen-dense", "fashion-norm-trained")
"""Tasks that ask what happens to one method."""
Row = tuple[str, int, str]


def methods(refreshes: tuple[str, ...], ranks: tuple[int, ...] = RANKS) -> list[Row]:
    """(method, rank, refresh) of every row, what the goals are about first."""
    rows = [("uora+inputs", ranks[0], "off"), ("lora", 8, "off"), ("vera", 4 * ranks[0], "off")]
    rows += [("head", 0, "off"), ("full", 0, "off"), ("uora", ranks[0], "off")]
    for rank in ranks:
        for draw in ("uora", "uora+inputs"):
            rows += [(draw, rank, refresh) for refresh in ("off", *refreshes)]
        rows.append(("vera", rank, "off"))
    return list(dict.fromkeys([*rows, ("lora", 4, "off"), ("lora", 1, "off")]))


def convolutional(refreshes: tuple[str, ...], ranks: tuple[int, ...], pointwise: bool) -> list[Row]:
    """(method, rank, refresh) of every row of a task of convolutions, where PEFT has no VeRA."""
    rows: list[Row] = [*((draw, 64, "off") for draw in DRAWS), ("lora", 8, "off")]
    rows += [
        ("lora", 1, "off"),
        ("lora", 4, "off"),
        *((draw, rank, "off") for rank in ranks for draw in DRAWS),
    ]
    if pointwise:
        return rows
    rows += [("head", 0, "off"), ("full", 0, "off")]
    return rows + [(draw, 64, refresh) for draw in DRAWS for refresh in refreshes]


def rows_of(task: str, refreshes: tuple[str, ...], ranks: tuple[int, ...]) -> list[Row]:
    """The rows of a task's table."""
    if task in ONE_ROW:
        return [("uora+inputs", 64, "off")]
    if task.startswith("fashion"):
        fewer = tuple(rank for rank in ranks if rank in (16, 256))
        return convolutional(refreshes, fewer, task.endswith("pointwise"))
    return methods(refreshes, ranks)


def wanted(
    tasks: list[str], rows: Callable[[str], list[Row]], seeds: int, done: Results[Run]
) -> Iterator[Run]:
    """Runs that can be made now, in the order in which they should be: rates first, then seed by seed."""
    later = []
    for task in tasks:
        for method in rows(task):
            lr, needed = search(task, method, done)
            yield from needed
            if lr is not None:
                later += [Run(task, *method, lr, seed) for seed in range(seeds)]
    yield from sorted((run for run in later if run not in done), key=lambda run: run.seed)


def execute(run: Run, quick: bool = False) -> list[dict]:
    """Train and score; the rows of the table. Runs in a process of its own."""
    import torch
    from quality_methods import Method, train
    from quality_tasks import TASKS

    torch.set_num_threads(1)
    task = TASKS[run.task](run.seed, quick)
    model, count, seconds = train(Method(run.method, run.rank, run.refresh), task, run.lr, run.seed)
    row = {**run.__dict__, "metric": task.metric, "adapter_params": count, "seconds": round(seconds, 2)}
    return [{**row, "split": split, "value": round(task.score(model, split), 3)} for split in ("val", "test")]


def quick(tasks: list[str]) -> None:
    """Each task once by each method, eight steps; no result is kept."""
    for task in tasks:
        for method in rows_of(task, ("lambda-0.2",), (4,)):
            print(*execute(Run(task, *method, GRID[STARTS[method[0]]], 0), quick=True), sep="\n", flush=True)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--tasks", nargs="+", default=ALL_TASKS)
    parser.add_argument("--refreshes", nargs="*", default=["lambda-0.2"], help="of POLICIES")
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS)
    parser.add_argument("--methods", nargs="+", default=list(STARTS), choices=list(STARTS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--minutes", type=float, default=480)
    given = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    if given.quick:
        return quick(given.tasks)
    if not given.report:

        def rows(task: str) -> list[Row]:
            every = rows_of(task, tuple(given.refreshes), tuple(given.ranks))
            return [row for row in every if row[0] in given.methods]

        left = partial(wanted, given.tasks, rows, given.seeds)
        carry_out(RESULTS / "quality.csv", Run, left, execute, given.workers, given.minutes)
    from quality_report import report

    return report(RESULTS)


if __name__ == "__main__":
    main()
