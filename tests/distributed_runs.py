"""The runs behind ``test_distributed``: one script, started once for each kind of launch.

``python -m tests.distributed_runs PART FOLDER`` runs the scenarios of a part on every rank and leaves what
each rank found in ``FOLDER/NAME.RANK.pt``. Lightning's own launchers start the second process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from packaging.version import Version
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_uora import (
    ReinitSchedule,
    UORACallback,
    attach_uora,
    detach_uora,
    export_peft,
    plot_vectors,
    refresh,
    save_adapter,
    summarize,
)
from lightning_uora.distributed.sharding import whole
from tests.toys import TENSORS_ONLY, Toy, trainer

RANK = 3  # odd, so that two ranks hold shards of unequal size
BATCH = 8  # of all ranks together
PATIENCE = timedelta(seconds=180)
SCHEDULES: dict[str, dict[str, Any]] = {
    "magnitude": {},
    "ema": {"criterion": "ema"},
    "sensitivity": {"criterion": "sensitivity"},
    "both vectors": {"vectors": ("d", "b")},
    "gradient": {"growth": "gradient", "candidates": 20},
}
KINDS = ("full", "adapter")
STOPS = {"between steps": 6, "while accumulating": 5}
ACCUMULATE = {"accumulate_grad_batches": 2}


def rows() -> TensorDataset:
    """Eight batches that are all the same, in rows that are not."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(BATCH, 6, generator=generator)
    return TensorDataset(x.repeat(8, 1), x[:, :3].argmax(1).repeat(8))


class Shares(LightningDataModule):
    """Every batch of eight rows, dealt out to the ranks. Lightning's own sampler shuffles."""

    def train_dataloader(self):
        ranks = self.trainer.world_size
        sampler = DistributedSampler(rows(), ranks, self.trainer.global_rank, shuffle=False)
        return DataLoader(rows(), batch_size=BATCH // ranks, sampler=sampler)

    def val_dataloader(self):
        return DataLoader(rows(), batch_size=BATCH)


class Normed(Toy):
    """With buffers of its own, which DistributedDataParallel sends."""

    def build(self):
        super().build()
        if not isinstance(self.body[1], nn.BatchNorm1d):
            self.body.insert(1, nn.BatchNorm1d(6))


class Spare(Toy):
    """With a layer that no loss depends on."""

    def build(self):
        super().build()
        self.spare = nn.Linear(6, 6)


class Sharded(Toy):
    """FSDP2 as its documentation has it; the head is sharded with the root."""

    late = "configure_model"

    def configure_model(self):
        if not hasattr(self, "body"):
            torch.manual_seed(4)
            self.build()
            attach_uora(self, uora().config)
            fully_shard(self.body)
            fully_shard(self)

    def training_step(self, batch, batch_index):
        """Before torch 2.9, gloo sums the gradients where FSDP2 asks for their mean."""
        loss = super().training_step(batch, batch_index)
        return loss if Version(torch.__version__) >= Version("2.9") else loss / self.trainer.world_size


class RootSharded(Sharded):
    """One group: after a validation its parameters stay whole, see ``reshard_``."""

    def configure_model(self):
        if not hasattr(self, "body"):
            torch.manual_seed(4)
            self.build()
            attach_uora(self, uora().config)
            fully_shard(self)


class Meta(Sharded):
    """Made without memory; a checkpoint brings the base."""

    def configure_model(self):
        if not hasattr(self, "body"):
            with torch.device("meta"):
                self.build()
                attach_uora(self, uora().config)
            fully_shard(self.body)
            fully_shard(self)


class Columns(Sharded):
    """Tensor parallelism, which leaves weights sharded in their forward."""

    def configure_model(self):
        if not hasattr(self, "body"):
            self.build()
            attach_uora(self, uora().config)
            mesh = init_device_mesh("cpu", (2,))
            parallelize_module(self, mesh, {"body.0": ColwiseParallel()})


class FromInputs(Sharded):
    """A should come from the inputs, and is sharded before it does."""

    def configure_model(self):
        if not hasattr(self, "body"):
            self.build()
            attach_uora(self, UORACallback(RANK, ["body.0"], init="inputs").config)
            fully_shard(self)


class ShardedFirst(Sharded):
    """The wrong order."""

    def configure_model(self):
        self.build()
        fully_shard(self)


def made(cls: type[Toy] = Toy, seed: int = 4) -> Toy:
    torch.manual_seed(seed)
    return cls()


def uora(kind: str = "full", **schedule: Any) -> UORACallback:
    eager = {"threshold": 2.0, "start": 0.0, "stop": 1.0, "max_fraction": 0.5, "every_n_steps": 2}
    names = schedule.pop("target_modules", ["body.0", "body.2"])
    reinit = ReinitSchedule(**{**eager, **schedule})
    return UORACallback(rank=RANK, target_modules=names, reinit=reinit, checkpoint=kind)


class Save(Callback):
    """Saves once, after so many batches."""

    def __init__(self, path: Path, batches: int):
        self.path, self.batches = path, batches

    def on_train_batch_end(self, trainer, *args):
        if trainer.fit_loop.total_batch_idx + 1 == self.batches:
            trainer.save_checkpoint(self.path)


def fitted(
    model: Toy, callback: UORACallback, *others: Callback, path: Path | None = None, **options: Any
) -> Trainer:
    """One run of two epochs; the whole batch has eight rows, however many ranks share it."""
    options = {"limit_val_batches": 0, "use_distributed_sampler": False, **options}
    run = trainer(callback, *others, **options)
    run.fit(model, datamodule=Shares(), ckpt_path=path, **TENSORS_ONLY)
    return run


def ended(*args: Any, **options: Any) -> dict[str, Any]:
    """What a run leaves: its whole state, the moments of its optimizer, its refreshes."""
    model, callback = args[:2]
    run = fitted(*args, **options)
    state = {k: whole(v).clone() for k, v in model.state_dict().items() if not k.endswith(".record")}
    moments = [whole(s["exp_avg"]).clone() for s in run.optimizers[0].state.values() if isinstance(s, dict)]
    return {"state": state, "moments": moments, "refreshes": callback.refreshes}


def ddp(**options: Any) -> dict[str, Any]:
    return {"strategy": DDPStrategy(timeout=PATIENCE, **options), "devices": 2}


def sharded(distributed: bool = False) -> dict[str, Any]:
    strategy = ModelParallelStrategy(
        data_parallel_size=2,
        tensor_parallel_size=1,
        save_distributed_checkpoint=distributed,
        timeout=PATIENCE,
    )
    return {"strategy": strategy, "devices": 2}


class Travelled(Callback):
    """Names of the buffers that DistributedDataParallel sends, counted over a run's forwards."""

    def __init__(self, ignore: bool = True):
        self.ignore, self.counts = ignore, {}

    def setup(self, trainer, pl_module, stage):
        if not self.ignore:
            pl_module._ddp_params_and_buffers_to_ignore = []

    def on_train_start(self, trainer, pl_module):
        names = {b.data_ptr(): name for name, b in pl_module.named_buffers()}
        self.send = torch.distributed._broadcast_coalesced

        def counted(group, tensors, *args):
            for t in tensors:
                name = names.get(t.data_ptr(), "a parameter")
                self.counts[name] = self.counts.get(name, 0) + 1
            return self.send(group, tensors, *args)

        torch.distributed._broadcast_coalesced = counted

    def on_train_end(self, trainer, pl_module):
        torch.distributed._broadcast_coalesced = self.send


def travelled(ignore: bool) -> dict[str, int]:
    counting = Travelled(ignore)
    fitted(made(Normed), uora(target_modules=["body.0", "body.3"], max_fraction=0.0), counting, **ddp())
    return counting.counts


def error(run: Callable[[], Any]) -> str:
    """The error that every rank meets at one place, so that none waits for another."""
    try:
        run()
    except (ValueError, MisconfigurationException) as found:
        return f"{type(found).__name__}: {found}"
    return "no error"


def replicated_runs(folder: Path) -> dict[str, Callable[[], Any]]:
    """Scenarios of DDP. The second rank starts from another base: the first one's must come to it."""
    runs: dict[str, Callable[[], Any]] = {
        f"ddp {name}": lambda s=schedule: ended(seeded_by_rank(), uora(**s), **ddp())
        for name, schedule in SCHEDULES.items()
    }
    runs["ddp unused"] = lambda: ended(
        made(Spare),
        uora(target_modules=["body.0", "body.2", "spare"]),
        **ddp(find_unused_parameters=True),
        enable_model_summary=True,
    )
    runs["travelled"] = lambda: (travelled(ignore=True), travelled(ignore=False))
    for kind in KINDS:
        for stop, batches in STOPS.items():
            path = folder / f"ddp {kind} {stop}.ckpt"
            runs[f"ddp saves {kind} {stop}"] = lambda k=kind, p=path, b=batches: ended(
                made(), uora(k), Save(p, b), **ddp(), **ACCUMULATE
            )
            runs[f"ddp resumes {kind} {stop}"] = lambda k=kind, p=path: ended(
                made(), uora(k), path=p, **ddp(), **ACCUMULATE
            )
            single = folder / f"single {kind} {stop}.ckpt"
            runs[f"ddp resumes single {kind} {stop}"] = lambda k=kind, p=single: ended(
                made(), uora(k), path=p, **ddp(), **ACCUMULATE
            )
    runs["unused saves"] = lambda: ended(
        made(Sometimes),
        uora(),
        Save(folder / "unused.ckpt", 1),
        **ddp(find_unused_parameters=True),
        **ACCUMULATE,
    )
    runs["disagreeing"] = disagreeing
    runs["alone"] = alone_on_the_first_rank
    return runs


class Sometimes(Toy):
    """The second rank's first loss does not depend on the body."""

    def forward(self, x):
        if self.global_rank == 1 and self.trainer.fit_loop.total_batch_idx == 0:
            return self.head(x)
        return super().forward(x)


def seeded_by_rank() -> Toy:
    return made(seed=4 + torch.distributed.get_rank() if torch.distributed.is_initialized() else 4)


def disagreeing() -> dict[str, Any]:
    """The second rank would choose other rows and other candidates, as another machine's rounding might."""
    module: Any = sys.modules["lightning_uora.reinit.refresh"]  # the package's attribute is the function
    which, candidates = module.weakest, module.picked_directions
    if torch.distributed.get_rank() == 1:
        module.weakest = lambda scores, schedule: [RANK - 1]
        module.picked_directions = lambda *args: {index: [7] for index in candidates(*args)}
    try:
        return ended(made(), uora(**SCHEDULES["gradient"]), **ddp())
    finally:
        module.weakest, module.picked_directions = which, candidates


def alone_on_the_first_rank() -> list[dict[str, Any]]:
    """A Trainer on one device in one of two ranks: nobody answers its collectives."""
    if torch.distributed.get_rank() != 0:
        return []
    callback = uora(growth="gradient")
    fitted(made(), callback, devices=1, max_epochs=1, strategy="auto", plugins=[])
    return callback.refreshes


def sharded_runs(folder: Path) -> dict[str, Callable[[], Any]]:
    """Scenarios of FSDP2."""
    runs: dict[str, Callable[[], Any]] = {
        f"sharded {name}": lambda s=schedule: ended(Sharded(), uora(**s), **sharded())
        for name, schedule in SCHEDULES.items()
    }
    runs["sharded with validation"] = lambda: ended(
        RootSharded(), uora(), **sharded(), limit_val_batches=1, val_check_interval=1
    )
    for kind, distributed in (("full", True), ("full", False), ("adapter", False)):
        for stop, batches in STOPS.items():
            path = folder / f"sharded {kind} {'folder' if distributed else 'file'} {stop}.ckpt"
            runs[f"saves {path.stem}"] = lambda k=kind, d=distributed, p=path, b=batches: ended(
                Sharded(), uora(k), Save(p, b), **sharded(d), **ACCUMULATE
            )
            runs[f"resumes {path.stem}"] = lambda k=kind, d=distributed, p=path: ended(
                Sharded(), uora(k), path=p, **sharded(d), **ACCUMULATE
            )
        saved = folder / f"ddp {kind} while accumulating.ckpt"
        runs[f"sharded reads ddp {kind}"] = lambda k=kind, p=saved: read(k, p)
    runs["saves ema"] = lambda: ended(
        Sharded(), uora(criterion="ema"), Save(folder / "ema.ckpt", 5), **sharded()
    )
    runs["resumes ema"] = lambda: ended(
        Sharded(), uora(criterion="ema"), path=folder / "ema.ckpt", **sharded()
    )
    runs["resumes meta"] = lambda: ended(
        Meta(), uora(), path=folder / "sharded full file between steps.ckpt", **sharded(), **ACCUMULATE
    )
    runs["exact"] = lambda: read(
        "full", damaged(folder, lambda c: c["uora"]["exact"]["A_6_0:rows"].mul_(1.0001))
    )
    runs["tools"] = lambda: tools(folder)
    runs["refused"] = lambda: refused(folder)
    return runs


def read(kind: str, path: Path) -> dict[str, torch.Tensor]:
    """The state that a sharded model has of another strategy's checkpoint.

    To validate: Lightning names an optimizer's entries by their place among all parameters there, and refuses
    to go on with those of an optimizer that holds some of them.
    """
    model = Sharded()
    run = trainer(uora(kind), use_distributed_sampler=False, **sharded())
    run.validate(model, datamodule=Shares(), ckpt_path=path, verbose=False, **TENSORS_ONLY)
    return {k: whole(v).clone() for k, v in model.state_dict().items() if not k.endswith(".record")}


def tools(folder: Path) -> dict[str, Any]:
    """What a sharded model still answers, and what it refuses."""
    model = RootSharded()
    fitted(model, uora(), **sharded())
    with torch.no_grad():
        model.eval()(rows()[:8][0])  # leaves the parameters whole
    before = model.body[0].uora_d.detach().clone()
    cache = [dict(module._uora.cache) for module in (model.body[0], model.body[2])]
    turned = refresh(model, ReinitSchedule(threshold=2.0, max_fraction=0.5, interpolation=0.5))
    save_adapter(model, folder / "adapter")
    weight = model.body[0].weight
    return {
        "rows": turned["A_6_0"],
        "before": before,
        "after": whole(model.state_dict()["body.0.uora_d"]),
        "summary": str(summarize(model)),
        "drawn": plot_vectors(model).axes[0].images[0].get_array().data.tolist(),
        "d": whole(model.body[0].uora_d.detach()).tolist(),
        "state": {k: whole(v).clone() for k, v in model.state_dict().items() if not k.endswith(".record")},
        "plain": type(before) is torch.Tensor,
        "detach": error(lambda: detach_uora(model, merge=True)),
        "export": error(lambda: export_peft(model, folder / "peft")),
        "weight kept": model.body[0].weight is weight,
        "cache": cache,
    }


def refused(folder: Path) -> dict[str, str]:
    return {
        "adapter folder": error(lambda: fitted(Sharded(), uora("adapter"), **sharded(distributed=True))),
        "tensor parallel": error(lambda: fitted(Columns(), uora(), **sharded())),
        "inputs": error(
            lambda: fitted(FromInputs(), UORACallback(RANK, ["body.0"], init="inputs"), **sharded())
        ),
        "sharded first": error(lambda: fitted(ShardedFirst(), uora(), **sharded())),
        "another rank": error(
            lambda: fitted(
                Sharded(),
                uora(),
                path=damaged(folder, lambda c: c["uora"]["config"].update(rank=4)),
                **sharded(),
                **ACCUMULATE,
            )
        ),
        "another architecture": error(
            lambda: fitted(
                Sharded(),
                uora(),
                path=damaged(folder, lambda c: c["uora"]["layers"].pop(c["uora"]["adapted"].pop())),
                **sharded(),
                **ACCUMULATE,
            )
        ),
        "another base": error(
            lambda: fitted(
                Sharded(),
                uora("adapter"),
                path=damaged(
                    folder, lambda c: c["uora"]["base"].update({"body.0.weight": [9, 9, "x"]}), "adapter"
                ),
                **sharded(),
                **ACCUMULATE,
            )
        ),
    }


def damaged(folder: Path, change: Callable[[dict[str, Any]], Any], kind: str = "full") -> Path:
    """A sharded run's file, changed by the first rank."""
    path = folder / "damaged.ckpt"
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        checkpoint = torch.load(folder / f"sharded {kind} file between steps.ckpt", weights_only=True)
        change(checkpoint)
        torch.save(checkpoint, path)
    torch.distributed.barrier()
    return path


def spawned_runs() -> dict[str, Callable[[], Any]]:
    """DDP with spawned processes: what they did comes back to the first one as the module's state."""

    def run() -> Any:
        model, callback = made(), uora(criterion="ema", growth="gradient")
        attach_uora(model, callback.config)
        run = fitted(model, callback, strategy="ddp_spawn", devices=2)
        return {"state": dict(model.state_dict()), "done": run.state.finished}

    return {"spawned": run}


def main(part: str, folder: Path) -> None:
    torch.set_num_threads(1)
    parts = {
        "launched": lambda: replicated_runs(folder) | sharded_runs(folder),
        "spawned": spawned_runs,
    }
    for name, run in parts[part]().items():
        found = run()
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        torch.save(found, folder / f"{name}.{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
