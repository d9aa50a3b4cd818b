"""Files: adapter folders, Lightning checkpoints, merged weights, exports to PEFT, all checked when read."""

from lightning_uora.storage.adapter_files import load_adapter, read, save_adapter
from lightning_uora.storage.bank import AdapterBank
from lightning_uora.storage.checkpoint import (
    CheckpointHooks,
    load_from_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from lightning_uora.storage.folders import is_adapter_folder, what_folder
from lightning_uora.storage.manifest import manifests_of
from lightning_uora.storage.merging import detached_state, merge_state, skeleton, tensors_of_root
from lightning_uora.storage.peft import export_peft, write_peft
from lightning_uora.storage.peft_names import by_parameter, known_targets
from lightning_uora.storage.unpickling import check_whole
from lightning_uora.storage.verifying import write_verified
from lightning_uora.storage.waiting import in_use, names_in

__all__ = [
    "AdapterBank",
    "CheckpointHooks",
    "by_parameter",
    "check_whole",
    "detached_state",
    "export_peft",
    "in_use",
    "is_adapter_folder",
    "known_targets",
    "load_adapter",
    "load_from_checkpoint",
    "manifests_of",
    "merge_state",
    "names_in",
    "read",
    "read_checkpoint",
    "save_adapter",
    "save_checkpoint",
    "skeleton",
    "tensors_of_root",
    "what_folder",
    "write_peft",
    "write_verified",
]
