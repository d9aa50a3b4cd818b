"""What the README and the guide promise holds: the lines train, the numbers are right.

That every snippet runs as printed is tested in ``test_docs.py``.
"""

from __future__ import annotations

import re
from pathlib import Path

import lightning.pytorch
import pytest

import lightning_uora
from lightning_uora.trainer.rates import AUTO_RATE, auto_rate

ROOT = Path(__file__).parent.parent
README, MEASURED = (ROOT / "README.md").read_text(), (ROOT / "docs/measured.md").read_text()
TASKS = ("digits", "docstrings-all", "fashion-frozen-norm")
VISION, TEXT, SAVING = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def trainers(monkeypatch, tmp_path):
    """The Trainers that a script makes, in an empty folder and without files of their own."""
    real, made = lightning.pytorch.Trainer, []

    def quiet(**options):
        settings = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
        made.append(real(**settings, enable_progress_bar=False, **options))
        return made[-1]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lightning.pytorch, "Trainer", quiet)
    return made


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("script", "rate", "layers"), [(VISION, 1e-4, 24), (TEXT, 2e-5, 8)])
def test_the_lines_for_vision_and_text_train(trainers, script, rate, layers):
    """Each is a whole script: the vectors move, at a rate of their own."""
    exec(script, {"__name__": "a_script"})
    (trainer,) = trainers
    named = list(trainer.lightning_module.named_parameters())
    moved = [p.abs().max() > 0 for name, p in named if name.endswith("uora_b")]
    assert len(moved) == layers
    assert all(moved)
    rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    assert rates == [rate, auto_rate(trainer.global_step, layers)]


def test_the_rate_that_the_guide_tells_is_that_of_the_code():
    assert f"their kind is {AUTO_RATE:g} times three factors" in (ROOT / "docs/settings.md").read_text()


def rows(text: str, first: str) -> dict[str, list[str]]:
    """A table whose header begins so: cells by the first one, without bold."""
    lines = text[text.index(first) :].partition("\n\n")[0].replace("**", "").splitlines()[2:]
    cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {name: rest for name, *rest in cells}


@pytest.mark.parametrize("page", [README, MEASURED], ids=["README", "docs/measured"])
def test_the_table_of_the_one_line_is_that_of_its_results(page):
    """Means at 1e-4 and 2e-5 on the digits, on all layers for the docstrings, and on the ConvNet."""
    results = (ROOT / "benchmarks/results/one_line.md").read_text()
    names = {
        "head alone": "head alone",
        "LoRA r 8 at the same rate": "PEFT LoRA r 8",
        "LoRA r 8 at its best rate": "PEFT LoRA r 8, best rate",
        "the one line, rank 64": "UORA, the one line",
        "full fine-tuning": "full fine-tuning",
    }
    shown = rows(page, "| | digits, 1e-4 |")
    assert set(shown) == set(names)
    for name, scores in shown.items():
        tables = [rows(results.partition(f"\n## {task}\n")[2], "| method |") for task in TASKS]
        told = [table.get(names[name], ["not run"] * 3) for table in tables]
        assert scores == [cell.split(" ± ")[0] for row in told for cell in row[1:]], name


def test_the_table_of_quality_is_that_of_its_results():
    """Scores, standard errors and parameters of every row that the guide shows."""
    results = (ROOT / "benchmarks/results/quality.md").read_text()
    columns = ("digits", "docstrings", "docstrings-all", "manual")
    found: dict[tuple[str, str, str, str], str] = {}
    for task in columns:
        table = results.partition(f"\n## {task}\n")[2]
        for line in table[table.index("| method |") :].partition("\n\n")[0].splitlines()[2:]:
            method, rank, refresh, _, count, score, *_ = (cell.strip() for cell in line.strip("|").split("|"))
            found[task, method, rank, refresh] = f"{score}, {count}"
    last = ""
    table = MEASURED[MEASURED.index("| method | digits |") :].partition("\n\n")[0].splitlines()[2:]
    for line in table:
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        refresh = "lambda-0.2" if name == "the same with refreshes" else "off"
        last = name if refresh == "off" else last
        rank = (re.findall(r" r (\d+)", last) or [""])[0]
        method = re.sub(r" r \d+|, no refreshes", "", last)
        for task, cell in zip(columns, cells, strict=True):
            told = found[task, method, rank, refresh]
            if method in ("head only", "full fine-tuning"):
                told, cell = told.partition(",")[0], cell.partition(",")[0]
            assert cell == told, (task, name)


def test_the_tree_names_every_room():
    tree = (ROOT / "docs/contributing.md").read_text().partition("## Rooms")[2]
    for path in Path(lightning_uora.__file__).parent.glob("[a-z]*"):
        if path.suffix == ".py" or path.is_dir():
            assert f"\n  {path.name}{'/' if path.is_dir() else ''} " in tree, path.name
