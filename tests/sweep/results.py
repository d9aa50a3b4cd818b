"""The rows on disk, and the table made from them."""

from __future__ import annotations

import csv
import dataclasses
import re
from collections import Counter
from pathlib import Path

import timm
import torch
import transformers

from tests.sweep.verdicts import COLUMNS, VERDICTS, Row

HERE = Path(__file__).parent
ROWS, TABLE = HERE / "results.csv", HERE / "RESULTS.md"
NUMBERS = {f.name for f in dataclasses.fields(Row) if f.type == "int"}
LIBRARIES = {
    "timm": "families of timm, the smallest member of each",
    "transformers": "model types of transformers",
}


def read(path: Path = ROWS) -> list[Row]:
    """The rows; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            Row(**{k: int(v) if k in NUMBERS else v for k, v in line.items()})
            for line in csv.DictReader(file)
        ]


def write(rows: list[Row], path: Path = ROWS, table: Path = TABLE) -> None:
    """Both files, the rows under a temporary name first."""
    new = path.with_suffix(".new")
    with new.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({**dataclasses.asdict(row), "reason": placeless(row.reason)} for row in rows)
    new.replace(path)
    table.write_text(markdown(read(path)))


def placeless(reason: str) -> str:
    """A message without the folders of the machine it was raised on."""
    return re.sub(r"(?<![\w/])/[^\s'\"]*?site-packages/", "", reason)


def markdown(rows: list[Row]) -> str:
    """The counts, then every model that did not pass, by name and with its reason."""
    parts = [
        "# The sweep",
        f"`make sweep`, with timm {timm.__version__}, transformers {transformers.__version__}, torch "
        f"{torch.__version__}. Each model: attach, equal fresh output, gradients as the formula says, "
        "disabled = base, detach exact, merge = trained output. Rows: `results.csv`. *Built* are those that "
        "run, twice alike and with a gradient, before an adapter is there; shares are of them.",
        counts(rows),
        "## What adapted them",
        presets(rows),
        "## Failed",
        listing(rows, "failed"),
        "## Refused, with the reason",
        listing(rows, "refused"),
        "## Not runnable without us",
        listing(rows, "not runnable"),
    ]
    return "\n\n".join(parts) + "\n"


def counts(rows: list[Row]) -> str:
    lines = ["| | all | not runnable | built | passed | refused | failed |", "|---|---|---|---|---|---|---|"]
    for library, title in LIBRARIES.items():
        found = Counter(row.verdict for row in rows if row.library == library)
        built = sum(found[verdict] for verdict in VERDICTS if verdict != "not runnable")
        share = f"{found['passed']} ({100 * found['passed'] / max(built, 1):.1f} %)"
        numbers = [
            sum(found.values()),
            found["not runnable"],
            built,
            share,
            found["refused"],
            found["failed"],
        ]
        lines.append(f"| {title} | " + " | ".join(map(str, numbers)) + " |")
    return "\n".join(lines)


def presets(rows: list[Row]) -> str:
    """The first preset that found something, in the order attention, all-linear, all."""
    lines = ["| preset | timm | transformers |", "|---|---|---|"]
    for preset in ("attention", "all-linear", "all"):
        found = Counter(row.library for row in rows if row.verdict == "passed" and row.preset == preset)
        lines.append(f"| `{preset}` | {found['timm']} | {found['transformers']} |")
    return "\n".join(lines)


def listing(rows: list[Row], verdict: str) -> str:
    chosen = [row for row in rows if row.verdict == verdict]
    if not chosen:
        return "None."
    lines = [f"| {row.library} | {row.family} | {row.reason[:160].replace('|', '/')} |" for row in chosen]
    return "\n".join(["| library | model | reason |", "|---|---|---|", *lines])
