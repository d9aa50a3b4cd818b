"""The ``uora`` command: what an adapter would cost; look at, merge and export what was saved."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_uora.adapters import OWNER, named_adapters
from lightning_uora.config import INITS, UORAConfig
from lightning_uora.reports import inspect_model, model_on_meta
from lightning_uora.storage import (
    detached_state,
    known_targets,
    load_from_checkpoint,
    merge_state,
    read,
    read_checkpoint,
    save_checkpoint,
    skeleton,
    write_peft,
)

EXAMPLES = """examples:
  uora inspect vit_base_patch16_224 --rank 1024        costs, before anything is downloaded
  uora inspect ./llama-70b/config.json --tokens 8192 --target-modules q_proj v_proj
  uora show adapter/                                   what a folder or a checkpoint holds
  uora merge last.ckpt plain.ckpt                      a checkpoint that plain load_from_checkpoint reads
  uora merge small.ckpt plain.ckpt --class my.module:Classifier     from checkpoint="adapter"
  uora export last.ckpt peft/ --format lora            a folder for peft.PeftModel.from_pretrained
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 when it worked, 2 with one line on standard error when it did not."""
    parser = argparse.ArgumentParser(
        prog="uora",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_inspect(commands)
    show = commands.add_parser("show", help="what a checkpoint or an adapter folder holds")
    show.add_argument("source", type=Path, metavar="FILE_OR_DIR")
    merge = commands.add_parser("merge", help="a plain checkpoint with the adapters in the weights")
    merge.add_argument("source", type=Path, metavar="CKPT")
    merge.add_argument("out", type=Path, metavar="OUT")
    merge.add_argument(
        "--class", dest="module_class", metavar="MODULE:CLASS", help="for adapter-only checkpoints"
    )
    export = commands.add_parser("export", help="a PEFT folder")
    export.add_argument("source", type=Path, metavar="CKPT_OR_DIR")
    export.add_argument("out", type=Path, metavar="OUT")
    export.add_argument("--format", choices=["lora", "vera"], default="lora")
    export.add_argument(
        "--max-rank",
        type=int,
        metavar="RANK",
        help="lora: the best approximation where a layer's rank is higher; its error is printed",
    )
    export.add_argument(
        "--base-model", metavar="NAME", help="base_model_name_or_path in the PEFT configuration"
    )
    export.add_argument(
        "--submodule",
        default="",
        metavar="PATH",
        help="the model inside the LightningModule that PEFT will wrap, such as model; names start there",
    )
    chosen = parser.parse_args(arguments)
    try:
        {"inspect": _inspect, "show": _show, "merge": _merge, "export": _export}[chosen.command](chosen)
    except (ValueError, OSError, ImportError, AttributeError) as error:
        message = " ".join(str(error).split())
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"uora: {message}")
        return 2
    return 0


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser("inspect", help="what an adapter would cost, without any weights")
    inspect.add_argument(
        "model", metavar="MODEL", help="timm name; transformers config path, model type or hub name"
    )
    inspect.add_argument("--rank", type=int, default=UORAConfig.rank)
    inspect.add_argument("--init", choices=INITS, default=UORAConfig.init, help="inputs: A is stored too")
    inspect.add_argument(
        "--target-modules", nargs="+", default=[UORAConfig.target_modules], metavar="PATTERN"
    )
    inspect.add_argument("--exclude-modules", nargs="+", default=[], metavar="PATTERN")
    inspect.add_argument(
        "--tokens", type=int, default=2048, help="rows each layer sees in a step: batch x length (2048)"
    )
    inspect.add_argument("--json", action="store_true", help="for machines, with every layer")


def _inspect(chosen: argparse.Namespace) -> None:
    config = UORAConfig(
        rank=chosen.rank,
        init=chosen.init,
        target_modules=chosen.target_modules,
        exclude_modules=chosen.exclude_modules,
    )
    found = inspect_model(model_on_meta(chosen.model), config, chosen.tokens, chosen.model)
    if chosen.json:
        sys.stdout.write(json.dumps(found.as_dict(), indent=1) + "\n")
        return
    table, console = found.table(), Console(soft_wrap=True, highlight=False, markup=False)
    wanted = Console(width=10_000).measure(table).maximum  # a console measures at most its own width
    Console(width=max(console.width, wanted)).print(table)
    for line in found.lines():
        console.print(line)


def _open(source: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Manifest, tensors and the checkpoint itself (empty for a folder)."""
    if source.is_dir():
        return *read(source), {}
    checkpoint = read_checkpoint(source)
    return checkpoint["uora"], checkpoint["state_dict"], checkpoint


def _show(chosen: argparse.Namespace) -> None:
    manifest, tensors, _ = _open(chosen.source)
    table = Table(title=str(chosen.source), show_header=False)
    config = ", ".join(f"{name}={value!r}" for name, value in manifest["config"].items())
    table.add_row("configuration", config)
    table.add_row("adapted modules", f"{len(manifest['adapted'])}: {', '.join(manifest['adapted'][:3])}, ...")
    record = manifest["record"]
    rows = sum(len(chosen) for entry in record for chosen in entry["rows"].values())
    table.add_row("refreshes", f"{len(record)}, {rows:,} rows and columns")
    for title, count in _bytes(tensors).items():
        table.add_row(title, f"{count:,} bytes")
    Console().print(table)


def _bytes(tensors: dict[str, Tensor]) -> dict[str, int]:
    sizes = {"vectors": 0, "A and B": 0, "record": 0, "everything else": 0}
    for name, tensor in tensors.items():
        if name.endswith((".uora_d", ".uora_b")) or name in ("uora_d", "uora_b"):
            kind = "vectors"
        elif OWNER in name:
            kind = "record" if name.endswith(".record") else "A and B"
        else:
            kind = "everything else"
        sizes[kind] += tensor.numel() * tensor.element_size()
    return sizes


def _merge(chosen: argparse.Namespace) -> None:
    checkpoint = read_checkpoint(chosen.source)
    manifest = checkpoint["uora"]
    if manifest["kind"] == "full":
        state = merge_state(manifest, checkpoint["state_dict"])
    elif chosen.module_class is None:
        raise ValueError(
            f"{chosen.source} holds adapters without their base; name the class that builds it: --class "
            "MODULE:CLASS."
        )
    else:
        module, _, name = chosen.module_class.partition(":")
        cls = getattr(importlib.import_module(module), name)
        state = detached_state(load_from_checkpoint(cls, chosen.source))
    keep = ("epoch", "global_step", "pytorch-lightning_version", "hyper_parameters", "hparams_name", "loops")
    save_checkpoint(
        {**{key: checkpoint[key] for key in keep if key in checkpoint}, "state_dict": state}, chosen.out
    )


def _export(chosen: argparse.Namespace) -> None:
    manifest, tensors, _ = _open(chosen.source)
    prefix = f"{manifest['root']}." if manifest.get("root") else ""
    inner = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    model = skeleton(manifest, inner)
    adapters = dict(named_adapters(model))
    lost = [name for name in manifest["trained"] if name not in inner]
    if lost:
        raise ValueError(f"{chosen.source} is damaged: it lacks {lost[0]!r}.")
    trained = {name: inner[name] for name in manifest["trained"]}
    adapters, layers, trained = (
        _within(chosen.submodule, named) for named in (adapters, manifest["layers"], trained)
    )
    path = f"{chosen.submodule}." if chosen.submodule else ""
    state = {name.removeprefix(path): t for name, t in inner.items() if name.startswith(path)}
    heads = _trained_modules(adapters, trained, state)
    saved = tuple(f"{head}." for head in heads)
    known = [name.removeprefix(path) for name in (*inner, *manifest["base"]) if name.startswith(path)]
    loss = write_peft(
        adapters,
        layers,
        heads,
        {name: t for name, t in state.items() if name.startswith(saved)},
        chosen.out,
        chosen.format,
        chosen.base_model,
        chosen.max_rank,
        known_targets(adapters, {name.rpartition(".")[0] for name in known}),
    )
    console = Console(soft_wrap=True, highlight=False, markup=False)
    if loss is not None:
        console.print(str(loss))
    bare = [n for n, t in trained.items() if t.dim() == 2 and f"{n.rpartition('.')[0]}.bias" not in state]
    if bare and manifest.get("kind") != "full":
        console.print(
            f"{chosen.source} does not tell whether another module shares {bare[0]!r}, which was trained; if "
            "one does, export a full checkpoint, or call export_peft(model, ...)."
        )


def _trained_modules(
    adapters: dict[str, Any], trained: dict[str, Tensor], state: dict[str, Tensor]
) -> list[str]:
    """Modules that hold what was trained, and those that share a tensor with them, which a file shows."""
    places = {(t.data_ptr(), t.shape): name for name, t in trained.items()}
    heads: dict[str, None] = {}
    for name, t in state.items():
        one = name if name in trained else places.get((t.data_ptr(), t.shape))
        if one is None:
            continue
        head = name.rpartition(".")[0]
        if not head or any(f"{adapted}.".startswith(f"{head}.") for adapted in adapters):
            raise ValueError(
                f"module {head!r} is adapted, or holds what is, and its {name.rpartition('.')[2]} was trained"
                f"{f' as {one!r}' if one != name else ''}; PEFT has no place for that."
            )
        heads[head] = None
    return list(heads)


def _within(path: str, named: dict[str, Any]) -> dict[str, Any]:
    """The same with names as they are inside the module at ``path``, which must hold them all."""
    prefix = f"{path}." if path else ""
    for name in named:
        if not name.startswith(prefix):
            raise ValueError(f"--submodule {path}: {name!r}, which was trained, lies outside.")
    return {name.removeprefix(prefix): value for name, value in named.items()}


if __name__ == "__main__":
    sys.exit(main())
