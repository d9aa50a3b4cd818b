"""What a folder is that was given for a checkpoint or an adapter, and what reads it."""

from __future__ import annotations

from pathlib import Path

__all__ = ["is_adapter_folder", "what_folder"]


def is_adapter_folder(path: str | Path) -> bool:
    """Whether ``save_adapter`` wrote it, in whole or in part."""
    return any((Path(path) / name).is_file() for name in ("uora_config.json", "uora_adapter.safetensors"))


def what_folder(path: str | Path) -> str:
    """A sentence that says what the folder is and what to do with it."""
    folder = Path(path)
    if is_adapter_folder(folder):
        return (
            f"{path} is an adapter folder, written by save_adapter, and holds no base model: call "
            "load_adapter(model, folder) on the base, then detach_uora(model, merge=True) to merge it."
        )
    if (folder / "adapter_config.json").is_file():
        return (
            f"{path} is an adapter folder of PEFT; read it with peft.PeftModel.from_pretrained(base, "
            "folder). This package reads only what it was exported from."
        )
    if (folder / ".metadata").is_file() or (folder / "meta.pt").is_file():
        return (
            f"{path} is a folder of shards; make one file of it with `python -m "
            f"lightning.pytorch.utilities.consolidate_checkpoint {path}`."
        )
    names = sorted(entry.name for entry in folder.iterdir())
    files = [name for name in names if name.endswith((".ckpt", ".pt"))]
    what = f"; give one of its files: {', '.join(files[:3])}" if files else ""
    held = "" if files else "; it is empty" if not names else f"; it holds {', '.join(names[:3])}"
    return (
        f"{path} is a folder that holds no uora_config.json (an adapter) and no .metadata (a checkpoint in "
        f"shards){what}{held}."
    )
