"""What must hold of every model with experts, however they are run: shared by the tests and by a sweep.

``python -m tests.experts_runs`` looks at every family of transformers that a tiny configuration builds.
"""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from lightning_uora import UORAConfig, attach_uora, detach_uora, named_adapters
from lightning_uora.adapters.experts import AdaptedExperts
from tests.sweep import transformers_models
from tests.sweep.life import Run, loss, outputs

WAYS = ("eager", "batched_mm", "grouped_mm")
RANK = 5


def with_experts() -> list[str]:
    """Model types whose source keeps weights with a leading expert axis."""
    found = []
    models = Path(transformers.__file__).parent / "models"
    for kind, config in CONFIG_MAPPING_NAMES.items():
        del config
        folder = models / kind.replace("-", "_")
        text = "".join(path.read_text() for path in folder.glob("modeling_*.py"))
        if "Experts(nn.Module)" in text:
            found.append(kind)
    return sorted(found)


def adapted(model: nn.Module) -> nn.Module:
    """With vectors that matter, on every linear layer and all experts."""
    attach_uora(model, UORAConfig(rank=RANK, target_modules="all-linear", trainable_modules=()))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, module in named_adapters(model):
            module.uora_d.copy_(torch.randn(module.uora_d.shape, generator=generator))
            module.uora_b.copy_(0.1 * torch.randn(module.uora_b.shape, generator=generator))
    return model


def plain(model: nn.Module) -> nn.Module:
    """A copy without adapters whose weights are the effective ones, and want gradients."""
    merged = copy.deepcopy(model)
    detach_uora(merged, merge=True)
    return merged.requires_grad_(True)


def expected_gradients(module: AdaptedExperts, G: Tensor) -> tuple[Tensor, Tensor]:
    """Of d and b by the formula, from the gradient of the effective weight, in its layout."""
    part, A, B, d, b, own = module.picked(None)
    A, B = own.down(A).double(), own.up(B).double()
    G = (G.transpose(1, 2) if part.transposed else G).double()
    H = torch.einsum("emn,rn,mr->emr", G, A, B)
    return torch.einsum("emr,em->er", H, b.double()), torch.einsum("emr,er->em", H, d.double())


def ways_of(model: nn.Module) -> list[str]:
    """Transformers' ways to run this model's experts."""
    return list(WAYS) if hasattr(model, "set_experts_implementation") else ["eager"]


def look(model: Any, run: Run) -> dict[str, float]:
    """Adapt, run in every way, compare with the merged copy; the largest relative differences seen.

    Raises:
        AssertionError: No experts were found, or none got a gradient.
    """
    base = copy.deepcopy(model)
    adapted(model)
    experts = {name: m for name, m in named_adapters(model) if isinstance(m, AdaptedExperts)}
    assert experts, "no experts were adapted"
    seen = {"output": 0.0, "gradient": 0.0, "moved": 0.0}
    for way in ways_of(model):
        try:
            model.set_experts_implementation(way)
        except (ValueError, AttributeError):
            if way != "eager":
                continue
        merged = plain(model)
        model.zero_grad()
        results = [outputs(one, run) for one in (model, merged)]
        outs = [flat(one) for one in results]
        seen["output"] = max(seen["output"], distance(*outs))
        with torch.no_grad():
            seen["moved"] = max(seen["moved"], distance(outs[0], flat(outputs(base, run))))
        for one in results:
            loss(one).backward()
        got = False
        parameters = dict(merged.named_parameters())
        for name, module in experts.items():
            G = parameters[name].grad
            if G is None:
                assert module.uora_d.grad is None
                continue
            got = True
            for mine, wanted in zip(
                (module.uora_d, module.uora_b), expected_gradients(module, G), strict=True
            ):
                assert mine.grad is not None, name
                seen["gradient"] = max(seen["gradient"], distance(mine.grad, wanted))
                unhit = G.flatten(1).abs().sum(1) == 0
                assert not mine.grad[unhit].any(), f"{name}: an expert that was not hit has a gradient"
        assert got, "no experts got a gradient"
    detach_uora(model)
    assert list(model.state_dict()) == list(base.state_dict())
    assert {type(m) for m in model.modules()} == {type(m) for m in base.modules()}
    return seen


def flat(results: list[Tensor]) -> Tensor:
    """All that a model puts out, as one row."""
    return torch.cat([t.flatten().float() for t in results])


def distance(one: Tensor, two: Tensor) -> float:
    """Of two tensors, relative to the second."""
    two = two.detach().double()
    return float((one.detach().double() - two).norm() / two.norm().clamp_min(1e-30))


def say(*words: str) -> None:
    sys.stdout.write(" ".join(words) + "\n")
    sys.stdout.flush()


def main(kinds: list[str]) -> None:
    """A line for each family."""
    warnings.simplefilter("ignore")
    for kind in kinds or with_experts():
        try:
            built = transformers_models.build(kind)
            seen = look(built.model, built.run)
            say(kind, *(f"{key} {value:.1e}" for key, value in seen.items()))
        except Exception as error:
            say(kind, type(error).__name__, " ".join(str(error).split())[:200])


if __name__ == "__main__":
    main(sys.argv[1:])
