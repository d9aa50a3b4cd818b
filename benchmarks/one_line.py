"""What ``callbacks=[UORACallback(...)]`` gives, added to code that trains everything at one rate.

    python benchmarks/one_line.py            # all runs that results/one_line.csv lacks, then table and plot
    python benchmarks/one_line.py --quick    # every task and method in a small form; minutes, nothing is kept
    python benchmarks/one_line.py --report   # only table and plot

The tasks of ``quality.py``, trained as a new user would: a LightningModule whose ``configure_optimizers``
returns ``AdamW(self.parameters(), lr=base_lr)``, constant or with warm-up and cosine, and a Trainer. Every
run is a process of its own on one thread, as many at a time as there are cores. For a seed all methods start
from the same weights and head and see the same batches. A run writes two rows to
``benchmarks/results/one_line.csv``, validation and test, as soon as it is over, and a run that is there is
not made again.
"""

from __future__ import annotations

import argparse
import os
from functools import partial

from one_line_runs import COLUMNS, CONVNET, LINES, METHODS, STARTS, TASKS, LineRun, has, run_at, wanted
from runs import RESULTS, SEEDS, carry_out


def execute(run: LineRun, quick: bool = False) -> list[dict]:
    """Train and score; the rows of the table. Runs in a process of its own."""
    import torch
    from one_line_methods import train
    from quality_tasks import TASKS

    torch.set_num_threads(1)
    task = TASKS[run.task](run.seed, quick)
    model, count, seconds = train(task, run)
    row = {**run.__dict__, "metric": task.metric, "adapter_params": count, "seconds": round(seconds, 2)}
    return [{**row, "split": split, "value": round(task.score(model, split), 3)} for split in ("val", "test")]


def quick(tasks: list[str], methods: list[str]) -> None:
    """Each task once by each method with warm-up and cosine, eight steps; no result is kept."""
    for task in tasks:
        for method in methods:
            if has(task, method):
                run = run_at(task, method, LINES[1], 0, STARTS.get(method))
                print(*execute(run, quick=True), sep="\n", flush=True)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--tasks", nargs="+", default=[*TASKS, CONVNET], choices=[*TASKS, CONVNET])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--minutes", type=float, default=480)
    given = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    if given.quick:
        return quick(given.tasks, given.methods)
    if not given.report:
        left = partial(wanted, given.tasks, given.methods, given.seeds)
        path = RESULTS / "one_line.csv"
        carry_out(path, LineRun, left, execute, given.workers, given.minutes, COLUMNS)
    from one_line_report import report

    return report(RESULTS)


if __name__ == "__main__":
    main()
