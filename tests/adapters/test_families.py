"""Real architectures of timm and transformers: equal when fresh, alive when trained, the base when disabled,
undone exactly.
"""

from __future__ import annotations

import pytest

from tests import families
from tests.sweep.life import check


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", families.TIMM)
def test_timm_family(name: str):
    model, x = families.timm_model(name)
    life = check(model, lambda m: m(x), families.TIMM[name])
    assert life.with_gradient == len(life.names)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*families.TEXT, *families.SEQ2SEQ, *families.VISION])
@pytest.mark.parametrize("target", ["attention", "all-linear"])
def test_transformers_family(name: str, target: str):
    model, run = families.transformers_model(name)
    life = check(model, run, target)
    assert life.with_gradient == len(life.names)
