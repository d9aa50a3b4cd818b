"""Mixed batches of every mixture of experts in transformers that has a tiny version here.

``python -m tests.mixing_runs [FAMILY ...]``: a line for each family, with the largest relative difference
between a sample in the mixed batch and the same sample under its adapter alone.
"""

from __future__ import annotations

import copy
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_uora import add_adapter, set_adapter, use_adapters
from tests.adapters.test_mixing import scatter
from tests.experts_runs import adapted, distance, say, with_experts
from tests.sweep import transformers_models
from tests.sweep.life import Run, outputs

NAMES = ["second", None, "default", "second"]


def given(model: nn.Module, run: Run) -> tuple[Any, Any]:
    """What the model is called with: as many samples as there are names, tokens of each in another order."""
    seen: list[tuple[Any, Any]] = []
    hook = model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    outputs(model, run)
    hook.remove()
    first = next(t for t in (*seen[0][0], *seen[0][1].values()) if isinstance(t, Tensor) and t.dim())
    size = first.shape[0]

    def wide(t: Tensor) -> Tensor:
        if not t.dim() or t.shape[0] != size:
            return t
        rows = [t[i % size] for i in range(len(NAMES))]
        ids = t.dtype == torch.long and t.unique().numel() > 2
        return torch.stack([row.roll(i, -1) if ids and row.dim() else row for i, row in enumerate(rows)])

    return tree_map_only(Tensor, wide, seen[0])


def look(model: nn.Module, run: Run) -> tuple[float, float]:
    """The largest difference, and how far two adapters are apart."""
    args, kwargs = given(model, run)
    adapted(model)
    add_adapter(model, "second")
    scatter(model, 9, 0.1)

    def call(one: nn.Module) -> Any:
        return one(*copy.deepcopy(args), **copy.deepcopy(kwargs))

    alone = {}
    for name in (None, "default", "second"):
        set_adapter(model, name)
        alone[name] = outputs(model, call)
    set_adapter(model, "default")
    with use_adapters(model, NAMES):
        mixed = outputs(model, call)
    worst = 0.0
    for place, found in enumerate(mixed):
        if found.dim() and found.shape[0] == len(NAMES):
            wanted = torch.stack([alone[name][place][row] for row, name in enumerate(NAMES)])
            worst = max(worst, distance(found, wanted))
    return worst, distance(alone["default"][0], alone["second"][0])


def main(kinds: list[str]) -> None:
    """A line for each family."""
    warnings.simplefilter("ignore")
    for kind in kinds or with_experts():
        try:
            built = transformers_models.build(kind)
            worst, moved = look(built.model, built.run)
            say(kind, f"worst {worst:.1e}", f"adapters apart {moved:.1e}")
        except Exception as error:
            say(kind, type(error).__name__, " ".join(str(error).split())[:200])


if __name__ == "__main__":
    main(sys.argv[1:])
