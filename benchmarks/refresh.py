"""What refreshes cost: seconds of one, of the steps between, and memory.

    python benchmarks/refresh.py            # about three minutes
    python benchmarks/refresh.py --quick
    python benchmarks/refresh.py --policies # what each schedule of quality.py turns, and what it costs

What they do to the scores is in the table of ``benchmarks/quality.py``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import timm
import torch
from quality_methods import POLICIES, Method, build
from quality_tasks import Digits
from torch import Tensor, nn
from training import fit, now

from lightning_uora import (
    ReinitSchedule,
    UORAConfig,
    attach_uora,
    load_adapter,
    named_adapters,
    refresh,
    save_adapter,
)
from lightning_uora.adapters import attachment_of
from lightning_uora.reinit import Refresher


def cost(quick: bool) -> None:
    """A refresh of a quarter of the rows of ViT-B at rank 1024, the steps between refreshes, and memory."""
    torch.set_num_threads(1)
    size, rounds = ("vit_tiny_patch16_224", 1) if quick else ("vit_base_patch16_224", 3)
    for share in ("model", "layer"):
        model = timm.create_model(size, num_classes=10)
        attach_uora(model, UORAConfig(rank=1024, target_modules="qkv", share=share))
        print(f"{size}, rank 1024, share={share}: {_cost(model, rounds)}", flush=True)


def default(quick: bool) -> None:
    """Four refreshes by the default schedule on the default targets, as a user meets them; the file after."""
    torch.set_num_threads(2)
    size = "vit_tiny_patch16_224" if quick else "vit_base_patch16_224"
    torch.manual_seed(0)
    model, twin = timm.create_model(size, num_classes=10), timm.create_model(size, num_classes=10)
    twin.load_state_dict(model.state_dict())
    layers = len(attach_uora(model, UORAConfig(rank=1024)))
    held, seconds = sum(b.nbytes for b in model.uora_projections.buffers()), []
    for _ in range(4):
        with torch.no_grad():
            for _, module in named_adapters(model):
                module.uora_d.add_(0.05 * torch.randn(1024))
        start = now()
        refresh(model, ReinitSchedule())
        seconds.append(f"{now() - start:.2f}")
    grown = sum(b.nbytes for b in model.uora_projections.buffers())
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        kilobytes = sum(file.stat().st_size for file in Path(folder).iterdir()) / 1000
        start = now()
        load_adapter(twin, folder)
        loading = now() - start
    print(
        f"{size}, rank 1024, {layers} layers, default schedule: refreshes {', '.join(seconds)} s; A and B "
        f"{held / 2**20:.1f} MiB before, {grown / 2**20:.1f} MiB after; folder {kilobytes:.0f} kB; "
        f"load_adapter {loading:.2f} s",
        flush=True,
    )


def _cost(model: nn.Module, rounds: int) -> str:
    x, y = torch.randn(4, 3, 224, 224), torch.randint(0, 10, (4,))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    one = attachment_of(model, "a benchmark")
    watch = Refresher(ReinitSchedule(start=10**6, stop=10**6), [10**6])

    def loss(x: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(x), y)

    def before(step: int, x: Tensor) -> None:
        watch.before_step(one, step)

    def after(step: int, x: Tensor) -> None:
        watch.after_step(one, [optimizer], step)

    watched, plain = [], []
    for _ in range(rounds + 1):
        watched += fit(loss, [x], optimizer, before, after)
        plain += fit(loss, [x], optimizer)
    watching, step = statistics.median(watched[1:]), statistics.median(plain[1:])
    held = sum(b.nbytes for b in model.uora_projections.buffers())
    with torch.no_grad():
        for _, module in named_adapters(model):
            module.uora_d.copy_(torch.rand(1024))
    start = now()
    rows = refresh(model, ReinitSchedule(threshold=0.25, threshold_mode="fraction"), optimizer)
    seconds = now() - start
    grown = sum(b.nbytes for b in model.uora_projections.buffers())
    (later,) = fit(loss, [x], optimizer)
    return (
        f"refresh of {sum(map(len, rows.values())):,} rows and columns {seconds:.2f} s = "
        f"{seconds / step:.2f} training steps of batch 4; step with the schedule watching "
        f"{watching / step:.3f} x; a step after the refresh {later / step:.2f} x; "
        f"A and B {held / 2**20:.0f} MiB before, {grown / 2**20:.0f} MiB after"
    )


SHOWN = ("threshold-0.05", "threshold-0.1", "threshold-0.2", "lambda-0.2", "uncapped", "replaced")
"""Of the schedules in ``quality_methods.py``; ``lambda-0.2`` has threshold 0.5."""


def policies(quick: bool) -> None:
    """One run of each schedule on the digits, rank 64: rows turned, bytes of own rows, jump of the loss."""
    torch.set_num_threads(1)
    task = Digits(0, quick)
    held = task.rows["val"]
    for name in SHOWN:
        torch.manual_seed(0)
        model, trained, head = build(Method("uora", 64, name), task, 0)
        groups = [{"params": trained, "lr": 0.1}, {"params": head, "lr": task.head_lr}]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.steps)
        schedule, one = POLICIES[name], attachment_of(model, "a benchmark")
        watch = Refresher(schedule, schedule.due_steps(task.steps))
        shared, jumps, turned = sum(b.nbytes for b in one.owner.buffers()), [], []
        model.train()
        for step, index in enumerate(task.order, 1):
            watch.before_step(one, step)
            optimizer.zero_grad()
            task.loss(model, index).backward()
            optimizer.step()
            decay.step()
            before = task.loss(model, held).item() if watch.is_due(step) else 0.0
            rows = watch.after_step(one, [optimizer], step)
            if rows:
                jumps.append(task.loss(model, held).item() / before - 1)
                turned.append(sum(len(chosen) for key, chosen in rows.items() if key[0] == "A"))
        ever = {
            (key, row) for entry in one.owner.record for key, rows in entry["rows"].items() for row in rows
        }
        share = sum(key[0] == "A" for key, _ in ever) / (64 * len(one.layers))
        own = sum(b.nbytes for b in one.owner.buffers()) - shared
        print(
            f"digits, rank 64, {name}: {len(turned)} refreshes, {sum(turned):,} rows of A turned, "
            f"{share:.1%} of all ever; own rows {own / 1000:,.0f} kB beside {shared / 1000:,.0f} kB shared; "
            f"loss at a refresh {statistics.mean(jumps or [0.0]):+.2%} in the mean, "
            f"{max(jumps or [0.0]):+.2%} at most; "
            f"score {task.score(model, 'test'):.1f}",
            flush=True,
        )


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--policies", action="store_true")
    given = parser.parse_args()
    for part in (policies,) if given.policies else (cost, default):
        part(given.quick)


if __name__ == "__main__":
    main()
