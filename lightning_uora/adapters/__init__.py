"""What an adapter is: which modules get one, how it computes, who owns A and B, attaching and undoing it."""

from lightning_uora.adapters.attach import (
    adapters_disabled,
    attach_uora,
    detach_uora,
    find_owner,
    find_root,
    is_adapted,
    named_adapters,
    param_groups,
)
from lightning_uora.adapters.draws import draw_down, one_thread
from lightning_uora.adapters.functional import factored_flops, merged_flops
from lightning_uora.adapters.kinds import Part
from lightning_uora.adapters.layers import AdaptedModule, adapted_modules, facts
from lightning_uora.adapters.projections import (
    OWNER,
    Projections,
    projections_of,
    require_no_inference_mode,
    seeded_generator,
)

__all__ = [
    "OWNER",
    "AdaptedModule",
    "Part",
    "Projections",
    "adapted_modules",
    "adapters_disabled",
    "attach_uora",
    "detach_uora",
    "draw_down",
    "factored_flops",
    "facts",
    "find_owner",
    "find_root",
    "is_adapted",
    "merged_flops",
    "named_adapters",
    "one_thread",
    "param_groups",
    "projections_of",
    "require_no_inference_mode",
    "seeded_generator",
]
