"""The command: what it shows, merges and exports equals what the model computes; errors are one line and exit
2.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_uora import (
    ReinitSchedule,
    UORAConfig,
    attach_uora,
    calibrate,
    detach_uora,
    load_from_checkpoint,
    named_adapters,
    refresh,
    save_adapter,
)
from lightning_uora.cli import main
from lightning_uora.storage.checkpoint import CheckpointHooks
from tests.toys import TENSORS_ONLY, Toy, callback, data, trainer


def checkpoint(tmp_path, kind: str):
    torch.manual_seed(4)
    base = Toy()
    model = copy.deepcopy(base)
    schedule = ReinitSchedule(threshold=2.0, start=1, stop=1.0, every_n_steps=3)
    run = trainer(callback(reinit=schedule, checkpoint=kind))
    run.fit(model, data())
    run.save_checkpoint(tmp_path / f"{kind}.ckpt")
    return base, model, tmp_path / f"{kind}.ckpt"


def test_merged_checkpoint_is_read_by_the_plain_class(tmp_path):
    _, model, path = checkpoint(tmp_path, "full")
    assert main(["merge", str(path), str(tmp_path / "plain.ckpt")]) == 0
    plain = Toy.load_from_checkpoint(tmp_path / "plain.ckpt", **TENSORS_ONLY)
    assert type(plain.body[0]) is nn.Linear
    assert not any("uora" in key for key in plain.state_dict())
    x = torch.randn(5, 6)
    torch.testing.assert_close(plain.eval()(x), model.eval()(x))
    assert not any("uora" in key for key in torch.load(tmp_path / "plain.ckpt", weights_only=True))


def test_an_adapter_checkpoint_is_merged_through_its_class(tmp_path, capsys):
    _, model, path = checkpoint(tmp_path, "adapter")
    assert main(["merge", str(path), str(tmp_path / "plain.ckpt")]) == 2
    assert "name the class that builds the base: --class" in capsys.readouterr().err
    torch.manual_seed(4)
    options = ["--class", "tests.toys:Toy"]
    assert main(["merge", str(path), str(tmp_path / "plain.ckpt"), *options]) == 0
    plain = Toy.load_from_checkpoint(tmp_path / "plain.ckpt", **TENSORS_ONLY)
    x = torch.randn(5, 6)
    torch.testing.assert_close(plain.eval()(x), model.eval()(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("source", ["full", "adapter", "folder", "full folder"])
def test_export_needs_no_model(tmp_path, source: str):
    base, model, path = checkpoint(tmp_path, "adapter" if source == "adapter" else "full")
    if "folder" in source:
        save_adapter(model, tmp_path / "folder", "full" if source == "full folder" else "record")
        path = tmp_path / "folder"
    assert main(["export", str(path), str(tmp_path / "peft"), "--base-model", "mine"]) == 0
    loaded = peft.PeftModel.from_pretrained(nn.ModuleDict(dict(base.named_children())), tmp_path / "peft")
    assert loaded.peft_config["default"].base_model_name_or_path == "mine"
    x = torch.randn(5, 6)
    inner = loaded.base_model.model
    torch.testing.assert_close(inner["head"](inner["body"](x)), model.eval()(x), atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_export_for_the_model_inside(tmp_path, capsys):
    base, model, path = checkpoint(tmp_path, "full")
    arguments = ["export", str(path), str(tmp_path / "peft"), "--submodule", "body"]
    assert main(arguments) == 2  # the head lies outside
    capsys.readouterr()
    saved = torch.load(path, weights_only=True)
    saved["uora"]["trained"] = []
    torch.save(saved, path)
    assert main(["export", str(path), str(tmp_path / "whole")]) == 0
    said = "load it with PeftModel.from_pretrained on the module that was saved; its first name is 'body.0'. "
    assert said + "For its 'body' alone: --submodule body." in capsys.readouterr().out
    assert main(arguments) == 0
    assert "on 'body' of the module that was saved; its first name is '0'." in capsys.readouterr().out
    loaded = peft.PeftModel.from_pretrained(base.body, tmp_path / "peft")
    x = torch.randn(5, 6)
    torch.testing.assert_close(loaded.eval()(x), model.eval().body(x), atol=1e-5, rtol=1e-4)


class TiedToy(Toy):
    """The head shares its weight with the layer that comes first."""

    def build(self):
        super().build()
        self.first = nn.Linear(6, 6)
        self.head = nn.Linear(6, 6, bias=False)
        self.head.weight = self.first.weight

    def forward(self, x):
        return super().forward(self.first(x))


def tied_checkpoint(tmp_path, **options):
    torch.manual_seed(4)
    base = TiedToy()
    model = copy.deepcopy(base)
    run = trainer(callback(**{"target_modules": ["body.0"], "trainable_modules": ["head"], **options}))
    run.fit(model, data())
    run.save_checkpoint(tmp_path / "tied.ckpt")
    return base, model, tmp_path / "tied.ckpt"


@pytest.mark.filterwarnings("ignore")
def test_a_tied_weight_in_a_checkpoint_is_exported_under_both_names(tmp_path):
    base, model, path = tied_checkpoint(tmp_path)
    assert main(["export", str(path), str(tmp_path / "peft")]) == 0
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert sorted(config["modules_to_save"]) == ["first", "head"]
    loaded = peft.PeftModel.from_pretrained(nn.ModuleDict(dict(base.named_children())), tmp_path / "peft")
    inner, x = loaded.eval().base_model.model, torch.randn(5, 6)
    got = inner["head"](inner["body"](inner["first"](x)))
    torch.testing.assert_close(got, model.eval()(x), atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_file_that_cannot_tell_what_is_tied_says_so(tmp_path, capsys):
    """Of a weight that may be an embedding's, not of a head with a bias."""
    _, model, _ = tied_checkpoint(tmp_path)
    save_adapter(model, tmp_path / "folder")
    assert main(["export", str(tmp_path / "folder"), str(tmp_path / "peft")]) == 0
    assert "does not show whether another module shares" in capsys.readouterr().out
    _, _, path = checkpoint(tmp_path, "adapter")
    assert main(["export", str(path), str(tmp_path / "other")]) == 0
    assert "does not tell" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.* are one weight")
def test_a_tied_weight_that_is_adapted_under_its_other_name_is_refused(tmp_path, capsys):
    _, _, path = tied_checkpoint(tmp_path, target_modules=["body.0", "first"])
    assert main(["export", str(path), str(tmp_path / "peft")]) == 2
    assert "PEFT cannot store that" in capsys.readouterr().err
    assert not (tmp_path / "peft").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("source", ["full", "adapter"])
def test_targets_are_full_names_in_a_list_where_what_the_file_tells_allows_it(tmp_path, source: str):
    _, _, path = checkpoint(tmp_path, source)
    assert main(["export", str(path), str(tmp_path / "peft")]) == 0
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["body.0", "body.2"]
    saved = torch.load(path, weights_only=True)
    saved["state_dict"]["sub.body.0.weight"] = torch.zeros(2)
    torch.save(saved, path)
    assert main(["export", str(path), str(tmp_path / "peft"), "--force"]) == 0
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["target_modules"] == r"body\.0|body\.2"


@pytest.mark.parametrize("max_rank", [1, 3, 4])
def test_max_rank_is_kept_and_its_error_printed(tmp_path, capsys, max_rank: int):
    _, model, path = checkpoint(tmp_path, "full")
    capsys.readouterr()
    assert main(["export", str(path), str(tmp_path / "peft"), "--max-rank", str(max_rank)]) == 0
    said, wrote, _ = capsys.readouterr().out.splitlines()
    assert f"of rank {max_rank}" in wrote
    if max_rank == 4:
        assert said == "max_rank=4: no layer has a higher rank; the export is exact."
        return
    updates = [module.delta_weight().detach().double() for _, module in named_adapters(model)]
    lost = [torch.linalg.svdvals(update)[max_rank:].norm() for update in updates]
    overall = torch.stack(lost).norm() / torch.stack([update.norm() for update in updates]).norm()
    worst = max(loss / update.norm() for loss, update in zip(lost, updates, strict=True))
    numbers = [float(word) for word in said.replace(",", "").split() if "e-" in word]
    assert numbers == pytest.approx([overall.item(), worst.item()], rel=6e-3)


def shown(capsys, monkeypatch, source) -> dict[str, str]:
    """The rows of ``uora show``."""
    monkeypatch.setenv("COLUMNS", "1000")
    assert main(["show", str(source)]) == 0
    lines = [line.strip("│ ").split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    return {title.strip(): said.strip() for title, said in lines}


VECTORS = 4 * 2 * (4 + 6)
"""Bytes of d and b of both layers; A and B have 4 x 6 entries each, every layer its own after a refresh."""
HEAD = 4 * (3 * 6 + 3)


def test_show_tells_what_is_there(tmp_path, capsys, monkeypatch):
    _, model, path = checkpoint(tmp_path, "full")
    _, _, small = checkpoint(tmp_path, "adapter")
    save_adapter(model, tmp_path / "folder")
    save_adapter(model, tmp_path / "whole", "full")
    sources = {
        "full": path,
        "adapter": small,
        "record": tmp_path / "folder",
        "projections": tmp_path / "whole",
    }
    found = {kind: shown(capsys, monkeypatch, source) for kind, source in sources.items()}
    for rows in found.values():
        assert "rank=4" in rows["configuration"]
        assert rows["adapted modules"] == "2: body.0, body.2"
        assert rows["refreshes"] == "3, 12 rows and columns"
        assert rows["d and b"] == f"{VECTORS} bytes"
        assert rows["also trained"] == f"{HEAD} bytes in 2: head.weight, head.bias"
        assert not any(said.startswith("0 bytes") for said in rows.values())
    assert found["full"]["what"] == "a full checkpoint: the whole model with its adapters"
    assert "the rest of the model" in found["full"]
    assert "record of the refreshes" in found["full"]
    for kind, what in {"adapter": "an adapter checkpoint", "record": "an adapter folder"}.items():
        assert found[kind]["what"] == (
            f"{what}, without its base model; A and B are rebuilt from the seed and the refreshes"
        )
        assert not {"A", "B", "the rest of the model"} & set(found[kind])
    assert found["projections"]["what"].endswith("A and B are stored")
    assert found["projections"]["A"] == found["projections"]["B"] == found["full"]["A"]
    optimizer = torch.load(path, weights_only=True)["optimizer_states"][0]["state"].values()
    moments = sum(value.nbytes for state in optimizer for value in state.values())
    assert found["full"]["optimizer states"] == f"{moments:,} bytes"


def test_show_tells_the_sizes_of_the_files_on_disk(tmp_path, capsys, monkeypatch):
    _, model, path = checkpoint(tmp_path, "full")
    save_adapter(model, tmp_path / "folder")
    for source in (path, *(tmp_path / "folder").iterdir()):
        rows = shown(capsys, monkeypatch, path if source == path else tmp_path / "folder")
        assert rows[source.name] == f"{source.stat().st_size:,} bytes on disk"


def test_show_tells_of_A_from_the_inputs(tmp_path, capsys, monkeypatch):
    model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
    attach_uora(model, UORAConfig(rank=2, target_modules=["0", "2"], trainable_modules=(), init="inputs"))
    calibrate(model, [torch.randn(20, 7)])
    save_adapter(model, tmp_path)
    rows = shown(capsys, monkeypatch, tmp_path)
    assert rows["what"].endswith(
        "A, from the inputs, is stored in float16; B is rebuilt from the seed and the refreshes"
    )
    assert rows["A"] == f"{2 * 2 * (7 + 5)} bytes"
    assert "B" not in rows
    assert "also trained" not in rows


class Seeded(Toy):
    """The same start whenever it is made, as a pretrained base is."""

    def __init__(self):
        with torch.random.fork_rng():
            torch.manual_seed(4)
            super().__init__()


class Wrapped(LightningModule):
    """Adapted in a part of it."""

    def __init__(self):
        super().__init__()
        self.net = Seeded()

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("cls", [Seeded, Wrapped])
def test_an_adapter_folder_is_merged_through_its_class(tmp_path, capsys, cls):
    _, model, _ = checkpoint(tmp_path, "full")
    folder, out = tmp_path / "folder", tmp_path / "plain.ckpt"
    save_adapter(model, folder)
    assert main(["merge", str(folder), str(out)]) == 2
    said = capsys.readouterr().err
    assert "is an adapter folder, written by save_adapter" in said
    assert "load_adapter(model, folder) on the base, then detach_uora(model, merge=True)" in said
    assert "--class MODULE:CLASS" in said
    assert main(["merge", str(folder), str(out), "--class", f"tests.test_cli:{cls.__name__}"]) == 0
    assert capsys.readouterr().out == (
        f"wrote {out}: a plain checkpoint, 2 adapted layers merged, {out.stat().st_size:,} bytes\n"
    )
    plain, x = cls.load_from_checkpoint(out, **TENSORS_ONLY), torch.randn(5, 6)
    assert not any("uora" in key for key in plain.state_dict())
    torch.testing.assert_close(plain.eval()(x), model.eval()(x))


def test_an_adapter_folder_is_not_merged_into_another_base(tmp_path, capsys):
    _, model, _ = checkpoint(tmp_path, "full")
    save_adapter(model, tmp_path / "folder")
    torch.manual_seed(5)
    assert main(["merge", str(tmp_path / "folder"), str(tmp_path / "out"), "--class", "tests.toys:Toy"]) == 2
    assert "was trained on another base" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_class_may_lie_in_the_current_folder(tmp_path):
    """In a process of its own, as the command's script starts: without the folder on the path."""
    _, model, _ = checkpoint(tmp_path, "full")
    save_adapter(model, tmp_path / "folder")
    (tmp_path / "mine.py").write_text("from tests.test_cli import Seeded as Mine\n")
    program = (
        "import sys; sys.path = [p for p in sys.path if p]; from lightning_uora.cli import main; "
        "code = main(sys.argv[1:]); assert '' not in sys.path; sys.exit(code)"
    )
    arguments = ["merge", "folder", "plain.ckpt", "--class", "mine:Mine"]
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plain.ckpt").exists()


def test_what_exists_is_written_over_by_force_alone(tmp_path, capsys):
    _, _, path = checkpoint(tmp_path, "full")
    for command, out in (("merge", tmp_path / "plain.ckpt"), ("export", tmp_path / "peft")):
        arguments = [command, str(path), str(out)]
        assert main(arguments) == 0
        before = {p: p.read_bytes() for p in ([out] if out.is_file() else out.iterdir())}
        first = next(iter(before))
        first.write_bytes(b"mine")
        capsys.readouterr()
        assert main(arguments) == 2
        assert (
            capsys.readouterr().err
            == f"uora: {out} already exists; choose another OUT, or overwrite it with --force.\n"
        )
        assert first.read_bytes() == b"mine"
        assert main([*arguments, "--force"]) == 0
        assert first.stat().st_size == len(before[first])


def test_an_empty_folder_takes_an_export_and_what_was_written_is_said(tmp_path, capsys):
    _, _, path = checkpoint(tmp_path, "full")
    out = tmp_path / "peft"
    out.mkdir()
    assert main(["export", str(path), str(out)]) == 0
    size = sum(file.stat().st_size for file in out.iterdir())
    said, begins = capsys.readouterr().out.splitlines()
    assert said == f"wrote {out}: PEFT LoRA of rank 4, 2 layers, {size:,} bytes"
    assert begins.endswith("on the module that was saved; its first name is 'body.0'.")


class WithLoss(Seeded):
    """An object among the hyperparameters."""

    def __init__(self, loss: object = None):
        super().__init__()
        self.save_hyperparameters()
        self.loss = loss


@pytest.mark.filterwarnings("ignore:Attribute 'loss' is an instance")
@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_loss_among_the_hyperparameters_is_shown_and_merged(tmp_path, capsys, monkeypatch, kind: str):
    model, path, out = WithLoss(nn.CrossEntropyLoss()), tmp_path / "a.ckpt", tmp_path / "plain.ckpt"
    run = trainer(callback(checkpoint=kind))
    run.fit(model, data())
    run.save_checkpoint(path)
    assert shown(capsys, monkeypatch, path)["d and b"] == f"{VECTORS} bytes"
    assert main(["merge", str(path), str(out), "--class", "tests.test_cli:WithLoss"]) == 0
    kept = torch.load(out, weights_only=False)["hyper_parameters"]
    assert type(kept["loss"]) is nn.CrossEntropyLoss


@pytest.mark.parametrize("content", [b"import torch\n", b"", b"PK\x03\x04 cut off", bytes(range(256))])
def test_a_file_that_is_no_checkpoint_is_one_line_without_advice_to_run_it(content, tmp_path, capsys):
    path = tmp_path / "mymod.py"
    path.write_bytes(content)
    assert main(["show", str(path)]) == 2
    said = "is damaged or not a checkpoint: torch.save did not write it, or did not finish."
    assert capsys.readouterr().err == f"uora: {path} {said}\n"


class Needy(Toy):
    """Cannot be made of nothing."""

    def __init__(self, size: int):
        super().__init__()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "/does/not/exist.ckpt"], "exist.ckpt does not exist; give a checkpoint or an adapter"),
        (["show", "{tmp}"], "holds no uora_config.json"),
        (["inspect", "{tmp}/full.ckpt"], "full.ckpt is no model; uora show lists what"),
        (["merge", "{tmp}/broken.ckpt", "{tmp}/out"], "is damaged or not a checkpoint"),
        (["merge", "{tmp}/plain.ckpt", "{tmp}/out"], "was not made with UORACallback"),
        (["export", "{tmp}/full.ckpt", "{tmp}/out", "--format", "vera"], "has other projections"),
        (
            ["export", "{tmp}/full.ckpt", "{tmp}/out", "--format", "vera", "--max-rank", "2"],
            "max_rank=2 is not allowed",
        ),
        (["merge", "{tmp}/adapter.ckpt", "{tmp}/out", "--class", "no.such:Thing"], "No module named 'no'"),
        (["merge", "{tmp}/adapter.ckpt", "{tmp}/out", "--class", "tests.toys"], "it must be MODULE:CLASS"),
        (
            ["merge", "{tmp}/adapter.ckpt", "{tmp}/out", "--class", "tests.test_cli:Needy"],
            "could not be built from the checkpoint's hyperparameters: ",
        ),
        (
            ["merge", "{tmp}/folder", "{tmp}/out", "--class", "tests.test_cli:Needy"],
            "could not be built without arguments, and an adapter folder stores none: ",
        ),
        (
            ["merge", "{tmp}/folder", "{tmp}/out", "--class", "tests.toys:data"],
            "made a DataLoader; it must make an nn.Module",
        ),
        (
            ["merge", "{tmp}/adapter.ckpt", "{tmp}/out", "--class", "tests.toys:data"],
            "is not a LightningModule class",
        ),
        (["merge", "{tmp}/peft", "{tmp}/out"], "is an adapter folder of PEFT"),
        (["show", "{tmp}/peft"], "is an adapter folder of PEFT"),
        (["show", "{tmp}/shards"], "is a folder of shards"),
        (["merge", "{tmp}", "{tmp}/out"], "give one of its files: adapter.ckpt, broken.ckpt"),
        (["merge", "{tmp}/other", "{tmp}/out"], "it holds notes.txt"),
        (["merge", "{tmp}/empty", "{tmp}/out"], "it is empty"),
        (["merge", "{tmp}/full.ckpt", "{tmp}/empty", "--force"], "is a folder, but merge writes a file"),
        (
            ["merge", "{tmp}/adapter.ckpt", "{tmp}/out", "--class", "tests.toys:Thing"],
            "has no attribute 'Thing'",
        ),
        (["merge", "{tmp}/full.ckpt", "{tmp}/no/such/folder/out"], "No such file"),
    ],
)
def test_errors_are_one_line_and_exit_two(tmp_path, capsys, arguments, message: str):
    checkpoint(tmp_path, "full")
    save_adapter(checkpoint(tmp_path, "adapter")[1], tmp_path / "folder")
    for name in ("peft/adapter_config.json", "shards/.metadata", "other/notes.txt", "empty/"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    (tmp_path / "broken.ckpt").write_bytes(b"broken")
    torch.save({"state_dict": {}}, tmp_path / "plain.ckpt")
    capsys.readouterr()
    assert main([a.format(tmp=tmp_path) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert not (tmp_path / "out").exists()


def test_help_has_examples_and_wrong_usage_exits_two():
    for arguments, code in ((["--help"], 0), ([], 2), (["merge"], 2)):
        done = subprocess.run(
            [sys.executable, "-m", "lightning_uora.cli", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code
        assert code or "uora merge last.ckpt plain.ckpt" in done.stdout


def test_a_merged_half_precision_checkpoint_is_rounded_once(tmp_path):
    _, _, path = checkpoint(tmp_path, "full")
    loaded = load_from_checkpoint(Toy, path)
    main(["merge", str(path), str(tmp_path / "plain.ckpt")])
    merged = torch.load(tmp_path / "plain.ckpt", weights_only=True)["state_dict"]["body.0.weight"]
    torch.testing.assert_close(merged, loaded.body[0].weight.detach())


def test_merging_into_a_weight_that_is_not_finite_is_refused_and_nothing_is_written(tmp_path, capsys):
    _, _, path = checkpoint(tmp_path, "full")
    saved = torch.load(path, weights_only=True)
    saved["state_dict"]["body.0.weight"][0, 0] = float("inf")
    torch.save(saved, path)
    assert main(["merge", str(path), str(tmp_path / "plain.ckpt")]) == 2
    assert "non-finite values into the weight of module 'body.0'" in capsys.readouterr().err
    assert not (tmp_path / "plain.ckpt").exists()


class Zoo(LightningModule):
    """Every kind of layer that can be adapted, under a part of the module."""

    def __init__(self):
        super().__init__()
        layers = {
            "conv": nn.Conv2d(3, 4, 3, groups=1, stride=2),
            "grouped": nn.Conv2d(4, 4, 3, groups=2, padding=1),
        }
        attention = {
            "same": nn.MultiheadAttention(4, 2),
            "apart": nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
        }
        self.net = nn.ModuleDict({**layers, **attention, "turned": Conv1D(3, 4), "linear": nn.Linear(3, 2)})

    def forward(self, x):
        h = self.net["grouped"](self.net["conv"](x)).flatten(2).permute(2, 0, 1)
        h = self.net["same"](h, h, h)[0]
        h = self.net["apart"](h, h[..., :3], torch.cat([h, h[..., :1]], -1))[0]
        return self.net["linear"](self.net["turned"](h))


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_of_layer_is_merged_as_detaching_would(tmp_path, inner: bool, dtype):
    """From the state dict alone, also where ``attach_uora`` was called on a part of the module."""
    torch.manual_seed(2)
    module = Zoo().to(dtype)
    root = module.net if inner else module
    attach_uora(root, UORAConfig(rank=3, target_modules="all", trainable_modules=()))
    for _, adapted in named_adapters(module):
        nn.init.normal_(adapted.uora_b)
    refresh(root, ReinitSchedule(threshold=9.0, max_fraction=0.4))
    hooks = CheckpointHooks(module, "full")
    checkpoint = {
        "state_dict": module.state_dict(),
        "pytorch-lightning_version": "2.6.0",
        "epoch": 0,
        "global_step": 0,
    }
    hooks.save(checkpoint)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    assert main(["merge", str(tmp_path / "a.ckpt"), str(tmp_path / "plain.ckpt")]) == 0
    detach_uora(root, merge=True)
    merged = torch.load(tmp_path / "plain.ckpt", weights_only=True)["state_dict"]
    assert list(merged) == list(module.state_dict())
    assert all(torch.equal(merged[k], v) for k, v in module.state_dict().items())
    plain = Zoo.load_from_checkpoint(tmp_path / "plain.ckpt", **TENSORS_ONLY).to(dtype)
    x = torch.randn(1, 3, 8, 8, dtype=dtype)
    assert torch.equal(plain(x), module(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_merge_into_a_file_of_a_shared_weight_is_refused(tmp_path, capsys, kind):
    _, _, path = tied_checkpoint(tmp_path, target_modules=["first"], trainable_modules=(), checkpoint=kind)
    named = ["--class", "tests.test_cli:TiedToy"] if kind == "adapter" else []
    torch.manual_seed(4)
    assert main(["merge", str(path), str(tmp_path / "plain.ckpt"), *named]) == 2
    assert "is also another weight of the model" in capsys.readouterr().err
    assert not (tmp_path / "plain.ckpt").exists()
