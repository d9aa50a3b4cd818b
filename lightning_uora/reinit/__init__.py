"""Refreshes: which rows of A and B are weak, what replaces them, and when."""

from lightning_uora.reinit.growth import gradients_collected, require_growth_possible
from lightning_uora.reinit.refresh import rebuild, rebuild_around, refresh
from lightning_uora.reinit.rotation import fresh_rows, without
from lightning_uora.reinit.schedule import Refresher

__all__ = [
    "Refresher",
    "fresh_rows",
    "gradients_collected",
    "rebuild",
    "rebuild_around",
    "refresh",
    "require_growth_possible",
    "without",
]
