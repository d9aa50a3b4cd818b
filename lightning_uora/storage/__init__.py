"""Files: adapter folders, Lightning checkpoints, merged weights, exports to PEFT, all checked when read."""

from lightning_uora.storage.adapter_files import load_adapter, read, save_adapter
from lightning_uora.storage.checkpoint import (
    CheckpointHooks,
    load_from_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from lightning_uora.storage.folders import is_adapter_folder, what_folder
from lightning_uora.storage.merging import detached_state, merge_state, skeleton
from lightning_uora.storage.peft import export_peft, write_peft

__all__ = [
    "CheckpointHooks",
    "detached_state",
    "export_peft",
    "is_adapter_folder",
    "load_adapter",
    "load_from_checkpoint",
    "merge_state",
    "read",
    "read_checkpoint",
    "save_adapter",
    "save_checkpoint",
    "skeleton",
    "what_folder",
    "write_peft",
]
