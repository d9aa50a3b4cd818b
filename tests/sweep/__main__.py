"""``python -m tests.sweep``: every model, one row each in results.csv, and RESULTS.md from it.

Goes on where it stopped: rows that are there are kept, unless ``--again`` names their verdict or family.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace

from tests.sweep import timm_models, transformers_models
from tests.sweep.pool import each
from tests.sweep.results import read, write
from tests.sweep.verdicts import Row, judge_timm, judge_transformers

SECONDS = 120.0
Job = tuple[str, str]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--again", nargs="*", default=[], help="verdicts or families to judge again; 'all'")
    options = parser.parse_args(arguments)
    known = {(row.library, row.family): row for row in read()}
    again = [job for job, row in known.items() if {"all", row.verdict, row.family} & set(options.again)]
    rows = {job: row for job, row in known.items() if job not in again}
    jobs = [(*job, known[job].member if job in known else "") for job in all_jobs() if job not in rows]
    for number, (job, results, ended) in enumerate(each(judge, jobs, options.workers, SECONDS), 1):
        row = results[-1] if results else Row(*job[:2])
        rows[job[:2]] = row = replace(row, reason=f"{row.reason}; {ended}") if ended else row
        write([rows[job] for job in all_jobs() if job in rows])
        print(
            f"{number}/{len(jobs)} {row.library} {row.family}: {row.verdict} {row.reason[:150]}", flush=True
        )


def all_jobs() -> list[Job]:
    return [("transformers", t) for t in transformers_models.model_types()] + [
        ("timm", f) for f in timm_models.families()
    ]


def judge(job: tuple[str, str, str]) -> Iterator[Row]:
    library, family, member = job
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    return judge_timm(family, member) if library == "timm" else judge_transformers(family)


if __name__ == "__main__":
    main(sys.argv[1:])
