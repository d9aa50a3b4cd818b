"""The vectors' own rate: a run with ``vector_lr`` is, bit for bit, the one whose module wrote two groups."""

from __future__ import annotations

import itertools
import warnings

import lightning
import pytest
import timm
import timm.scheduler
import torch
import transformers
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateFinder, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from packaging.version import Version
from torch import nn
from torch.optim import lr_scheduler as S  # noqa: N812 - many names of it

from lightning_uora import ReinitSchedule, UORACallback, attach_uora, param_groups
from lightning_uora.trainer.rates import auto_rate
from lightning_uora.trainer.schedules import is_gentle, peak_rate
from tests.toys import BUILT, Toy, callback, data, equal_batches, trainer

RESUMED = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint", "ignore:Be aware that when")
EPOCH = pytest.mark.filterwarnings("ignore:The epoch parameter in")  # torch 2.7, of its own SequentialLR
RATE = 0.02
"""Of the vectors, where a test says nothing else; the rest has 1e-3."""


def plain(make):
    """A schedule whose arguments are the same for one group and for two."""
    return lambda optimizer, rates: make(optimizer)


SCHEDULES = {
    "none": plain(lambda o: None),
    "LambdaLR": plain(lambda o: S.LambdaLR(o, lambda step: (step + 1) / 7)),
    "LambdaLR, a function each": lambda o, rates: S.LambdaLR(
        o, [lambda step: 0.9**step] * len(o.param_groups)
    ),
    "MultiplicativeLR": plain(lambda o: S.MultiplicativeLR(o, lambda step: 0.93)),
    "StepLR": plain(lambda o: S.StepLR(o, 2, 0.3)),
    "MultiStepLR": plain(lambda o: S.MultiStepLR(o, [2, 5], 0.3)),
    "ConstantLR": plain(lambda o: S.ConstantLR(o, 0.3, 4)),
    "LinearLR": plain(lambda o: S.LinearLR(o, 0.3, total_iters=4)),
    "ExponentialLR": plain(lambda o: S.ExponentialLR(o, 0.9)),
    "PolynomialLR": plain(lambda o: S.PolynomialLR(o, 6, 2.0)),
    "CosineAnnealingLR": plain(lambda o: S.CosineAnnealingLR(o, 6, 1e-5)),
    "CosineAnnealingWarmRestarts": plain(lambda o: S.CosineAnnealingWarmRestarts(o, 3, eta_min=1e-5)),
    "OneCycleLR": lambda o, rates: S.OneCycleLR(o, rates, 12, div_factor=7.0, final_div_factor=33.0),
    "OneCycleLR in three phases": lambda o, rates: S.OneCycleLR(o, rates, 12, three_phase=True),
    "CyclicLR": lambda o, rates: S.CyclicLR(
        o, [rate / 50 for rate in rates], rates, step_size_up=3, mode="exp_range", gamma=0.9
    ),
    "CyclicLR, momentum still": lambda o, rates: S.CyclicLR(
        o, [rate / 8 for rate in rates], rates, step_size_up=2, cycle_momentum=False
    ),
    "ReduceLROnPlateau": plain(lambda o: S.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=0.5)),
    "SequentialLR": plain(
        lambda o: S.SequentialLR(
            o, [S.LinearLR(o, 0.1, total_iters=3), S.CosineAnnealingLR(o, 5), S.ConstantLR(o, 0.5, 9)], [3, 6]
        )
    ),
    "ChainedScheduler": plain(
        lambda o: S.ChainedScheduler([S.LinearLR(o, 0.1, total_iters=3), S.ExponentialLR(o, 0.9)], o)
    ),
    "SequentialLR in ChainedScheduler": plain(
        lambda o: S.ChainedScheduler(
            [S.SequentialLR(o, [S.LinearLR(o, 0.5), S.ExponentialLR(o, 0.8)], [3]), S.StepLR(o, 2)], o
        )
    ),
    **{
        f"transformers {name}": plain(
            lambda o, name=name: transformers.get_scheduler(
                name,
                o,
                num_warmup_steps=3,
                num_training_steps=9,
                scheduler_specific_kwargs=SPECIFIC.get(name),
            )
        )
        for name in (
            "linear",
            "cosine",
            "cosine_with_restarts",
            "constant",
            "constant_with_warmup",
            "inverse_sqrt",
            "cosine_with_min_lr",
            "warmup_stable_decay",
            "reduce_lr_on_plateau",
        )
    },
    "transformers polynomial": plain(
        lambda o: transformers.get_polynomial_decay_schedule_with_warmup(o, 3, 9, lr_end=0.0)
    ),
}
SPECIFIC = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 2},
    "reduce_lr_on_plateau": {"factor": 0.5, "patience": 0, "threshold": 0.5},
}
WARM = {"warmup_t": 2, "warmup_lr_init": 1e-6}
TIMM = {
    "CosineLRScheduler": lambda o: timm.scheduler.CosineLRScheduler(
        o, 8, 1e-5, warmup_t=2, warmup_lr_init=1e-6
    ),
    "CosineLRScheduler without warm-up": lambda o: timm.scheduler.CosineLRScheduler(o, 8),
    "StepLRScheduler": lambda o: timm.scheduler.StepLRScheduler(o, 3, 0.4, **WARM),
    "MultiStepLRScheduler": lambda o: timm.scheduler.MultiStepLRScheduler(o, [3, 5], 0.4),
    "TanhLRScheduler": lambda o: timm.scheduler.TanhLRScheduler(o, 8, **WARM),
    "PolyLRScheduler": lambda o: timm.scheduler.PolyLRScheduler(o, 8, **WARM),
    "PlateauLRScheduler": lambda o: timm.scheduler.PlateauLRScheduler(o, 0.5, patience_t=0, warmup_t=2),
}
OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, {}),
    "fused": (torch.optim.AdamW, {"fused": True}),
    "foreach": (torch.optim.AdamW, {"foreach": True, "amsgrad": True}),
    "a tensor as rate": (torch.optim.AdamW, {"lr": "tensor"}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.5}),
}


def is_vector(name: str) -> bool:
    return name.endswith(("uora_d", "uora_b"))


class Written(Toy):
    """Writes one group of all parameters or, ``by_hand``, two."""

    def __init__(self, by_hand: bool, schedule="none", optimizer="AdamW", named: bool = False):
        super().__init__()
        self.by_hand, self.make, self.named = by_hand, SCHEDULES.get(schedule), named
        self.timm = TIMM.get(schedule)
        self.cls, self.options = OPTIMIZERS[optimizer]
        self.rates: list[list[float]] = []

    def optimizer(self, named=None):
        named = list(self.named_parameters()) if named is None else named
        give = (lambda pairs: pairs) if self.named else (lambda pairs: [p for _, p in pairs])
        options = {"lr": 1e-3, **self.options}
        if options["lr"] == "tensor":
            options["lr"] = torch.tensor(1e-3)
        if not self.by_hand:
            return self.cls(give(named), **options)
        rate = options["lr"].new_tensor(RATE) if isinstance(options["lr"], torch.Tensor) else RATE
        vectors = {"params": give([pair for pair in named if is_vector(pair[0])]), "lr": rate}
        others = {"params": give([pair for pair in named if not is_vector(pair[0])])}
        return self.cls([others, {**vectors, "weight_decay": 0.0}], **options)

    def configure_optimizers(self):
        optimizer = self.optimizer()
        if self.timm is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # timm's plateau is on its way out
                try:
                    scheduler = self.timm(optimizer)
                except TypeError as error:  # its plateau passes what this torch no longer takes
                    pytest.skip(f"timm {timm.__version__} with torch {torch.__version__}: {error}")
        else:
            scheduler = self.make(optimizer, [1e-3, RATE][: len(optimizer.param_groups)])
        if scheduler is None:
            return optimizer
        inner = {"scheduler": scheduler, "interval": "step", "monitor": "loss", "strict": False}
        return {"optimizer": optimizer, "lr_scheduler": inner}

    def lr_scheduler_step(self, scheduler, metric):
        if self.timm is not None:
            scheduler.step(self.global_step, metric)
        else:
            super().lr_scheduler_step(scheduler, metric)

    def on_train_batch_end(self, *args):
        self.rates.append([float(g["lr"]) for g in self.trainer.optimizers[0].param_groups])


def pair(**options):
    """The module that wrote its groups, with the callback that leaves them; and the other way round."""
    for by_hand in (True, False):
        torch.manual_seed(1)
        yield Written(by_hand, **options), callback(vector_lr=None if by_hand else RATE)


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    names = [name for name, _ in one.named_parameters()]
    for name, a, b in zip(names, one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert one.body[0].uora_b.abs().max() > 1e-3


def both(fit=None, **options) -> tuple[Written, Written]:
    """Both modules after their fits."""
    modules = []
    for module, uora in pair(**options):
        run = fit or (lambda module, uora: trainer(uora).fit(module, data()))
        run(module, uora)
        modules.append(module)
    hand, ours = modules
    assert ours.rates == hand.rates
    assert_equal(hand, ours)
    return hand, ours


@EPOCH
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_group_follows_every_schedule(schedule: str):
    hand, _ = both(schedule=schedule)
    if schedule not in ("none", "transformers constant"):
        assert len({rates[1] for rates in hand.rates}) > 1


@pytest.mark.filterwarnings("ignore:.*lr_scheduler:FutureWarning")
@pytest.mark.parametrize("schedule", TIMM)
def test_the_group_follows_timms_schedules(schedule: str):
    hand, _ = both(schedule=schedule)
    assert len({rates[1] for rates in hand.rates}) > 1


@EPOCH
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("schedule", ["none", "OneCycleLR", "SequentialLR"])
def test_every_form_of_optimizer(optimizer: str, schedule: str):
    old = Version(torch.__version__) < Version("2.10")
    if old and (optimizer, schedule) == ("a tensor as rate", "SequentialLR"):
        pytest.skip(f"torch {torch.__version__}: its schedules write into the tensors that they remember")
    both(optimizer=optimizer, schedule=schedule)


@pytest.mark.parametrize("schedule", ["none", "LambdaLR", "OneCycleLR", "ReduceLROnPlateau"])
def test_accumulation_and_clipping(schedule: str):
    both(
        lambda module, uora: trainer(uora, accumulate_grad_batches=2, gradient_clip_val=0.1).fit(
            module, data()
        ),
        schedule=schedule,
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.filterwarnings(
    "ignore:You're resuming from a checkpoint that ended before", "ignore:Be aware that"
)
@EPOCH
def test_a_resume_goes_on_as_the_run_by_hand_does_and_as_the_unbroken_run(tmp_path, schedule: str):
    ends = []
    for number in (0, 1):
        module, uora = list(pair(schedule=schedule))[number]
        folder = tmp_path / str(number)
        save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        trainer(uora, save, enable_checkpointing=True).fit(module, equal_batches())
        again, uora = list(pair(schedule=schedule))[number]
        trainer(uora).fit(again, equal_batches(), ckpt_path=folder / "step=3.ckpt")
        ends.append(again)
        if "lateau" not in schedule:  # what it watches is of the whole run
            assert_equal(module, again)
    assert_equal(*ends)


def test_parameters_with_names_keep_them():
    _, ours = both(named=True)
    others, vectors = ours.trainer.optimizers[0].param_groups
    assert all(map(is_vector, vectors["param_names"]))
    assert vectors["param_names"] == [name for name, _ in ours.named_parameters() if is_vector(name)]
    assert not any(map(is_vector, others["param_names"]))


class Two(Written):
    """Two optimizers with a schedule each, by hand."""

    automatic_optimization = False

    def training_step(self, batch, batch_index):
        for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()
            scheduler.step()

    def configure_optimizers(self):
        named = list(self.named_parameters())
        first = [pair for pair in named if pair[0].startswith("body.0")]
        optimizers = [self.optimizer(first), self.optimizer([p for p in named if p not in first])]
        return optimizers, [S.ExponentialLR(optimizers[0], 0.9), S.CosineAnnealingLR(optimizers[1], 8)]

    def __eq__(self, other):
        return self is other

    __hash__ = Written.__hash__


def test_two_optimizers_and_manual_optimisation():
    modules = []
    for by_hand in (True, False):
        torch.manual_seed(1)
        module = Two(by_hand)
        module.configure_optimizers.__func__  # noqa: B018 - it is the class's own
        trainer(callback(vector_lr=None if by_hand else RATE)).fit(module, data())
        modules.append(module)
    assert_equal(*modules)
    for optimizer in modules[1].trainer.optimizers:
        assert [group.get("name") for group in optimizer.param_groups] == [None, "uora_vectors"]


def test_an_optimizer_built_in_init_gets_the_vectors():
    class Early(Written):
        def __init__(self, by_hand):
            super().__init__(by_hand)
            if by_hand:
                attach_uora(self, callback().config)
            self.early = self.optimizer()
            self.schedule = S.OneCycleLR(self.early, [1e-3, RATE][: len(self.early.param_groups)], 20)

        def configure_optimizers(self):
            return {
                "optimizer": self.early,
                "lr_scheduler": {"scheduler": self.schedule, "interval": "step"},
            }

    modules = []
    for by_hand in (True, False):
        torch.manual_seed(1)
        module = Early(by_hand)
        trainer(callback(vector_lr=None if by_hand else RATE)).fit(module, data())
        modules.append(module)
    assert_equal(*modules)


@pytest.mark.parametrize("toy", BUILT)
def test_auto_gives_the_vectors_a_group_wherever_the_model_is_built(toy):
    class OneGroup(toy):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=2e-5)

    module = OneGroup()
    trainer(callback()).fit(module, data())
    others, vectors = module.trainer.optimizers[0].param_groups
    assert vectors["name"] == "uora_vectors"
    assert (vectors["lr"], vectors["weight_decay"]) == (auto_rate(8), 0.0)
    assert (others["lr"], others["weight_decay"]) == (2e-5, 0.01)
    found = {name for name, p in module.named_parameters() if any(p is v for v in vectors["params"])}
    assert found == {name for name, _ in module.named_parameters() if is_vector(name)}


@pytest.mark.parametrize(
    ("steps", "rate"), [(None, 0.01), (100_000, 0.01), (1_000, 0.01), (250, 0.02), (90, 0.033), (3, 0.05)]
)
def test_the_automatic_rate_is_absolute_and_higher_in_short_runs(steps, rate):
    assert auto_rate(steps) == rate


@pytest.mark.parametrize(
    ("layers", "gentle", "rate"), [(1, False, 0.02), (48, False, 0.01), (12, True, 0.05), (48, True, 0.025)]
)
def test_the_automatic_rate_is_lower_for_many_layers_and_higher_with_warm_up_and_decay(layers, gentle, rate):
    assert auto_rate(250, layers, gentle) == rate


def _warm(step):
    return min(1.0, (step + 1) / 4)


GENTLE = {
    "constant": (lambda o: S.LambdaLR(o, lambda step: 1.0), False),
    "warm-up alone": (lambda o: S.LambdaLR(o, _warm), False),
    "decay alone": (lambda o: S.CosineAnnealingLR(o, 8), False),
    "both": (lambda o: S.LambdaLR(o, lambda step: _warm(step) * max(0.0, 1 - step / 8)), True),
    "one cycle": (lambda o: S.OneCycleLR(o, 1e-3, total_steps=8), True),
    "sequence": (
        lambda o: S.SequentialLR(o, [S.LinearLR(o, 0.1, total_iters=2), S.CosineAnnealingLR(o, 6)], [2]),
        True,
    ),
    "sequence that stays": (
        lambda o: S.SequentialLR(
            o, [S.LinearLR(o, 0.1, total_iters=2), S.LambdaLR(o, lambda step: 1.0)], [2]
        ),
        False,
    ),
    "transformers": (lambda o: transformers.get_cosine_schedule_with_warmup(o, 2, 8), True),
    "transformers, warm-up alone": (lambda o: transformers.get_constant_schedule_with_warmup(o, 2), False),
    "timm": (lambda o: timm.scheduler.CosineLRScheduler(o, 8, warmup_t=2, warmup_lr_init=1e-6), True),
}


@EPOCH
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step()")
@pytest.mark.parametrize("schedule", GENTLE)
def test_the_rate_is_higher_where_the_schedule_warms_up_and_decays(schedule):
    make, gentle = GENTLE[schedule]

    class Scheduled(Toy):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": make(optimizer), "interval": "step"},
            }

        def lr_scheduler_step(self, scheduler, metric):
            scheduler.step(self.global_step) if "timm" in type(scheduler).__module__ else scheduler.step()

    run = trainer(callback())
    run.fit(Scheduled(), data())
    schedulers = [config.scheduler for config in run.lr_scheduler_configs]
    base = schedulers[0].base_values[1] if schedule == "timm" else peak_rate(schedulers, 1)
    assert base == auto_rate(8, 2, gentle)


def test_a_schedule_that_cannot_be_asked_about_its_end_is_not_called_gentle():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = S.LambdaLR(optimizer, lambda step: [0.1, 1.0, 0.0][step])
    assert is_gentle(schedule, 0, 2)
    assert not is_gentle(schedule, 0, 100)
    assert not is_gentle(schedule, 0, None)


def test_groups_with_and_without_decay_give_one_group_of_vectors():
    class Decay(Toy):
        def configure_optimizers(self):
            flat = [p for p in self.parameters() if p.dim() < 2]
            weights = {"params": [p for p in self.parameters() if p.dim() > 1]}
            some = {"params": flat[::2], "weight_decay": 0.0}
            return torch.optim.AdamW([weights, some, {"params": flat[1::2], "weight_decay": 0.1}], lr=1e-4)

    module = Decay()
    trainer(callback()).fit(module, data())
    groups = module.trainer.optimizers[0].param_groups
    assert len(groups) == 4
    assert len(groups[-1]["params"]) == 4


def test_vectors_follow_the_function_of_the_group_that_they_came_from():
    class Layered(Toy):
        def configure_optimizers(self):
            parts = [self.body[0], self.body[2], self.head]
            groups = [{"params": list(part.parameters())} for part in parts]
            optimizer = torch.optim.AdamW(groups, lr=1e-4)
            same, half = (lambda step: 1.0), (lambda step: 0.5)
            schedule = S.LambdaLR(optimizer, [same, half, same])
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    module = Layered()
    trainer(callback(vector_lr=RATE)).fit(module, data())
    groups = module.trainer.optimizers[0].param_groups
    assert [group.get("name") for group in groups[3:]] == ["uora_vectors", "uora_vectors_2"]
    assert [group["lr"] for group in groups[3:]] == [RATE, RATE / 2]


def test_a_group_that_holds_vectors_alone_is_the_users():
    class Own(Toy):
        def configure_optimizers(self):
            return torch.optim.AdamW(param_groups(self, lr=1e-4, vector_lr=0.03))

    module = Own()
    trainer(callback()).fit(module, data())
    groups = module.trainer.optimizers[0].param_groups
    assert [(group["name"], group["lr"]) for group in groups] == [("others", 1e-4), ("uora_vectors", 0.03)]
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]


def one_group(cls, **options):
    class OneGroup(Toy):
        def configure_optimizers(self):
            return cls(self.parameters(), **options)

    return OneGroup()


class Home(torch.optim.Optimizer):
    """An optimizer that nobody knows."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        loss = closure()
        for p in itertools.chain(*(group["params"] for group in self.param_groups)):
            if p.grad is not None:
                p.data.add_(p.grad, alpha=-0.1)
        return loss


class HomeSchedule(S.LRScheduler):
    """A schedule that nobody knows."""

    def get_lr(self):
        return [0.1 for _ in self.optimizer.param_groups]


@pytest.mark.parametrize(
    ("cls", "options", "said"),
    [
        (
            torch.optim.LBFGS,
            {"lr": 0.1},
            r"the vectors get no group of their own with LBFGS, which has one.*lr=0.1",
        ),
        (
            Home,
            {},
            r"with Home, so they train at lr=0.1. Make the groups in configure_optimizers: groups = param",
        ),
        (
            torch.optim.SGD,
            {"lr": 0.1},
            r'vector_lr="auto" has no measured rate for SGD, so .*lr=0.1. Set UORACallb',
        ),
        (torch.optim.Adafactor, {}, r"has no measured rate for Adafactor"),
    ],
)
def test_what_cannot_take_a_group_is_named_and_left_as_it_is(cls, options, said):
    module = one_group(cls, **options)
    with pytest.warns(UserWarning, match=said) as caught:
        trainer(callback()).fit(module, data())
    assert len([w for w in caught if "vector_lr" in str(w.message)]) == 1
    (group,) = module.trainer.optimizers[0].param_groups
    assert len(group["params"]) == len(list(module.parameters()))


def test_an_unknown_schedule_is_named_and_nothing_is_half_done():
    class Module(Toy):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
            return [optimizer], [HomeSchedule(optimizer)]

    module = Module()
    with pytest.warns(UserWarning, match=r"the vectors get no group of their own with HomeSchedule"):
        trainer(callback(vector_lr=RATE)).fit(module, data())
    assert len(module.trainer.optimizers[0].param_groups) == 1


@pytest.mark.parametrize("rate", [0, -1e-3, float("nan"), float("inf"), True, "fast", [1e-2]])
def test_a_wrong_rate_is_refused_when_the_callback_is_made(rate):
    with pytest.raises(ValueError, match=r"^vector_lr=.*must be a positive number, 'auto' or None"):
        UORACallback(vector_lr=rate)


def test_none_leaves_the_optimizer_alone_and_warns_where_the_vectors_cannot_move():
    module = one_group(torch.optim.AdamW, lr=2e-5)
    with pytest.warns(UserWarning, match=r"AdamW trains the vectors at lr=2e-05, which hardly moves"):
        trainer(callback(vector_lr=None)).fit(module, data())
    assert len(module.trainer.optimizers[0].param_groups) == 1


def test_none_with_an_optimizer_that_does_not_know_the_vectors_is_refused():
    class Early(Toy):
        def __init__(self):
            super().__init__()
            self.early = torch.optim.AdamW(self.parameters(), lr=1e-3)

        def configure_optimizers(self):
            return self.early

    with pytest.raises(Exception, match=r"built without 4 of the vectors.*they would not train"):
        trainer(callback(vector_lr=None)).fit(Early(), data())


def test_one_max_lr_over_the_users_groups_and_decay_of_the_vectors_are_told():
    class Own(Toy):
        def configure_optimizers(self):
            groups = param_groups(self, lr=1e-4, vector_lr=0.03)
            groups[1]["weight_decay"] = 0.1
            optimizer = torch.optim.AdamW(groups)
            schedule = S.OneCycleLR(optimizer, max_lr=5e-3, total_steps=20)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    with (
        pytest.warns(UserWarning, match=r"max_lr=0.005 for all groups.*max_lr=\[0.005, 0.01\]"),
        pytest.warns(UserWarning, match=r"weight_decay=0.1 pulls the vectors"),
    ):
        trainer(callback()).fit(Own(), data())


@pytest.mark.filterwarnings(
    "ignore:You're resuming from a checkpoint that ended before", "ignore:Be aware that"
)
def test_a_checkpoint_of_a_run_without_the_group_goes_on_as_it_was(tmp_path):
    """As from before ``vector_lr``: the run ends where the unbroken one does."""

    def module():
        torch.manual_seed(1)
        return one_group(torch.optim.AdamW, lr=0.05)

    unbroken = module()
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    trainer(callback(vector_lr=None), save, enable_checkpointing=True).fit(unbroken, equal_batches())
    again = module()
    with pytest.warns(UserWarning, match=r"checkpoint.s run AdamW had no group.*lr=0.05"):
        trainer(callback()).fit(again, equal_batches(), ckpt_path=tmp_path / "step=3.ckpt")
    assert_equal(unbroken, again)
    with_group = module()
    save = ModelCheckpoint(tmp_path / "new", filename="{step}", every_n_train_steps=3, save_top_k=-1)
    trainer(callback(), save, enable_checkpointing=True, max_epochs=1).fit(with_group, equal_batches())
    with pytest.raises(
        Exception, match=r"checkpoint's AdamW has 2 groups, but this run's has 1; was it saved with"
    ):
        trainer(callback(vector_lr=None)).fit(
            module(), equal_batches(), ckpt_path=tmp_path / "new" / "step=3.ckpt"
        )


class Tunable(Toy):
    def __init__(self):
        super().__init__()
        self.lr = 1e-4

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def train_dataloader(self):
        return data()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", ["finder", "ours"])
def test_the_finder_of_rates_sets_that_of_the_rest_alone(tmp_path, first: str):
    finder = LearningRateFinder(min_lr=1e-5, max_lr=1e-2, num_training_steps=30, early_stop_threshold=None)
    order = [finder, callback()] if first == "finder" else [callback(), finder]
    module = Tunable()
    trainer(*order, default_root_dir=tmp_path, max_epochs=20).fit(module)
    others, vectors = module.trainer.optimizers[0].param_groups
    assert module.lr != 1e-4
    if Version(lightning.__version__) >= Version("2.6"):  # before, the optimizer stayed as it was
        assert others["lr"] == module.lr
    assert vectors["lr"] == auto_rate(80)


def test_the_monitor_and_the_loggers_show_the_rate_and_how_far_the_adapters_moved(tmp_path):
    logger, module = CSVLogger(tmp_path), one_group(torch.optim.AdamW, lr=1e-3)
    run = trainer(callback(), LearningRateMonitor(), logger=logger, log_every_n_steps=4)
    run.fit(module, data())
    logger.save()
    lines = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    columns = lines[0].split(",")
    assert "lr-AdamW/uora_vectors" in columns
    rows = [dict(zip(columns, line.split(","), strict=True)) for line in lines[1:]]
    moved = [row for row in rows if row["uora/update_ratio"]]
    assert [int(row["step"]) for row in moved] == [4, 8]
    assert [float(row["uora/vector_lr"]) for row in moved] == [auto_rate(8)] * 2
    ratios = []
    for name in ("0", "2"):
        layer = module.body.get_submodule(name)
        W, delta = layer._parameters["weight"].detach(), layer.delta_weight().detach()
        ratios.append(float(delta.double().norm() / W.double().norm()))
    assert float(moved[-1]["uora/update_ratio"]) == pytest.approx(sum(ratios) / 2, rel=1e-4)
    lengths = [float(layer.uora_b.detach().norm()) for layer in (module.body[0], module.body[2])]
    assert float(moved[-1]["uora/norm_b"]) == pytest.approx(sum(lengths) / 2, rel=1e-4)


def test_nothing_is_computed_between_the_loggers_steps(monkeypatch, tmp_path):
    from lightning_uora.trainer import loggers

    calls = []
    monkeypatch.setattr(loggers, "progress", lambda module: calls.append(1) or {})
    trainer(callback(), logger=CSVLogger(tmp_path), log_every_n_steps=3).fit(Toy(), data())
    trainer(callback(), logger=False, log_every_n_steps=1).fit(Toy(), data())
    assert len(calls) == 2


def test_training_that_hardly_moves_the_adapters_is_told_at_its_end():
    with pytest.warns(UserWarning, match=r"hardly moved: norm\(update\) / norm\(W\) is .*vector_lr=\"auto\""):
        trainer(callback(vector_lr=1e-5), max_epochs=3).fit(one_group(torch.optim.AdamW, lr=1e-3), data())


def test_a_rank_beyond_what_the_widths_can_use_is_told_with_its_cost():
    with pytest.warns(UserWarning, match=r"rank=40 is more than layers of at most 6 features can use: .*MiB"):
        trainer(callback(rank=40)).fit(Toy(), data())


@pytest.mark.filterwarnings("ignore:Found .* module:lightning.fabric.utilities.warnings.PossibleUserWarning")
def test_the_models_own_dropout_in_evaluation_mode_is_told():
    class Dropping(Toy):
        def build(self):
            super().build()
            self.body.insert(1, nn.Dropout(0.1))

    module = Dropping()
    module.body.eval()
    with pytest.warns(UserWarning, match=r"own dropout \(1 modules\) does nothing"):
        trainer(callback()).fit(module, data())


def test_refreshes_clear_the_momentum_in_the_new_group():
    eager = ReinitSchedule(threshold=2.0, start=3, stop=3, max_fraction=0.5, every_n_steps=1)

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 3:
                state = trainer.optimizers[0].state[pl_module.body[0].uora_d]
                rows = uora.refreshes[0]["rows"]["A_6_0"]
                assert not state["exp_avg"][rows].any()
                assert state["exp_avg"].any()

    uora = callback(reinit=eager)
    trainer(uora, Look()).fit(one_group(torch.optim.AdamW, lr=1e-3), data())
    assert uora.refreshes
