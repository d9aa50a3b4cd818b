"""Names of modules and parameters as their author wrote them, whatever wraps them meanwhile."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

__all__ = ["SHELF", "named_buffers", "named_modules", "named_parameters", "plain", "unwrapped"]

WRAPPED = ("_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Where torch.compile, Fabric and torch's own wrappers keep the module."""
PARALLEL = (DataParallel, DistributedDataParallel)
SHELF = "uora_shelf"
"""Where adapters wait that do not compute; plain names do not reach there."""
_WRAPPED = re.compile(rf"(^|(?<=\.))({'|'.join(WRAPPED)})(\.|$)")


def plain(name: str) -> str:
    """A name or state-dict key without the parts that wrappers put in."""
    return _WRAPPED.sub("", name).rstrip(".") if "_" in name else name


def unwrapped(module: nn.Module) -> nn.Module:
    """What a wrapper wraps; any other module itself."""
    while True:
        inner = [module._modules[one] for one in WRAPPED if module._modules.get(one) is not None]
        if isinstance(module, PARALLEL):
            inner.append(module.module)
        if not inner or inner[0] is None:
            return module
        module = inner[0]


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by plain name, in model order, each once; of a wrapper and what it wraps the latter."""
    return dict(_walk(model))


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(plain name, module) in the order of ``nn.Module.named_modules``, without recursion: often asked."""
    seen, waiting = set[int](), [("", model)]
    while waiting:
        path, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        children = module._modules
        parallel = "module" in children and isinstance(module, PARALLEL)
        for leaf, child in reversed(children.items()):
            if child is None or leaf == SHELF:
                continue
            wraps = leaf in WRAPPED or (parallel and leaf == "module")
            waiting.append((path if wraps else f"{path}.{leaf}" if path else leaf, child))


def named_parameters(model: nn.Module, every: bool = False) -> dict[str, nn.Parameter]:
    """Parameters by plain name, in model order; each once, or with ``every`` under each of its names."""
    found, seen = dict[str, nn.Parameter](), set[int]()
    for path, module in _walk(model):
        for leaf, parameter in module._parameters.items():
            if parameter is not None and (every or id(parameter) not in seen):
                seen.add(id(parameter))
                found[f"{path}.{leaf}" if path else leaf] = parameter
    return found


def named_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that a state dict holds, by plain name."""
    found, seen = dict[str, Tensor](), set[int]()
    for path, module in _walk(model):
        for leaf, buffer in module._buffers.items():
            if buffer is None or leaf in module._non_persistent_buffers_set or id(buffer) in seen:
                continue
            seen.add(id(buffer))
            found[f"{path}.{leaf}" if path else leaf] = buffer
    return found
