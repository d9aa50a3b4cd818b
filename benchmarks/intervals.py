"""What the reports say of a few seeds: a mean's standard error, paired differences and their intervals."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from scipy.stats import t as student


@dataclass(frozen=True)
class Interval:
    """Mean of paired differences, half the width of its 95 % interval, and how many pairs."""

    mean: float
    half: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ± {self.half:.2f}"


def paired(one: dict[int, float], other: dict[int, float]) -> Interval | None:
    """``one`` less ``other``, over the seeds that both have; None for fewer than three."""
    differences = [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]
    if len(differences) < 3:
        return None
    count = len(differences)
    half = student.ppf(0.975, count - 1) * statistics.stdev(differences) / count**0.5
    return Interval(statistics.mean(differences), float(half), count)


def standard_error(values: Iterable[float]) -> float:
    """Of the mean; not a number for a single value."""
    values = list(values)
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
