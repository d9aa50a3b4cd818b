"""Bytes on disk: UORA by record and in full, PEFT's VeRA and LoRA, Lightning checkpoints. Random weights.

python benchmarks/files.py            # ViT-B and RoBERTa-base at ranks 64, 256, 1024; about two minutes
python benchmarks/files.py --quick    # tiny models
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from pathlib import Path

import peft
import timm
import transformers
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_uora import UORACallback, UORAConfig, attach_uora, detach_uora, save_adapter


class Holder(LightningModule):
    """Whatever is to be saved."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def folder_bytes(folder: Path) -> int:
    """All files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def sizes(base: nn.Module, targets: list[str], rank: int, root: Path) -> dict[str, int]:
    """Bytes of each way to save one adapted model."""
    result = {}
    attach_uora(base, UORAConfig(rank=rank, target_modules=targets, trainable_modules=()))
    for kind in ("record", "full"):
        save_adapter(base, root / kind, kind)
        result[f"UORA {kind}"] = folder_bytes(root / kind)
    detach_uora(base)
    vera = peft.VeraConfig(r=rank, target_modules=targets)
    for name, config in (
        ("PEFT VeRA", vera),
        ("PEFT LoRA r 8", peft.LoraConfig(r=8, target_modules=targets)),
    ):
        peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(root / name)
        (root / name / "README.md").unlink(missing_ok=True)
        result[name] = folder_bytes(root / name)
    for kind in ("adapter", "full"):
        callback = UORACallback(rank, targets, trainable_modules=(), checkpoint=kind)
        trainer = Trainer(accelerator="cpu", callbacks=[callback], logger=False, enable_progress_bar=False)
        holder = Holder(copy.deepcopy(base))
        trainer.strategy.connect(holder)
        callback.setup(trainer, holder, "fit")
        trainer.save_checkpoint(root / f"{kind}.ckpt", weights_only=True)
        result[f"Lightning {kind}"] = (root / f"{kind}.ckpt").stat().st_size
    return result


def main() -> None:
    """One row for each model and rank."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    warnings.simplefilter("ignore")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    roberta = transformers.RobertaConfig(**(small if quick else {}))
    models = {
        "ViT-B, qkv": (timm.create_model("test_vit" if quick else "vit_base_patch16_224"), ["qkv"]),
        "RoBERTa-base, query, value": (transformers.AutoModel.from_config(roberta), ["query", "value"]),
    }
    header = ""
    for name, (base, targets) in models.items():
        for rank in (8,) if quick else (64, 256, 1024):
            with tempfile.TemporaryDirectory() as root:
                row = sizes(base, targets, rank, Path(root))
            if not header:
                header = "| model | rank | " + " | ".join(row) + " |"
                print(f"{header}\n|{'---|' * (len(row) + 2)}")
            print(
                f"| {name} | {rank} | " + " | ".join(f"{size / 1000:,.0f} kB" for size in row.values()) + " |"
            )


if __name__ == "__main__":
    main()
