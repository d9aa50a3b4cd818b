"""Rows known to be orthogonal turn as by decomposition, and stay as orthogonal as they were."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from lightning_uora import ReinitSchedule, UORAConfig, attach_uora, named_adapters, refresh

refreshing = sys.modules["lightning_uora.reinit.refresh"]  # the door's name is the function's
SIZES = [(4, 40, 40), (24, 40, 30), (40, 40, 40), (40, 20, 16), (50, 20, 33), (64, 24, 48)]
"""Rank, width and height: room for all, full blocks, blocks and a rest."""


def turned(rank, n, m, share, monkeypatch, known, interpolation=0.4):
    model = nn.Sequential(nn.Linear(n, m), nn.Linear(m, n))
    attach_uora(model, UORAConfig(rank=rank, target_modules="all-linear", share=share, seed=3))
    used = []
    real = refreshing.rows_around
    with monkeypatch.context() as patch:
        patch.setattr(
            refreshing, "rows_around", lambda *a: (used.append(real(*a)), used[-1] if known else None)[1]
        )
        g = torch.Generator().manual_seed(5)
        for _ in range(4):
            with torch.no_grad():
                for _, layer in named_adapters(model):
                    layer.uora_d.copy_(torch.randn(rank, generator=g))
            refresh(model, ReinitSchedule(threshold=0.8, interpolation=interpolation))
    owner = model.uora_projections
    assert owner.record
    names = {name.partition(":")[0] for name in owner.matrices}
    return {name: owner.current(name) for name in names}, used


@pytest.mark.parametrize("interpolation", [0.4, 1.0])
@pytest.mark.parametrize("share", ["layer", "model"])
@pytest.mark.parametrize("sizes", SIZES)
def test_known_rows_turn_as_by_decomposition(sizes, share, interpolation, monkeypatch):
    fast, used = turned(*sizes, share, monkeypatch, True, interpolation)
    slow, _ = turned(*sizes, share, monkeypatch, False, interpolation)
    assert any(one is not None for one in used)
    assert set(fast) == set(slow)
    for name, M in fast.items():
        # where little of a drawn direction is left, down to a 1000th, rounding grows by as much
        torch.testing.assert_close(M, slow[name], atol=1e-3, rtol=0)
