"""How the methods look in every figure: Okabe and Ito's colours, which the colour-blind can tell apart."""

from __future__ import annotations

from typing import Any

LOOKS = {
    "head": ("#999999", "x", ":"),
    "full": ("#000000", "*", "-."),
    "lora": ("#0072B2", "s", "-"),
    "lora-own": ("#56B4E9", "s", "--"),
    "vera": ("#009E73", "v", "--"),
    "uora": ("#D55E00", "o", "-"),
    "uora+inputs": ("#E69F00", "D", "-"),
    "groups": ("#CC79A7", "^", "--"),
}
"""Colour, marker and dashes."""


def line(method: str, label: str) -> dict[str, Any]:
    """Arguments of a line without markers."""
    colour, _, dashes = LOOKS[method]
    return {"color": colour, "linestyle": dashes, "linewidth": 2, "label": label}


def marked(method: str, label: str) -> dict[str, Any]:
    """Arguments of a line with markers and error bars."""
    return {**line(method, label), "marker": LOOKS[method][1], "markersize": 8, "capsize": 3}
