"""What several processes must agree on, and parameters that are spread over them."""

from lightning_uora.distributed.processes import (
    agreed,
    alone,
    first_rank,
    mean_gradients,
    on_any_rank,
    summed,
)
from lightning_uora.distributed.sharding import edited, is_sharded, like, reshard_, whole

__all__ = [
    "agreed",
    "alone",
    "edited",
    "first_rank",
    "is_sharded",
    "like",
    "mean_gradients",
    "on_any_rank",
    "reshard_",
    "summed",
    "whole",
]
