"""The refresh: exactly the chosen rows turn, at their norm, orthogonal where there is room, the same from the
record.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from lightning_uora import ReinitSchedule, UORAConfig, attach_uora, named_adapters, rebuild, refresh
from lightning_uora.adapters import attachment_of
from lightning_uora.adapters.draws import draw_down
from lightning_uora.adapters.projections import seeded_generator
from lightning_uora.reinit.growth import gradients_collected
from lightning_uora.reinit.rotation import turned_rows
from lightning_uora.reinit.schedule import Refresher
from lightning_uora.reinit.weakness import weakest

ALL = ReinitSchedule(threshold=1e9, threshold_mode="absolute", max_fraction=1.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def adapted(share: str = "layer", rank: int = 4, **options) -> nn.Module:
    """Two layers of width 9 and height 7, vectors spread so that every layer has weak entries of its own."""
    model = nn.ModuleDict({"one": nn.Linear(9, 7), "two": nn.Linear(9, 7)})
    attach_uora(model, UORAConfig(rank=rank, target_modules="all-linear", share=share, **options))
    for k, (_, layer) in enumerate(named_adapters(model)):
        with torch.no_grad():
            layer.uora_d.copy_(torch.linspace(-1, 1, rank + 1)[1:].roll(k) + 0.01)
            nn.init.normal_(layer.uora_b, generator=generator(k))
    return model


@pytest.mark.parametrize(
    ("k", "n", "chosen"), [(4, 9, [1, 3]), (5, 7, [0, 4]), (3, 8, [0, 1, 2]), (1, 2, [0])]
)
@pytest.mark.parametrize("interpolation", [0.1, 0.5, 1.0])
def test_with_room_all_rows_stay_exactly_orthogonal_at_their_norm(k, n, chosen, interpolation):
    """K + chosen <= n: the Gram matrix does not change."""
    rows = draw_down(k, n, "orthogonal", generator())
    new = rows.clone()
    new[chosen] = turned_rows(rows, chosen, interpolation, generator(1))
    torch.testing.assert_close(new @ new.t(), rows @ rows.t(), atol=2e-6, rtol=0)
    theta = math.atan2(interpolation, 1 - interpolation)
    cosines = (new[chosen] * rows[chosen]).sum(1) / rows[chosen].square().sum(1)
    torch.testing.assert_close(cosines, torch.full((len(chosen),), math.cos(theta)), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("k", "n", "chosen"), [(6, 6, [2, 4]), (8, 3, [0, 4, 7]), (5, 6, [0, 1, 2]), (6, 6, [3])]
)
def test_without_room_norms_and_the_angle_are_kept(k, n, chosen):
    """Square and stacked blocks: each row turns by the angle; its direction leaves the staying rows alone if
    it can.
    """
    rows = draw_down(k, n, "orthogonal", generator())
    new = turned_rows(rows, chosen, 0.5, generator(1))
    torch.testing.assert_close(new.norm(dim=1), rows[chosen].norm(dim=1))
    cosines = (new * rows[chosen]).sum(1) / rows[chosen].square().sum(1)
    torch.testing.assert_close(cosines, torch.full((len(chosen),), math.cos(math.pi / 4)), atol=1e-5, rtol=0)
    if len(chosen) > 1 and k <= n:
        stay = [i for i in range(k) if i not in chosen]
        assert (new @ rows[stay].t()).abs().max() < 1e-5


def test_kaiming_rows_keep_their_own_norms():
    rows = draw_down(5, 9, "kaiming_uniform", generator())
    new = turned_rows(rows, [1, 2], 0.5, generator(1))
    torch.testing.assert_close(new.norm(dim=1), rows[[1, 2]].norm(dim=1))


def test_one_dimension_has_no_other_direction():
    rows = torch.ones(3, 1)
    assert torch.equal(turned_rows(rows, [0, 2], 0.5, generator()), rows[[0, 2]])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"threshold": 0.5, "threshold_mode": "relative", "max_fraction": 1.0}, [0, 2]),
        ({"threshold": 0.25, "threshold_mode": "absolute", "max_fraction": 1.0}, [0, 2]),
        ({"threshold": 0.06, "threshold_mode": "absolute", "max_fraction": 1.0}, [0]),
        ({"threshold": 0.6, "threshold_mode": "fraction", "max_fraction": 1.0}, [0, 1, 2]),
        ({"threshold": 0.5, "threshold_mode": "relative", "max_fraction": 0.3}, [0]),
        ({"threshold": 0.5, "threshold_mode": "relative", "max_fraction": 0.1}, []),
        ({"threshold": 0.0, "threshold_mode": "relative", "max_fraction": 1.0}, []),
    ],
)
def test_weakest_by_threshold_and_limit(options, expected):
    assert weakest([torch.tensor([0.05, 0.5, 0.2, 1.0, 0.75])], ReinitSchedule(**options)) == expected


def test_a_shared_row_is_weak_only_if_it_is_weak_in_every_layer():
    """The maximum over layers decides, not the mean."""
    scores = [torch.tensor([0.1, 0.02, 1.0, 1.0]), torch.tensor([0.1, 0.5, 0.7, 1.0])]
    shares = [(s / s.mean())[1].item() for s in scores]
    assert sum(shares) / 2 < 0.5 < max(shares)
    assert weakest(scores, ReinitSchedule(threshold=0.5, max_fraction=1.0)) == [0]


def test_exactly_the_chosen_rows_change_under_share_model():
    model = adapted("model")
    owner = model.uora_projections
    A, B = owner.down(9).clone(), owner.up(7).clone()
    with torch.no_grad():
        for _, layer in named_adapters(model):
            layer.uora_d.copy_(torch.tensor([1.0, 0.01, 1.0, -1.0]))
    rows = refresh(model, ReinitSchedule(max_fraction=0.5))
    assert rows == {"A_9": [1], "B_7": [1]}
    assert (owner.down(9) != A).any(1).nonzero().flatten().tolist() == [1]
    assert (owner.up(7) != B).any(0).nonzero().flatten().tolist() == [1]
    assert sorted(owner._buffers) == ["A_9", "B_7"]


def test_a_layers_rows_move_no_other_layer_under_share_layer():
    model = adapted("layer")
    owner = model.uora_projections
    A, B = owner.down(9).clone(), owner.up(7).clone()
    before = model["two"].delta_weight().detach()
    rows = refresh(model, ReinitSchedule(threshold=0.2, threshold_mode="absolute", max_fraction=0.25))
    assert set(rows) == {"A_9_0", "B_7_0", "A_9_1", "B_7_1"}
    assert rows["A_9_0"] != rows["A_9_1"]
    assert torch.equal(owner.down(9), A)
    assert torch.equal(owner.up(7), B)
    for index, name in enumerate(("one", "two")):
        chosen = rows[f"A_9_{index}"]
        assert (owner.down(9, index) != A).any(1).nonzero().flatten().tolist() == chosen
        assert torch.equal(model[name]._uora_tensors(9)[0], owner.down(9, index))
    assert not torch.equal(model["two"].delta_weight(), before)


def test_a_second_refresh_of_a_layer_starts_from_what_the_first_left():
    """Rows that only the first refresh chose stay as it left them."""
    model = adapted("layer")
    owner = model.uora_projections
    kept = {}
    for weak in (1, 3):
        with torch.no_grad():
            for _, layer in named_adapters(model):
                layer.uora_d.fill_(1.0)[weak] = 0.01
        assert refresh(model, ReinitSchedule())["A_9_0"] == [weak]
        kept[weak] = owner.down(9, 0)[weak].clone(), owner.up(7, 0)[:, weak].clone()
    for weak, (row, column) in kept.items():
        assert torch.equal(owner.down(9, 0)[weak], row)
        assert torch.equal(owner.up(7, 0)[:, weak], column)
        assert not torch.equal(row, owner.down(9)[weak])


def test_b_chooses_rows_of_b():
    model = adapted("layer")
    with torch.no_grad():
        for _, layer in named_adapters(model):
            layer.uora_b.copy_(torch.tensor([1.0, 1.0, 0.01, 1.0, 1.0, -1.0, 1.0]))
    B = model.uora_projections.up(7).clone()
    rows = refresh(model, ReinitSchedule(vectors=["b"]))
    assert rows == {"B_7_0:rows": [2], "B_7_1:rows": [2]}
    assert (model.uora_projections.up(7, 0) != B).any(1).nonzero().flatten().tolist() == [2]
    torch.testing.assert_close(model.uora_projections.up(7, 0)[2].norm(), B[2].norm())


def test_both_vectors_at_once_rebuild_too():
    model = adapted("layer")
    refresh(model, ReinitSchedule(vectors=["d", "b"], threshold=1.0))
    after = [b.clone() for b in model.uora_projections.buffers()]
    rebuild(model)
    assert all(torch.equal(a, b) for a, b in zip(after, model.uora_projections.buffers(), strict=True))


@pytest.mark.parametrize("share", ["model", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projections_are_rebuilt_from_the_record_bit_for_bit(share, dtype):
    model = adapted(share, rank=5).to(dtype)
    for _ in range(3):
        refresh(model, ReinitSchedule(threshold=1.1, max_fraction=0.5))
    owner = model.uora_projections
    assert len(owner.record) == 3
    after = {name: b.clone() for name, b in owner.named_buffers()}
    twin = adapted(share, rank=5).to(dtype)
    twin.uora_projections.record = copy.deepcopy(owner.record)
    torch.randn(11)
    rebuild(twin)
    assert set(after) == {name for name, _ in twin.uora_projections.named_buffers()}
    assert all(torch.equal(after[name], b) for name, b in twin.uora_projections.named_buffers())
    assert twin.uora_projections.record == owner.record


def test_draws_do_not_depend_on_threads_or_other_generators():
    results = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        model = adapted("model", rank=6)
        torch.randn(threads)
        refresh(model, ReinitSchedule(threshold=2.0))
        results.append(model.uora_projections.down(9).clone())
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_the_global_random_state_is_not_touched():
    model, state = adapted(), torch.get_rng_state()
    refresh(model, ALL)
    assert torch.equal(torch.get_rng_state(), state)


def test_successive_refreshes_draw_different_directions():
    model = adapted("model")
    start = model.uora_projections.down(9).clone()
    turns = []
    for _ in range(2):
        with torch.no_grad():
            model.uora_projections.down(9).copy_(start)
        refresh(model, ALL)
        turns.append(model.uora_projections.down(9).clone())
    assert not torch.equal(*turns)


def test_interpolation_zero_changes_nothing_and_one_replaces():
    model = adapted("model")
    state = copy.deepcopy(model.state_dict())
    assert refresh(model, ReinitSchedule(threshold=9.0, interpolation=0.0)) == {}
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    A = model.uora_projections.down(9).clone()
    rows = refresh(model, ReinitSchedule(threshold=9.0, interpolation=1.0))["A_9"]
    assert (model.uora_projections.down(9)[rows] * A[rows]).sum(1).abs().max() < 1e-5


@pytest.mark.parametrize("preserve", [True, False])
def test_preserving_scales_refreshed_entries_by_the_cosine_of_every_turn(preserve: bool):
    """Cos for A and cos for B: cos² for d; others keep their bits."""
    model = adapted("layer")
    before = model["one"].uora_d.detach().clone()
    schedule = ReinitSchedule(threshold=1.0, preserve_function=preserve, interpolation=0.3)
    rows = refresh(model, schedule)["A_9_0"]
    cosine = math.cos(math.atan2(0.3, 0.7)) ** 2 if preserve else 1.0
    expected = before.clone()
    expected[rows] *= cosine
    torch.testing.assert_close(model["one"].uora_d.detach(), expected)


def test_the_cosine_is_the_value_that_moves_the_update_least():
    """Literal least squares of the old contribution on the new direction, with equal entries of b."""
    model = adapted("layer")
    with torch.no_grad():
        model["one"].uora_b.fill_(0.7)
    owner, d = model.uora_projections, model["one"].uora_d.detach().clone()
    A, B = owner.down(9).clone(), owner.up(7).clone()
    rows = refresh(model, ReinitSchedule(threshold=1.0, max_fraction=0.5))["A_9_0"]
    assert rows
    for i in rows:
        old = d[i] * torch.outer(0.7 * B[:, i], A[i])
        new = torch.outer(0.7 * owner.up(7, 0)[:, i], owner.down(9, 0)[i])
        best = (old * new).sum() / new.square().sum()
        torch.testing.assert_close(model["one"].uora_d[i].detach(), best, atol=1e-6, rtol=1e-4)


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01),
}


def trained(optimizer: str, steps: int = 30):
    torch.manual_seed(0)
    model = adapted("layer")
    made = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    x, y = torch.randn(64, 9), torch.randn(64, 7)

    def step():
        made.zero_grad()
        nn.functional.mse_loss(model["one"](x) + model["two"](x), y).backward()
        made.step()

    for _ in range(steps):
        step()
    return model, made, step


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("reset", [True, False])
def test_first_moments_of_refreshed_entries_are_cleared_and_nothing_else(name: str, reset: bool):
    model, optimizer, _ = trained(name)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    rows = refresh(model, ReinitSchedule(threshold=1.0, reset_optimizer_state=reset), optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    cleared = 0
    for index, parameter in enumerate(parameters):
        for key, old in before.get(index, {}).items():
            now = optimizer.state[parameter][key]
            expected = copy.deepcopy(old)
            for layer, module in enumerate((model["one"], model["two"])):
                if reset and parameter is module.uora_d and key in ("exp_avg", "momentum_buffer"):
                    expected[rows[f"A_9_{layer}"]] = 0.0
                    cleared += 1
            same = torch.equal(now, expected) if isinstance(now, torch.Tensor) else now == expected
            assert same, (index, key)
    assert cleared == (2 if reset and name != "SGD" else 0)


def test_the_step_after_a_refresh_is_no_larger_than_usual():
    """Clearing both moments would give about three times the learning rate; clearing the first does not."""
    model, optimizer, step = trained("AdamW")
    for _ in range(10):
        refresh(model, ReinitSchedule(threshold=1.0, max_fraction=0.5), optimizer)
        before = [m.uora_d.detach().clone() for _, m in named_adapters(model)]
        step()
        for old, (_, module) in zip(before, named_adapters(model), strict=True):
            assert (module.uora_d - old).abs().max() <= 1.6 * 0.01


def test_an_average_does_not_mistake_a_zero_crossing_for_death():
    model = adapted("layer")
    refresher = Refresher(ReinitSchedule(criterion="ema", start=40, stop=40, every_n_steps=1), due=[40])
    for step in range(1, 41):
        with torch.no_grad():
            model["one"].uora_d.copy_(torch.tensor([1.0, 0.001, 1.0, 1.0]))
            model["one"].uora_d[0] = (40 - step) / 20  # was large, is crossing zero now
            model["two"].uora_d.fill_(1.0)
        rows = refresher.after_step(attachment_of(model, "a test"), [], step)
    assert rows == {"A_9_0": [1], "B_7_0": [1]}


def test_sensitivity_weighs_by_the_second_moment():
    model, optimizer, _ = trained("AdamW")
    with torch.no_grad():
        for module in (model["one"], model["two"]):
            module.uora_d.fill_(1.0)
            optimizer.state[module.uora_d]["exp_avg_sq"].copy_(torch.tensor([1.0, 1.0, 1e-6, 1.0]))
    rows = refresh(model, ReinitSchedule(criterion="sensitivity"), optimizer)
    assert rows["A_9_0"] == [2]
    with pytest.raises(ValueError, match="criterion='sensitivity' needs an optimizer with second moments"):
        refresh(model, ReinitSchedule(criterion="sensitivity"))


def literal_candidates(rows: torch.Tensor, key: str, pool: int) -> torch.Tensor:
    """The pool as the docstrings say it is drawn: Gaussian, less its part in the rows, at length 1."""
    drawn = torch.randn(pool, rows.shape[1], generator=seeded_generator(0, "refresh", 0, key)).double()
    basis = rows.double().t()
    drawn = drawn - (basis @ torch.linalg.lstsq(basis, drawn.t()).solution).t()
    return drawn / drawn.norm(dim=1, keepdim=True)


def test_growth_by_gradient_takes_the_candidates_with_the_largest_gradient():
    """Against the literal score |(b * β)^T G α| of every candidate; exact from the record."""
    model = adapted("layer")
    owner, x, y = model.uora_projections, torch.randn(64, 9), torch.randn(64, 7)
    A, B, b = owner.down(9).clone(), owner.up(7).clone(), model["one"].uora_b.detach().double()
    schedule = ReinitSchedule(
        threshold=1.0, max_fraction=0.5, growth="gradient", candidates=50, interpolation=1.0
    )
    with gradients_collected(model):
        for _ in range(2):
            nn.functional.mse_loss(model["one"](x) + model["two"](x), y).backward()
        G = owner.gradients[0, "weight"].double()
        rows = refresh(model, schedule)["A_9_0"]
    alphas, betas = literal_candidates(A, "A_9_0", 50), literal_candidates(B.t(), "B_7_0", 50)
    scores = [abs(((b * beta) @ G @ alpha).item()) for alpha, beta in zip(alphas, betas, strict=True)]
    best = sorted(range(50), key=lambda c: -scores[c])[: len(rows)]
    assert owner.record[0]["picked"]["0"] == best
    turned = owner.down(9, 0)[rows[0]].double() / 2**0.5
    torch.testing.assert_close(turned, alphas[best[0]], atol=1e-5, rtol=0)
    after = {name: t.clone() for name, t in owner.named_buffers()}
    rebuild(model)
    assert all(torch.equal(after[name], t) for name, t in owner.named_buffers())


def test_collected_gradients_are_those_of_the_effective_weight():
    model = adapted("layer", compute="factored")
    x = torch.randn(5, 9)
    with gradients_collected(model):
        model["one"](x).square().sum().backward()
        G = model.uora_projections.gradients[0, "weight"]
    W = model["one"].weight.detach().requires_grad_()
    nn.functional.linear(x, W, model["one"].bias).square().sum().backward()
    torch.testing.assert_close(G, W.grad, atol=1e-4, rtol=1e-4)
    assert model.uora_projections.gradients is None


@pytest.mark.parametrize(
    ("make", "schedule", "message"),
    [
        (
            lambda: adapted("model"),
            ReinitSchedule(growth="gradient"),
            "needs share='layer', got share='model'",
        ),
        (lambda: adapted("layer", dropout=0.1), ReinitSchedule(growth="gradient"), "needs dropout=0.0"),
        (
            lambda: adapted("layer"),
            ReinitSchedule(growth="gradient"),
            "inside `with lightning_uora.reinit.gradients_collected",
        ),
        (lambda: adapted("layer"), ReinitSchedule(criterion="ema"), "criterion='ema' needs averages"),
        (lambda: nn.Linear(3, 3), ReinitSchedule(), "holds no adapted model"),
    ],
)
def test_what_a_refresh_needs_and_does_not_find(make, schedule, message: str):
    with pytest.raises(ValueError, match=message):
        refresh(make(), schedule)


@pytest.mark.parametrize("vector", ["d", "b"])
def test_non_finite_vectors_are_named_and_nothing_changes(vector: str):
    model = adapted("layer")
    with torch.no_grad():
        getattr(model["two"], f"uora_{vector}")[1] = float("nan")
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=f"{vector} of module 'two' is not finite at step 0; nothing was refreshed"
    ):
        refresh(model, ALL)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, state[key], equal_nan=True, atol=0, rtol=0)


def test_state_dict_carries_record_and_own_copies_and_drops_them():
    model = adapted("layer")
    fresh = copy.deepcopy(model.state_dict())
    refresh(model, ReinitSchedule(threshold=1.0))
    state = copy.deepcopy(model.state_dict())
    assert {"uora_projections.record", "uora_projections.A_9_0:rows"} <= set(state)
    twin = adapted("layer")
    twin.load_state_dict(state)
    assert twin.uora_projections.record == model.uora_projections.record
    assert torch.equal(twin["one"].delta_weight(), model["one"].delta_weight())
    twin.load_state_dict(fresh)
    assert twin.uora_projections.record == []
    assert sorted(twin.uora_projections._buffers) == ["A_9", "B_7"]
    plain = {k: v for k, v in state.items() if "uora" not in k}
    model.load_state_dict(plain, strict=False)
    assert len(model.uora_projections.record) == 1


@pytest.mark.parametrize(
    ("schedule", "total", "expected"),
    [
        (ReinitSchedule(), 1000, [30, 87, 143, 200]),
        (ReinitSchedule(), 10, [1, 2]),
        (ReinitSchedule(start=5, stop=9, every_n_steps=2), None, [5, 7, 9]),
        (ReinitSchedule(start=0, stop=3, every_n_steps=1), None, [1, 2, 3]),
        (ReinitSchedule(start=0, stop=7, every_n_steps=2), None, [2, 4, 6]),
        (ReinitSchedule(start=0.0, stop=1.0, every_n_steps=3), 10, [3, 6, 9]),
        (ReinitSchedule(start=1, stop=7, every_n_steps=2), None, [1, 3, 5, 7]),
        (ReinitSchedule(start=0, stop=1, every_n_steps=2), None, []),
        (ReinitSchedule(start=0.5, stop=1.0), 4, [2, 3, 4]),
        (ReinitSchedule(start=50, stop=0.2), 100, []),
        (ReinitSchedule(start=0.0, stop=0.0), 100, []),
    ],
)
def test_due_steps(schedule, total, expected):
    assert schedule.due_steps(total) == expected


def test_fractions_of_an_endless_run_are_refused_with_advice():
    with pytest.raises(
        ValueError,
        match=r"start=0.03 is a fraction of the run, whose length is not known.*give start and stop",
    ):
        ReinitSchedule().due_steps(None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("every_n_steps", 0),
        ("every_n_steps", 1.5),
        ("threshold", -0.1),
        ("threshold", float("nan")),
        ("threshold_mode", "mean"),
        ("max_fraction", 1.1),
        ("max_fraction", -0.1),
        ("interpolation", 1.5),
        ("interpolation", "half"),
        ("start", -1),
        ("start", 1.5),
        ("start", True),
        ("start", None),
        ("stop", -0.1),
        ("stop", 0.01),
        ("vectors", ()),
        ("vectors", ("c",)),
        ("reset_optimizer_state", 1),
        ("criterion", "size"),
        ("preserve_function", None),
        ("growth", "best"),
        ("candidates", 0),
    ],
)
def test_a_wrong_schedule_names_the_field_and_the_value(field: str, value):
    with pytest.raises(ValueError, match=f"^{field}=.*is not allowed; {field} must be ") as error:
        ReinitSchedule(**{field: value})
    assert repr(value) in str(error.value)
