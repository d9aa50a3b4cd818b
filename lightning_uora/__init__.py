"""UORA for PyTorch Lightning: fine-tune a model by training two small vectors per layer.

    trainer = Trainer(callbacks=[UORACallback(rank=256)])

In Lightning
    UORACallback            adapters for any LightningModule, in one line
    load_from_checkpoint    load a trained module with its adapters

In plain torch
    attach_uora             put adapters into a model and freeze the rest
    param_groups            parameter groups for the optimizer; the vectors get their own rate
    calibrate               find A from the layers' inputs, for init="inputs"
    refresh                 refresh weak rows of A and columns of B once
    detach_uora             take the adapters out, or merge them into the weights

Settings
    UORAConfig              what is adapted, and how
    ReinitSchedule          when rows are refreshed, and which

Files
    save_adapter            write an adapter to a folder of kilobytes
    load_adapter            put a saved adapter on its base
    export_peft             write an adapter as a LoRA or VeRA for Hugging Face PEFT
    rebuild                 rebuild A and B from the seed and the record of refreshes

Several adapters on one model
    add_adapter, set_adapter, remove_adapter, adapter_names
    use_adapters            a batch in which every sample has its own adapter
    adapters_disabled       the frozen base, inside a with block
    AdapterBank             adapters in folders, loaded when first named

Looking
    summarize               what trains, layer by layer (Summary, LayerSummary)
    named_adapters          the adapted modules, by name
    plot_vectors            heat maps of d and b
    plot_refreshes          how much of each layer was refreshed, and when

``uora --help`` lists the commands. The guide is in ``docs/``.
"""

from importlib.util import find_spec
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

__version__ = "0.2.0"

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


def __dir__() -> list[str]:
    """What ``help`` and completion list, the callback among it where Lightning is installed."""
    missing = set() if find_spec("lightning") else {"UORACallback"}
    return sorted({*globals(), *__all__} - missing)


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
