"""Whatever is done to an adapted model, in whatever order, its outputs follow the formula.

Hypothesis draws the settings and the order of the rules; after every rule each adapted layer and the whole
model are held against ``W + diag(b) B diag(d) A``, written out in float64 from what the model holds at that
moment. 200 orders in ``make test``; 20,000 by ``make soak``.
"""

from __future__ import annotations

import copy
import os
import pickle
import tempfile
import threading
from contextlib import AbstractContextManager

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

from lightning_uora import (
    ReinitSchedule,
    UORAConfig,
    adapters_disabled,
    attach_uora,
    calibrate,
    detach_uora,
    load_adapter,
    named_adapters,
    refresh,
    save_adapter,
)
from lightning_uora.adapters import OWNER
from tests.any_order import (
    ADAPTABLE,
    PARTS,
    ROUNDINGS,
    Mixed,
    adapted_name,
    assert_near,
    called,
    dtype_of,
    expected,
    formula,
    fresh,
    inputs_of,
    is_tied,
    raw,
    vectors,
)

SOAK = os.environ.get("UORA_ANY_ORDER")
ORDERS = settings(
    max_examples=int(SOAK or 200),
    stateful_step_count=30 if SOAK else 10,
    derandomize=SOAK is None,
    deadline=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),  # to explain takes as long as all the rest
    suppress_health_check=list(HealthCheck),
)
GRAD_MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
OPTIMIZERS = {
    "AdamW": lambda params: torch.optim.AdamW(params, 0.05, foreach=False),
    "fused AdamW": lambda params: torch.optim.AdamW(params, 0.05, fused=True),
    "foreach AdamW": lambda params: torch.optim.AdamW(params, 0.05, foreach=True),
    "SGD": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9),
    "fused SGD": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9, fused=True),
    "RMSprop": lambda params: torch.optim.RMSprop(params, 0.02),
}
WRITES = {
    "copy_": lambda t, values: t.copy_(values),
    "mul_": lambda t, values: t.mul_(-0.7),
    "one entry": lambda t, values: t.view(-1)[:1].fill_(1.5),
    "entry by index": lambda t, values: t.__setitem__(-1, 0.75),
}
THROUGH = {
    "copy_": lambda w, values: w.copy_(values),
    "a view": lambda w, values: w.view(w.shape[0], -1).copy_(values.flatten(1)),
    "row by row": lambda w, values: [row.copy_(v) for row, v in zip(w, values, strict=True)],
    "two slices": lambda w, values: (w[:2].copy_(values[:2]), w[2:].copy_(values[2:])),
    "data": lambda w, values: w.data.view(-1).copy_(values.flatten()),
    "detached": lambda w, values: w.detach()[...].copy_(values),
    "out": lambda w, values: torch.add(values, 0, out=w),
    "foreach": lambda w, values: torch._foreach_copy_([w], [values]),
    "split": lambda w, values: [a.copy_(b) for a, b in zip(w.split(2), values.split(2), strict=True)],
    "__setitem__": lambda w, values: w.__setitem__(slice(None), values),
}
"""Ways to write through what reading a weight returns."""
parts, seeds = st.sampled_from(("", "", "", *PARTS)), st.integers(0, 9)
grad_modes, optimizers = st.sampled_from(list(GRAD_MODES)), st.sampled_from(list(OPTIMIZERS))
writes, kinds = st.sampled_from(list(WRITES)), st.sampled_from(["uora_d", "uora_b", "W"])


@st.composite
def configs(draw) -> UORAConfig:
    """Any setting that does not draw at random in a forward; one of the tied layers at most."""
    trained = draw(st.sampled_from(["auto", ("head",), ()]))
    names = [name for name in ADAPTABLE if name != "head" or trained == ()]
    targets = draw(st.lists(st.sampled_from(names), min_size=1, max_size=6, unique=True))
    if "one" in targets and "two" in targets:
        targets.remove(draw(st.sampled_from(["one", "two"])))
    return UORAConfig(
        rank=draw(st.sampled_from([1, 3, 10])),
        target_modules=targets,
        trainable_modules=trained,
        init=draw(st.sampled_from(["orthogonal", "kaiming_uniform", "inputs"])),
        bias=draw(st.sampled_from(["none", "adapted", "all"])),
        compute=draw(st.sampled_from(["auto", "merged", "factored"])),
        share=draw(st.sampled_from(["layer", "model"])),
        d_init=0.5,
        seed=draw(st.integers(0, 3)),
    )


@st.composite
def schedules(draw) -> ReinitSchedule:
    return ReinitSchedule(
        threshold=draw(st.sampled_from([0.5, 0.9, 2.0])),
        threshold_mode=draw(st.sampled_from(["relative", "absolute"])),
        max_fraction=draw(st.sampled_from([0.25, 1.0])),
        interpolation=draw(st.sampled_from([0.2, 1.0])),
        vectors=draw(st.sampled_from([("d",), ("b",), ("d", "b")])),
        preserve_function=draw(st.booleans()),
        reset_optimizer_state=draw(st.booleans()),
    )


def drawn(shape: torch.Size, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 2


def check(model: Mixed, names: list[str], mode: AbstractContextManager, disabled: bool = False) -> Tensor:
    """Every named part answers by the formula; the last answer."""
    dtype = dtype_of(model)
    for name, about in expected(model, names, disabled).items():
        with mode:
            found = called(model.get_submodule(name), name, inputs_of(name, dtype))
        assert_near(found, about, dtype, f"the output of {name or 'the model'}")
    return found


class AnyOrder(RuleBasedStateMachine):
    """An adapted model in use. Each rule says what it stands for."""

    @initialize(
        config=configs(),
        frozen=st.sets(parts),
        seed=seeds,
        training=st.booleans(),
        compiles=st.integers(0, 24),
    )
    def attach(self, config: UORAConfig, frozen: set[str], seed: int, training: bool, compiles: int) -> None:
        """Vectors as after some training; one order in 25 may compile, which takes as long as the others."""
        self.model = Mixed(frozen=frozen - {""}).train(training)
        self.trained_before = {name: p.requires_grad for name, p in self.model.named_parameters()}
        self.targets, self.config = attach_uora(self.model, config), config
        self.trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        self.compiles, self.compiled = compiles == 24, 0
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.average: Mixed | None = None
        self.coarsest = torch.float32  # in which A and B were drawn
        if config.init == "inputs":
            calibrate(self.model, [drawn(torch.Size((12, 5, 9)), seed).float()])
        with torch.no_grad():
            for number, vector in enumerate(vectors(self.model).values()):
                vector.copy_(drawn(vector.shape, seed + number))

    def tensor(self, kind: str, which: int) -> nn.Parameter:
        """d, b or the base's own weight of one of the adapted layers."""
        layer = self.model.get_submodule(self.targets[which % len(self.targets)])
        return raw(layer) if kind == "W" else getattr(layer, kind)

    def go_on_with(self, model: Mixed) -> None:
        self.model = model
        self.optimizers = {}

    # What holds after every rule.

    @invariant()
    def outputs_follow_the_formula_with_and_without_gradients(self) -> None:
        self.check_gradients(check(self.model, [*self.targets, ""], torch.enable_grad()))
        check(self.model, [*self.targets, ""], torch.no_grad())

    def check_gradients(self, output: Tensor) -> None:
        """Vectors are parameters, and those that require gradients get finite ones."""
        known = {id(p) for p in self.model.parameters()}
        assert all(id(vector) in known for vector in vectors(self.model).values())
        assert [name for name, _ in named_adapters(self.model)] == self.targets
        wanted = {name: v for name, v in vectors(self.model).items() if v.requires_grad}
        if wanted:
            gradients = torch.autograd.grad(output.double().square().sum(), list(wanted.values()))
            assert [name for name, g in zip(wanted, gradients, strict=True) if not g.isfinite().all()] == []

    # Modes and what trains.

    @rule(part=parts, training=st.booleans())
    def train_or_eval(self, part: str, training: bool) -> None:
        """A validation in the midst of training; a backbone left in eval mode (tinker-feedback#143)."""
        self.model.get_submodule(part).train(training)

    @rule(part=parts, required=st.booleans())
    def freeze_or_unfreeze(self, part: str, required: bool) -> None:
        """``freeze()``, GANs that toggle, gradual unfreezing (trl#3926, BaseFinetuning)."""
        self.model.get_submodule(part).requires_grad_(required)
        self.optimizers = {}

    @rule(kind=optimizers, forward_before=st.sampled_from([None, *GRAD_MODES]))
    def train_a_step(self, kind: str, forward_before: str | None) -> None:
        """Fused kernels move no version counter (trl#3103); rollouts between steps without gradients."""
        x = inputs_of("", dtype_of(self.model))
        if forward_before:
            with GRAD_MODES[forward_before]():
                self.model(x)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        loss = self.model(x).tanh().square().mean()
        assert loss.requires_grad == bool(trained)
        if trained:
            if kind not in self.optimizers:
                self.optimizers[kind] = OPTIMIZERS[kind](trained)
            self.model.zero_grad()
            loss.backward()
            self.optimizers[kind].step()

    @rule(schedule=schedules())
    def refresh_rows(self, schedule: ReinitSchedule) -> None:
        """UORA's own: A and B change under a layer that kept its weight."""
        refresh(self.model, schedule, list(self.optimizers.values()))

    # Calls.

    @rule(part=parts, mode=grad_modes)
    def call_a_part_alone(self, part: str, mode: str) -> None:
        """Feature extraction; evaluation under ``no_grad`` and Lightning's ``inference_mode``."""
        check(self.model, [part], GRAD_MODES[mode]())

    @rule(part=parts, mode=grad_modes)
    def call_in_a_thread(self, part: str, mode: str) -> None:
        """Served models; grad modes belong to a thread (DataParallel, asynchronous rollouts)."""
        failed: list[BaseException] = []

        def run() -> None:
            try:
                check(self.model, [part], GRAD_MODES[mode]())
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if failed:
            raise failed[0]

    @precondition(lambda self: self.compiles and self.compiled < 3)
    @rule(which=st.integers(0, 5), mode=st.sampled_from(["grad", "no_grad"]))
    def call_compiled(self, which: int, mode: str) -> None:
        """``torch.compile`` of the model, then more training (guards that miss what changed)."""
        self.compiled += 1
        name, dtype = self.targets[which % len(self.targets)], dtype_of(self.model)
        about = expected(self.model, [name])[name]
        with GRAD_MODES[mode]():
            layer = torch.compile(self.model.get_submodule(name), backend="eager")
            assert_near(called(layer, name, inputs_of(name, dtype)), about, dtype, f"{name} compiled")

    @rule(mode=grad_modes)
    def disable_the_adapters(self, mode: str) -> None:
        """The reference model of DPO and KL penalties."""
        with adapters_disabled(self.model):
            check(self.model, [*self.targets, ""], GRAD_MODES[mode](), disabled=True)

    # Copies and storage.

    @rule(dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    def cast(self, dtype: torch.dtype) -> None:
        """``model.half()`` and back before evaluation; Lightning's ``*-true`` precisions."""
        self.model.to(dtype)
        self.optimizers = {}
        self.coarsest = max(self.coarsest, dtype, key=lambda one: torch.finfo(one).eps)
        assert {vector.dtype for vector in vectors(self.model).values()} == {torch.float32}

    @rule(pickled=st.booleans())
    def go_on_with_a_copy(self, pickled: bool) -> None:
        """Spawned workers, ``torch.save(model)``, target networks (peft#2018 of copies)."""
        before = self.model
        self.go_on_with(pickle.loads(pickle.dumps(before)) if pickled else copy.deepcopy(before))
        with torch.no_grad():
            for vector in vectors(before).values():
                vector.data.fill_(3.0)  # what happens to the first is nothing to the copy

    @rule(assign=st.booleans())
    def load_its_own_state(self, assign: bool) -> None:
        """Early stopping that puts back the best weights."""
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(state, strict=True, assign=assign)
        self.optimizers = {}

    @rule(assign=st.booleans(), mode=grad_modes)
    def load_the_state_into_a_fresh_model(self, assign: bool, mode: str) -> None:
        """Resuming by hand; the fresh model has run before it is loaded."""
        other = fresh(self.model, self.config)
        with GRAD_MODES[mode if self.config.init != "inputs" else "no_grad"]():  # A is still to be found
            other.eval()(inputs_of("", dtype_of(other)))
        other.load_state_dict(self.model.state_dict(), strict=True, assign=assign)
        self.assert_same_as(other)
        self.go_on_with(copy.deepcopy(other))

    @precondition(lambda self: self.config.init != "inputs")
    @rule()
    def load_what_trains_into_a_fresh_model(self) -> None:
        """Checkpoints of what requires gradients alone, with the record: A and B are made again."""
        other = fresh(self.model, self.config)
        state = {n: v for n, v in self.model.state_dict().items() if OWNER not in n or n.endswith(".record")}
        other.load_state_dict(state, strict=False)
        eps = torch.finfo(self.coarsest).eps
        ours, theirs = formula(self.model), formula(other)
        if any(name.endswith(".record") for name in state):
            for name in ADAPTABLE:
                gap = (ours[name].value - theirs[name].value).abs()
                assert (gap <= ROUNDINGS * eps * ours[name].size).all(), f"another weight of {name}"

    @rule(projections=st.sampled_from(["record", "full"]))
    def save_and_load_the_adapter(self, projections: str) -> None:
        """An adapter holds what was to train when it was attached (``freeze()`` before the save)."""
        other = fresh(self.model, None)
        known = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, p in other.named_parameters():
                if name not in self.trained:
                    p.copy_(known[name])
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(self.model, folder, projections)
            assert load_adapter(other, folder) == self.targets
        self.assert_same_as(other, torch.finfo(self.coarsest).eps if projections == "record" else 0.0)
        self.go_on_with(other)

    def assert_same_as(self, other: Mixed, eps: float = 0.0) -> None:
        """Bit for bit; A and B made again from a record are those of before the casts, within ``eps``."""
        ours, theirs = formula(self.model), formula(other)
        for name in ADAPTABLE:
            gap = (ours[name].value - theirs[name].value).abs()
            assert (gap <= ROUNDINGS * eps * ours[name].size).all(), f"another effective weight of {name}"
        ours, theirs = (
            {n: v for n, v in one.state_dict().items() if not (eps and OWNER in n)}
            for one in (self.model, other)
        )
        assert sorted(ours) == sorted(theirs)  # own rows stand in the order in which they came
        assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []

    @rule(training=st.booleans())
    def merge_a_copy(self, training: bool) -> None:
        """``merge_and_unload`` for serving; tied weights (peft#2018)."""
        merged = copy.deepcopy(self.model).train(training)
        about = expected(merged, [*ADAPTABLE, ""])
        tied = is_tied(merged) and {"one", "two"} & set(self.targets)
        try:
            detach_uora(merged, merge=True)
        except ValueError:
            assert tied  # shared weights may be refused, never merged into the wrong layer
            return
        self.assert_plain(merged)
        for name, one in about.items():
            with torch.no_grad():
                found = called(merged.get_submodule(name), name, inputs_of(name, dtype_of(merged)))
            assert_near(found, one, dtype_of(merged), f"the merged {name or 'model'}")

    @rule()
    def detach_a_copy(self) -> None:
        """``unload``: the base as it was, whatever it was used for."""
        plain = copy.deepcopy(self.model)
        about = expected(plain, [*ADAPTABLE, ""], disabled=True)
        detach_uora(plain)
        self.assert_plain(plain)
        for name, one in about.items():
            found = called(plain.get_submodule(name), name, inputs_of(name, dtype_of(plain)))
            assert_near(found, one, dtype_of(plain), f"the detached {name or 'model'}")

    def assert_plain(self, model: Mixed) -> None:
        like = Mixed(tied=is_tied(model))
        assert [(n, type(m)) for n, m in model.named_modules()] == [
            (n, type(m)) for n, m in like.named_modules()
        ]
        assert list(model.state_dict()) == list(like.state_dict())
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        assert flags == {name: self.trained_before.get(name, flags[name]) for name in flags}

    # Writes.

    @rule(kind=kinds, which=st.integers(0, 5), how=writes, seed=seeds, data=st.booleans())
    def write_in_place(self, kind: str, which: int, how: str, seed: int, data: bool) -> None:
        """Loaders, initialisers, clipping, weight decay by hand; ``.data`` moves no version counter."""
        target = self.tensor(kind, which)
        with torch.no_grad():
            WRITES[how](target.data if data else target, drawn(target.shape, seed))

    @rule(kind=kinds, which=st.integers(0, 5), seed=seeds)
    def replace_the_data(self, kind: str, which: int, seed: int) -> None:
        """``param.data = tensor``: offloading, flattening optimizers, older loaders."""
        target = self.tensor(kind, which)
        target.data = drawn(target.shape, seed).to(target.dtype)

    @rule(decay=st.sampled_from([0.0, 0.5]))
    def validate_with_an_average(self, decay: float) -> None:
        """EMA: a copy follows the vectors, and is swapped in by ``.data.copy_`` for a validation."""
        if self.average is None:
            self.average = copy.deepcopy(self.model)
        averages, own = vectors(self.average), vectors(self.model)
        kept = {name: vector.detach().clone() for name, vector in own.items()}
        for name, vector in own.items():
            averages[name].data.lerp_(vector.data, 1 - decay)
            vector.data.copy_(averages[name].data)
        check(self.average, [*self.targets, ""], torch.no_grad())
        check(self.model, [*self.targets, ""], torch.no_grad())
        for name, vector in own.items():
            vector.data.copy_(kept[name])

    @rule(which=st.integers(0, 5), seed=seeds, how=st.sampled_from([*THROUGH, "replaced", "augmented"]))
    def write_through_the_weight(self, which: int, seed: int, how: str) -> None:
        """Folding, rescaling, loaders (``fuse_conv_bn_eval``): what is written is what is read."""
        layer = self.model.get_submodule(self.targets[which % len(self.targets)])
        name, (m, *rest) = adapted_name(layer), raw(layer).shape
        x = drawn(torch.Size((m, *rest)), seed).to(dtype_of(self.model))
        sizes = formula(self.model)[self.targets[which % len(self.targets)]].size
        with torch.no_grad():
            if how == "replaced":
                setattr(layer, name, nn.Parameter(x))
                self.optimizers = {}
            elif how == "augmented":
                setattr(layer, name, getattr(layer, name).mul_(0).add_(x))  # what `*=` and `+=` do
            else:
                THROUGH[how](getattr(layer, name), x)
            gap = (getattr(layer, name).double() - x.double()).abs()
        allowed = ROUNDINGS * torch.finfo(x.dtype).eps * (sizes + x.double().abs())
        assert (gap <= allowed).all(), f"{gap.max():.3g} away from what was written into {name}"

    def teardown(self) -> None:
        if getattr(self, "compiled", 0):
            torch._dynamo.reset()


AnyOrder.TestCase.settings = ORDERS


class TestAnyOrder(AnyOrder.TestCase):
    pass
