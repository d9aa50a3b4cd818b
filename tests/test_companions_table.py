"""The table of what goes with ``UORACallback``: a row for all that Lightning exports, and rows hold."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import lightning
import pytest
from packaging.version import Version

FOLDER = Path(__file__).parent.parent / "benchmarks"
TABLE = FOLDER / "results/companions.csv"
AGAIN = [
    ("callback", "Timer", ""),
    ("callback", "ModelPruning", "all"),
    ("precision", "MixedPrecision", "bf16-mixed"),
]
"""Cheap rows, judged anew: right, refused, and right in another precision."""


@pytest.fixture
def companions(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("companions")


@pytest.fixture
def entries(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("companions_entries")


@pytest.mark.skipif(lightning.__version__ < "2.6", reason="the stored table is of Lightning 2.6")
def test_everything_that_lightning_exports_has_a_row(companions, entries):
    """Callbacks, loggers, precision plugins, strategies by class and by registered name."""
    rows = companions.read(TABLE)
    for kind, names in entries.exported().items():
        assert names - {name for of, name, _ in rows if of == kind} == set()


def test_no_row_is_of_something_that_does_not_exist(companions, entries):
    """Lightning before the version of the table may lack what came later."""
    rows = companions.read(TABLE)
    (version,) = {row["lightning"] for row in rows.values()}
    if Version(lightning.__version__) < Version(version):
        pytest.skip(f"the table is of Lightning {version}")
    exported = entries.exported()
    for kind, name, _ in rows:
        names = name.split(", ") if kind == "pair" else [name]
        assert set(names) <= exported["callback" if kind == "pair" else kind]
    known = {companions.key_of(entry) for kind in exported for entry in entries.entries(kind)}
    assert {key for key in rows if key[0] != "pair"} == known


@pytest.mark.skipif(lightning.__version__ < "2.6", reason="the stored table is of Lightning 2.6")
def test_every_pair_of_callbacks_that_are_right_alone_has_a_row(companions, entries):
    rows = companions.read(TABLE)
    right = [e for e in entries.entries("callback") if companions.is_right(rows[companions.key_of(e)])]
    assert {companions.key_of(pair) for pair in entries.pairs(right)} == {k for k in rows if k[0] == "pair"}


def test_the_table_for_readers_is_made_from_the_rows(companions):
    assert TABLE.with_suffix(".md").read_text() == companions.markdown(companions.read(TABLE))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key", AGAIN, ids=lambda key: key[1])
def test_a_row_is_judged_again_as_the_table_says(companions, entries, key: tuple[str, str, str]):
    (entry,) = (e for e in entries.entries(key[0]) if companions.key_of(e) == key)
    assert companions.judged(entry)["verdict"] == companions.read(TABLE)[key]["verdict"]
