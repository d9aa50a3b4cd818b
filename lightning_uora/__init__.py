"""UORA for PyTorch Lightning: fine-tune with two small vectors per layer, by one callback.

Floors, each importing only from below: ``callback``, ``cli`` · ``companions``, ``interop``, ``merging`` ·
``attachment``, ``training_batches``, ``counting``, ``adapter_files``, ``checkpoint`` · ``restoring``,
``refresher``, ``report``, ``inspection`` · ``refresh``, ``calibration`` · ``injection``, ``growth``,
``passes`` · ``targets``, ``observer``, ``weakness`` · ``layers``, ``roles`` · ``kinds``, ``projection``,
``moments``, ``ranks``, ``fingerprints``, ``manifest`` · ``functional``, ``rotation``, ``sharding``,
``shared_inputs``, ``patches``, ``untouched``, ``loaders``, ``config``.
"""

from lightning_uora.adapter_files import load_adapter, save_adapter
from lightning_uora.calibration import calibrate
from lightning_uora.callback import UORACallback
from lightning_uora.checkpoint import load_from_checkpoint
from lightning_uora.config import ReinitSchedule, UORAConfig
from lightning_uora.injection import adapters_disabled, attach_uora, detach_uora, named_adapters, param_groups
from lightning_uora.interop import export_peft
from lightning_uora.refresh import rebuild, refresh
from lightning_uora.report import LayerSummary, Summary, plot_refreshes, plot_vectors, summarize

__version__ = "0.1.0"

__all__ = [
    "LayerSummary",
    "ReinitSchedule",
    "Summary",
    "UORACallback",
    "UORAConfig",
    "adapters_disabled",
    "attach_uora",
    "calibrate",
    "detach_uora",
    "export_peft",
    "load_adapter",
    "load_from_checkpoint",
    "named_adapters",
    "param_groups",
    "plot_refreshes",
    "plot_vectors",
    "rebuild",
    "refresh",
    "save_adapter",
    "summarize",
]
