"""The schedule inside Lightning: counted in optimizer steps, seen in loggers, the same run after a resume."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_uora import ReinitSchedule, UORACallback, named_adapters, rebuild
from lightning_uora.reinit.schedule import Refresher
from tests.toys import Toy, callback, data, equal_batches, trainer

EAGER = {"threshold": 2.0, "start": 0.0, "stop": 1.0, "max_fraction": 0.5}


def steps_of(uora: UORACallback) -> list[int]:
    return [record["step"] for record in uora.refreshes]


def refreshing(**options) -> UORACallback:
    return callback(share="layer", reinit=ReinitSchedule(**{**EAGER, **options}))


def test_refreshes_come_at_the_due_steps_and_are_recorded_plainly():
    uora, model = refreshing(every_n_steps=3), Toy()
    trainer(uora).fit(model, data())  # 8 steps
    assert steps_of(uora) == [3, 6]
    for record in uora.refreshes:
        assert set(record) == {"step", "rows", "interpolation"}
        assert all(isinstance(i, int) for rows in record["rows"].values() for i in rows)
    after = [b.clone() for b in model.uora_projections.buffers()]
    rebuild(model)
    assert all(torch.equal(a, b) for a, b in zip(after, model.uora_projections.buffers(), strict=True))


def test_steps_are_optimizer_steps_under_accumulation():
    uora = refreshing(every_n_steps=1)
    trainer(uora, accumulate_grad_batches=2).fit(Toy(), data())
    assert steps_of(uora) == [1, 2, 3, 4]
    uora = refreshing(every_n_steps=1, start=1.0)
    trainer(uora, GradientAccumulationScheduler({0: 1, 1: 4})).fit(Toy(), data())  # 4 + 1 steps
    assert steps_of(uora) == [5]


def test_an_average_is_kept_over_optimizer_steps_and_not_over_batches(monkeypatch):
    seen = []
    monkeypatch.setattr(Refresher, "_observe", lambda self, model: seen.append(1))
    trainer(refreshing(criterion="ema", start=99, stop=99), accumulate_grad_batches=2).fit(Toy(), data())
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_epochs": 3}, 12),
        ({"max_epochs": -1, "max_steps": 5}, 5),
        ({"max_epochs": 2, "max_steps": 5}, 5),
        ({"limit_train_batches": 2}, 4),
        ({"limit_train_batches": 0.5}, 4),
        ({"overfit_batches": 1}, 2),
    ],
)
def test_the_window_follows_the_length_of_the_run(options, expected: int):
    uora = refreshing(start=1.0)
    trainer(uora, **options).fit(Toy(), data())
    assert steps_of(uora) == [expected]


def test_an_endless_run_wants_integers():
    with pytest.raises(ValueError, match="give start and stop as integers"):
        trainer(refreshing(), max_epochs=-1).fit(Toy(), data())

    class Stop(Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step >= 6

    uora = refreshing(start=2, stop=4, every_n_steps=1)
    trainer(uora, Stop(), max_epochs=-1).fit(Toy(), data())
    assert steps_of(uora) == [2, 3, 4]


class Manual(Toy):
    """Two optimizers by hand; ``past_lightning`` steps them where Lightning does not count."""

    past_lightning = False

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_index):
        loss = super().training_step(batch, batch_index)
        self.manual_backward(loss)
        for optimizer in self.optimizers(use_pl_optimizer=not self.past_lightning):
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        named = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        vectors = [p for n, p in named if "uora" in n]
        return torch.optim.Adam(vectors, lr=0.05), torch.optim.SGD(
            [p for n, p in named if "uora" not in n], lr=0.1
        )


class PastLightning(Manual):
    past_lightning = True


@pytest.mark.parametrize("cls", [Manual, PastLightning])
@pytest.mark.parametrize("limit", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 8}])
def test_manual_optimisation_counts_batches(cls, limit):
    if cls is PastLightning and "max_steps" in limit:
        limit = {"max_epochs": 1}  # Lightning's own step limit never comes
    uora = refreshing(every_n_steps=1)
    trainer(uora, **limit).fit(cls(), data())
    expected = {2: 8, -1: 4, 1: 4}[limit["max_epochs"]]
    assert steps_of(uora) == list(range(1, expected + 1))


def test_momentum_is_cleared_in_lightnings_optimizer():
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            for record in uora.refreshes[len(seen) :]:
                seen.append(record)
                moment = trainer.optimizers[0].state[pl_module.body[0].uora_d]["exp_avg"]
                rows = record["rows"]["A_6_0"]
                assert not moment[rows].any()
                if record["step"] > 1:  # b = 0 at first: d has no gradient yet
                    assert moment[[i for i in range(4) if i not in rows]].all()

    uora = refreshing(every_n_steps=2)
    trainer(uora, Look()).fit(Toy(), data())
    assert len(seen) == 4


def test_metric_reaches_the_loggers(tmp_path):
    logger = CSVLogger(tmp_path)
    trainer(refreshing(every_n_steps=4), logger=logger).fit(Toy(), data())
    metrics = [
        (m["step"], m["uora/refreshed_rows"]) for m in logger.experiment.metrics if "uora/refreshed_rows" in m
    ]
    lines = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "uora/refreshed_rows" in lines
    assert all(count == 8.0 for _, count in metrics)


def test_a_schedule_that_never_selects_warns_at_the_end():
    with pytest.warns(UserWarning, match=r"refreshed no row in 4 attempts: threshold=1e-09 \(absolute\)"):
        trainer(refreshing(threshold=1e-9, threshold_mode="absolute")).fit(Toy(), data())


def test_a_window_that_is_over_before_it_starts_warns():
    with pytest.warns(
        UserWarning, match=r"never refreshes in this run of 8 steps: .* start=100 to stop=0\.5"
    ):
        trainer(refreshing(start=100, stop=0.5)).fit(Toy(), data())


@pytest.mark.parametrize("training", [True, False])
def test_dropout_of_a_model_in_evaluation_mode_warns(training: bool, recwarn):
    trainer(callback(dropout=0.5)).fit(Toy().train(training), data())
    assert any("evaluation mode" in str(warning.message) for warning in recwarn) is not training


def test_no_schedule_no_refresh():
    uora = callback(reinit=None)
    trainer(uora).fit(Toy(), data())
    assert uora.refreshes == []
    assert uora.state_dict() == {}


def test_a_second_fit_and_a_second_module_start_their_own_schedule():
    uora = refreshing(every_n_steps=4)
    for _ in range(2):
        trainer(uora).fit(Toy(), data())
        assert steps_of(uora) == [4, 8]


def test_growth_by_gradient_in_training_and_its_requirements():
    uora, model = refreshing(growth="gradient", candidates=20, every_n_steps=3), Toy()
    trainer(uora).fit(model, data())
    assert steps_of(uora) == [3, 6]
    assert all(set(record["picked"]) == {"0", "1"} for record in uora.refreshes)
    assert model.uora_projections.gradients is None
    with pytest.raises(ValueError, match="needs share='layer'"):
        UORACallback(share="model", reinit=ReinitSchedule(growth="gradient"))
    with pytest.raises(ValueError, match=r"needs dropout=0.0"):
        UORACallback(share="layer", dropout=0.1, reinit=ReinitSchedule(growth="gradient"))


def test_the_same_seed_gives_the_same_run_bit_for_bit():
    runs = []
    for _ in range(2):
        torch.manual_seed(4)
        model = Toy()
        trainer(refreshing(every_n_steps=2)).fit(model, data())
        runs.append(model.state_dict())
    assert all(torch.equal(v, runs[1][k]) for k, v in runs[0].items())


@pytest.mark.parametrize("criterion", ["magnitude", "ema"])
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize(("stop_after", "accumulate"), [(3, 1), (5, 1), (6, 1), (2, 2), (6, 2)])
def test_a_resume_equals_the_unbroken_run_bit_for_bit(tmp_path, criterion, stop_after, accumulate):
    """After refreshes, in the middle of an epoch and of an accumulation: weights, vectors, A, B, record,
    optimizer.
    """

    def make():
        torch.manual_seed(4)
        return Toy(), refreshing(every_n_steps=2, criterion=criterion)

    path = tmp_path / "middle.ckpt"

    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.fit_loop.total_batch_idx + 1 == stop_after and not path.exists():
                trainer.save_checkpoint(path)

    options = {"max_epochs": 3, "accumulate_grad_batches": accumulate}
    model, uora = make()
    run = trainer(uora, Save(), **options)
    run.fit(model, equal_batches())
    resumed, uora_again = make()
    again = trainer(uora_again, **options)
    again.fit(resumed, equal_batches(), ckpt_path=path)
    assert uora_again.refreshes == uora.refreshes
    assert len(uora.refreshes) >= 3
    state, state_again = model.state_dict(), resumed.state_dict()
    assert list(state) == list(state_again)
    assert all(torch.equal(v, state_again[k]) for k, v in state.items())
    one, two = (t.optimizers[0].state_dict()["state"] for t in (run, again))
    assert all(torch.equal(one[i]["exp_avg"], two[i]["exp_avg"]) for i in one)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_checkpoint_between_a_step_and_its_refresh_resumes_to_the_same_run(tmp_path):
    """A callback before this one in the list saves at the due step: the refresh is made up for."""
    path = tmp_path / "between.ckpt"

    class Save(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 3 and not path.exists():
                trainer.save_checkpoint(path)

    def make():
        torch.manual_seed(4)
        return Toy(), refreshing(every_n_steps=2)

    model, uora = make()
    trainer(Save(), uora).fit(model, equal_batches())
    resumed, again = make()
    trainer(again).fit(resumed, equal_batches(), ckpt_path=path)
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_growth_by_gradient_resumed_between_a_step_and_its_refresh_waits_for_a_gradient(tmp_path):
    """Gradients of all weights are too large for a checkpoint: the refresh comes one step later."""
    path = tmp_path / "between.ckpt"

    class Save(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 3 and not path.exists():
                trainer.save_checkpoint(path)

    trainer(Save(), refreshing(every_n_steps=2, start=1, growth="gradient")).fit(Toy(), equal_batches())
    again = refreshing(every_n_steps=2, start=1, growth="gradient")
    trainer(again).fit(Toy(), equal_batches(), ckpt_path=path)
    assert steps_of(again) == [1, 4, 5, 7]


def test_non_finite_vectors_stop_training_by_name():
    class Breaks(Toy):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            return None

        def optimizer_step(self, *args, **kwargs):
            super().optimizer_step(*args, **kwargs)
            with torch.no_grad():
                self.body[2].uora_d[0] = float("nan")

    with pytest.raises(ValueError, match=r"d of module 'body.2' is not finite at step 1"):
        trainer(refreshing(every_n_steps=1)).fit(Breaks(), equal_batches())


def test_loading_a_refreshed_state_into_a_fresh_module_gives_the_same_outputs():
    model = Toy()
    trainer(refreshing(every_n_steps=2)).fit(model, equal_batches())
    twin = Toy()
    trainer(refreshing()).predict(twin, equal_batches())
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    x = torch.randn(3, 6)
    assert torch.equal(twin.eval()(x), model.eval()(x))
    assert len(list(named_adapters(twin))) == 2
    assert isinstance(twin.body[0], nn.Linear)


@pytest.mark.parametrize(
    ("known", "options", "steps"),
    [
        (True, {}, [1, 2, 3, 4]),  # the window of the plan with which the run began
        (False, {}, [1, 2, 3, 4, 11, 16]),  # an older file: what of the new plan's window is not over
        (True, {"start": 0.4, "stop": 0.4}, [1, 2, 3, 4, 13]),  # another window that the user gave
    ],
)
def test_a_resume_with_a_longer_plan_refreshes_in_no_step_outside_a_window(tmp_path, known, options, steps):
    uora = refreshing(stop=0.5)
    run = trainer(uora)
    run.fit(Toy(), data())  # 8 steps
    run.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    if not known:
        (state,) = (s for key, s in checkpoint["callbacks"].items() if key.startswith("UORACallback"))
        places = [s for s in (state, *state.values()) if isinstance(s, dict) and "handled" in s]
        for place in places:
            del place["due"], place["window"]
        assert places
        torch.save(checkpoint, tmp_path / "last.ckpt")
    again = refreshing(**{"stop": 0.5, **options})
    trainer(again, max_epochs=8).fit(Toy(), data(), ckpt_path=tmp_path / "last.ckpt")
    assert steps_of(again) == steps
