"""Whether a module computes with the weight of another one directly, where PEFT's adapter would be missed."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import cache

from torch import nn

__all__ = ["weight_reader"]

# Note [Weights that are read elsewhere]
# PEFT wraps a module; who reads `self.dt_proj.weight` from outside of it (Mamba's kernels do) gets the base.
# Here a read is the effective weight. A model says so nowhere but in its source, so that is looked at: the
# methods of the module that holds the adapted one, less those that make, initialise or tie weights. Where the
# module is called as well, which of the two happens depends on settings and kernels.

SET_UP = ("init", "reset", "set", "tie", "extra_repr", "load", "save", "state_dict", "merge", "fuse")
"""What the names of methods begin with, underscores left out, that compute nothing."""

QUANTISED = "_is_quantized"
"""What transformers sets in the configuration of a model that it has quantised; Jamba looks for it."""


def weight_reader(model: nn.Module, name: str) -> tuple[str, bool] | None:
    """Which method of the holder of module ``name`` reads its weight, and whether the module is called too.

    Returns:
        ``("Class.method", called)``; None where no such method is seen.
    """
    holder, _, leaf = name.rpartition(".")
    parent = type(model.get_submodule(holder))
    classes = [cls for cls in parent.__mro__ if cls.__module__.partition(".")[0] not in ("torch", "builtins")]
    for cls in classes:
        for method, read in _uses(cls, _weights_in):
            if read == leaf:
                calls = _calls_in if _is_quantised(model) else _plain_calls_in
                called = any(leaf == other for one in classes for _, other in _uses(one, calls))
                return f"{cls.__name__}.{method}", called
    return None


@cache
def _uses(cls: type, find: Callable[[ast.AST], Iterator[str]]) -> tuple[tuple[str, str], ...]:
    """(method, name of a submodule that it uses in the way that ``find`` looks for) of a class."""
    return tuple(
        (name, leaf)
        for name, method in vars(cls).items()
        if inspect.isfunction(method) and not name.lstrip("_").startswith(SET_UP)
        for leaf in find(_tree(method))
    )


def _tree(method: Callable[..., object]) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):  # made at run time, or without a file
        return ast.Module([], [])


def _is_quantised(model: nn.Module) -> bool:
    """Whether transformers quantised the model, which then says so."""
    return hasattr(getattr(model, "config", None), QUANTISED)


def _calls_in(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        yield from _called(node)


def _called(node: ast.AST) -> Iterator[str]:
    of = node.func if isinstance(node, ast.Call) else None
    if isinstance(of, ast.Attribute) and isinstance(of.value, ast.Name) and of.value.id == "self":
        yield of.attr


def _plain_calls_in(tree: ast.AST) -> Iterator[str]:
    """Calls but for those that a model makes only after transformers has quantised it."""
    quantised = (
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and QUANTISED in ast.unparse(node.test)
        for branch in node.body
        for inner in ast.walk(branch)
    )
    aside = {id(node) for node in quantised}
    for node in ast.walk(tree):
        if id(node) not in aside:
            yield from _called(node)


def _weights_in(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load):
            of = node.value
            if isinstance(of, ast.Attribute) and isinstance(of.value, ast.Name) and of.value.id == "self":
                yield of.attr
