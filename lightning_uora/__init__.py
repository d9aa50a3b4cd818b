"""UORA for PyTorch Lightning: fine-tune with two small vectors per layer, by one callback.

Rooms, each importing only from those below it (a folder's ``__init__`` says what it is for and what others
may take from it): ``callback``, ``cli`` · ``trainer`` · ``storage``, ``inputs`` · ``reports``, ``reinit`` ·
``adapters`` · ``distributed``, ``config``.
"""

from typing import TYPE_CHECKING, Any

from lightning_uora.adapters import (
    adapter_names,
    adapters_disabled,
    add_adapter,
    attach_uora,
    detach_uora,
    named_adapters,
    param_groups,
    remove_adapter,
    set_adapter,
    use_adapters,
)
from lightning_uora.config import ReinitSchedule, UORAConfig
from lightning_uora.inputs import calibrate
from lightning_uora.reinit import rebuild, refresh
from lightning_uora.reports import LayerSummary, Summary, plot_refreshes, plot_vectors, summarize
from lightning_uora.storage import AdapterBank, export_peft, load_adapter, load_from_checkpoint, save_adapter

if TYPE_CHECKING:
    from lightning_uora.callback import UORACallback

__version__ = "0.1.0"

__all__ = [
    "AdapterBank",
    "LayerSummary",
    "ReinitSchedule",
    "Summary",
    "UORACallback",
    "UORAConfig",
    "adapter_names",
    "adapters_disabled",
    "add_adapter",
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
    "remove_adapter",
    "save_adapter",
    "set_adapter",
    "summarize",
    "use_adapters",
]


def __getattr__(name: str) -> Any:
    """``UORACallback``, imported when it is first asked for: all else works where Lightning is missing."""
    if name != "UORACallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from lightning_uora.callback import UORACallback
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lightning":
            raise
        raise ImportError("UORACallback needs Lightning: pip install lightning") from error
    globals()[name] = UORACallback
    return UORACallback
