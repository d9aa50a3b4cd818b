"""The methods of ``quality.py``: how a model is made trainable, and one run of training and scoring."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass

import peft
import torch
from quality_tasks import Task
from torch import Tensor, nn
from training import fit

from lightning_uora import ReinitSchedule, UORAConfig, attach_uora, calibrate
from lightning_uora.adapters import attachment_of
from lightning_uora.inputs import inputs_observed
from lightning_uora.reinit import Refresher

POLICIES: dict[str, ReinitSchedule | None] = {
    "off": None,
    "relative-0.5": ReinitSchedule(threshold=0.5, interpolation=0.5),
    "relative-0.25": ReinitSchedule(threshold=0.25, interpolation=0.5),
    "lambda-0.2": ReinitSchedule(threshold=0.5, interpolation=0.2),
    "lambda-0.1": ReinitSchedule(threshold=0.5, interpolation=0.1),
    "ema": ReinitSchedule(threshold=0.5, interpolation=0.5, criterion="ema"),
    "sensitivity": ReinitSchedule(threshold=0.5, interpolation=0.5, criterion="sensitivity"),
    "gradient": ReinitSchedule(threshold=0.5, interpolation=0.5, growth="gradient"),
    "inputs": ReinitSchedule(threshold=0.5, interpolation=0.5, growth="inputs"),
    "d-kept": ReinitSchedule(threshold=0.5, interpolation=0.5, preserve_function=False),
    "threshold-0.05": ReinitSchedule(threshold=0.05, interpolation=0.2),
    "threshold-0.1": ReinitSchedule(threshold=0.1, interpolation=0.2),
    "threshold-0.2": ReinitSchedule(threshold=0.2, interpolation=0.2),
    "uncapped": ReinitSchedule(threshold=0.5, interpolation=0.2, max_fraction=1.0),
    "replaced": ReinitSchedule(threshold=0.05, interpolation=1.0, every_n_steps=5, stop=0.5),
    "late": ReinitSchedule(threshold=0.5, interpolation=0.5, start=0.1, stop=0.6),
}
"""Schedules of refreshes by the name that they have in the table; all but "late" and "replaced" between 3 and
20 % of the steps, four times, a quarter of the rows at most but for "uncapped".
"""


@dataclass(frozen=True)
class Method:
    """A row of the table: ``head``, ``full``, ``lora``, ``vera``, ``uora`` or ``uora+inputs``."""

    name: str
    rank: int = 0
    refresh: str = "off"

    def __str__(self) -> str:
        rank = f" r {self.rank}" if self.rank else ""
        return self.name + rank + (f", {self.refresh}" if self.refresh != "off" else "")


def build(method: Method, task: Task, seed: int) -> tuple[nn.Module, list[nn.Parameter], list[nn.Parameter]]:
    """The model to train, what the method trains in it, and what every method trains beside."""
    model = task.model()
    if method.name in ("lora", "vera"):
        modules = {name: model.get_submodule(name) for name in task.names}
        # PEFT's rank has to be a multiple of a convolution's groups
        names = [n for n, m in modules.items() if getattr(m, "groups", 1) == 1]
        model = peft.get_peft_model(model, _peft_config(method, names, seed))
    elif method.name.startswith("uora"):
        init = "inputs" if method.name.endswith("+inputs") else "orthogonal"
        chosen = {
            "trainable_modules": (),
            "init": init,
            "seed": seed,
            "batch_norm": "moving",
        }  # tasks freeze it
        attach_uora(model, UORAConfig(method.rank, task.names, **chosen))
    else:
        model.requires_grad_(method.name == "full")
        if method.name == "head" and not task.head:
            return model, [_own_output(model)], []
    beside = [p for name in (task.head, *task.others) for p in _head(model, name)]
    for parameter in beside:
        parameter.requires_grad_(True)
    ours = {id(parameter) for parameter in beside}
    trained = [p for p in model.parameters() if p.requires_grad and id(p) not in ours]
    return model, trained, beside


def _peft_config(method: Method, names: list[str], seed: int) -> peft.PeftConfig:
    transposed = any(name.endswith("c_attn") for name in names)
    if method.name == "vera":
        return peft.VeraConfig(
            r=method.rank, target_modules=names, projection_prng_key=seed, fan_in_fan_out=transposed
        )
    return peft.LoraConfig(
        r=method.rank, lora_alpha=2 * method.rank, target_modules=names, fan_in_fan_out=transposed
    )


def _head(model: nn.Module, name: str) -> list[nn.Parameter]:
    if not name:
        return []
    inner = model.base_model.model if isinstance(model, peft.PeftModel) else model
    return list(inner.get_submodule(name).parameters())


def _own_output(model: nn.Module) -> nn.Parameter:
    """A language model's output layer, no longer tied to its embedding: what "head only" means there."""
    output = model.get_output_embeddings()
    output.weight = nn.Parameter(output.weight.detach().clone())
    return output.weight


def train(method: Method, task: Task, lr: float, seed: int) -> tuple[nn.Module, int, float]:
    """Train one method. The model, its adapter parameters, and seconds with calibration and refreshes."""
    torch.manual_seed(seed)
    model, trained, head = build(method, task, seed)
    start = time.perf_counter()
    if method.name.endswith("+inputs"):
        calibrate(model, task.order[:8], lambda index: task.run(model, index))
    groups = [
        {"params": trained or head, "lr": lr},
        {"params": head if trained else [], "lr": task.head_lr},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.steps)
    schedule = POLICIES[method.refresh]
    refresher = Refresher(schedule, schedule.due_steps(task.steps)) if schedule else None
    one = attachment_of(model, "a benchmark") if refresher is not None else None

    def before(step: int, index: Tensor) -> None:
        if refresher is not None:
            refresher.before_step(one, step)

    def after(step: int, index: Tensor) -> None:
        decay.step()
        if refresher is not None:
            looks = refresher.schedule.growth == "inputs" and refresher.is_due(step)
            run = lambda index: task.run(model, index)  # noqa: E731
            with inputs_observed(model, [index], run) if looks else nullcontext():
                refresher.after_step(one, [optimizer], step)

    model.train()
    fit(lambda index: task.loss(model, index), task.order, optimizer, before, after)
    counted = sum(p.numel() for p in trained) + sum(p.numel() for n in task.others for p in _head(model, n))
    return model, counted, time.perf_counter() - start
