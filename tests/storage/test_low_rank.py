"""``max_rank=``: the best approximation of each layer's update, and the error that is told, against an SVD of
the update written out in float64.
"""

from __future__ import annotations

import copy
import json
import logging
import re

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_uora import UORAConfig, attach_uora, export_peft, named_adapters
from lightning_uora.storage.low_rank import norm_squared, shorten


class Mixed(nn.Module):
    """Layers of odd sizes, a convolution among them; the last has few outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 11, (3, 2), stride=2)
        self.wide = nn.Linear(33, 13)
        self.narrow = nn.Linear(13, 4)

    def forward(self, x):
        return self.narrow(self.wide(self.conv(x).relu().flatten(1)).tanh())


X = torch.randn(5, 3, 3, 6, generator=torch.Generator().manual_seed(1))


def adapted(rank: int, scale: float = 0.3, **sizes: float) -> tuple[nn.Module, nn.Module]:
    """Base and adapted model; ``sizes`` makes the vectors b of a layer larger or smaller."""
    torch.manual_seed(0)
    base = Mixed().eval()
    model = copy.deepcopy(base)
    attach_uora(model, UORAConfig(rank=rank, target_modules="all", trainable_modules=()))
    with torch.no_grad():
        for name, module in named_adapters(model):
            module.uora_d.normal_()
            module.uora_b.normal_(std=scale).mul_(sizes.get(name, 1.0))
    return base, model


def literal(model: nn.Module) -> dict[str, torch.Tensor]:
    """The update of each layer as a float64 matrix."""
    found = {}
    for name, module in named_adapters(model):
        A, B, d, b = (t.detach().double() for t in module._uora_tensors(module.adapted_parts[0].n))
        found[name] = torch.diag(b) @ B @ torch.diag(d) @ A
    return found


def written(folder, name: str) -> torch.Tensor:
    """The update that the folder holds for a layer, in float64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    up, down = (tensors[f"base_model.model.{name}.lora_{side}.weight"].double().flatten(1) for side in "BA")
    return up @ down


def told(message: str) -> tuple[float, float, str]:
    overall, worst, name = re.search(
        r"updates (\S+) over all layers, (\S+) in the worst \((.*)\)", message
    ).groups()
    return float(overall), float(worst), name


@pytest.mark.parametrize("max_rank", [1, 3, 5])
def test_each_layer_gets_the_best_approximation_and_the_error_told_is_the_literal_one(
    tmp_path, max_rank: int
):
    _, model = adapted(9, narrow=0.1)
    with pytest.warns(UserWarning, match=f"max_rank={max_rank}: 3 of 3 layers") as caught:
        export_peft(model, tmp_path, max_rank=max_rank)
    updates = literal(model)
    errors = {name: (update - written(tmp_path, name)).norm() for name, update in updates.items()}
    for name, update in updates.items():
        best = torch.linalg.svdvals(update)[max_rank:].square().sum().sqrt()
        torch.testing.assert_close(errors[name], best, atol=1e-6, rtol=1e-5)
    relative = {name: (errors[name] / updates[name].norm()).item() for name in updates}
    overall, worst, name = told(str(caught[0].message))
    total = (
        torch.stack(list(errors.values())).norm() / torch.stack([u.norm() for u in updates.values()]).norm()
    )
    assert overall == pytest.approx(total.item(), rel=6e-3)  # three digits are told
    assert name == max(relative, key=relative.get)
    assert worst == pytest.approx(relative[name], rel=6e-3)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("max_rank", [3, 5])
def test_peft_computes_with_the_approximation(tmp_path, max_rank: int):
    base, model = adapted(9)
    with pytest.warns(UserWarning, match="relative error"):
        export_peft(model, tmp_path, max_rank=max_rank)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    with torch.no_grad():
        for name in literal(model):
            weight = base.get_submodule(name).weight
            weight.add_(written(tmp_path, name).reshape(weight.shape).float())
        torch.testing.assert_close(loaded(X), base(X), atol=1e-5, rtol=1e-5)


def test_a_layer_with_fewer_outputs_than_its_rank_is_shortened_exactly(tmp_path, caplog):
    base, model = adapted(40)
    with caplog.at_level(logging.INFO, "lightning_uora"):
        export_peft(model, tmp_path, max_rank=20)
    assert told(caplog.text)[1] < 1e-6
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (13, 13)
    assert config["rank_pattern"] == config["alpha_pattern"] == {"^conv": 11, "^narrow": 4}
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(X), model(X), atol=1e-5, rtol=1e-5)


def test_layers_at_or_below_it_stay_as_they_are(tmp_path, caplog):
    _, model = adapted(5)
    export_peft(model, tmp_path / "plain")
    with caplog.at_level(logging.INFO, "lightning_uora"):
        export_peft(model, tmp_path / "short", max_rank=5)
    assert "max_rank=5: no layer has a higher rank; the export is exact." in caplog.text
    plain, short = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "short"))
    assert plain.keys() == short.keys()
    assert all(torch.equal(plain[name], short[name]) for name in plain)


def test_names_that_end_alike_keep_their_own_ranks(tmp_path):
    base = nn.Sequential(nn.Linear(7, 3), nn.Sequential(nn.Linear(3, 9), nn.Linear(9, 8))).eval()
    model = copy.deepcopy(base)
    attach_uora(model, UORAConfig(rank=12, target_modules="all", trainable_modules=()))
    with torch.no_grad():
        for _, module in named_adapters(model):
            module.uora_b.normal_()
    export_peft(model, tmp_path, max_rank=8)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 8
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    x = torch.randn(5, 7)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model.eval()(x), atol=1e-5, rtol=1e-5)


def test_an_update_that_is_zero_loses_nothing(tmp_path, caplog):
    _, model = adapted(9, scale=0.0)
    with caplog.at_level(logging.INFO, "lightning_uora"):
        export_peft(model, tmp_path, max_rank=2)
    assert told(caplog.text)[:2] == (0.0, 0.0)


def test_a_rank_that_vllm_does_not_take_is_told_once_with_what_to_do(tmp_path):
    _, model = adapted(513)
    with pytest.warns(
        UserWarning, match="rank 513, but vLLM takes at most 512; export with max_rank=512"
    ) as caught:
        export_peft(model, tmp_path)
    assert [warning.filename for warning in caught] == [__file__]
    _, model = adapted(512)
    export_peft(model, tmp_path)
    _, model = adapted(513)
    export_peft(model, tmp_path, max_rank=512)


@pytest.mark.parametrize(("format", "max_rank"), [("vera", 4), ("lora", 0), ("lora", -1)])
def test_a_max_rank_that_cannot_be_is_refused(tmp_path, format: str, max_rank: int):
    _, model = adapted(3)
    with pytest.raises(ValueError, match=f"max_rank={max_rank} is not allowed"):
        export_peft(model, tmp_path / "out", format, max_rank=max_rank)
    assert not (tmp_path / "out").exists()


def test_an_update_that_is_not_finite_is_refused_by_name(tmp_path):
    _, model = adapted(9)
    with torch.no_grad():
        model.wide.uora_b[2] = torch.nan
    with pytest.raises(ValueError, match=r"non-finite values in 'wide.uora_b' of the model"):
        export_peft(model, tmp_path / "out", max_rank=4)
    assert not (tmp_path / "out").exists()


def test_factors_that_are_not_finite_have_no_approximation():
    up, down = torch.ones(5, 3), torch.ones(3, 7)
    up[1, 2] = torch.inf
    with pytest.raises(ValueError, match="non-finite"):
        shorten(up, down, 2)


@pytest.mark.parametrize(("m", "r", "n"), [(7, 3, 5), (5, 9, 7), (3, 4, 11), (11, 4, 3)])
def test_factors_alone_tell_the_norm_and_the_error(m: int, r: int, n: int):
    """In float64 to its last digits, whichever of the three sizes is the largest."""
    generator = torch.Generator().manual_seed(7)
    up, down = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((m, r), (r, n)))
    s = torch.linalg.svdvals(up @ down)
    assert norm_squared(up, down) == pytest.approx(s.square().sum().item(), rel=1e-12)
    for rank in range(1, min(m, r, n) + 1):
        shorter_up, shorter_down, error = shorten(up, down, rank)
        assert (shorter_up.shape, shorter_down.shape) == ((m, rank), (rank, n))
        assert error == pytest.approx(s[rank:].square().sum().item(), rel=1e-9, abs=1e-24)
        assert (up @ down - shorter_up @ shorter_down).square().sum().item() == pytest.approx(
            error, abs=1e-12
        )
