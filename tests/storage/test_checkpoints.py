"""Lightning checkpoints of both kinds: small or whole, and every resume is the unbroken run bit for bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.serialization import get_unsafe_globals_in_checkpoint

from lightning_uora import ReinitSchedule, UORACallback, detach_uora, load_from_checkpoint, named_adapters
from lightning_uora.cli import main
from tests.toys import (
    BUILT,
    TENSORS_ONLY,
    BuiltInConfigureModel,
    Toy,
    callback,
    data,
    equal_batches,
    trainer,
)

KINDS = ["full", "adapter"]
RESUMING = "ignore:You're resuming from a checkpoint that ended before the epoch ended"


class Normed(Toy):
    """With a BatchNorm, whose statistics move although it is frozen."""

    def build(self):
        super().build()
        if not isinstance(self.body[1], nn.BatchNorm1d):
            self.body.insert(1, nn.BatchNorm1d(6))


def uora(kind: str, **options) -> UORACallback:
    schedule = ReinitSchedule(threshold=2.0, start=0.0, stop=1.0, max_fraction=0.5, every_n_steps=2)
    return callback(reinit=schedule, checkpoint=kind, **options)


def made(cls=Normed, seed: int = 4):
    torch.manual_seed(seed)
    return cls()


def same_state(one: nn.Module, two: nn.Module) -> bool:
    state, other = one.state_dict(), two.state_dict()
    return list(state) == list(other) and all(torch.equal(v, other[k]) for k, v in state.items())


@pytest.mark.filterwarnings(RESUMING)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batches", "accumulate"), [(3, 1), (4, 1), (6, 2), (5, 2), (7, 4)])
def test_a_resume_after_refreshes_equals_the_unbroken_run(tmp_path, kind: str, batches: int, accumulate: int):
    """Mid-epoch and mid-accumulation: weights, vectors, A and B, record, optimizer."""
    path = tmp_path / "middle.ckpt"

    class Save(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.fit_loop.total_batch_idx + 1 == batches and not path.exists():
                trainer.save_checkpoint(path)

    options = {"max_epochs": 3, "accumulate_grad_batches": accumulate}
    model, one = made(), uora(kind)
    run = trainer(one, Save(), **options)
    run.fit(model, equal_batches())
    resumed, two = made(), uora(kind)
    again = trainer(two, **options)
    again.fit(resumed, equal_batches(), ckpt_path=path, **TENSORS_ONLY)
    assert two.refreshes == one.refreshes
    assert same_state(model, resumed)
    states = [t.optimizers[0].state_dict()["state"] for t in (run, again)]
    for index, state in states[0].items():
        assert all(torch.equal(state[k], states[1][index][k]) for k in ("exp_avg", "exp_avg_sq", "step"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("cls", [Normed, BuiltInConfigureModel])
def test_load_from_checkpoint_needs_no_trainer(tmp_path, kind: str, weights_only: bool, cls):
    model = made(cls)
    run = trainer(uora(kind))
    run.fit(model, data())
    run.save_checkpoint(tmp_path / "a.ckpt", weights_only=weights_only)
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    frozen = {"body.0.weight", "uora_projections.A_6"}
    assert bool(frozen & set(checkpoint["state_dict"])) == (kind == "full")
    torch.manual_seed(4)
    loaded = load_from_checkpoint(cls, tmp_path / "a.ckpt")
    assert type(loaded) is cls
    assert same_state(loaded, model)
    x = torch.randn(5, 6)
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    trainer(uora(kind)).fit(loaded.train(), data())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cls", BUILT)
def test_best_weights_are_tested_whoever_builds_the_model(tmp_path, kind: str, cls):
    saves = ModelCheckpoint(tmp_path, monitor="val", save_weights_only=True)
    run = trainer(uora(kind), saves, enable_checkpointing=True, max_epochs=3)
    model = made(cls)
    run.fit(model, data(), data())
    (score,) = run.test(model, data(), ckpt_path="best", verbose=False)
    assert score["val"] == pytest.approx(float(saves.best_model_score), abs=1e-6)
    fresh = made(cls)
    (score,) = trainer(uora(kind)).test(fresh, data(), ckpt_path=saves.best_model_path, verbose=False)
    assert score["val"] == pytest.approx(float(saves.best_model_score), abs=1e-6)


def test_an_adapter_checkpoint_holds_no_base_and_all_buffers(tmp_path):
    run = trainer(uora("adapter"))
    model = made()
    run.fit(model, data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    statistics = {n for n, _ in model.named_buffers() if "running" in n or "num_batches" in n}
    assert set(state) == trained | statistics
    assert len(statistics) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_the_plain_model_loads_into_the_adapted_one(tmp_path, kind: str):
    plain = made(seed=9)
    run = trainer()
    run.fit(plain, data())
    run.save_checkpoint(tmp_path / "plain.ckpt", weights_only=True)
    model = made()
    trainer(uora(kind)).test(model, data(), ckpt_path=tmp_path / "plain.ckpt", verbose=False)
    x = torch.randn(5, 6)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, parameter in plain.named_parameters():  # it decides the kernels on some processors
        parameter.requires_grad_(wanted[name])
    with torch.no_grad():
        assert torch.equal(model.eval()(x), plain.eval()(x))
    assert len(list(named_adapters(model))) == 2


def damaged(path, change):
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)


FAULTS = {
    "another base": (lambda c: None, 5, "trained on another base"),
    "missing key": (lambda c: c["state_dict"].pop("body.0.uora_d"), 4, "lacks 'body.0.uora_d'"),
    "unexpected key": (lambda c: c["state_dict"].update(x=torch.ones(1)), 4, "has unexpected 'x'"),
    "another shape": (
        lambda c: c["state_dict"].update({"body.0.uora_d": torch.ones(3)}),
        4,
        r"uora_d has shape \(3,\)",
    ),
    "lost record": (lambda c: c["uora"].update(record=[]), 4, "are not those of the run"),
    "newer version": (lambda c: c["uora"].update(version=99), 4, "has version 99"),
    "another rank": (
        lambda c: c["uora"]["config"].update(rank=5),
        4,
        r"another configuration: rank \(5 saved, 4 here",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_adapter_checkpoint_is_an_error_and_nothing_is_half_loaded(tmp_path, fault: str):
    change, seed, message = FAULTS[fault]
    path = tmp_path / "a.ckpt"
    run = trainer(uora("adapter"))
    run.fit(made(), data())
    run.save_checkpoint(path)
    damaged(path, change)
    model = made(seed=seed)
    trainer(uora("adapter")).fit(model, data())  # adapters, and refreshes of its own, that must survive
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        trainer(uora("adapter")).fit(model, data(), ckpt_path=path)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in after.items())


def test_loading_takes_the_arguments_of_the_class_alone(tmp_path):
    run = trainer(uora("full"))
    run.fit(made(), data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    for name in ("map_location", "strict"):
        with pytest.raises(ValueError, match=f"{name} is not an argument here: the module comes back whole"):
            load_from_checkpoint(Normed, tmp_path / "a.ckpt", **{name: "cpu"})


class Weighted(nn.CrossEntropyLoss):
    """A loss of the user's own."""


class WithLoss(Toy):
    """An object among the hyperparameters."""

    def __init__(self, loss: object = None, size: int = 0):
        super().__init__()
        self.save_hyperparameters()
        self.loss, self.size = loss, size


def saved_with(loss: object, path, kind: str = "full") -> WithLoss:
    torch.manual_seed(4)
    model = WithLoss(copy.deepcopy(loss).requires_grad_(False), 3)
    run = trainer(uora(kind, target_modules="body"))
    run.fit(model, data())
    run.save_checkpoint(path)
    return model


OWN_OBJECTS = pytest.mark.filterwarnings("ignore:Attribute 'loss' is an instance")


@OWN_OBJECTS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.MultiheadAttention(4, 2), nn.GRU(2, 3)),
    ],
)
def test_torchs_own_modules_among_the_hyperparameters_come_back(tmp_path, kind: str, weights_only, loss):
    model = saved_with(loss, tmp_path / "a.ckpt", kind)
    torch.manual_seed(4)
    found = load_from_checkpoint(WithLoss, tmp_path / "a.ckpt", weights_only=weights_only)
    assert same_state(found, model)
    assert type(found.hparams["loss"]) is type(loss)
    assert repr(found.loss) == repr(loss)
    assert found.size == 3
    assert get_unsafe_globals_in_checkpoint(tmp_path / "a.ckpt")  # nothing stays allowed


@OWN_OBJECTS
def test_objects_of_other_types_are_named_and_read_when_they_are_allowed(tmp_path):
    path = tmp_path / "a.ckpt"
    model = saved_with(Weighted(), path)
    with pytest.raises(
        ValueError, match=r"holds objects of tests\.storage\.test_checkpoints\.Weighted"
    ) as error:
        load_from_checkpoint(WithLoss, path)
    assert "`with torch.serialization.safe_globals([Weighted]):`" in str(error.value)
    assert "load_from_checkpoint(..., weights_only=False)" in str(error.value)
    assert "damaged" not in str(error.value)
    with torch.serialization.safe_globals([Weighted]):
        assert same_state(load_from_checkpoint(WithLoss, path), model)
    found = load_from_checkpoint(WithLoss, path, weights_only=False)
    assert same_state(found, model)
    assert type(found.loss) is Weighted


@pytest.mark.filterwarnings("ignore:No gradient in the first optimizer step")
@OWN_OBJECTS
@pytest.mark.filterwarnings("ignore:No gradient in the first backward for loss")
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapted_model_among_the_hyperparameters_is_replaced_by_a_fresh_one(tmp_path, kind: str):
    def fresh() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 3))

    path = tmp_path / "a.ckpt"
    torch.manual_seed(4)
    model, run = WithLoss(fresh()), trainer(uora(kind))
    run.fit(model, data())
    run.save_checkpoint(path)
    with pytest.raises(ValueError, match=r"holds the adapted model itself .* save_hyperparameters\(ignore="):
        load_from_checkpoint(WithLoss, path)
    torch.manual_seed(4)
    assert same_state(load_from_checkpoint(WithLoss, path, loss=fresh(), weights_only=False), model)


def test_what_is_no_archive_is_damaged_either_way(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(b"no archive")
    for weights_only in (True, False):
        with pytest.raises(ValueError, match="is damaged or not a checkpoint"):
            load_from_checkpoint(Toy, tmp_path / "a.ckpt", weights_only=weights_only)
        with pytest.raises(FileNotFoundError):
            load_from_checkpoint(Toy, tmp_path / "none.ckpt", weights_only=weights_only)


def places(value, path=()):
    """Paths of everything inside dicts and lists, of lists the first entry."""
    if path:
        yield path
    children = list(value.items()) if isinstance(value, dict) else []
    if isinstance(value, list):
        children = list(enumerate(value[:1]))
    for key, child in children:
        yield from places(child, (*path, key))


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_wrong_in_a_checkpoint_is_a_value_error(tmp_path, kind: str):
    run = trainer(uora(kind))
    run.fit(made(), data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    whole = torch.load(tmp_path / "a.ckpt", weights_only=True)
    lost, refused, others, path = object(), 0, [], tmp_path / "b.ckpt"
    for place in places({key: whole[key] for key in ("state_dict", "uora")}):
        for wrong in (lost, "x"):
            broken = copy.deepcopy(whole)
            holder = broken
            for key in place[:-1]:
                holder = holder[key]
            if wrong is lost:
                del holder[place[-1]]
            else:
                holder[place[-1]] = wrong
            torch.save(broken, path)
            for use in (lambda: load_from_checkpoint(Normed, path), lambda: exported(path, tmp_path)):
                try:
                    torch.manual_seed(4)
                    use()
                except ValueError:
                    refused += 1
                except RuntimeError as error:
                    others.append(str(error))
    assert refused > 80
    assert all("loading state_dict" in message for message in others)  # torch's own, for the base


def exported(path, folder):
    """The command's exit status becomes its error."""
    if main(["export", str(path), str(folder / "peft")]) == 2:
        raise ValueError("refused")


def test_another_base_can_be_accepted_by_an_explicit_option(tmp_path):
    path = tmp_path / "a.ckpt"
    run = trainer(uora("adapter"))
    run.fit(made(), data())
    run.save_checkpoint(path)
    torch.manual_seed(5)
    with pytest.raises(ValueError, match="another base"):
        load_from_checkpoint(Normed, path)
    with pytest.warns(UserWarning, match="another base"):
        load_from_checkpoint(Normed, path, base_mismatch="warn")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK nonsense", "is damaged or not a checkpoint"),
        (b"", "is damaged or not a checkpoint"),
        (None, "was not made"),
    ],
)
def test_files_that_are_no_checkpoint_of_ours(tmp_path, content, message: str):
    path = tmp_path / "x.ckpt"
    if content is None:
        torch.save({"state_dict": {}}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_from_checkpoint(Toy, path)


def test_the_modules_own_hooks_still_run_and_the_module_copies_and_pickles(tmp_path):
    class Own(Normed):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["mine"] = 3

        def on_load_checkpoint(self, checkpoint):
            self.loaded = checkpoint["mine"]

    model = made(Own)
    run = trainer(uora("full"))
    run.fit(model, data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    twin = copy.deepcopy(model)
    assert twin.on_save_checkpoint.__self__.module is twin
    loaded = load_from_checkpoint(Own, tmp_path / "a.ckpt")
    assert loaded.loaded == 3
    plain = made(Toy)
    trainer(uora("full")).fit(plain, data())
    again = pickle.loads(pickle.dumps(plain))
    assert same_state(again, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_module_saves_and_loads_plain_checkpoints(tmp_path, kind: str):
    model, run = made(), trainer(uora(kind))
    run.fit(model, data())
    x = torch.randn(5, 6)
    expected = model.eval()(x)
    detach_uora(model, merge=True)
    run.save_checkpoint(tmp_path / "plain.ckpt", weights_only=True)
    assert "uora" not in torch.load(tmp_path / "plain.ckpt", weights_only=True)
    plain = Normed.load_from_checkpoint(tmp_path / "plain.ckpt", **TENSORS_ONLY)
    torch.testing.assert_close(plain.eval()(x), expected)


def test_only_adapter_checkpoints_pay_for_fingerprints_of_the_base(tmp_path):
    for kind in KINDS:
        model, run = made(), trainer(uora(kind))
        run.fit(model, data())
        run.save_checkpoint(tmp_path / f"{kind}.ckpt")
        prints = torch.load(tmp_path / f"{kind}.ckpt", weights_only=True)["uora"]["base"]
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert set(prints) == (frozen if kind == "adapter" else set())


def test_wrong_kind_is_refused():
    with pytest.raises(ValueError, match=r"^checkpoint='small' is not allowed"):
        UORACallback(checkpoint="small")
