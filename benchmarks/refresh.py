"""What refreshes cost: seconds of one, of the steps between, and memory.

    python benchmarks/refresh.py            # about three minutes
    python benchmarks/refresh.py --quick

What they do to the scores is in the table of ``benchmarks/quality.py``.
"""

from __future__ import annotations

import argparse
import statistics
import time

import timm
import torch
from torch import nn

from lightning_uora import ReinitSchedule, UORAConfig, attach_uora, named_adapters, refresh
from lightning_uora.reinit.schedule import Refresher


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
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    cost(parser.parse_args().quick)


if __name__ == "__main__":
    main()
