"""One verdict for one model, and the row that says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from torch import nn

from lightning_uora import UORAConfig, attach_uora, detach_uora
from lightning_uora.config import PRESETS
from tests.sweep import timm_models, transformers_models
from tests.sweep.life import RANK, NotRunnableError, Run, check, look_at

Verdict = Literal["passed", "refused", "failed", "not runnable"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


@dataclass(frozen=True)
class Row:
    """What the table says of one model.

    ``not runnable`` is the model without us: no configuration, inputs or gradient could be found for it.
    """

    library: str
    family: str
    member: str = ""
    recipe: str = ""
    inputs: str = ""
    parameters: int = 0
    preset: str = ""
    adapted: int = 0
    with_gradient: int = 0
    verdict: Verdict = "not runnable"
    reason: str = ""


COLUMNS = [f.name for f in fields(Row)]


class RefusedError(Exception):
    """``attach_uora`` raised ``ValueError``: the package says why it does not adapt this model."""


def first_preset(model: nn.Module) -> str:
    """The first preset that finds something, tried and undone.

    Raises:
        RefusedError: None does, or one finds what it refuses.
    """
    reason = ""
    for preset in PRESETS:
        try:
            attach_uora(model, UORAConfig(rank=RANK, target_modules=preset, trainable_modules=()))
        except ValueError as error:
            reason = str(error)
            if "finds nothing to adapt" in reason:
                continue
            raise RefusedError(f"{preset}: {reason}") from error
        detach_uora(model)
        return preset
    raise RefusedError(reason)


def judge_timm(family: str, member: str = "") -> Iterator[Row]:
    """The verdict on a family's smallest member, which is found unless it is given."""
    yield Row("timm", family, reason="not finished: looking for the smallest member")
    row = Row("timm", family, member or timm_models.smallest(family))
    yield from judge(row, lambda: timm_model(row.member))


def judge_transformers(model_type: str) -> Iterator[Row]:
    yield from judge(Row("transformers", model_type), lambda: transformers_model(model_type))


def timm_model(member: str) -> tuple[nn.Module, Run, dict[str, str]]:
    model = timm_models.build(member)
    batch = timm_models.batch(model)

    def run(m: nn.Module) -> object:
        return m(batch)

    look_at(model, run)
    return model, run, {"recipe": "default", "inputs": "image"}


def transformers_model(model_type: str) -> tuple[nn.Module, Run, dict[str, str]]:
    built = transformers_models.build(model_type)
    about = {"member": type(built.model).__name__, "recipe": built.recipe, "inputs": built.inputs}
    return built.model, built.run, about


def judge(row: Row, make: Callable[[], tuple[nn.Module, Run, dict[str, str]]]) -> Iterator[Row]:
    """The verdict on what ``make`` gives comes last; before it, what it is if the rest never ends."""
    yield replace(row, reason="not finished: building and running the base")
    try:
        model, run, about = make()
    except Exception as error:
        yield replace(row, reason=reason(error))
        return
    row = replace(row, **about, parameters=sum(p.numel() for p in model.parameters()))
    yield replace(row, verdict="failed", reason="not finished: with an adapter")
    try:
        row = replace(row, preset=first_preset(model))
        life = check(model, run, row.preset)
    except RefusedError as error:
        yield replace(row, verdict="refused", reason=reason(error))
    except NotRunnableError as error:
        yield replace(row, reason=reason(error))
    except Exception as error:
        yield replace(row, verdict="failed", reason=reason(error))
    else:
        yield replace(row, adapted=len(life.names), with_gradient=life.with_gradient, verdict="passed")


def reason(error: Exception) -> str:
    text = (
        " ".join(str(error.args[0] if error.args else "").split())
        if is_ours(error)
        else " ".join(str(error).split())
    )
    kind = "" if is_ours(error) else type(error).__name__ + ": "
    return f"{kind}{text}"[:300]


def is_ours(error: Exception) -> bool:
    return isinstance(error, (NotRunnableError, RefusedError, AssertionError))
