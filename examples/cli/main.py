"""Lightning's command line over the modules of these examples: everything else is YAML.

    python examples/cli/main.py fit --config examples/cli/vision.yaml
    python examples/cli/main.py fit --config examples/cli/text.yaml --trainer.max_epochs 1
    python examples/cli/main.py fit --config examples/cli/vision.yaml --optimizer AdamW --optimizer.lr 0.03
    python examples/cli/main.py fit --trainer.callbacks.help=lightning_uora.UORACallback
    python examples/cli/main.py fit --config examples/cli/vision.yaml --print_config

The bundled data of the examples, on two CPU cores: vision a minute, text two and a half. A checkpoint's test:
``python examples/cli/main.py test --config ... --ckpt_path ...``; expected ``score`` as in the examples.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI

sys.path.insert(0, str(Path(__file__).parent.parent))
import bundled

from lightning_uora.yaml_errors import one_line_errors


class ExampleCLI(LightningCLI):
    """LightningCLI that says in one line what the examples' modules and data lack."""

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (bundled.BadInputError, OSError, ImportError) as error:
            raise SystemExit(f"error: {' '.join(str(error).split())}") from error


if __name__ == "__main__":
    with one_line_errors():
        ExampleCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
        )
