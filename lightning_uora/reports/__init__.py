"""What an adapted model holds or an adapter would cost, as numbers, tables and figures."""

from lightning_uora.reports.contents import contents
from lightning_uora.reports.figures import plot_refreshes, plot_vectors
from lightning_uora.reports.inspection import inspect_model
from lightning_uora.reports.meta_models import model_on_meta
from lightning_uora.reports.progress import progress
from lightning_uora.reports.report import LayerSummary, Summary, summarize, trained_parts

__all__ = [
    "LayerSummary",
    "Summary",
    "contents",
    "inspect_model",
    "model_on_meta",
    "plot_refreshes",
    "plot_vectors",
    "progress",
    "summarize",
    "trained_parts",
]
