"""Checkpoints that Lightning writes are read back and compared before they replace what was there."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule

from lightning_uora.storage import write_verified

__all__ = ["verify_write"]

# Note [Verified writes]
# The strategy's CheckpointIO writes after all hooks, trainer.save_checkpoint after the fit as well. So when a
# checkpoint of an adapted module is complete, the plugin's save_checkpoint is replaced on the instance; the
# replacement takes itself off when it is called, and the plugin is as it was. Inside of others (in
# AsyncCheckpointIO's thread several may wait) it stays. Left alone: plugins that write in ways of their own,
# remote paths, folders, strategies that write shards without a plugin, and the processes that do not write.


class VerifiedWrite:
    """A plugin's ``save_checkpoint``, verified; see Note [Verified writes]."""

    def __init__(self, plugin: TorchCheckpointIO, once: bool) -> None:
        self.plugin, self.once = plugin, once

    def save(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """As the plugin's own.

        Raises:
            OSError: What was written reads back otherwise; what was at ``path`` is as it was.
        """
        if self.once:
            self.plugin.__dict__.pop("save_checkpoint", None)
        write = partial(type(self.plugin).save_checkpoint, self.plugin, checkpoint)
        local = "://" not in str(path) and not Path(path).is_dir()
        if "uora" not in checkpoint or not local or storage_options is not None:
            write(path, storage_options)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_verified(checkpoint, path, write)


def verify_write(pl_module: LightningModule) -> None:
    """Have what the module's Trainer writes next verified; see Note [Verified writes]."""
    trainer: Any = pl_module._trainer
    if trainer is None or not trainer.is_global_zero:
        return
    plugin = outer = trainer.strategy.checkpoint_io
    while (inner := getattr(plugin, "checkpoint_io", None)) is not None:
        plugin = inner
    if getattr(type(plugin), "save_checkpoint", None) is TorchCheckpointIO.save_checkpoint:
        plugin.__dict__["save_checkpoint"] = VerifiedWrite(plugin, once=plugin is outer).save
