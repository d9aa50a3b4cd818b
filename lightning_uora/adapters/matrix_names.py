"""What A and B are called in their owner, and which of them a state dict should have and lacks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

__all__ = ["PLACES", "is_own", "lacking", "shared_name", "whole_name"]

# Note [Names of A and B]
# ``A_768`` and ``B_768`` are shared. What layer 3 has of its own is ``A_768_3:rows``, ``B_768_3:columns``
# and, where b decided, ``B_768_3:rows``; their places are in ``...:at``. A that came from a layer's own
# inputs is whole, ``A_768_3``, in the 16 bits that files hold. Files of before have whole copies.

PLACES = ":at"


def is_own(name: str) -> bool:
    """Whether a buffer is one layer's own and not shared, see Note [Names of A and B]."""
    return name.count("_") == 2


def whole_name(name: str) -> str:
    """Of the matrix that a buffer is of: ``A_768_3`` for ``A_768_3:rows``."""
    return name.partition(":")[0]


def shared_name(name: str) -> str:
    """Of the shared matrix that a layer's own one replaces."""
    return "_".join(whole_name(name).split("_")[:2])


def lacking(names: Collection[str], shared: Iterable[str], told: Mapping[str, Any]) -> set[str]:
    """Matrices that a state dict should have and lacks, in whole or in part, by their whole names.

    Args:
        names: Of the owner's buffers in the state dict.
        shared: Of the shared matrices that this owner has.
        told: What the state dict's record tells. From before it told the names, own rows are looked for only
            where shared matrices are missing too.
    """
    absent = {name for name in (*shared, *told.get("resized", ())) if name not in names}
    own = told.get("own")
    if own is None and absent:
        wholes = {whole_name(name) for name in names}
        keys = {whole_name(key) for entry in told.get("refreshes", ()) for key in entry["rows"]}
        own = [key for key in keys if is_own(key) and key not in wholes]
    return {whole_name(name) for name in {*absent, *(own or ())} if name not in names}
