"""Figures: what is drawn is what the model and the record hold."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from torch import nn

from lightning_uora import (
    ReinitSchedule,
    UORAConfig,
    attach_uora,
    named_adapters,
    plot_refreshes,
    plot_vectors,
    summarize,
)
from tests.toys import Toy, callback, data, trainer


def refreshed(tmp_path=None, share: str = "layer"):
    uora = callback(share=share, reinit=ReinitSchedule(threshold=2.0, start=0.0, stop=1.0, every_n_steps=3))
    model = Toy()
    logger = TensorBoardLogger(tmp_path) if tmp_path else False
    trainer(uora, logger=logger).fit(model, data())
    return model, uora


@pytest.mark.parametrize("share", ["model", "layer"])
def test_vectors_are_drawn_by_layer_with_refreshed_entries_marked(share: str):
    model, uora = refreshed(share=share)
    heat, spread, _ = plot_vectors(model).axes
    drawn = torch.tensor(heat.images[0].get_array())
    torch.testing.assert_close(
        drawn, torch.stack([m.uora_d.detach().abs() for _, m in named_adapters(model)])
    )
    assert heat.images[0].norm.vmin == 0
    for index, line in enumerate(heat.lines):
        key = "A_6" if share == "model" else f"A_6_{index}"
        assert sorted(line.get_xdata()) == sorted({i for r in uora.refreshes for i in r["rows"][key]})
    assert [t.get_text() for t in heat.get_yticklabels()] == ["0", "2"]  # of body
    for number, (_, module) in enumerate(named_adapters(model)):
        low, middle, high = module.uora_b.detach().abs().quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
        assert list(spread.lines[2 * number].get_xdata()) == pytest.approx([low, high])
        assert list(spread.lines[2 * number + 1].get_xdata()) == pytest.approx([middle])


@pytest.mark.parametrize("share", ["model", "layer"])
def test_refreshes_are_shares_of_directions_by_layer_and_step(share: str):
    model, uora = refreshed(share=share)
    for source, unit in ((model, 100 / 4), (uora.refreshes, 1.0)):
        axes = plot_refreshes(source).axes[0]
        table = torch.tensor(axes.images[0].get_array())
        keys = ["A_6", "B_6"] if share == "model" else ["A_6_0", "A_6_1"]
        expected = [[unit * len(r["rows"].get(key, ())) for r in uora.refreshes] for key in keys]
        assert table.tolist() == expected
        assert axes.images[0].norm.vmin == 0
        assert [t.get_text() for t in axes.get_xticklabels()] == ["3", "6"]
        names = ["0", "2"] if source is model else ["layer 0", "layer 1"]
        names = names if share == "layer" else ["all of width 6", "all of height 6, columns of B"]
        assert [t.get_text() for t in axes.get_yticklabels()] == names
    assert plot_refreshes([]).axes[0].get_title() == "0 refreshes"


def test_rows_of_b_have_lines_of_their_own():
    records = [{"step": 5, "rows": {"A_6_1": [0, 2], "B_9_1": [0, 2], "B_9_1:rows": [1], "B_4_0": [3]}}]
    axes = plot_refreshes(records).axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == [
        "layer 0, columns of B",
        "layer 1",
        "layer 1, rows of B",
    ]
    assert torch.tensor(axes.images[0].get_array()).flatten().tolist() == [1.0, 2.0, 1.0]


def test_a_run_without_refreshes_says_so_in_place_of_empty_axes():
    (axes,) = plot_refreshes([{"step": 5, "rows": {}}]).axes
    assert [text.get_text() for text in axes.texts] == ["no direction was turned"]
    assert not axes.images
    assert plot_refreshes([]).axes[0].get_title() == "0 refreshes"


def test_layers_of_many_sizes_at_one_place_share_a_line_of_the_table():
    stages = nn.ModuleList(
        nn.ModuleDict({"q": nn.Linear(n, n), "k": nn.Linear(n, n), "out": nn.Linear(n, 2 * n)})
        for n in (4, 8, 4)
    )
    attach_uora(stages, UORAConfig(rank=2, target_modules="all"))
    lines = {line.split("│")[1].strip(): line for line in str(summarize(stages)).splitlines() if "│" in line}
    rows = {name: line.split("│")[2:5] for name, line in lines.items()}
    cells = {name: [cell.strip() for cell in found] for name, found in rows.items()}
    assert cells["*.q, k"] == ["6", "up to 8 x 8", str(2 * (3 * 2 + 4 + 8 + 4))]
    assert cells["*.out"] == ["3", "up to 16 x 8", str(3 * 2 + 8 + 16 + 8)]
    assert len(cells) == 4


def test_names_in_the_table_break_at_dots_and_fit_80_columns_whatever_their_length():
    class Deep(nn.Module):
        def __init__(self, *path: str):
            super().__init__()
            setattr(self, path[0], Deep(*path[1:]) if path[1:] else nn.Linear(3, 4))

    for path in (("encoder_of_words", "attention_of_heads", "projection_of_queries", "inner"), ("x" * 90,)):
        model = Deep(*path)
        attach_uora(model, UORAConfig(rank=2, target_modules="all"))
        table = Console(width=80, file=io.StringIO())
        table.print(summarize(model).table({"vectors": "0.0277"}))
        lines = table.file.getvalue().splitlines()
        assert max(map(len, lines)) <= 80
        cells = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
        name, at = "".join(cells[: cells.index("vectors d and b, rank 2")]), ".".join(path)
        assert name in (at, at.rpartition(".")[2])
    parts = (
        "part_of_it_all",
        "part_ii",
        "part_of_three_things",
        "part_of_it",
        "part_last_of_all",
        "part_end",
    )
    whole = nn.ModuleDict({"a": Deep(*parts), "b": nn.Linear(3, 3)})
    attach_uora(whole, UORAConfig(rank=2, target_modules="all"))
    broken = [
        line.split("│")[1].rstrip()
        for line in str(summarize(whole)).splitlines()
        if "part" in line or "end" in line
    ]
    assert len(broken) == 2
    assert broken[0].endswith(".")
    assert "".join(line.strip() for line in broken) == ".".join(["a", *parts])


def test_two_layers_without_names_of_their_own_are_told_by_number():
    model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
    attach_uora(model, UORAConfig(rank=4, target_modules="all"))
    assert [line.split("│")[1].strip() for line in str(summarize(model)).splitlines()[4:6]] == ["0", "2"]


def test_images_reach_tensorboard(tmp_path):
    refreshed(tmp_path)
    events = b"".join(path.read_bytes() for path in tmp_path.rglob("events*"))
    assert b"uora/vectors" in events
    assert b"uora/refreshes" in events


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    model, _ = refreshed()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"lightning-uora\[plot\]"):
        plot_vectors(model)


def test_a_plain_model_is_refused():
    with pytest.raises(ValueError, match="holds no adapted model"):
        plot_vectors(nn.Linear(3, 3))
