"""What a user may choose, as frozen dataclasses of plain values that YAML can hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["INITS", "PRESETS", "ReinitSchedule", "UORAConfig"]

INITS = ("orthogonal", "kaiming_uniform", "inputs")
"""Draws of A and B."""
PRESETS = ("attention", "all-linear", "all")
"""Names that ``target_modules`` understands besides patterns."""


@dataclass(frozen=True)
class UORAConfig:
    """What is adapted, and how.

    Every value is checked when the object is made, before any model is touched.

    Args:
        rank: Directions r of the shared projections, at least 1. Costs r trainable numbers per layer; A and B
            grow with it.
        target_modules: A preset (``"attention"``, ``"all-linear"``, ``"all"``), a pattern, or a list of
            either. A pattern is a full module name, a dotted suffix (``"qkv"``, ``"attn.qkv"``), a glob
            (``"blocks.*.attn.qkv"``), or ``"re:"`` and a regular expression for the whole name. A pattern
            that matches only containers (``"blocks.3"``) takes every Linear-like layer and attention inside
            them, except heads.
        exclude_modules: Patterns of modules to leave out. They win over targets; a container excludes
            everything inside.
        trainable_modules: Modules and bare parameters trained in full. ``"auto"`` finds the head: what timm
            and transformers call the head, and your own layers beside a pretrained model. Patterns name them;
            ``()`` trains none.
        init: Draw of A and B: ``"orthogonal"``, or ``"kaiming_uniform"`` as in VeRA. With ``"inputs"`` B is
            drawn as in ``"orthogonal"``, and ``calibrate`` sets A to the main directions of the layers'
            inputs, for each layer by itself with ``share="layer"``.
        calibration_batches: Training batches that ``UORACallback`` uses for ``init="inputs"``.
        d_init: Start of every entry of d.
        dropout: Probability on the adapter's input, for Linear-like modules only.
        bias: ``"adapted"`` also trains the biases of the adapted modules, ``"all"`` every bias of the model.
        batch_norm: ``"frozen"``: BatchNorm of the frozen base uses its running statistics, as in ``eval()``.
            ``"moving"``: it uses each batch's own and updates the running ones, PyTorch's usual behaviour.
            BatchNorm that trains itself always moves.
        seed: Seeds A and B; no other generator is read or moved.
        compute: ``"merged"`` builds the effective weight, ``"factored"`` applies A and B to the input,
            ``"auto"`` takes the one that costs fewer operations for each input. Modules that are not
            Linear-like are always merged.
        share: Whose rows a refresh may change. ``"layer"``: each layer refreshes its own copies of rows.
            ``"model"``: one A for each width and one B for each height; a row is refreshed when every layer
            that uses it finds it weak.

    Raises:
        ValueError: A value is not allowed; the message names the field, what came and what is allowed.

    Source: ``d_init`` and the Kaiming draw from VeRA (arXiv:2310.11454); the orthogonal draw from UORA
    (arXiv:2505.20154), its scale is *ours*; A from the inputs after EVA (arXiv:2410.07170), *ours*.
    """

    rank: int = 256
    target_modules: str | Sequence[str] = "attention"
    exclude_modules: str | Sequence[str] = ()
    trainable_modules: str | Sequence[str] = "auto"
    init: str = "orthogonal"
    calibration_batches: int = 8
    d_init: float = 0.1
    dropout: float = 0.0
    bias: str = "none"
    batch_norm: str = "frozen"
    seed: int = 0
    compute: str = "auto"
    share: str = "layer"

    def __post_init__(self) -> None:
        require_int("rank", self.rank, at_least=1)
        require_int("seed", self.seed, at_least=0)
        require_int("calibration_batches", self.calibration_batches, at_least=1)
        require_number("d_init", self.d_init)
        require_number("dropout", self.dropout)
        if not 0.0 <= self.dropout < 1.0:
            raise invalid("dropout", self.dropout, "a probability in [0, 1)")
        require_choice("init", self.init, INITS)
        require_choice("bias", self.bias, ("none", "adapted", "all"))
        require_choice("batch_norm", self.batch_norm, ("frozen", "moving"))
        require_choice("compute", self.compute, ("auto", "merged", "factored"))
        require_choice("share", self.share, ("model", "layer"))
        for name in ("target_modules", "exclude_modules", "trainable_modules"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        if not self.target_modules:
            raise invalid(
                "target_modules", self.target_modules, "a preset, a pattern, or a list of at least one"
            )


@dataclass(frozen=True)
class ReinitSchedule:
    """When weak rows and columns of A and B are refreshed, which ones, and what replaces them.

    Steps are optimizer steps; under manual optimisation they are batches.

    Args:
        every_n_steps: Steps between refreshes: at ``start``, ``start + n``, ..., but never at step 0, before
            anything has trained. None: four refreshes, spread evenly over the window.
        threshold: An entry is weak if its score is below this. The default takes about 3 % of half-normal
            entries, so that four refreshes turn less than an eighth of a layer's rows; 0.5 would take the
            lower third.
        threshold_mode: ``"relative"`` to the layer's mean score, ``"absolute"``, or ``"fraction"``: the share
            of entries with the lowest scores.
        max_fraction: At most this share of the rows in one refresh, the weakest first.
        interpolation: λ in [0, 1]. A row turns by the angle whose tangent is λ / (1 - λ): 0 changes nothing,
            1 replaces the row. The default is 14 degrees; ``benchmarks/results/quality.md`` compares others.
        start: First step of the window; a float is a fraction of the run's steps, an integer a step.
        stop: Last step of the window, likewise.
        vectors: Which vectors decide by their magnitudes: ``"d"`` (rows of A with columns of B), ``"b"``
            (rows of B).
        reset_optimizer_state: Clear the first moment of refreshed entries.
        criterion: The score: ``"magnitude"``, ``"ema"`` (its exponential average over about 20 steps), or
            ``"sensitivity"`` (magnitude x root of the optimizer's second moment).
        preserve_function: Scale a refreshed entry of d (or b) by the cosine of the turn, which moves the
            layer's output least; False keeps the entry.
        growth: Where new directions come from. ``"random"``. ``"gradient"``: of ``candidates`` fresh
            directions, those with the largest gradient (needs ``share="layer"``). ``"inputs"``: for A the
            next unused main directions of the layers' inputs, for B random ones (needs ``init="inputs"``).
        candidates: How many directions ``growth="gradient"`` compares in each layer.

    Raises:
        ValueError: A value is not allowed.

    Source: refreshing small entries' rows by interpolation from UORA (arXiv:2505.20154); rotation, window,
    criteria and function preservation are *ours*; growth by gradient after RigL (arXiv:1911.11134), *ours*.
    """

    every_n_steps: int | None = None
    threshold: float = 0.05
    threshold_mode: str = "relative"
    max_fraction: float = 0.25
    interpolation: float = 0.2
    start: int | float = 0.03
    stop: int | float = 0.2
    vectors: Sequence[str] = ("d",)
    reset_optimizer_state: bool = True
    criterion: str = "magnitude"
    preserve_function: bool = True
    growth: str = "random"
    candidates: int = 512

    def __post_init__(self) -> None:
        if self.every_n_steps is not None:
            require_int("every_n_steps", self.every_n_steps, at_least=1)
        require_int("candidates", self.candidates, at_least=1)
        require_number("threshold", self.threshold)
        require_choice("threshold_mode", self.threshold_mode, ("relative", "absolute", "fraction"))
        if self.threshold < 0 or (self.threshold_mode == "fraction" and self.threshold > 1):
            raise invalid(
                "threshold", self.threshold, "at least 0, and at most 1 with threshold_mode='fraction'"
            )
        for name in ("max_fraction", "interpolation"):
            require_number(name, getattr(self, name))
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise invalid(name, getattr(self, name), "in [0, 1]")
        for name in ("start", "stop"):
            _check_moment(name, getattr(self, name))
        if type(self.start) is type(self.stop) and self.start > self.stop:
            raise invalid("stop", self.stop, f"at least start={self.start}")
        vectors = _patterns("vectors", self.vectors)
        object.__setattr__(self, "vectors", (vectors,) if isinstance(vectors, str) else vectors)
        if not self.vectors or not set(self.vectors) <= {"d", "b"}:
            raise invalid("vectors", self.vectors, "'d', 'b' or both")
        for name in ("reset_optimizer_state", "preserve_function"):
            if not isinstance(getattr(self, name), bool):
                raise invalid(name, getattr(self, name), "true or false")
        require_choice("criterion", self.criterion, ("magnitude", "ema", "sensitivity"))
        require_choice("growth", self.growth, ("random", "gradient", "inputs"))
        if self.growth != "random" and self.vectors != ("d",):
            raise invalid("vectors", self.vectors, f"('d',) with growth={self.growth!r}")

    def due_steps(self, total: int | None) -> list[int]:
        """The steps after which a refresh is due, ascending.

        Args:
            total: Optimizer steps of the whole run; None when the run has no end.

        Raises:
            ValueError: ``start`` or ``stop`` is a fraction and the run has no known end.
        """
        first, last = self._step("start", total), self._step("stop", total)
        if self.every_n_steps is not None:
            return [step for step in range(first, last + 1, self.every_n_steps) if step > 0]
        first = max(1, first)
        if last < first:
            return []
        return sorted({round(first + (last - first) * i / 3) for i in range(4)})

    def _step(self, name: str, total: int | None) -> int:
        moment: int | float = getattr(self, name)
        if isinstance(moment, int):
            return moment
        if total is None:
            raise ValueError(
                f"{name}={moment} is a fraction of the run, whose length is not known (max_steps and "
                "max_epochs are unlimited, or the data has no length); give start and stop as integers "
                "(optimizer steps), set max_steps or limit_train_batches, or use reinit=None."
            )
        return round(moment * total)


def _check_moment(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise invalid(name, value, "a fraction in [0.0, 1.0] or an integer step")
    if not value >= 0 or (isinstance(value, float) and not value <= 1.0):
        raise invalid(name, value, "a fraction in [0.0, 1.0] or an integer step of at least 0")


def invalid(field: str, value: object, allowed: str) -> ValueError:
    """The one form of a refused argument: its name, what came, what is allowed."""
    return ValueError(f"{field}={value!r} is not allowed; {field} must be {allowed}.")


def differences(one: UORAConfig, here: str, other: UORAConfig, there: str) -> str:
    """Fields in which two configurations differ, with both values; empty where they are equal."""
    pairs = ((f.name, getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    return "; ".join(f"{name} ({a!r} {here}, {b!r} {there})" for name, a, b in pairs if a != b)


def require_int(field: str, value: object, at_least: int) -> None:
    """Raise ``ValueError`` unless ``value`` is an int (no bool) of at least ``at_least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise invalid(field, value, f"an integer of at least {at_least}")


def require_number(field: str, value: object) -> None:
    """Raise ``ValueError`` unless ``value`` is a finite int or float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < float("inf"):
        raise invalid(field, value, "a finite number")


def require_rate(field: str, value: object) -> None:
    """Raise ``ValueError`` unless ``value`` is a positive finite number, ``"auto"`` or None."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")
    if not (number or value is None or value == "auto"):
        raise invalid(field, value, "a positive number, 'auto' or None")


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
