"""What a user may choose, as frozen dataclasses of plain values that YAML can hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["PRESETS", "UORAConfig"]

PRESETS = ("attention", "all-linear", "all")
"""Names that ``target_modules`` understands besides patterns."""


@dataclass(frozen=True)
class UORAConfig:
    """How a model is adapted.

    Every value is checked when the object is made, before any model is touched.

    Args:
        rank: Directions r of the shared projections, at least 1. Costs r trainable numbers per layer; A and B
            grow with it.
        target_modules: A preset (``"attention"``, ``"all-linear"``, ``"all"``), a pattern, or a list of
            either. A pattern is a full module name, a dotted suffix (``"qkv"``, ``"attn.qkv"``), a glob
            (``"blocks.*.attn.qkv"``), or ``"re:"`` and a regular expression for the whole name.
        exclude_modules: Patterns of modules that stay as they are. They win over targets; a container
            excludes all inside.
        trainable_modules: Modules trained as they are: ``"auto"`` finds the head, patterns name them, ``()``
            for none.
        init: Draw of A and B: ``"orthogonal"``, or ``"kaiming_uniform"`` as in VeRA.
        d_init: Start of every entry of d.
        dropout: Probability on the adapter's input, of Linear-like modules only.
        bias: ``"adapted"`` trains the biases of the adapted modules too, ``"all"`` every bias of the model.
        seed: Seeds A and B; no other generator is read or moved.
        compute: ``"merged"`` builds the effective weight, ``"factored"`` applies A and B to the input,
            ``"auto"`` takes what costs fewer operations for each input. What is not Linear-like is always
            merged.

    Raises:
        ValueError: A value is outside what is allowed; the message names the field, what came and what is
            allowed.

    Source: ``d_init`` and the Kaiming draw from VeRA (arXiv:2310.11454); the orthogonal draw from UORA
    (arXiv:2505.20154), its scale is *ours*.
    """

    rank: int = 256
    target_modules: str | Sequence[str] = "attention"
    exclude_modules: Sequence[str] = ()
    trainable_modules: str | Sequence[str] = "auto"
    init: str = "orthogonal"
    d_init: float = 0.1
    dropout: float = 0.0
    bias: str = "none"
    seed: int = 0
    compute: str = "auto"

    def __post_init__(self) -> None:
        require_int("rank", self.rank, at_least=1)
        require_int("seed", self.seed, at_least=0)
        require_number("d_init", self.d_init)
        require_number("dropout", self.dropout)
        if not 0.0 <= self.dropout < 1.0:
            raise invalid("dropout", self.dropout, "a probability in [0, 1)")
        require_choice("init", self.init, ("orthogonal", "kaiming_uniform"))
        require_choice("bias", self.bias, ("none", "adapted", "all"))
        require_choice("compute", self.compute, ("auto", "merged", "factored"))
        for name in ("target_modules", "exclude_modules", "trainable_modules"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        if not self.target_modules:
            raise invalid(
                "target_modules", self.target_modules, "a preset, a pattern, or a list of at least one"
            )


def invalid(field: str, value: object, allowed: str) -> ValueError:
    """The one form of a refused argument: its name, what came, what is allowed."""
    return ValueError(f"{field}={value!r} is not allowed; {field} must be {allowed}.")


def require_int(field: str, value: object, at_least: int) -> None:
    """Raise ``ValueError`` unless ``value`` is an int (no bool) of at least ``at_least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise invalid(field, value, f"an integer of at least {at_least}")


def require_number(field: str, value: object) -> None:
    """Raise ``ValueError`` unless ``value`` is a finite int or float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < float("inf"):
        raise invalid(field, value, "a finite number")


def require_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise invalid(field, value, "one of " + ", ".join(map(repr, choices)))


def _patterns(field: str, value: Any) -> str | tuple[str, ...]:
    """A string as it is, a sequence of strings as a tuple (YAML brings lists)."""
    if isinstance(value, str):
        patterns: tuple[Any, ...] = (value,)
    elif isinstance(value, Sequence):
        patterns = tuple(value)
    else:
        raise invalid(field, value, "a string or a list of strings")
    if not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise invalid(field, value, "non-empty strings")
    return value if isinstance(value, str) else patterns
