"""Estimate what an adapter would cost; show, merge and export what was saved."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from lightning_uora.adapters import named_adapters, set_adapter
from lightning_uora.config import INITS, UORAConfig
from lightning_uora.reports import contents, inspect_model, model_on_meta
from lightning_uora.storage import (
    by_parameter,
    detached_state,
    in_use,
    is_adapter_folder,
    known_targets,
    load_adapter,
    load_from_checkpoint,
    manifests_of,
    merge_state,
    names_in,
    read,
    read_checkpoint,
    save_checkpoint,
    skeleton,
    tensors_of_root,
    what_folder,
    write_peft,
)

EXAMPLES = """examples:
  uora inspect vit_base_patch16_224 --rank 1024        what it would cost; downloads no weights
  uora inspect ./llama-70b/config.json --tokens 8192 --target-modules q_proj v_proj
  uora show adapter/                                   what an adapter folder or a checkpoint holds
  uora merge last.ckpt plain.ckpt                      a checkpoint that plain load_from_checkpoint reads
  uora merge small.ckpt plain.ckpt --class my.module:Classifier     from checkpoint="adapter"
  uora merge adapter/ plain.ckpt --class my.module:Classifier       from an adapter folder
  uora export last.ckpt peft/ --format lora            a folder for peft.PeftModel.from_pretrained
"""

SOURCE = "checkpoint or adapter folder"
FORMATS = {"lora": "LoRA", "vera": "VeRA"}
PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")


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
    show = commands.add_parser("show", help="list what a checkpoint or an adapter folder holds")
    show.add_argument("source", type=Path, metavar="FILE_OR_DIR", help=SOURCE)
    merge = commands.add_parser(
        "merge", help="write a plain checkpoint, the adapters merged into its weights"
    )
    merge.add_argument("source", type=Path, metavar="CKPT_OR_DIR", help=SOURCE)
    merge.add_argument("out", type=Path, metavar="OUT", help="checkpoint file to write")
    merge.add_argument(
        "--class",
        dest="module_class",
        metavar="MODULE:CLASS",
        help="class that builds the base, for adapter folders and checkpoint='adapter' files; the current "
        "folder is searched too",
    )
    export = commands.add_parser("export", help="write a folder that PEFT loads")
    export.add_argument("source", type=Path, metavar="CKPT_OR_DIR", help=SOURCE)
    export.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    export.add_argument(
        "--format", choices=list(FORMATS), default="lora", help="kind of PEFT adapter (default: lora)"
    )
    export.add_argument(
        "--max-rank",
        type=int,
        metavar="RANK",
        help="lora only: approximate layers of a higher rank with this one, and print the error",
    )
    export.add_argument(
        "--base-model", metavar="NAME", help="name or path of the base, for PEFT's base_model_name_or_path"
    )
    export.add_argument(
        "--submodule",
        default="",
        metavar="PATH",
        help="part of the LightningModule that PEFT will wrap, such as model; names start there",
    )
    for command in (merge, export):
        command.add_argument(
            "--adapter",
            metavar="NAME",
            help="which adapter, if the checkpoint has several (default: the active one)",
        )
        command.add_argument("--force", action="store_true", help="overwrite OUT if it exists")
    chosen = parser.parse_args(arguments)
    try:
        {"inspect": _inspect, "show": _show, "merge": _merge, "export": _export}[chosen.command](chosen)
    except (ValueError, OSError, ImportError, AttributeError) as error:
        _print(f"uora: {' '.join(str(error).split())}", stderr=True)
        return 2
    return 0


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser("inspect", help="estimate what an adapter would cost, without any weights")
    inspect.add_argument(
        "model", metavar="MODEL", help="timm name, or transformers config path, model type or hub name"
    )
    inspect.add_argument(
        "--rank",
        type=int,
        default=UORAConfig.rank,
        help=f"directions in each layer (default: {UORAConfig.rank})",
    )
    inspect.add_argument(
        "--init", choices=INITS, default=UORAConfig.init, help="how A starts; with inputs, files store A too"
    )
    inspect.add_argument(
        "--target-modules",
        nargs="+",
        default=[UORAConfig.target_modules],
        metavar="PATTERN",
        help="preset (attention, all-linear, all) or patterns of names (default: attention)",
    )
    inspect.add_argument(
        "--exclude-modules", nargs="+", default=[], metavar="PATTERN", help="modules to leave out"
    )
    inspect.add_argument(
        "--tokens", type=int, default=2048, help="tokens in a training step, batch x length (default: 2048)"
    )
    inspect.add_argument(
        "--quantize",
        choices=["nf4", "nf4-double", "fp4", "int8"],
        help="count the base as bitsandbytes quantises it",
    )
    inspect.add_argument("--json", action="store_true", help="print JSON, with every layer")


def _inspect(chosen: argparse.Namespace) -> None:
    config = UORAConfig(
        rank=chosen.rank,
        init=chosen.init,
        target_modules=chosen.target_modules,
        exclude_modules=chosen.exclude_modules,
    )
    is_file = Path(chosen.model).is_file() and not chosen.model.endswith(".json")
    if is_file or is_adapter_folder(chosen.model):
        raise ValueError(
            f"{chosen.model} is no model; uora show lists what a saved adapter or checkpoint holds."
        )
    found = inspect_model(model_on_meta(chosen.model), config, chosen.tokens, chosen.model, chosen.quantize)
    if chosen.json:
        sys.stdout.write(json.dumps(found.as_dict(), indent=1) + "\n")
        return
    table = found.table()
    wanted = Console(width=10_000).measure(table).maximum  # a console measures at most its own width
    Console(width=max(Console().width, wanted)).print(table)
    for line in found.lines():
        _print(line)


def _open(source: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Manifest, tensors and the checkpoint itself (empty for a folder)."""
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist; give a checkpoint or an adapter folder.")
    if is_adapter_folder(source):
        return *read(source), {}
    checkpoint = read_checkpoint(source)
    return checkpoint["uora"], checkpoint["state_dict"], checkpoint


def _show(chosen: argparse.Namespace) -> None:
    manifest, tensors, checkpoint = _open(chosen.source)
    for one in manifests_of(manifest):
        Console().print(contents(chosen.source, one, tensors, checkpoint.get("optimizer_states")))


def _merge(chosen: argparse.Namespace) -> None:
    _require_free(chosen, chosen.out.exists())
    if chosen.out.is_dir():
        raise ValueError(f"{chosen.out} is a folder, but merge writes a file; give a file name as OUT.")
    manifest, tensors, checkpoint = _open(chosen.source)
    several = manifests_of(manifest)
    chosen_ones, tensors = _chosen_adapter(several, tensors, chosen.adapter)
    if several[0].get("kind") == "full":
        state = merge_state({"several": chosen_ones}, tensors)
    elif chosen.module_class is None:
        held = f"{chosen.source} holds adapters without their base;"
        what = f"{what_folder(chosen.source)} Or" if chosen.source.is_dir() else held
        raise ValueError(f"{what} name the class that builds the base: --class MODULE:CLASS.")
    else:
        with _current_folder_importable():
            cls = _class(chosen.module_class)
            module = _on_base(chosen, cls, several)
            if chosen.adapter is not None:
                set_adapter(module, chosen.adapter)
            state = detached_state(module)
    keep = ("epoch", "global_step", "pytorch-lightning_version", "hyper_parameters", "hparams_name", "loops")
    kept = {key: checkpoint[key] for key in keep if key in checkpoint} if checkpoint else _version()
    save_checkpoint({**kept, "state_dict": state}, chosen.out)
    count = sum(len(one["adapted"]) for one in chosen_ones)
    what = (
        f"a plain checkpoint, {count} adapted {_layers(count)} merged{_of_several(several, chosen.adapter)}"
    )
    _wrote(chosen.out, what, chosen.out)


def _chosen_adapter(
    several: list[dict[str, Any]], tensors: dict[str, Tensor], name: str | None
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Manifests and tensors as if the adapter of that name had been the only one."""
    if name is not None and len(several) > 1:
        raise ValueError(
            f"--adapter {name}: the checkpoint has several adapted models, with one adapter each; "
            "leave --adapter out."
        )
    found = []
    for manifest in several:
        one, tensors = in_use(manifest, tensors, name)
        found.append(one)
    return found, tensors


def _of_several(several: list[dict[str, Any]], name: str | None) -> str:
    """Which adapter it was, where there are others."""
    names = names_in(several[0])
    left = ", ".join(one for one in names if one != (name or names[0]))
    return f" of adapter {name or names[0]!r} (not {left}: --adapter)" if left else ""


def _require_free(chosen: argparse.Namespace, taken: bool) -> None:
    if taken and not chosen.force:
        raise ValueError(f"{chosen.out} already exists; choose another OUT, or overwrite it with --force.")


def _wrote(out: Path, what: str, *files: Path) -> None:
    size = sum(file.stat().st_size for file in files)
    _print(f"wrote {out}: {what}, {size:,} bytes")


def _print(line: str, stderr: bool = False) -> None:
    Console(stderr=stderr, soft_wrap=True, highlight=False, markup=False).print(line)


def _layers(count: int) -> str:
    return "layer" if count == 1 else "layers"


def _version() -> dict[str, str]:
    """What Lightning asks for in a checkpoint's file; nothing where there is no Lightning."""
    try:
        import lightning
    except ImportError:
        return {}
    return {"pytorch-lightning_version": lightning.__version__}


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    """As under ``python -m``: a script's own modules are found where it is run."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with suppress(ValueError):  # the module may have changed it
            sys.path.remove(here)


def _class(named: str) -> Any:
    """The class that ``MODULE:CLASS`` names."""
    module, colon, name = named.partition(":")
    if not (module and colon and name):
        raise ValueError(
            f"--class {named} is not allowed; it must be MODULE:CLASS, such as my.module:Classifier."
        )
    try:
        found = importlib.import_module(module)
    except Exception as error:  # a user's module raises what it likes
        looked = f" (looked in {Path.cwd()} and among what is installed)"
        where = looked if isinstance(error, ModuleNotFoundError) else ""
        raise ValueError(f"--class {named}: {type(error).__name__}: {error}{where}.") from error
    if not hasattr(found, name):
        own = [n for n, one in vars(found).items() if isinstance(one, type) and one.__module__ == module]
        has = f"; its own classes: {', '.join(own[:5])}" if own else ""
        raise ValueError(f"--class {named}: module {module!r} has no attribute {name!r}{has}.")
    return getattr(found, name)


def _on_base(chosen: argparse.Namespace, cls: Any, several: list[dict[str, Any]]) -> nn.Module:
    """A module of the class with the source's adapters."""
    named = f"--class {chosen.module_class}"
    if not chosen.source.is_dir():
        if not hasattr(cls, "load_from_checkpoint"):
            raise ValueError(f"{named} is not a LightningModule class, which a checkpoint needs.")
        try:
            loaded: nn.Module = load_from_checkpoint(cls, chosen.source)
        except (ValueError, OSError):
            raise
        except Exception as error:  # a user's class raises what it likes
            raise ValueError(
                f"{named} could not be built from the checkpoint's hyperparameters: {error}. Merge in "
                "Python: load_from_checkpoint(cls, path, name=value), then detach_uora(module, "
                "merge=True)."
            ) from error
        return loaded
    try:
        module = cls()
    except Exception as error:  # a user's class raises what it likes
        raise ValueError(
            f"{named} could not be built without arguments, and an adapter folder stores none: "
            f"{error}. Merge in Python: load_adapter(model, folder), then detach_uora(model, "
            "merge=True)."
        ) from error
    if not isinstance(module, nn.Module):
        raise ValueError(f"{named} made a {type(module).__name__}; it must make an nn.Module.")
    load_adapter(module if len(several) > 1 else _adapted_part(module, several[0]), chosen.source)
    return module


def _adapted_part(module: nn.Module, manifest: dict[str, Any]) -> nn.Module:
    """The outermost part that has every adapted name; the module itself where none has."""
    parts = (
        part for part in module.modules() if set(manifest["adapted"]) <= {n for n, _ in part.named_modules()}
    )
    return next(parts, module)


def _export(chosen: argparse.Namespace) -> None:
    _require_free(chosen, chosen.out.is_file() or (chosen.out.is_dir() and any(chosen.out.iterdir())))
    manifest, tensors, _ = _open(chosen.source)
    if len(several := manifests_of(manifest)) > 1:
        manifest = _one_of(several, chosen.submodule)
        chosen.submodule = ""  # its names begin there
    several, families = [manifest], manifest.get("families", [])
    (manifest,), tensors = _chosen_adapter(several, tensors, chosen.adapter)
    inner = tensors_of_root(manifest, tensors)
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
    mixture = any(".experts." in f".{name}" for name in known)
    parameters = by_parameter(layers, mixture) if chosen.format == "lora" else {}
    plain_targets = [name for name in adapters if name not in parameters]
    loss = write_peft(
        adapters,
        layers,
        heads,
        {name: t for name, t in state.items() if name.startswith(saved)},
        chosen.out,
        chosen.format,
        chosen.base_model,
        chosen.max_rank,
        known_targets(plain_targets, {name.rpartition(".")[0] for name in known} | set(parameters)),
        mixture=mixture,
        families=families,
    )
    console = Console(soft_wrap=True, highlight=False, markup=False)
    if loss is not None:
        console.print(str(loss))
    count, rank = len(adapters), manifest["config"].get("rank", UORAConfig.rank)
    rank = min(rank, chosen.max_rank or rank)
    what = f"PEFT {FORMATS[chosen.format]} of rank {rank}, {count} {_layers(count)}"
    what += _of_several(several, chosen.adapter)
    _wrote(chosen.out, what, *(chosen.out / name for name in PEFT_FILES))
    _print(_where_names_begin([*adapters, *trained], chosen.submodule))
    bare = [n for n, t in trained.items() if t.dim() == 2 and f"{n.rpartition('.')[0]}.bias" not in state]
    if bare and manifest.get("kind") != "full":
        console.print(
            f"{bare[0]!r} was trained, and {chosen.source} does not show whether another module "
            "shares it. If one does, export a full checkpoint, or call export_peft(model, ...)."
        )


def _where_names_begin(names: Sequence[str], submodule: str) -> str:
    """What PEFT has to wrap."""
    begin = {name.partition(".")[0] for name in names} - set(names)
    base = f"{submodule!r} of the module that was saved" if submodule else "the module that was saved"
    where = f"load it with PeftModel.from_pretrained on {base}; its first name is {names[0]!r}."
    if submodule or len(begin) != 1:
        return where
    (part,) = begin
    return f"{where} For its {part!r} alone: --submodule {part}."


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
                f"module {head!r} is adapted or holds adapted layers, and its {name.rpartition('.')[2]} "
                f"was trained too{f' as {one!r}' if one != name else ''}; PEFT cannot store that. Merge "
                "instead."
            )
        heads[head] = None
    return list(heads)


def _one_of(several: list[dict[str, Any]], path: str) -> dict[str, Any]:
    """Of several adapted models the one at ``path``, or the one whose layers all lie there."""
    found = [one for one in several if one["root"] == path] or [
        one for one in several if all(f"{name}.".startswith(f"{path}.") for name in _names_of(one))
    ]
    if len(found) != 1:
        roots = ", ".join(one["root"] or f"(the module itself: {_names_of(one)[0]})" for one in several)
        raise ValueError(
            f"the source holds several adapted models, at {roots}; choose one with --submodule PATH "
            "(its own path, or that of a module around its layers)."
        )
    return found[0]


def _names_of(manifest: dict[str, Any]) -> list[str]:
    """Names of a manifest's adapted layers in the module that was saved."""
    root = manifest.get("root", "")
    return [f"{root}.{name}" if root else name for name in manifest["adapted"]]


def _within(path: str, named: dict[str, Any]) -> dict[str, Any]:
    """The same with names as they are inside the module at ``path``, which must hold them all."""
    prefix = f"{path}." if path else ""
    for name in named:
        if not name.startswith(prefix):
            raise ValueError(
                f"--submodule {path}: {name!r} was trained and lies outside; choose a module that holds "
                "all that was trained."
            )
    return {name.removeprefix(prefix): value for name, value in named.items()}


if __name__ == "__main__":
    sys.exit(main())
