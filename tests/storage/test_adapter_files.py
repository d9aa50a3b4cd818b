"""Adapter files: save and load is the identity, and every broken, foreign or swapped file leaves the model as
it was.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_uora import (
    ReinitSchedule,
    UORAConfig,
    attach_uora,
    detach_uora,
    export_peft,
    load_adapter,
    named_adapters,
    refresh,
    save_adapter,
)
from lightning_uora.storage.adapter_files import CONFIG_FILE, TENSOR_FILE


class Net(nn.Module):
    """Linear layers, a frozen BatchNorm that moves, a head."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 5))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.body(x))


def base(seed: int = 0, width: int = 6) -> Net:
    torch.manual_seed(seed)
    return Net(width)


def trained(seed: int = 0, rank: int = 4, share: str = "layer", **options) -> Net:
    """A base after a few steps, with refreshes between."""
    model = base(seed)
    attach_uora(model, UORAConfig(rank=rank, target_modules="all-linear", share=share, **options))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 5)).square().mean().backward()
        optimizer.step()
        refresh(model, ReinitSchedule(threshold=2.0, max_fraction=0.5, interpolation=0.5), optimizer)
    return model


def snapshot(model: nn.Module) -> tuple:
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return (
        state,
        [type(m) for m in model.modules()],
        [(n, p.requires_grad) for n, p in model.named_parameters()],
    )


def unchanged(model: nn.Module, before: tuple) -> bool:
    state, *rest = snapshot(model)
    same = list(state) == list(before[0]) and all(torch.equal(v, before[0][k]) for k, v in state.items())
    return same and tuple(rest) == before[1:]


@pytest.mark.parametrize("projections", ["record", "full"])
@pytest.mark.parametrize("share", ["model", "layer"])
def test_save_and_load_is_the_identity(tmp_path, projections: str, share: str):
    model = trained(share=share)
    save_adapter(model, tmp_path, projections)
    assert sorted(p.name for p in tmp_path.iterdir()) == [TENSOR_FILE, CONFIG_FILE]
    assert len({p.stat().st_mode for p in tmp_path.iterdir()}) == 1  # as the umask says, both
    twin = base()
    assert load_adapter(twin, tmp_path) == [name for name, _ in named_adapters(model)]
    state, state_again = model.state_dict(), twin.state_dict()
    assert set(state) == set(state_again)
    assert all(torch.equal(v, state_again[k]) for k, v in state.items())
    x = torch.randn(4, 5)
    assert torch.equal(twin.eval()(x), model.eval()(x))
    assert [(n, p.requires_grad) for n, p in twin.named_parameters()] == [
        (n, p.requires_grad) for n, p in model.named_parameters()
    ]


def test_record_file_holds_what_trained_and_little_more(tmp_path):
    """ViT-S at rank 64: the trained parameters plus less than 60 kB, and no A or B."""
    model = timm.create_model("vit_small_patch16_224", num_classes=10)
    attach_uora(model, UORAConfig(rank=64, target_modules="qkv"))
    save_adapter(model, tmp_path)
    trained_bytes = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert trained_bytes < written < trained_bytes + 60_000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_loading_onto_another_dtype_keeps_the_vectors_exact(tmp_path, dtype):
    model = trained()
    save_adapter(model, tmp_path, "full")
    twin = base().to(dtype)
    load_adapter(twin, tmp_path)
    assert torch.equal(twin.body[0].uora_b, model.body[0].uora_b)
    x = torch.randn(4, 5)
    torch.testing.assert_close(twin.eval()(x.to(dtype)).float(), model.eval()(x), atol=0.1, rtol=0.1)


def damage_truncated(folder):
    path = folder / TENSOR_FILE
    path.write_bytes(path.read_bytes()[:-7])


def damage_swapped(folder):
    other = folder.parent / "other"
    save_adapter(trained(rank=3), other)
    shutil.copy(other / TENSOR_FILE, folder / TENSOR_FILE)


def edit(change):
    def damage(folder):
        manifest = json.loads((folder / CONFIG_FILE).read_text())
        change(manifest)
        (folder / CONFIG_FILE).write_text(json.dumps(manifest))

    return damage


DAMAGES = {
    "no tensors": (
        lambda f: (f / TENSOR_FILE).unlink(),
        FileNotFoundError,
        "holds no uora_adapter.safetensors",
    ),
    "no config": (lambda f: (f / CONFIG_FILE).unlink(), FileNotFoundError, "holds no uora_config.json"),
    "truncated": (damage_truncated, ValueError, "is damaged, or comes from another save"),
    "swapped": (damage_swapped, ValueError, "copy both from one save"),
    "half a config": (
        lambda f: (f / CONFIG_FILE).write_text((f / CONFIG_FILE).read_text()[:50]),
        ValueError,
        "uora_config.json is damaged",
    ),
    "foreign config": (lambda f: (f / CONFIG_FILE).write_text("[1]"), ValueError, "is not a UORA manifest"),
    "newer version": (
        edit(lambda m: m.update(version=99)),
        ValueError,
        r"has version 99.*update lightning-uora",
    ),
    "missing part": (edit(lambda m: m.pop("record")), ValueError, "lacks record"),
    "unknown field": (edit(lambda m: m["config"].update(speed=3)), ValueError, "unknown fields: speed"),
    "another rank": (
        edit(lambda m: m["config"].update(rank=3)),
        ValueError,
        "the rows of 'A_\\d_\\d' cannot be right",
    ),
    "another seed": (edit(lambda m: m["config"].update(seed=9)), ValueError, "are not those of the run"),
    "another record": (edit(lambda m: m.update(record=[])), ValueError, "are not those of the run"),
    "other modules": (
        edit(lambda m: m.update(adapted=["x"])),
        ValueError,
        "the list of adapted modules cannot",
    ),
    "impossible rank": (edit(lambda m: m["config"].update(rank=-1)), ValueError, "rank -1 cannot be right"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_broken_file_is_an_error_and_the_model_is_as_it_was(tmp_path, kind: str):
    damage, error, message = DAMAGES[kind]
    folder = tmp_path / "adapter"
    save_adapter(trained(), folder)
    damage(folder)
    model = base()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        load_adapter(model, folder)
    assert unchanged(model, before)


def test_another_base_is_refused_unless_a_warning_is_asked_for(tmp_path):
    save_adapter(trained(), tmp_path)
    model = base(seed=1)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"trained on another base \(different: 'body.0.weight'"):
        load_adapter(model, tmp_path)
    assert unchanged(model, before)
    with pytest.warns(UserWarning, match="another base"):
        load_adapter(model, tmp_path, base_mismatch="warn")
    assert len(list(named_adapters(model))) == 2


def test_a_small_change_of_the_base_is_noticed(tmp_path):
    save_adapter(trained(), tmp_path)
    model = base()
    with torch.no_grad():
        model.body[0].weight[0, 0] += 0.01
    with pytest.raises(ValueError, match="another base"):
        load_adapter(model, tmp_path)


def test_another_architecture_is_refused(tmp_path):
    save_adapter(trained(), tmp_path)
    with pytest.raises(ValueError, match="has shape"):
        load_adapter(base(width=7), tmp_path)


def test_a_crash_while_saving_leaves_the_old_adapter(tmp_path, monkeypatch):
    from lightning_uora.storage import adapter_files

    model = trained()
    save_adapter(model, tmp_path)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapter_files, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(trained(seed=1), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


def test_wrong_calls_say_so(tmp_path):
    with pytest.raises(ValueError, match="projections='some' is not allowed"):
        save_adapter(trained(), tmp_path, "some")
    with pytest.raises(ValueError, match="holds no adapted model"):
        save_adapter(base(), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        save_adapter(trained(), tmp_path / "file")
    save_adapter(trained(), tmp_path / "good")
    with pytest.raises(ValueError, match="already adapted"):
        load_adapter(trained(), tmp_path / "good")


def test_trained_heads_and_biases_and_moved_statistics_come_back(tmp_path):
    model = trained(bias="all")
    save_adapter(model, tmp_path)
    twin = base()
    load_adapter(twin, tmp_path)
    for name in ("head.weight", "body.1.bias", "body.1.running_mean", "body.1.num_batches_tracked"):
        assert torch.equal(twin.state_dict()[name], model.state_dict()[name]), name
    assert not torch.equal(twin.body[1].running_mean, copy.deepcopy(base()).body[1].running_mean)


KILLED = """
import os, signal, sys
from pathlib import Path
from lightning_uora.storage import adapter_files
from tests.storage.test_adapter_files import trained

def half(tensors, path):
    Path(path).write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

adapter_files.save_file = half
adapter_files.save_adapter(trained(seed=1), sys.argv[1])
"""


def test_a_process_killed_while_saving_leaves_the_old_adapter_loadable(tmp_path):
    model = trained()
    save_adapter(model, tmp_path)
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=root, check=False)
    assert done.returncode == -signal.SIGKILL
    twin = base()
    load_adapter(twin, tmp_path)
    assert torch.equal(twin.body[0].uora_b, model.body[0].uora_b)
    save_adapter(model, tmp_path)


def test_an_unknown_way_to_meet_another_base_is_refused(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(7, 5))
    other = copy.deepcopy(model)
    attach_uora(model, UORAConfig(3, "all-linear"))
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="base_mismatch='ignore' is not allowed"):
        load_adapter(other, tmp_path, base_mismatch="ignore")


def test_a_base_that_was_written_between_two_saves_has_new_fingerprints(tmp_path):
    """Through `.data`, which moves no version."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5))
    attach_uora(model, UORAConfig(rank=2, target_modules=["0"], trainable_modules=()))
    save_adapter(model, tmp_path)
    model[0]._parameters["weight"].data.mul_(2.0)
    save_adapter(model, tmp_path)
    detach_uora(model)
    assert load_adapter(model, tmp_path) == ["0"]


@pytest.mark.parametrize("name", ["uora_d", "uora_b", "head"])
def test_numbers_that_are_not_finite_are_neither_saved_nor_loaded(name, tmp_path):
    def made():
        torch.manual_seed(0)
        return nn.ModuleDict({"body": nn.Linear(6, 5), "head": nn.Linear(5, 2)})

    config = UORAConfig(rank=3, target_modules=["body"], trainable_modules=["head"])
    model = made()
    attach_uora(model, config)
    save_adapter(model, tmp_path / "good")
    spoiled = model["head"].bias if name == "head" else getattr(model["body"], name)
    with torch.no_grad():
        spoiled[0] = float("nan")
    with pytest.raises(ValueError, match=r"non-finite values in .* of the model; nothing was saved"):
        save_adapter(model, tmp_path / "bad")
    with pytest.raises(ValueError, match=r"non-finite values in .* of the model; nothing was exp"):
        export_peft(model, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    tensors = load_file(tmp_path / "good" / "uora_adapter.safetensors")
    tensors["head.bias" if name == "head" else f"body.{name}"][0] = float("inf")
    save_file(tensors, tmp_path / "good" / "uora_adapter.safetensors")
    told = json.loads((tmp_path / "good" / "uora_config.json").read_text())
    told["sha256"] = hashlib.sha256((tmp_path / "good" / "uora_adapter.safetensors").read_bytes()).hexdigest()
    (tmp_path / "good" / "uora_config.json").write_text(json.dumps(told))
    other = made()
    with pytest.raises(ValueError, match=r"non-finite values in .* of the adapter; nothing was loaded"):
        load_adapter(other, tmp_path / "good")
    assert not hasattr(other, "uora_projections")
