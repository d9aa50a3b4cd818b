"""Lightning's command line over the modules of these examples: everything else is YAML.

    python examples/cli/main.py fit --config examples/cli/vision.yaml
    python examples/cli/main.py fit --config examples/cli/text.yaml --trainer.max_epochs 1
    python examples/cli/main.py fit --config examples/cli/vision.yaml --optimizer AdamW --optimizer.lr 0.03
    python examples/cli/main.py fit --trainer.callbacks.help=lightning_uora.UORACallback
    python examples/cli/main.py fit --config examples/cli/vision.yaml --print_config

The bundled data of the examples, on two CPU cores: vision a minute, text five. A ``test`` of the checkpoint:
``python examples/cli/main.py test --config ... --ckpt_path ...``; expected ``score`` as in the examples.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI

sys.path.insert(0, str(Path(__file__).parent.parent))
from bundled import one_line_errors

from lightning_uora.yaml_errors import reason


class OneLineCLI(LightningCLI):
    """LightningCLI that says in one line why a model, data or a callback could not be made."""

    def instantiate_classes(self) -> None:
        with one_line_errors():
            try:
                super().instantiate_classes()
            except ValueError as error:
                raise ValueError(reason(str(error))) from error


if __name__ == "__main__":
    OneLineCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
    )
