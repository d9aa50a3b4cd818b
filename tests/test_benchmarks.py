"""The benchmark scripts: what they choose and conclude from made-up tables; each runs in a small form."""

from __future__ import annotations

import ast
import csv
import dataclasses
import importlib
import math
import runpy
import shutil
import statistics
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_uora import ReinitSchedule

FOLDER = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("quality")


@pytest.fixture
def runs(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("runs")


@pytest.fixture
def line_runs(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("one_line_runs")


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def done_by(runs, rates: dict[float, float], seeds=range(4)) -> dict:
    """Validation scores of LoRA r 8 by learning rate, a point apart over the seeds."""
    return {
        runs.Run("digits", "lora", 8, "off", lr, seed): {"val": score + seed, "test": 0.0}
        for lr, score in rates.items()
        for seed in seeds
    }


def test_the_search_asks_for_the_neighbours_of_its_start(runs):
    lr, needed = runs.search("digits", ("lora", 8, "off"), {})
    assert lr is None
    assert {run.lr for run in needed} == {1e-3, 3e-3, 1e-2}
    assert {run.seed for run in needed} == {0, 1, 2, 3}


def test_the_search_walks_to_the_best_rate_and_stops_there(runs):
    rates = {1e-3: 50.0, 3e-3: 60.0, 1e-2: 70.0}
    lr, needed = runs.search("digits", ("lora", 8, "off"), done_by(runs, rates))
    assert lr is None
    assert {run.lr for run in needed} == {3e-2}
    lr, needed = runs.search("digits", ("lora", 8, "off"), done_by(runs, rates | {3e-2: 69.0}))
    assert (lr, needed) == (1e-2, [])


def test_the_search_ends_at_the_edge_of_the_grid(runs):
    rates = dict(zip(runs.GRID, range(50, 58), strict=True))
    assert runs.search("digits", ("lora", 8, "off"), done_by(runs, rates)) == (0.3, [])


def test_refreshes_take_the_rate_that_was_chosen_without_them(quality, runs):
    done = {
        runs.Run("digits", "uora", 16, "off", lr, seed): {"val": value, "test": 0.0}
        for lr, value in ((1e-2, 1.0), (3e-2, 2.0), (1e-1, 0.0))
        for seed in range(4)
    }
    assert runs.search("digits", ("uora", 16, "relative-0.5"), done)[0] == 3e-2
    wanted = list(quality.wanted(["digits"], lambda task: [("uora", 16, "relative-0.5")], 3, done))
    assert [(run.refresh, run.lr, run.seed) for run in wanted] == [
        ("relative-0.5", 3e-2, s) for s in range(3)
    ]


def test_a_run_that_is_in_the_table_is_not_made_again(quality, runs, tmp_path):
    rates = {1e-3: 50.0, 3e-3: 60.0, 1e-2: 55.0}
    done = done_by(runs, rates)
    for run, found in done.items():
        row = {**run.__dict__, "metric": "accuracy", "adapter_params": 7, "seconds": 1.0}
        rows = [{**row, "split": split, "value": value} for split, value in found.items()]
        runs.append(tmp_path / "quality.csv", rows)
    assert runs.read(tmp_path / "quality.csv", runs.Run) == done
    left = list(quality.wanted(["digits"], lambda task: [("lora", 8, "off")], 5, done))
    assert left == [runs.Run("digits", "lora", 8, "off", 3e-3, 4)]


def table_of(runs, path: Path, tests: dict[tuple[str, int, str], list[float]]) -> None:
    """A table in which every method's middle rate is the best, and test scores are those given."""
    for (method, rank, refresh), values in tests.items():
        start = runs.STARTS[method]
        for step, bonus in ((-1, 0.0), (0, 5.0), (1, 0.0)):
            for seed, value in enumerate(values):
                if refresh != "off" and step:
                    continue
                row = {"task": "digits", "method": method, "rank": rank, "refresh": refresh, "seed": seed}
                row |= {"lr": runs.GRID[start + step], "metric": "accuracy", "seconds": 2}
                row |= {"adapter_params": 100 * (rank or 1)}
                scores = {"val": 50.0 + bonus + (refresh != "off"), "test": value if step == 0 else 99.0}
                runs.append(path, [{**row, "split": s, "value": v} for s, v in scores.items()])


def test_the_report_takes_test_scores_at_the_chosen_rate_and_students_interval(quality, runs, tmp_path):
    report = importlib.import_module("quality_report")
    ours, theirs = [90.0, 91.0, 95.0, 93.0], [88.0, 90.0, 91.0, 92.0]
    scores = {("uora+inputs", 4, "off"): ours, ("vera", 16, "off"): theirs, ("lora", 8, "off"): theirs}
    scores |= {("vera", 4, "off"): theirs, ("uora", 4, "off"): [94.0] * 4}
    scores |= {
        ("lora", 1, "off"): theirs,
        ("uora", 1, "off"): ours,
        ("uora", 1, "lambda-0.2"): [92, 91, 101, 93],
    }
    table_of(runs, tmp_path / "quality.csv", scores | {("uora+inputs", 4, "relative-0.5"): ours})
    table = report.tabulate(tmp_path / "quality.csv")
    assert table.scores["digits"]["uora+inputs", 4, "off"] == dict(enumerate(ours))
    found = table.difference("digits", ("uora+inputs", 4, "off"), ("vera", 16, "off"))
    differences = [2.0, 1.0, 4.0, 1.0]
    assert found.mean == statistics.mean(differences)
    assert found.half == pytest.approx(3.182446 * statistics.stdev(differences) / math.sqrt(4))
    text = "\n".join(report.goals(table))
    assert f'| digits | UORA, `init="inputs"`, r 4 |  | +0.00 ± 0.00 | {found} | 4 | yes |' in text
    assert "| 2.0 x | +0.00 ± 0.00 | +2.00 ±" in text
    assert f"r 4 | less PEFT VeRA | +0.00 ± 0.00 | {found} | 4 | no |" in text
    assert "r 4 | less UORA | +0.00 ± 0.00 | -1.75 ±" in text
    assert "| relative-0.5 | +1.00 ± 0.00 | +0.00 ± 0.00 | 4 | no |" in text
    assert (
        "At the defaults of version 0.1 (lambda-0.2), 1 settings: +2.00 to +2.00, +2.00 in the mean;" in text
    )
    assert "above -0.3 are 1, with the whole interval 0; the interval lies on one side of zero in 0." in text
    assert "no more parameters" in text
    assert f"UORA, r 1 | 100 and 100 | +0.00 ± 0.00 | {found} | 4 | no |" in text  # r 4 has more
    report.report(tmp_path)
    assert (tmp_path / "quality.png").stat().st_size > 3_000
    assert "## digits" in (tmp_path / "quality.md").read_text()


def test_the_measured_table_in_the_repository_is_whole(quality, runs):
    """Every run has its two rows, none is there twice, and the command has nothing left to do."""
    with (FOLDER / "results/quality.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    keys = [tuple(row[c] for c in (*runs.COLUMNS[:6], "split")) for row in rows]
    assert len(set(keys)) == len(keys)
    done = runs.read(FOLDER / "results/quality.csv", runs.Run)
    assert {len(found) for found in done.values()} == {2}
    for run in (run for run in done if run.task == "docstrings" and run.method in ("head", "full")):
        assert done[replace(run, task="docstrings-all")] == done[run]  # nothing there depends on the adapters
    rows = lambda task: quality.methods(("lambda-0.2",))  # noqa: E731
    assert not list(quality.wanted(runs.ALL_TASKS, rows, runs.SEEDS, done))


def test_the_table_of_the_one_line_in_the_repository_is_whole(runs, line_runs):
    done = runs.read(FOLDER / "results/one_line.csv", line_runs.LineRun)
    assert {len(found) for found in done.values()} == {2}
    assert not list(
        line_runs.wanted([*line_runs.TASKS, line_runs.CONVNET], list(line_runs.METHODS), runs.SEEDS, done)
    )


def test_quality_benchmark_runs_every_method_in_a_small_form(
    quality, monkeypatch, tmp_path, capsys, one_thread
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["quality.py", "--quick", "--tasks", "digits"])
    for name in ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"):  # main sets them; put back after the test
        monkeypatch.setenv(name, "1")
    quality.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{'task'")]
    assert len(rows) == 2 * len(quality.methods(("lambda-0.2",), (4,)))
    assert not list(tmp_path.rglob("*.csv"))


def test_counting_saved_bytes_leaves_nothing_behind(monkeypatch):
    """All seven copies of eight models would not fit otherwise; what a ReLU saves is its own output."""
    monkeypatch.syspath_prepend(FOLDER)
    timing = importlib.import_module("timing")
    model, outputs = nn.Sequential(nn.Linear(3, 5), nn.ReLU()), []
    model[1].register_forward_hook(lambda *given: outputs.append(weakref.ref(given[2])))
    assert timing.saved_bytes(model, torch.ones(7, 3)) == 4 * 7 * (3 + 5)
    assert [output() for output in outputs] == [None]


def test_step_time_benchmark_runs_in_a_small_form(monkeypatch, capsys, one_thread):
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", ["step_time.py", "table", "crossing", "life", "--quick"])
    runpy.run_path(str(FOLDER / "step_time.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert out.count("x floor") == 7
    assert out.count("the automatic choice") == 2
    assert out.count("ViT-tiny, rank 64:") == 6


def test_step_time_report_says_where_the_automatic_choice_is_worst(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(FOLDER)
    report = importlib.import_module("step_time_report")
    rows = [
        {
            "part": "crossing",
            "shape": "2 -> 3",
            "precision": "32",
            "layers": "1",
            "rank": "4",
            "batch": tokens,
        }
        | {"tokens": tokens, "method": method, "ratio": ratio}
        for tokens, ratios in (("8", ("1", "1.3", "1.3")), ("16", ("1", "2", "1")))
        for method, ratio in zip(("merged", "factored", "auto"), ratios, strict=True)
    ]
    (line,) = report.choices(rows)
    assert "within 10 % in 1 of 2; at worst 1.30 x (layer 2 -> 3, rank 4, 8 tokens)" in line
    for row in rows:
        row |= {"ms": "1", "low": "0.5"}
    report.draw(rows).savefig(tmp_path / "parts_that_are_missing_are_left_out.png")


def imports_of(path: Path) -> set[str]:
    """Names of the modules that a file imports anywhere, in its functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def test_no_file_of_the_benchmarks_is_imported_by_what_it_imports():
    files = {path.stem: path for path in FOLDER.glob("*.py")}
    below = {name: imports_of(path) & files.keys() for name, path in files.items()}
    assert below["quality"] >= {"runs", "quality_report"}
    while lowest := {name for name, needed in below.items() if not needed}:
        below = {name: needed - lowest for name, needed in below.items() if name not in lowest}
    assert not below, f"a circle among {sorted(below)}"


def test_the_loop_calls_before_and_after_each_step_and_times_all_of_it(monkeypatch):
    """Two steps of plain gradient descent on w * x; w falls by 0.1 x in each."""
    monkeypatch.syspath_prepend(FOLDER)
    training = importlib.import_module("training")
    w, seen = nn.Parameter(torch.tensor(1.0)), []
    seconds = training.fit(
        lambda x: w * x,
        [3.0, 5.0],
        torch.optim.SGD([w], lr=0.1),
        lambda step, x: seen.append(("before", step, x, round(w.item(), 6))),
        lambda step, x: seen.append(("after", step, x, round(w.item(), 6))),
    )
    assert seen == [
        ("before", 0, 3.0, 1.0),
        ("after", 1, 3.0, 0.7),
        ("before", 1, 5.0, 0.7),
        ("after", 2, 5.0, 0.2),
    ]
    assert len(seconds) == 2
    assert min(seconds) > 0


def test_the_policy_that_the_table_calls_the_default_differs_in_its_threshold_alone(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    policy = importlib.import_module("quality_methods").POLICIES["lambda-0.2"]
    assert policy == dataclasses.replace(ReinitSchedule(), threshold=0.5)


def test_the_rates_of_groups_by_hand_are_finer_and_those_of_lora_end_at_3e_2(line_runs):
    assert line_runs.GRIDS["groups"] == (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 2e-2, 3e-2, 5e-2, 1e-1, 3e-1)
    assert line_runs.GRIDS["lora-own"] == (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def test_only_methods_with_a_rate_of_their_own_search_for_it(line_runs):
    line = (2e-5, "cosine")
    assert line_runs.rate("digits", "line", line, {}) == (2e-5, [])
    lr, needed = line_runs.rate("digits", "groups", line, {})
    assert lr is None
    assert {(run.lr, run.base_lr, run.schedule) for run in needed} == {
        (own, *line) for own in (2e-2, 3e-2, 5e-2)
    }
    at = {own: line_runs.run_at("digits", "groups", line, 0, own) for own in (2e-2, 3e-2, 5e-2, 1e-1)}
    values = {2e-2: 50.0, 3e-2: 60.0, 5e-2: 70.0, 1e-1: 65.0}
    done = {replace(at[lr], seed=seed): {"val": values[lr]} for lr in at for seed in range(4)}
    assert line_runs.rate("digits", "groups", line, done) == (5e-2, [])


def test_runs_come_seed_by_seed_and_none_is_made_twice_for_docstrings_all(line_runs):
    runs = list(line_runs.wanted(line_runs.TASKS, list(line_runs.METHODS), 8, {}))
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert len(set(runs)) == len(runs)
    first = [run for run in runs if run.seed == 0]
    assert {(run.task, run.base_lr) for run in first[:12]} == {
        (task, base_lr) for task in line_runs.TASKS for base_lr, _ in line_runs.LINES
    }
    assert {run.method for run in first[:12]} == {"line"}
    fixed, searched = 5 * 4 * 3 * 8 - 2 * 3 * 8, 2 * 4 * 3 * 3 * 4
    assert len(runs) == fixed + searched
    assert not [run for run in runs if run.task == "docstrings-all" and run.method in ("head", "full")]
    assert not list(line_runs.wanted(["digits"], ["head"], 1, {run: {} for run in first}))


def line_table(runs, line_runs, path: Path, tests: dict[str, list[float]], tasks: list[str]) -> None:
    """A table in which the middle rate is the best everywhere, and test scores are those given."""
    for task, line in ((task, line) for task in tasks for line in line_runs.LINES):
        for method, values in tests.items():
            rates, middle = [None], None
            if method in line_runs.GRIDS:
                grid, middle = line_runs.GRIDS[method], line_runs.STARTS[method]
                rates = grid[grid.index(middle) - 1 : grid.index(middle) + 2]
            for lr in rates:
                for seed, value in enumerate(values):
                    if (task, method) in line_runs.SAME:
                        continue
                    row = {**line_runs.run_at(task, method, line, seed, lr).__dict__, "metric": "accuracy"}
                    row |= {"adapter_params": 1, "seconds": 1800}
                    scores = {"val": 60.0 + (lr == middle), "test": value if lr == middle else 99.0}
                    rows = [{**row, "split": s, "value": v} for s, v in scores.items()]
                    runs.append(path, rows, line_runs.COLUMNS)


def test_the_report_of_the_one_line_judges_its_goals(runs, line_runs, tmp_path):
    """Against groups the mean decides (-0.5, -1.5), against LoRA the interval, against the head the mean."""
    report = importlib.import_module("one_line_report")
    tests = {"line": [80.0, 81.0, 83.0, 82.0], "line+inputs": [79.0, 80.0, 82.0, 81.0]}
    tests |= {"groups": [81.0, 81.0, 83.0, 83.0], "lora-own": [90.0] * 4, "full": [85.0] * 4}
    tests |= {"lora": [70.0, 72.0, 73.0, 72.0], "head": [79.0, 80.0, 82.0, 82.0]}
    line_table(runs, line_runs, tmp_path / "one_line.csv", tests, ["docstrings", "docstrings-all"])
    table = report.tabulate(tmp_path / "one_line.csv")
    line = (1e-4, "cosine")
    assert table.scores["docstrings", "groups", line] == dict(enumerate(tests["groups"]))
    assert table.scores["docstrings-all", "head", line] == dict(enumerate(tests["head"]))
    assert table.rates["docstrings", "lora-own", line] == 3e-3
    differences = [10.0, 9.0, 10.0, 10.0]
    found = table.difference("docstrings", "line", "lora", line)
    assert found.half == pytest.approx(3.182446 * statistics.stdev(differences) / math.sqrt(4))
    text = "\n".join(report.goals(table))
    assert "| docstrings | 1e-4, warm-up, cosine | random | -0.50 ± 0.92 | 4 | yes |" in text
    assert "| docstrings | 1e-4, warm-up, cosine | inputs | -1.50 ± 0.92 | 4 | no |" in text
    assert f"| docstrings-all | 2e-5, warm-up, cosine | random | {found} | 4 | yes |" in text
    assert "| docstrings | 1e-3, constant | inputs | -0.25 ± 0.80 | 4 | no |" in text
    assert text.count("Holds in 6 of 12; 12 not measured.") == 2
    assert "Holds in 8 of 8; 4 not measured." in text
    report.report(tmp_path)
    text = (tmp_path / "one_line.md").read_text()
    assert "| method | 1e-3, constant | 1e-4, warm-up, cosine | 2e-5, warm-up, cosine |" in text
    assert text.count("| UORA, the one line | 81.5 ± 0.6 (4) | 81.5 ± 0.6 (4) | 81.5 ± 0.6 (4) |") == 2
    assert "copied from docstrings, which has the same runs: head alone, full fine-tuning." in text
    assert "| docstrings, UORA, groups by hand, best rate | 0.03 | 0.03 | 0.03 |" in text
    assert "digits" not in text
    assert (tmp_path / "one_line.png").stat().st_size > 3_000


def test_a_method_of_the_one_line_benchmark_runs_in_a_small_form(monkeypatch, tmp_path, capsys, one_thread):
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["one_line.py", "--quick", "--tasks", "digits", "--methods", "groups"])
    for name in ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "1")
    importlib.import_module("one_line").main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{'task'")]
    assert len(rows) == 2
    assert not list(tmp_path.rglob("*.csv"))


def test_a_user_of_the_one_line_benchmark_writes_these_groups(monkeypatch, line_runs, tmp_path):
    """One group of everything at the base rate; by hand, the adapters apart, at their own rate."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.chdir(tmp_path)
    methods = importlib.import_module("one_line_methods")
    task = importlib.import_module("quality_tasks").Digits(0, quick=True)
    kinds = importlib.import_module("quality_methods")
    found = {}
    for method in ("lora", "lora-own"):
        model = kinds.build(kinds.Method("lora", 8), task, 0)[0]
        run = line_runs.run_at(
            "digits", method, (1e-3, "constant"), 0, 3e-2 if method == "lora-own" else None
        )
        optimizer = methods.Learner(task, model, run).configure_optimizers()["optimizer"]
        trained = [[p for p in group["params"] if p.requires_grad] for group in optimizer.param_groups]
        found[method] = [
            (group["lr"], len(ps)) for group, ps in zip(optimizer.param_groups, trained, strict=True)
        ]
    layers, head = len(task.names), 2
    assert found == {
        "lora": [(1e-3, 2 * layers + head)],
        "lora-own": [(1e-3, head), (3e-2, 2 * layers)],
    }


def test_the_schedule_warms_up_over_a_tenth_and_ends_at_zero(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    shape = importlib.import_module("one_line_methods").shape
    assert [shape(step, 40) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert shape(22, 40) == pytest.approx(0.5)
    assert shape(40, 40) == pytest.approx(0.0)


def test_runs_that_are_missing_are_made_once_and_none_is_started_after_the_time(runs, monkeypatch, tmp_path):
    """Three runs, one of them in the table already, by two workers; then no minutes at all."""
    monkeypatch.setattr(runs, "_alone", lambda execute, run: execute(run))
    path, made = tmp_path / "runs.csv", []
    three = [runs.Run("digits", "head", 0, "off", 0.1, seed) for seed in range(3)]

    def execute(run):
        made.append(run)
        row = {**run.__dict__, "metric": "accuracy", "adapter_params": 0, "seconds": 1.0}
        return [{**row, "split": split, "value": 50.0 + run.seed} for split in ("val", "test")]

    def wanted(done):
        return (run for run in three if run not in done)

    runs.append(path, execute(three[1]))
    runs.carry_out(path, runs.Run, wanted, execute, workers=2, minutes=0)
    assert made == [three[1]]
    runs.carry_out(path, runs.Run, wanted, execute, workers=2, minutes=1)
    assert sorted(run.seed for run in made) == [0, 1, 2]
    assert runs.read(path, runs.Run) == {
        run: dict.fromkeys(("val", "test"), 50.0 + run.seed) for run in three
    }


@pytest.mark.parametrize("name", ["quality", "one_line"])
def test_the_tables_in_the_repository_are_what_the_report_prints(runs, line_runs, tmp_path, name):
    shutil.copy(FOLDER / f"results/{name}.csv", tmp_path)
    importlib.import_module(f"{name}_report").report(tmp_path)
    assert (tmp_path / f"{name}.md").read_text() == (FOLDER / f"results/{name}.md").read_text()
