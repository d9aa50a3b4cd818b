"""A sample of the sweep, fixed by a seed, judged again; and the judge, on models that break a promise."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest
import timm
import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from tests.sweep.life import NotRunnableError, check, check_gradients, look_at
from tests.sweep.pool import each
from tests.sweep.results import ROWS, TABLE, markdown, placeless, read, write
from tests.sweep.verdicts import Row, judge, judge_timm, judge_transformers

SMALL = 500_000
COUNTS = {"timm": 5, "transformers": 20}


def sample() -> list[Row]:
    """Of the small models that passed, five families of timm and twenty types of transformers."""
    draws, chosen = random.Random(0), []
    for library, count in COUNTS.items():
        passed = [
            r for r in read() if r.library == library and r.verdict == "passed" and r.parameters < SMALL
        ]
        chosen += draws.sample(passed, count)
    return chosen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", sample(), ids=lambda row: f"{row.library}-{row.family}")
def test_a_model_of_the_sample_passes_as_the_table_says(row: Row):
    library = {"timm": timm, "transformers": transformers}[row.library]
    if not (timm.is_model(row.member) if library is timm else row.family in CONFIG_MAPPING_NAMES):
        pytest.skip(f"{row.library} {library.__version__} has no {row.family}")
    rows = list(
        judge_timm(row.family, row.member) if row.library == "timm" else judge_transformers(row.family)
    )
    assert (rows[-1].verdict, rows[-1].reason) == ("passed", "")
    assert rows[-1].preset == row.preset


def test_nothing_in_the_table_failed_and_more_than_95_percent_of_what_runs_passes():
    for library in COUNTS:
        rows = [row for row in read() if row.library == library]
        built = [row for row in rows if row.verdict != "not runnable"]
        assert len(built) > 50
        assert [row.family for row in built if row.verdict == "failed"] == []
        assert sum(row.verdict == "passed" for row in built) > 0.95 * len(built)
        assert all(row.reason for row in rows if row.verdict != "passed")


def test_no_reason_names_a_folder_of_the_machine_that_swept():
    assert placeless("from '/any/where/lib/site-packages/a/b.py'> nor") == "from 'a/b.py'> nor"
    assert not [row.family for row in read() if "site-packages" in row.reason]


def test_the_committed_table_is_made_from_the_committed_rows(tmp_path):
    """But for the versions, which are those of the machine that swept."""
    lines = [text.splitlines() for text in (markdown(read()), TABLE.read_text())]
    assert lines[0][3:] == lines[1][3:]
    write(read(), tmp_path / "rows.csv", tmp_path / "table.md")
    assert (tmp_path / "rows.csv").read_text() == ROWS.read_text()


class Two(nn.Module):
    """An attention's worth of layers, one of which may be dead or do what it should not."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(5, 5) for _ in range(3))

    def forward(self, x):
        return self.v_proj(torch.tanh(self.q_proj(x)) * self.k_proj(x))


class ReadsTheFrozenWeight(Two):
    """Past the adapter: what the package cannot see, the check has to."""

    def forward(self, x):
        hidden = nn.functional.linear(x, self.q_proj._parameters["weight"], self.q_proj.bias)
        return self.v_proj(torch.tanh(hidden) * self.k_proj(x))


class CutsTheGradient(Two):
    def forward(self, x):
        return self.v_proj(torch.tanh(self.q_proj(x)) * self.k_proj(x).detach())


class Counts(Two):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x) + self.calls


def run(model: nn.Module) -> torch.Tensor:
    return model(torch.linspace(-1, 1, 10).reshape(2, 5))


def last(model: nn.Module) -> Row:
    return list(judge(Row("toys", "two"), lambda: (model, run, {})))[-1]


def test_the_judge_passes_what_is_right_and_counts_live_layers():
    assert last(Two()) == Row(
        "toys", "two", parameters=90, preset="attention", adapted=3, with_gradient=3, verdict="passed"
    )
    assert last(CutsTheGradient()).with_gradient == 2  # as the base's own weight has none


def test_the_judge_fails_a_model_that_goes_past_the_adapter():
    row = last(ReadsTheFrozenWeight())
    assert row.verdict == "failed"
    assert "merged output differs" in row.reason  # a fresh one where the processor tells frozen weights apart


def test_the_judge_tells_what_does_not_run_without_us_and_what_is_refused():
    assert "differs from run to run" in last(Counts()).reason
    assert last(Counts()).verdict == "not runnable"
    empty = nn.Sequential(nn.LayerNorm(5), nn.Tanh())
    assert (last(empty).verdict, "finds nothing to adapt" in last(empty).reason) == ("refused", True)
    broken = Two()
    nn.init.constant_(broken.v_proj.bias, float("nan"))
    assert last(broken).reason == "the output is not finite"


def test_a_gradient_that_is_missing_or_wrong_is_named():
    right = {"a.uora_d": torch.ones(3), "a.uora_b": torch.ones(2)}
    assert check_gradients(right, right) == 1
    with pytest.raises(AssertionError, match=r"no gradient for a\.uora_b"):
        check_gradients({**right, "a.uora_b": None}, right)
    with pytest.raises(AssertionError, match=r"gradient of a\.uora_d is off by 1"):
        check_gradients({**right, "a.uora_d": torch.tensor([1.0, 2.0, 1.0])}, right)


def test_a_dead_base_is_not_counted_as_passed():
    class Dead(Two):
        def forward(self, x):
            return super().forward(x).detach() + self.q_proj.bias

    with pytest.raises(NotRunnableError, match="no weight changes the output"):
        look_at(Dead(), run)
    with pytest.raises(
        NotRunnableError, match=r"none of the adapted weights has a gradient|no weight changes"
    ):
        check(Dead(), run, "attention")


def work(name: str):
    yield f"{name} began"
    if name == "hangs":
        time.sleep(60)
    if name == "dies":
        raise SystemExit(3)
    yield f"{name} ended"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_hang_or_a_death_is_a_result_and_the_others_go_on():
    ended = {name: (results, how) for name, results, how in each(work, ["hangs", "dies", "a", "b"], 2, 5.0)}
    assert ended["a"] == (["a began", "a ended"], "")
    assert ended["b"] == (["b began", "b ended"], "")
    assert ended["dies"] == (["dies began"], "the process died with exit code 3")
    assert ended["hangs"] == (["hangs began"], "took more than 5 s")


def test_rows_survive_the_file(tmp_path):
    row = replace(
        Row("timm", "vit"), parameters=7, adapted=2, with_gradient=1, verdict="failed", reason='a, "b"\nc'
    )
    write([row], tmp_path / "rows.csv", tmp_path / "table.md")
    assert read(tmp_path / "rows.csv") == [row]
    assert read(tmp_path / "none.csv") == []
