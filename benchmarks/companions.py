"""Which callbacks, strategies, precisions and loggers of Lightning go with ``UORACallback``, by real runs.

    python benchmarks/companions.py                          # every row; minutes on one core
    python benchmarks/companions.py callback logger          # of callback, strategy, precision, logger, pair
    python benchmarks/companions.py callback --only Timer    # some rows

Each row is a fit of four epochs with a validation, predictions, and the same fit resumed from the checkpoint
of its middle; the same without adapters where anything is off. Pairs are of callbacks that are right alone.

- ``right``: every vector moved, no bit of the base did, and the resumed run ends at the outputs of the
  unbroken one, bit for bit. "without adapters a resume ends elsewhere too": the companion itself does so.
- ``refused``: ``UORACallback`` says so, in this line.
- ``does not apply``: the same run dies without adapters too, of this.
- ``wrong``: anything else.

Rows go to ``benchmarks/results/companions.csv`` and from there to ``companions.md``.
"""

from __future__ import annotations

import argparse
import csv
import gc
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import lightning
import torch

sys.path.insert(0, str(Path(__file__).parent))
from companions_entries import SPAWNED, entries, pairs
from companions_runs import Entry, verdict

RESULTS = Path(__file__).parent / "results"
KINDS = ("callback", "strategy", "precision", "logger", "pair")
COLUMNS = ["kind", "name", "setting", "verdict", "seconds", "lightning"]
LIMIT = 300  # seconds for all strategies that launch a second process
Row = dict[str, str]
Rows = dict[tuple[str, str, str], Row]


def key_of(entry: Entry) -> tuple[str, str, str]:
    """What a row is found by."""
    return entry.kind, entry.name, entry.setting


def judged(entry: Entry, folder: Path | None = None) -> Row:
    """The row of an entry, by a real run."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        said = verdict(entry, folder or Path(temporary))
    seconds = f"{time.perf_counter() - start:.1f}"
    return dict(zip(COLUMNS, [*key_of(entry), said, seconds, lightning.__version__], strict=True))


def launched(entry: Entry) -> bool:
    """Whether Lightning starts the second process by running this command again."""
    several = entry.name.startswith("ddp") or entry.name in ("DDPStrategy", "ModelParallelStrategy")
    return several and not any(how in entry.name for how in SPAWNED)


def judged_launched(wanted: list[Entry]) -> Iterator[Row]:
    """All strategies of that sort in one process, which Lightning makes two."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "rows.csv"
        command = [sys.executable, __file__, "--ranks", str(table), "--only", *(e.name for e in wanted)]
        environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "WORLD_SIZE")}
        environment["OMP_NUM_THREADS"] = "1"
        ended = subprocess.run(
            command, env=environment, timeout=LIMIT, check=False, capture_output=True, text=True
        )
        found = read(table)
    for entry in wanted:
        if key_of(entry) in found:
            yield found[key_of(entry)]
        else:
            said = f"wrong: the processes ended with {ended.returncode}, {ended.stderr.strip()[-100:]}"
            yield dict(zip(COLUMNS, [*key_of(entry), said, "0", lightning.__version__], strict=True))


def in_ranks(table: Path, only: list[str]) -> None:
    """One of the two processes; folders have one name in both."""
    rows: Rows = {}
    for number, entry in enumerate(e for e in entries("strategy") if e.name in only):
        rows[key_of(entry)] = judged(entry, table.parent / str(number))
        if os.environ.get("LOCAL_RANK", "0") == "0":
            write(rows, table)


def read(path: Path) -> Rows:
    """Rows by what they are found by."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {(r["kind"], r["name"], r["setting"]): r for r in csv.DictReader(file)}


def write(rows: Rows, path: Path) -> None:
    """The whole table."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())


def is_right(row: Row) -> bool:
    """Whether a row says so, with or without a remark."""
    return row["verdict"].partition(":")[0] == "right"


def markdown(rows: Rows) -> str:
    """The table for readers; of the pairs only those that are not right."""
    counts = Counter((row["kind"], row["verdict"].partition(":")[0]) for row in rows.values())
    verdicts = ("right", "refused", "does not apply", "wrong")
    versions = ", ".join(sorted({row["lightning"] for row in rows.values()}))
    lines = ["# What goes with `UORACallback`", ""]
    lines += [
        f"Made by `python benchmarks/companions.py` with Lightning {versions}. The command's first lines"
    ]
    lines += ["say what a verdict means. Pairs that are right are not listed.", ""]
    lines += [f"| kind | {' | '.join(verdicts)} |", f"|---|{'---|' * len(verdicts)}"]
    for kind in KINDS:
        lines.append(f"| {kind} | {' | '.join(str(counts[kind, verdict]) for verdict in verdicts)} |")
    for kind in KINDS:
        lines += ["", f"## {kind}", "", "| name | setting | verdict |", "|---|---|---|"]
        for row in rows.values():
            if row["kind"] == kind and not (kind == "pair" and row["verdict"] == "right"):
                said = row["verdict"].replace("|", "\\|")
                lines.append(f"| {row['name']} | {row['setting']} | {said} |")
    return "\n".join(lines) + "\n"


def measured(kind: str, only: list[str], rows: Rows) -> Iterator[Row]:
    """The rows of a kind, each as soon as it is there."""
    if kind == "pair":
        wanted = list(pairs([e for e in entries("callback") if is_right(rows[key_of(e)])]))
    else:
        wanted = entries(kind)
    wanted = [entry for entry in wanted if not only or entry.name in only]
    together = [entry for entry in wanted if kind == "strategy" and launched(entry)]
    if together:
        yield from judged_launched(together)
    for entry in wanted:
        if entry not in together:
            yield judged(entry)


def ordered(rows: Rows) -> Rows:
    """As Lightning lists them; what is no more is left out."""
    keys = [key_of(entry) for kind in KINDS[:-1] for entry in entries(kind)]
    right = [e for e in entries("callback") if key_of(e) in rows and is_right(rows[key_of(e)])]
    keys += [key_of(entry) for entry in pairs(right)]
    return {key: rows[key] for key in keys if key in rows}


def main() -> None:
    """Measure what is asked for, and keep it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", help=", ".join(KINDS))
    parser.add_argument("--only", nargs="+", default=[], help="rows by name")
    parser.add_argument("--report", action="store_true", help="only write companions.md anew")
    parser.add_argument("--ranks", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    gc.freeze()  # some companions collect garbage all the time
    if given.ranks is not None:
        in_ranks(given.ranks, given.only)
        return
    if not set(given.kinds) <= set(KINDS):
        parser.error(f"kinds are {', '.join(KINDS)}; got {' '.join(given.kinds)}")
    path, start = RESULTS / "companions.csv", time.perf_counter()
    rows = read(path)
    for kind in () if given.report else given.kinds or KINDS:
        for row in measured(kind, given.only, rows):
            rows[row["kind"], row["name"], row["setting"]] = row
            print(" | ".join(row.values()), flush=True)
            write(rows, path)
        write(rows := ordered(rows), path)
    (RESULTS / "companions.md").write_text(markdown(rows))
    print(f"Lightning {lightning.__version__}: {len(rows)} rows, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
