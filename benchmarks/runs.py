"""The table of runs: what a run is, how its rows are kept and found, and which learning rate won."""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

RESULTS = Path(__file__).parent / "results"
COLUMNS = ["task", "method", "rank", "refresh", "lr", "seed", "split", "metric", "value"]
COLUMNS += ["adapter_params", "seconds"]
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
STARTS = {"full": 1, "head": 4, "lora": 3, "vera": 5, "uora": 5, "uora+inputs": 5}
SEARCHED, SEEDS = 4, 8
SEARCHED_BY_TASK = {"fashion": 2, "fashion-pointwise": 2, "fashion-frozen-norm": 2}  # 60 s a run
ALL_TASKS = ["digits", "manual", "docstrings", "docstrings-all"]  # those of convolutions by --tasks
SAME_RATE = {"fashion-dense": "fashion", "fashion-norm-trained": "fashion"}
SAME_RATE |= {
    "fashion-frozen-dense": "fashion-frozen-norm",
    "fashion-frozen-pointwise": "fashion-frozen-norm",
}
"""Tasks that take the rates of another."""


@dataclass(frozen=True)
class Run:
    """One training run; what its rows in the table are found by."""

    task: str
    method: str
    rank: int
    refresh: str
    lr: float
    seed: int


AnyRun = TypeVar("AnyRun", bound=Run)
Results = dict[AnyRun, dict[str, float]]


def search(task: str, method: tuple[str, int, str], done: Results[Run]) -> tuple[float | None, list[Run]]:
    """The learning rate of a row of ``quality.py``, or None and the runs that are still needed for it."""
    name, rank, _ = method
    task = SAME_RATE.get(task, task)
    seeds = SEARCHED_BY_TASK.get(task, SEARCHED)
    return climb(GRID, STARTS[name], lambda lr, seed: Run(task, name, rank, "off", lr, seed), done, seeds)


def climb(
    grid: Sequence[float],
    here: int,
    run_at: Callable[[float, int], AnyRun],
    done: Results[AnyRun],
    seeds: int = SEARCHED,
) -> tuple[float | None, list[AnyRun]]:
    """The rate with the best validation mean, or None and the runs that are still needed for it.

    Args:
        grid: Rates, ascending.
        here: Place in the grid to start from; the search goes on to the neighbours until none is better.
        run_at: The run of a rate and a seed.
        done: Scores of the runs that are over.
        seeds: How many seeds a mean is over.
    """
    while True:
        around = [i for i in (here, here - 1, here + 1) if 0 <= i < len(grid)]
        runs = {i: [run_at(grid[i], seed) for seed in range(seeds)] for i in around}
        missing = [run for i in around for run in runs[i] if run not in done]
        if missing:
            return None, missing
        best = max(around, key=lambda i: statistics.mean(done[run]["val"] for run in runs[i]))
        if best == here:
            return grid[here], []
        here = best


def run_of(row: dict[str, str], kind: type[AnyRun]) -> AnyRun:
    """The run that a row of the table belongs to."""
    read_as = {"str": str, "int": int, "float": float}
    return kind(**{field.name: read_as[str(field.type)](row[field.name]) for field in fields(kind)})


def read(path: Path, kind: type[AnyRun]) -> Results[AnyRun]:
    """Scores by run and split."""
    done: Results[AnyRun] = {}
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                done.setdefault(run_of(row, kind), {})[row["split"]] = float(row["value"])
    return done


def append(path: Path, rows: list[dict], columns: Sequence[str] = COLUMNS) -> None:
    """Rows at the end of the table, its header before the first."""
    path.parent.mkdir(exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def carry_out(
    path: Path,
    kind: type[AnyRun],
    wanted: Callable[[Results[AnyRun]], Iterable[AnyRun]],
    execute: Callable[[AnyRun], list[dict]],
    workers: int,
    minutes: float,
    columns: Sequence[str] = COLUMNS,
) -> None:
    """Make the runs that the table lacks, each in a process of its own; start none after so many minutes.

    Args:
        path: The table; rows are written as soon as a run is over.
        kind: Of the runs.
        wanted: The runs that can be made now, given what is done, in the order in which they should be.
        execute: Makes a run and returns its rows; a function that a new process can import.
        workers: Runs at a time.
        minutes: How long runs are started for.
        columns: Of the table.
    """
    end, done, under_way = time.monotonic() + 60 * minutes, read(path, kind), dict[Future, AnyRun]()
    with ThreadPoolExecutor(workers) as waiting:
        while True:
            busy = set(under_way.values())
            for run in wanted(done) if time.monotonic() < end else ():
                if len(under_way) == workers:
                    break
                if run not in busy:
                    busy.add(run)
                    under_way[waiting.submit(_alone, execute, run)] = run
            if not under_way:
                return
            finished, _ = wait(under_way, return_when=FIRST_COMPLETED)
            for future in finished:
                run = under_way.pop(future)
                append(path, found := future.result(), columns)
                done[run] = {row["split"]: row["value"] for row in found}
                print(run, done[run], f"{found[0]['seconds']} s", flush=True)


def _alone(execute: Callable[[AnyRun], list[dict]], run: AnyRun) -> list[dict]:
    """In a process of its own, forked from one that did nothing but the slow imports."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "lightning.pytorch", "transformers", "timm", "peft"])
    with ProcessPoolExecutor(1, context) as process:
        return process.submit(execute, run).result()
