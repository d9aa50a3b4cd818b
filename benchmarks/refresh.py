"""Refreshes measured: what they cost, what they do to the loss at once, and to accuracy in the end.

    python benchmarks/refresh.py cost       # seconds of a refresh, of the steps between, memory; about three
    minutes python benchmarks/refresh.py quality    # policies x 8 seeds on the digits; about fifteen minutes
    on one core python benchmarks/refresh.py quality --quick

Quality: a small ViT (width 64, depth 6) pretrained on the digits 0-4 is adapted to 5-9, inverted and rotated,
from 250 images in 240 steps; adapters of rank 16 on qkv, proj, fc1, fc2; AdamW, vectors at 0.1. Every policy
sees the same initial weights and batches for a seed, so differences are paired. The jump is the change of the
loss on one fixed batch of 250 images by the refresh alone. Rows go to ``benchmarks/results/refresh.csv``.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import sys
import time
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from lightning_uora import ReinitSchedule, UORAConfig, attach_uora, named_adapters, refresh
from lightning_uora.refresh import Refresher

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from bundled import digits
from vision_timm import small_vit

RESULTS = Path(__file__).parent / "results"
EARLY = {"start": 0.03, "stop": 0.2}
POLICIES: dict[str, tuple[str, ReinitSchedule | None, str]] = {
    # name: (share, schedule, what becomes of d: as the schedule says, or "zero")
    "none": ("model", None, ""),
    "model, relative 0.5": ("model", ReinitSchedule(**EARLY), ""),
    "model, lowest 10 %": ("model", ReinitSchedule(threshold=0.1, threshold_mode="fraction", **EARLY), ""),
    "layer, relative 0.5, d cos": ("layer", ReinitSchedule(**EARLY), ""),
    "layer, relative 0.5, d kept": ("layer", ReinitSchedule(preserve_function=False, **EARLY), ""),
    "layer, relative 0.5, d zero": ("layer", ReinitSchedule(preserve_function=False, **EARLY), "zero"),
    "layer, relative 0.25": ("layer", ReinitSchedule(threshold=0.25, **EARLY), ""),
    "layer, relative 0.5, ema": ("layer", ReinitSchedule(criterion="ema", **EARLY), ""),
    "layer, relative 0.5, sensitivity": ("layer", ReinitSchedule(criterion="sensitivity", **EARLY), ""),
    "layer, relative 0.5, gradient": ("layer", ReinitSchedule(growth="gradient", **EARLY), ""),
    "layer, relative 0.5, 10-60 %": ("layer", ReinitSchedule(start=0.1, stop=0.6), ""),
}


def pretrained(seed: int, epochs: int = 25) -> nn.Module:
    """The small ViT after some epochs on 0-4, with a fresh head."""
    torch.manual_seed(seed)
    model, data = small_vit(), digits(range(5), moved=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(data)).split(64):
            x, y = (t[batch] for t in data.tensors)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    model.reset_classifier(5)
    return model


def adapt(base: nn.Module, policy: str, seed: int, steps: int) -> tuple[float, list[float], int]:
    """Train one policy. Test accuracy in percent, the loss jumps, rows refreshed."""
    share, schedule, treatment = POLICIES[policy]
    model, data = copy.deepcopy(base), digits(range(5, 10), moved=True)
    targets = ["qkv", "proj", "fc1", "fc2"]
    attach_uora(model, UORAConfig(16, targets, ["patch_embed"], seed=seed, share=share))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data), generator=generator)
    train, test = order[:250], order[250:]
    vectors = [v for _, m in named_adapters(model) for v in (m.uora_d, m.uora_b)]
    groups = [{"params": vectors, "lr": 0.1, "weight_decay": 0.0}, {"params": list(model.head.parameters())}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    refresher = Refresher(schedule, schedule.due_steps(steps)) if schedule else None
    jumps: list[float] = []

    def loss(index: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(data.tensors[0][index]), data.tensors[1][index])

    for step in range(1, steps + 1):
        if refresher is not None:
            refresher.before_step(model, step - 1)
        optimizer.zero_grad()
        loss(train[torch.randint(250, (64,), generator=generator)]).backward()
        optimizer.step()
        cosine.step()
        if refresher is None:
            continue
        with torch.no_grad():
            before = loss(train).item() if refresher.is_due(step) else None
            rows = refresher.after_step(model, [optimizer], step)
            if rows and treatment == "zero":
                layers = [module for _, module in named_adapters(model)]
                for key, chosen in rows.items():
                    if key[0] == "A":
                        layers[int(key.split("_")[2])].uora_d[chosen] = 0.0
            if before is not None and rows:
                jumps.append(loss(train).item() - before)
    with torch.no_grad():
        right = model.eval()(data.tensors[0][test]).argmax(1) == data.tensors[1][test]
    return 100 * right.float().mean().item(), jumps, refresher.refreshed if refresher else 0


def quality(quick: bool) -> None:
    """All policies, seeds and a table of paired differences to no refresh."""
    torch.set_num_threads(1)
    seeds, steps = (range(2), 24) if quick else (range(8), 240)
    rows = []
    for seed in seeds:
        base = pretrained(seed)
        for policy in POLICIES:
            accuracy, jumps, count = adapt(base, policy, seed, steps)
            rows.append({"policy": policy, "seed": seed, "accuracy": round(accuracy, 3), "rows": count})
            rows[-1]["mean_jump"] = round(statistics.mean(jumps), 5) if jumps else 0.0
            rows[-1]["max_jump"] = round(max(jumps), 5) if jumps else 0.0
            print(rows[-1], flush=True)
    if not quick:
        RESULTS.mkdir(exist_ok=True)
        with (RESULTS / "refresh.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    none = {row["seed"]: row["accuracy"] for row in rows if row["policy"] == "none"}
    print(
        "\n| policy | accuracy, % | difference to none | rows refreshed | loss jump, mean / max "
        "|\n|---|---|---|---|---|"
    )
    for policy in POLICIES:
        mine = [row for row in rows if row["policy"] == policy]
        accuracy = [row["accuracy"] for row in mine]
        paired = [row["accuracy"] - none[row["seed"]] for row in mine]
        error = statistics.stdev(paired) / len(paired) ** 0.5
        mean, worst = statistics.mean(row["mean_jump"] for row in mine), max(row["max_jump"] for row in mine)
        jump = f"{mean:+.4f} / {worst:+.4f}"
        count = statistics.mean(row["rows"] for row in mine)
        print(
            f"| {policy} | {statistics.mean(accuracy):.1f} ± {statistics.stdev(accuracy):.1f} | "
            f"{statistics.mean(paired):+.2f} ± {error:.2f} | {count:.0f} | {jump} |"
        )


def cost(quick: bool) -> None:
    """A refresh of a quarter of the rows of ViT-B at rank 1024, the steps between refreshes, and memory."""
    torch.set_num_threads(1)
    size, rounds = ("vit_tiny_patch16_224", 1) if quick else ("vit_base_patch16_224", 3)
    x, y = torch.randn(4, 3, 224, 224), torch.randint(0, 10, (4,))
    quarter = ReinitSchedule(threshold=0.25, threshold_mode="fraction")
    for share in ("model", "layer"):
        model = timm.create_model(size, num_classes=10)
        attach_uora(model, UORAConfig(rank=1024, target_modules="qkv", share=share))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        watched = Refresher(ReinitSchedule(start=10**6, stop=10**6), [10**6])
        steps: dict[str, list[float]] = {"plain": [], "watched": []}
        for turn in range(2 * rounds + 2):
            kind = "plain" if turn % 2 else "watched"
            start = time.perf_counter()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if kind == "watched":
                watched.before_step(model, turn)
                watched.after_step(model, [optimizer], turn)
            if turn > 1:
                steps[kind].append(time.perf_counter() - start)
        held = sum(b.numel() * b.element_size() for b in model.uora_projections.buffers())
        with torch.no_grad():
            for _, module in named_adapters(model):
                module.uora_d.copy_(torch.rand(1024))
        start = time.perf_counter()
        rows = refresh(model, quarter, optimizer)
        seconds = time.perf_counter() - start
        after = sum(b.numel() * b.element_size() for b in model.uora_projections.buffers())
        start = time.perf_counter()
        nn.functional.cross_entropy(model(x), y).backward()
        later = time.perf_counter() - start
        plain = statistics.median(steps["plain"])
        print(
            f"{size}, rank 1024, share={share}: refresh of {sum(map(len, rows.values())):,} rows and columns "
            f"{seconds:.2f} s = {seconds / plain:.2f} training steps of batch 4; step with the schedule "
            "watching "
            f"{statistics.median(steps['watched']) / plain:.3f} x; a step after the refresh "
            f"{later / plain:.2f} x; "
            f"A and B {held / 2**20:.0f} MiB before, {after / 2**20:.0f} MiB after"
        )


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["cost", "quality"])
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    (cost if arguments.what == "cost" else quality)(arguments.quick)


if __name__ == "__main__":
    main()
