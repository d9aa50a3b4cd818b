"""What was written is read back and compared with what was given, before it replaces what was there."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lightning_uora.adapters import OWNER, SHELF, plain
from lightning_uora.storage.manifest import manifests_of

__all__ = ["difference", "require_same", "write_verified"]

# Note [Reading back]
# A checkpoint is mapped into memory, not read: of a "full" one the pages of the vectors, A, B, the records
# and what trained besides are looked at, and the frozen base is not. Objects of other packages (among
# hyperparameters, in other callbacks' states) are not made, so nothing of theirs runs.

READ = ("torch", "collections", "_codecs")
"""Packages whose classes are made when a checkpoint is read back, see Note [Reading back]."""
VALUES = ("bytearray", "complex", "frozenset", "range", "set", "slice")
"""Builtins likewise."""


class _Unmade:
    """In the place of an object that is not looked at."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> _Unmade:
        return self

    __setstate__ = __setitem__ = append = extend = add = __call__


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] not in READ and (module, name) not in {("builtins", v) for v in VALUES}:
            return _Unmade
        return super().find_class(module, name)


_READER = ModuleType("reading_back")
_READER.__dict__["Unpickler"] = _Unpickler


def _same_bits(one: Tensor, two: Tensor) -> bool:
    """Bit by bit: NaN equals itself."""
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    one, two = (t.detach().cpu().reshape(-1) for t in (one, two))
    return torch.equal(one.view(torch.uint8), two.view(torch.uint8))


def difference(given: Any, found: Any, where: str = "") -> str | None:
    """The first place where nested plain data and tensors differ; objects of other types are not compared."""
    if isinstance(given, Tensor):
        plain_one = type(given) in (Tensor, torch.nn.Parameter) and given.layout == torch.strided
        same = isinstance(found, Tensor) and (not plain_one or _same_bits(given, found))
        return None if same else where
    if isinstance(given, Mapping):
        if not isinstance(found, Mapping):
            return None if isinstance(found, _Unmade) else where
        if list(given) != list(found):
            return where or "its keys"
        pairs: Iterator[tuple[Any, Any, Any]] = ((key, given[key], found[key]) for key in given)
    elif isinstance(given, (list, tuple)):
        if not isinstance(found, (list, tuple)) or len(given) != len(found):
            return None if isinstance(found, _Unmade) else where
        pairs = ((place, *pair) for place, pair in enumerate(zip(given, found, strict=True)))
    else:
        compared = isinstance(given, (bool, int, float, str, bytes)) and not isinstance(found, _Unmade)
        same = not compared or given == found or (given != given and found != found)
        return None if same else where
    for key, one, two in pairs:
        if (wrong := difference(one, two, f"{where}.{key}".lstrip("."))) is not None:
            return wrong
    return None


def require_same(wrong: str | None) -> None:
    """Raise ``OSError`` where a difference was found."""
    if wrong is not None:
        raise OSError(
            f"what was written does not read back the same ({wrong}); the disk may be full or "
            "faulty. The old files are unchanged."
        )


def write_verified(checkpoint: Mapping[str, Any], path: str | Path, write: Callable[[Path], Any]) -> None:
    """Let a checkpoint be written under a temporary name, read back and compared; then it gets its own.

    Args:
        checkpoint: What is given: of one with adapters what is theirs is compared, of another one all.
        path: Its file; the folder must exist.
        write: Writes it under the path that it is called with.

    Raises:
        OSError: It cannot be read, or reads back otherwise. What was at ``path`` is as it was.
    """
    target = Path(path)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".saving-") as temporary:
        new = Path(temporary) / target.name
        write(new)
        try:
            found = torch.load(
                new,
                map_location="cpu",
                mmap=True,
                weights_only=False,
                pickle_module=_READER,
            )
        except Exception as error:  # torch's reader fails on garbage in any way it can
            require_same(f"it cannot be read: {error}")
            raise
        looked_at = _ours if "uora" in checkpoint else dict
        require_same(difference(looked_at(checkpoint), looked_at(found)))
        del found  # the file is mapped
        new.replace(target)


def _ours(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Of a checkpoint with adapters: manifests, vectors, A, B, records and what trained besides."""
    state: Mapping[str, Any] = checkpoint.get("state_dict", {})
    stored = checkpoint.get("uora", {})
    manifests = manifests_of(stored) if isinstance(stored, dict) else []
    trained = {
        ".".join(filter(None, (one.get("root", ""), name)))
        for one in manifests
        for name in one.get("trained", ())
    }
    small = any(one.get("kind") == "adapter" for one in manifests)
    return {
        "uora": stored,
        "the names": [str(key) for key in state],
        "state_dict": {k: v for k, v in state.items() if small or _is_ours(plain(k), trained)},
        "uora_gradients": checkpoint.get("uora_gradients", {}),
    }


def _is_ours(key: str, trained: set[str]) -> bool:
    *path, leaf = key.split(".")
    return key in trained or leaf in ("uora_d", "uora_b") or any(p.startswith((OWNER, SHELF)) for p in path)
