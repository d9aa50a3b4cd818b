"""What stands in a checkpoint's file, without running code from it: plain data, and torch's own modules."""

from __future__ import annotations

import errno
import io
import re
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from lightning_uora.adapters import StaysFrozen

__all__ = ["check_whole", "torch_modules_allowed", "unpickled"]

# Note [Objects among hyperparameters]
# ``save_hyperparameters()`` writes every argument into the checkpoint, a loss module too. torch's unpickler
# for weights makes plain data alone, so the classes that a file names are looked up first, without
# unpickling. Classes of torch.nn.modules are let through: they are made of plain data and run nothing when
# they are built. They are looked up in what is imported already. What else a file names is refused by name.


def unpickled(path: str | Path, weights_only: bool = True) -> Any:
    """The content of a file that ``torch.save`` wrote, on the CPU.

    Args:
        path: The file.
        weights_only: Take plain data and torch's own modules only, see Note [Objects among hyperparameters].
            False runs whatever the file says.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is damaged, or holds an object of a type that may not be made.
    """
    with torch_modules_allowed(path) as others:
        if others and weights_only:
            raise ValueError(_refusal(path, others))
        try:
            return torch.load(path, map_location="cpu", weights_only=weights_only)
        except OSError as error:
            if not _is_cut(error):
                raise
            raise ValueError(f"{path} is damaged or not a checkpoint: {_why(path, error)}") from error
        except Exception as error:  # torch's unpickler fails on garbage in any way it can
            raise ValueError(f"{path} is damaged or not a checkpoint: {_why(path, error)}") from error


def check_whole(path: str | Path) -> None:
    """Without reading it: whether ``torch.save`` finished the file. Folders and other paths pass.

    Raises:
        ValueError: The file is empty, or begins as an archive and does not end as one.
    """
    if not Path(path).is_file():
        return
    with Path(path).open("rb") as file:
        begins = file.read(4)
    if not begins or (begins == b"PK\x03\x04" and not zipfile.is_zipfile(path)):
        raise ValueError(f"{path} is damaged or not a checkpoint: {_UNFINISHED}")


_UNFINISHED = "torch.save did not write it, or did not finish."


def _is_cut(error: OSError) -> bool:
    """Of a file that ends too early torch says "[Errno 22] Invalid argument" and no name."""
    return error.errno == errno.EINVAL and error.filename is None


def _why(path: str | Path, error: Exception) -> str:
    """Without torch's advice to read it in a way that runs what it says."""
    if not zipfile.is_zipfile(path):
        return _UNFINISHED
    said = re.search(
        r"WeightsUnpickler error:\s*(.*?)\s*(?:Check the documentation|$)", str(error), re.DOTALL
    )
    return said[1] if said else str(error)


@contextmanager
def torch_modules_allowed(file: str | Path | io.BytesIO) -> Iterator[list[str]]:
    """Within, torch unpickles the classes of ``torch.nn.modules`` that the file names.

    Yields:
        Names of what else it needs beyond plain data.
    """
    names = _named_in(file)
    allowed = {name: cls for name in names if (cls := _torch_module(name)) is not None}
    with safe_globals(list(allowed.values())):
        yield [name for name in names if name not in allowed]


def _named_in(file: str | Path | io.BytesIO) -> list[str]:
    """What torch would refuse to make; nothing where the file is no archive: torch.load says more of it."""
    try:
        return sorted(get_unsafe_globals_in_checkpoint(file))
    except OSError as error:
        if not _is_cut(error):
            raise
        return []
    except Exception:  # garbage
        return []
    finally:
        if isinstance(file, io.BytesIO):
            file.seek(0)


def _torch_module(name: str) -> type[nn.Module] | type[StaysFrozen] | None:
    """The ``nn.Module`` defined under ``torch.nn.modules`` that has this name, or a held BatchNorm's hook."""
    path, _, leaf = name.rpartition(".")
    if (path, leaf) == (StaysFrozen.__module__, StaysFrozen.__name__):
        return StaysFrozen
    if not path.startswith("torch.nn.modules."):
        return None
    found = getattr(sys.modules.get(path), leaf, None)
    is_one = isinstance(found, type) and issubclass(found, nn.Module) and found.__module__ == path
    return found if is_one else None


def _refusal(path: str | Path, names: list[str]) -> str:
    trust = (
        "load_from_checkpoint(..., weights_only=False) reads it too, but do that only with a "
        "file that you trust"
    )
    if any(name.startswith(("builtins.", "posix.", "nt.", "os.", "subprocess.")) for name in names):
        return (
            f"{path} is damaged or not a checkpoint of plain data: reading it would call "
            f"{', '.join(names)}, which may run any code. {trust}."
        )
    if any(name.startswith("lightning_uora.") for name in names):
        return (
            f"{path} holds the adapted model itself among the hyperparameters; leave it out with "
            "save_hyperparameters(ignore=[...]). If you trust this file, read it with "
            "load_from_checkpoint(..., name=model, weights_only=False), where model is a fresh one."
        )
    short = ", ".join(name.rpartition(".")[2] for name in names)
    return (
        f"{path} holds objects of {', '.join(names)} (usually hyperparameters), but only plain "
        "data and torch's own modules are read. If you know these classes, read it within `with "
        f"torch.serialization.safe_globals([{short}]):`; {trust}."
    )
