"""Figures: what is drawn is what the model and the record hold."""

from __future__ import annotations

import sys

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from lightning_uora import ReinitSchedule, named_adapters, plot_refreshes, plot_vectors
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
    heat, histogram, _ = plot_vectors(model).axes
    drawn = torch.tensor(heat.images[0].get_array())
    torch.testing.assert_close(
        drawn, torch.stack([m.uora_d.detach().abs() for _, m in named_adapters(model)])
    )
    for index, line in enumerate(heat.lines):
        key = "A_6" if share == "model" else f"A_6_{index}"
        assert sorted(line.get_xdata()) == sorted({i for r in uora.refreshes for i in r["rows"][key]})
    assert [t.get_text() for t in heat.get_yticklabels()] == ["body.0", "body.2"]
    assert len(histogram.collections) == 2


def test_timeline_from_a_model_equals_that_from_records():
    model, uora = refreshed()
    for source in (model, uora.refreshes):
        axes = plot_refreshes(source).axes[0]
        points = axes.collections[0].get_offsets().tolist()
        assert sorted({x for x, _ in points}) == [3.0, 6.0]
        assert len(points) == sum(len(r["rows"]) for r in uora.refreshes)
    assert plot_refreshes([]).axes[0].get_title() == "0 refreshes"


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
    with pytest.raises(ValueError, match="not the root of an adapted model"):
        plot_vectors(nn.Linear(3, 3))
