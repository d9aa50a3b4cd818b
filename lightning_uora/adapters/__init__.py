"""What an adapter is: which modules get one, how it computes, who owns A and B, attaching and undoing it."""

from lightning_uora.adapters.around import AdaptedAround
from lightning_uora.adapters.attach import (
    adapters_disabled,
    attach_beside,
    attach_to,
    attach_uora,
    detach_uora,
    named_adapters,
    param_groups,
)
from lightning_uora.adapters.attachments import (
    Attachment,
    adopt,
    attachment_of,
    attachments,
    is_adapted,
    require_attachments,
    trained_names,
    trained_parameters,
    vectors_in,
)
from lightning_uora.adapters.draws import draw_down, one_thread
from lightning_uora.adapters.experts import AdaptedExperts
from lightning_uora.adapters.functional import factored_flops, merged_flops
from lightning_uora.adapters.kinds import Part, key_of, named_parts, unsupported
from lightning_uora.adapters.layers import AdaptedModule, facts
from lightning_uora.adapters.mixing import use_adapters
from lightning_uora.adapters.names import (
    SHELF,
    named_buffers,
    named_modules,
    named_parameters,
    plain,
    unwrapped,
)
from lightning_uora.adapters.norm_statistics import StaysFrozen, moving_norms, never_moved, settle_statistics
from lightning_uora.adapters.offloaded import is_offloaded, kept_elsewhere
from lightning_uora.adapters.opaque import is_opaque, is_quantised, packed_parts, settle_, sizes
from lightning_uora.adapters.own_rows import packed, unpacked
from lightning_uora.adapters.projections import (
    OWNER,
    Projections,
    require_no_inference_mode,
    seeded_generator,
)
from lightning_uora.adapters.roles import find_heads
from lightning_uora.adapters.several import (
    add_adapter,
    remove_adapter,
    require_free,
    require_name,
    set_adapter,
    settle_beside,
    undo,
)
from lightning_uora.adapters.shelf import (
    activated,
    adapter_names,
    item_of,
    put_back,
    put_off,
    shelf_of,
    the_only,
)
from lightning_uora.adapters.stacked import active_experts, has_experts, named_layers
from lightning_uora.adapters.targets import Selection, trained_as_they_are

__all__ = [
    "OWNER",
    "SHELF",
    "AdaptedAround",
    "AdaptedExperts",
    "AdaptedModule",
    "Attachment",
    "Part",
    "Projections",
    "Selection",
    "StaysFrozen",
    "activated",
    "active_experts",
    "adapter_names",
    "adapters_disabled",
    "add_adapter",
    "adopt",
    "attach_beside",
    "attach_to",
    "attach_uora",
    "attachment_of",
    "attachments",
    "detach_uora",
    "draw_down",
    "factored_flops",
    "facts",
    "find_heads",
    "has_experts",
    "is_adapted",
    "is_offloaded",
    "is_opaque",
    "is_quantised",
    "item_of",
    "kept_elsewhere",
    "key_of",
    "merged_flops",
    "moving_norms",
    "named_adapters",
    "named_buffers",
    "named_layers",
    "named_modules",
    "named_parameters",
    "named_parts",
    "never_moved",
    "one_thread",
    "packed",
    "packed_parts",
    "param_groups",
    "plain",
    "put_back",
    "put_off",
    "remove_adapter",
    "require_attachments",
    "require_free",
    "require_name",
    "require_no_inference_mode",
    "seeded_generator",
    "set_adapter",
    "settle_",
    "settle_beside",
    "settle_statistics",
    "shelf_of",
    "sizes",
    "the_only",
    "trained_as_they_are",
    "trained_names",
    "trained_parameters",
    "undo",
    "unpacked",
    "unsupported",
    "unwrapped",
    "use_adapters",
    "vectors_in",
]
