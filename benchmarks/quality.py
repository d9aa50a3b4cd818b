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
import csv
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
COLUMNS = ["task", "method", "rank", "refresh", "lr", "seed", "split", "metric", "value"]
COLUMNS += ["adapter_params", "seconds"]
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
STARTS = {"full": 1, "head": 4, "lora": 3, "vera": 5, "uora": 5, "uora+inputs": 5}
SEARCHED, SEEDS = 4, 8
RANKS = (16, 4, 64, 256)
ALL_TASKS = ["digits", "manual", "docstrings", "docstrings-all"]


@dataclass(frozen=True)
class Run:
    """One training run; what its rows in the table are found by."""

    task: str
    method: str
    rank: int
    refresh: str
    lr: float
    seed: int


Results = dict[Run, dict[str, float]]


def methods(refreshes: tuple[str, ...], ranks: tuple[int, ...] = RANKS) -> list[tuple[str, int, str]]:
    """(method, rank, refresh) of every row, what the goals are about first."""
    rows = [("uora+inputs", ranks[0], "off"), ("lora", 8, "off"), ("vera", 4 * ranks[0], "off")]
    rows += [("head", 0, "off"), ("full", 0, "off"), ("uora", ranks[0], "off")]
    for rank in ranks:
        for draw in ("uora", "uora+inputs"):
            rows += [(draw, rank, refresh) for refresh in ("off", *refreshes)]
        rows.append(("vera", rank, "off"))
    return list(dict.fromkeys([*rows, ("lora", 4, "off"), ("lora", 1, "off")]))


def search(task: str, method: tuple[str, int, str], done: Results) -> tuple[float | None, list[Run]]:
    """The learning rate with the best validation mean, or None and the runs that are still needed for it."""
    name, rank, _ = method
    here = STARTS[name]
    while True:
        around = [i for i in (here, here - 1, here + 1) if 0 <= i < len(GRID)]
        runs = {i: [Run(task, name, rank, "off", GRID[i], seed) for seed in range(SEARCHED)] for i in around}
        missing = [run for i in around for run in runs[i] if run not in done]
        if missing:
            return None, missing
        best = max(around, key=lambda i: statistics.mean(done[run]["val"] for run in runs[i]))
        if best == here:
            return GRID[here], []
        here = best


def wanted(tasks: list[str], rows: list[tuple[str, int, str]], seeds: int, done: Results) -> Iterator[Run]:
    """Runs that can be made now, in the order in which they should be: rates first, then seed by seed."""
    later = []
    for task in tasks:
        for method in rows:
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


def read(path: Path) -> Results:
    """Scores by run and split."""
    done: Results = {}
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                run = Run(
                    row["task"],
                    row["method"],
                    int(row["rank"]),
                    row["refresh"],
                    float(row["lr"]),
                    int(row["seed"]),
                )
                done.setdefault(run, {})[row["split"]] = float(row["value"])
    return done


def append(path: Path, rows: list[dict]) -> None:
    """Rows at the end of the table, its header before the first."""
    path.parent.mkdir(exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def carry_out(
    tasks: list[str], rows: list[tuple[str, int, str]], seeds: int, workers: int, minutes: float
) -> None:
    """Make the runs that are missing, for so long at most."""
    path, end = RESULTS / "quality.csv", time.monotonic() + 60 * minutes
    done, under_way = read(path), dict[Future, Run]()
    with ProcessPoolExecutor(workers) as pool:
        while time.monotonic() < end:
            busy = set(under_way.values())
            for run in (run for run in wanted(tasks, rows, seeds, done) if run not in busy):
                if len(under_way) == workers:
                    break
                if run not in under_way.values():
                    under_way[pool.submit(execute, run)] = run
            if not under_way:
                return
            finished, _ = wait(under_way, return_when=FIRST_COMPLETED)
            for future in finished:
                run = under_way.pop(future)
                append(path, found := future.result())
                done[run] = {row["split"]: row["value"] for row in found}
                print(run, done[run], f"{found[0]['seconds']} s", flush=True)


def quick(tasks: list[str]) -> None:
    """Each task once by each method, eight steps; no result is kept."""
    for task in tasks:
        for method in methods(("lambda-0.2",), ranks=(4,)):
            print(*execute(Run(task, *method, GRID[STARTS[method[0]]], 0), quick=True), sep="\n", flush=True)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--tasks", nargs="+", default=ALL_TASKS)
    parser.add_argument("--refreshes", nargs="+", default=["lambda-0.2"], help="of POLICIES")
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--minutes", type=float, default=480)
    given = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    if given.quick:
        return quick(given.tasks)
    if not given.report:
        rows = methods(tuple(given.refreshes), tuple(given.ranks))
        carry_out(given.tasks, rows, given.seeds, given.workers, given.minutes)
    from quality_report import report

    return report(RESULTS)


if __name__ == "__main__":
    main()
