"""Files from others: nothing in them runs, takes the memory that it claims, or fails without a reason."""

from __future__ import annotations

import ast
import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_uora
from lightning_uora import (
    ReinitSchedule,
    UORAConfig,
    attach_uora,
    load_adapter,
    load_from_checkpoint,
    named_adapters,
    refresh,
    save_adapter,
)
from lightning_uora.adapters.projections import Projections
from lightning_uora.cli import main
from lightning_uora.storage.checkpoint import read_checkpoint
from lightning_uora.storage.unpickling import _torch_module
from tests.toys import Toy, callback, data, trainer

HUGE = 10**13
JUNK = [None, -1, HUGE, 0.5, float("nan"), "x", "", [], {}, [HUGE], ["../../x"], {"x": HUGE}, True]


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A refreshed adapter, saved."""
    model = base()
    attach_uora(model, UORAConfig(rank=4, target_modules=["0", "2"], trainable_modules=()))
    for _, module in named_adapters(model):
        nn.init.normal_(module.uora_b)
    refresh(model, ReinitSchedule(threshold=2.0, start=0, stop=9))
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def no_large_draw(monkeypatch):
    """Fails where more than the honest file's numbers would be drawn."""
    draw = Projections._draw

    def guarded(self, name):
        assert self.config.rank * int(name.split("_")[1]) < 1_000_000, "memory would be taken"
        return draw(self, name)

    monkeypatch.setattr(Projections, "_draw", guarded)


def tampered(folder: Path, change) -> None:
    path = folder / "uora_config.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def paths(node, path=()):
    """Every place in a JSON document."""
    yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from paths(value, (*path, key))


def put(node, path, value):
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value


def test_whatever_stands_anywhere_in_the_file_loads_or_is_refused_with_a_reason(
    folder, no_large_draw, capsys
):
    """Every value of the manifest, one at a time, by every kind of junk; the command likewise."""
    honest = json.loads((folder / "uora_config.json").read_text())
    refused = 0
    for path in list(paths(honest))[1:]:
        for junk in JUNK:
            manifest = copy.deepcopy(honest)
            put(manifest, path, junk)
            (folder / "uora_config.json").write_text(json.dumps(manifest))
            model = base()
            before = {name: p.clone() for name, p in model.named_parameters()}
            try:
                load_adapter(model, folder)
            except ValueError:
                refused += 1
                assert {name for name, _ in model.named_parameters()} == set(before)
                assert all(p.requires_grad and torch.equal(p, before[n]) for n, p in model.named_parameters())
            assert main(["show", str(folder)]) in (0, 2)
    assert refused > 500


@pytest.mark.parametrize("command", ["load", "show", "export"])
@pytest.mark.parametrize("what", ["rank", "width", "height"])
def test_a_claimed_size_takes_no_memory(folder, no_large_draw, tmp_path, capsys, command: str, what: str):
    def change(manifest):
        if what == "rank":
            manifest["config"]["rank"] = HUGE
        else:
            manifest["layers"]["0"]["parts"][0][{"height": 2, "width": 3}[what]] = HUGE

    tampered(folder, change)
    if command == "load":
        with pytest.raises(ValueError, match=r"cannot be right|should have shape"):
            load_adapter(base(), folder)
        return
    arguments = [command, str(folder)] + ([str(tmp_path / "out")] if command == "export" else [])
    assert main(arguments) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../../escaped", "/etc/passwd", "a..b", ".", "__class__", "forward", 5])
def test_tricks_in_names_reach_no_file(folder, tmp_path, capsys, name):
    def change(manifest):
        manifest["adapted"][0] = name
        manifest["layers"][name] = manifest["layers"].pop("0")

    tampered(folder, change)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"."):
        load_adapter(base(), folder)
    assert main(["export", str(folder), str(tmp_path / "out" / "peft")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_deeply_nested_file_is_refused(folder):
    (folder / "uora_config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="damaged"):
        load_adapter(base(), folder)


class Payload:
    """Unpickled in full, it would leave a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("where", ["checkpoint", "uora", "hyper_parameters"])
def test_code_in_a_checkpoint_does_not_run(tmp_path, capsys, where: str):
    model, path, trace = Toy(), tmp_path / "last.ckpt", tmp_path / "trace"
    run = trainer(callback())
    run.fit(model, data())
    run.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    if where == "checkpoint":
        checkpoint["extra"] = Payload(trace)
    else:
        checkpoint.setdefault(where, {})["extra"] = Payload(trace)
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        read_checkpoint(path)
    for command in (["show", str(path)], ["merge", str(path), str(tmp_path / "out.ckpt")]):
        assert main(command) == 2
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # the payload is real


NAMES_A_CLASS = [
    "torch.nn.modules.loss.Tensor",  # imported there, not defined
    "torch.nn.modules.loss._Reduction",
    "torch.nn.modules.loss.F.cross_entropy",
    "torch.nn.modules.linear.init.torch",
    "torch.nn.modules.no_such.Thing",
    "torch.nn.modules_of_mine.Linear",
    "torch.nn.utils.prune.Identity",
    "os.system",
    "Linear",
]


@pytest.mark.parametrize("name", NAMES_A_CLASS)
def test_only_modules_defined_in_torch_are_made(name: str):
    before = set(sys.modules)
    assert _torch_module(name) is None
    assert set(sys.modules) == before
    assert _torch_module("torch.nn.modules.loss.CrossEntropyLoss") is nn.CrossEntropyLoss


def test_a_loss_in_a_file_opens_no_way_for_code(tmp_path):
    """The payload hangs on an object of a type that is let through."""
    path, trace, loss = tmp_path / "last.ckpt", tmp_path / "trace", nn.CrossEntropyLoss()
    loss.extra = Payload(trace)
    model = Toy()
    run = trainer(callback())
    run.fit(model, data())
    run.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    torch.save({**checkpoint, "hyper_parameters": {"loss": loss}}, path)
    with pytest.raises(ValueError, match=r"would call builtins\.getattr.*which may run any code"):
        load_from_checkpoint(Toy, path)
    assert not trace.exists()
    with pytest.raises(
        TypeError, match="loss"
    ):  # what the caller asked for: it is unpickled, the class refuses it
        load_from_checkpoint(
            type("Picky", (Toy,), {"__init__": lambda self, size: None}), path, weights_only=False
        )
    assert trace.exists()


def defaults(function: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, str | None]:
    """Arguments of a function and their defaults as written; None where there is none."""
    plain = [*function.args.posonlyargs, *function.args.args]
    given = [None] * (len(plain) - len(function.args.defaults)) + list(function.args.defaults)
    pairs = [
        *zip(plain, given, strict=True),
        *zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True),
    ]
    return {argument.arg: None if value is None else ast.unparse(value) for argument, value in pairs}


def test_nothing_in_the_package_unpickles_code():
    """Every torch.load says weights_only=True, or what the caller said, who says True unless asked otherwise;
    no pickle module is imported. What this process has just written is read back by an unpickler that makes
    nothing but tensors and plain data: see test_verifying.
    """
    calls, own = 0, "verifying.py"
    for path in Path(lightning_uora.__file__).parent.rglob("*.py"):
        if path.name == own:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load"):
                calls += 1
                said = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert said["weights_only"] in ("True", "weights_only")
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
                assert defaults(node).get("weights_only", "True") == "True", node.name
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not {"pickle", "dill", "joblib", "cloudpickle"} & set(names), path
    assert calls


def test_a_rank_beyond_the_machines_memory_is_refused_before_it_is_taken(no_large_draw):
    model = base()
    with pytest.raises(ValueError, match=r"would need .* GB for A and B"):
        attach_uora(model, UORAConfig(rank=HUGE, target_modules="all-linear", trainable_modules=()))
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "uora_projections")
