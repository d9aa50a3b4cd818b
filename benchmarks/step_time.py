"""Step time and saved-for-backward bytes of UORA against the frozen floor and PEFT's VeRA.

    python benchmarks/step_time.py            # all rows, about five minutes on two cores
    python benchmarks/step_time.py --quick    # a smoke run of every row

One process, one thread. Every method trains its own copy of one timm ViT on the same batch with AdamW;
"floor" is the model with only ``cls_token`` trainable. Rounds visit the methods in turn; a ratio is the
median over rounds of step time divided by the floor's step time in the same round. Saved bytes are what
autograd keeps for backward, parameters and buffers left out, every storage counted once.
"""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
import time
from collections.abc import Callable

import peft
import timm
import torch
from torch import Tensor, nn

from lightning_uora import UORAConfig, attach_uora

TARGETS = ["qkv"]


def floor(model: nn.Module, rank: int) -> nn.Module:
    """The frozen model; one small parameter trains, so that a backward runs through every block."""
    model.requires_grad_(False)
    model.cls_token.requires_grad_(True)
    return model


def uora(model: nn.Module, rank: int) -> nn.Module:
    """This package."""
    attach_uora(model, UORAConfig(rank=rank, target_modules=TARGETS, trainable_modules=()))
    model.cls_token.requires_grad_(True)
    return model


def vera(model: nn.Module, rank: int) -> nn.Module:
    """PEFT's VeRA."""
    model = peft.get_peft_model(model, peft.VeraConfig(r=rank, target_modules=TARGETS))
    model.base_model.model.cls_token.requires_grad_(True)
    return model


METHODS: dict[str, Callable[[nn.Module, int], nn.Module]] = {"floor": floor, "uora": uora, "peft vera": vera}


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that one forward keeps for backward, without what the model holds anyway."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        pointer = t.untyped_storage().data_ptr()
        if pointer not in own:
            seen[pointer] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(x).square().mean()
        total = sum(seen.values())
    del loss
    return total


def training(name: str, rank: int, batch: int, rounds: int) -> None:
    """One row for each method: ratio of its step to the floor's, and its saved bytes."""
    base = timm.create_model(name, num_classes=10)
    models = {method: build(copy.deepcopy(base), rank).train() for method, build in METHODS.items()}
    x, y = torch.randn(batch, 3, 224, 224), torch.randint(0, 10, (batch,))
    optimizers = {
        method: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for method, model in models.items()
    }
    times: dict[str, list[float]] = {method: [] for method in models}
    for turn in range(rounds + 2):
        for method, model in models.items():
            start = time.perf_counter()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizers[method].step()
            optimizers[method].zero_grad()
            if turn >= 2:
                times[method].append(time.perf_counter() - start)
    saved = {method: saved_bytes(model, x) for method, model in models.items()}
    for method in models:
        ratios = [a / b for a, b in zip(times[method], times["floor"], strict=True)]
        quarter = statistics.quantiles(ratios, n=4)
        print(
            f"{name:22} r {rank:5} batch {batch:2}  {method:10} "
            f"{statistics.median(times[method]) * 1e3:8.1f} ms "
            f"{statistics.median(ratios):6.3f} x floor  [{quarter[0]:.3f}, {quarter[2]:.3f}]  "
            f"saved {saved[method] / 2**20:7.1f} MiB"
        )
    against = [a / b for a, b in zip(times["uora"], times["peft vera"], strict=True)]
    print(
        f"{'':22} uora / peft vera: time {statistics.median(against):.3f}, "
        f"saved bytes {saved['uora'] / saved['peft vera']:.3f}"
    )


def evaluation(name: str, rank: int, rounds: int) -> None:
    """Inference without gradients, against the plain model."""
    plain = timm.create_model(name, num_classes=10).eval()
    adapted = uora(copy.deepcopy(plain), rank).eval()
    x = torch.randn(8, 3, 224, 224)
    ratios = []
    with torch.inference_mode():
        adapted(x)
        for _ in range(rounds):
            start = time.perf_counter()
            plain(x)
            middle = time.perf_counter()
            adapted(x)
            ratios.append((time.perf_counter() - middle) / (middle - start))
    print(f"{name:22} r {rank:5} eval      uora / plain {statistics.median(ratios):.3f}")


def attaching(name: str, rank: int) -> None:
    """Seconds and peak memory growth of attach_uora, before and after LAPACK is loaded and warm."""
    models = [timm.create_model(name), timm.create_model(name)]
    for turn, model in zip(("first in the process", "second"), models, strict=True):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        uora(model, rank)
        seconds = time.perf_counter() - start
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        own = sum(t.numel() * t.element_size() for t in model.uora_projections.buffers())
        print(
            f"{name:22} r {rank:5} attach    {seconds:.2f} s, peak memory grew by {grown / 2**20:.1f} MiB, "
            f"{grown / own:.2f} x A + B ({turn})"
        )


def main() -> None:
    """Run every row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three rounds each")
    rounds = 3 if parser.parse_args().quick else 25
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(
        f"torch {torch.__version__}, peft {peft.__version__}, timm {timm.__version__}, one thread, {rounds} "
        "rounds"
    )
    attaching("vit_base_patch16_224", 1024)
    training("vit_tiny_patch16_224", 1024, 8, rounds)
    training("vit_small_patch16_224", 64, 4, rounds)
    evaluation("vit_tiny_patch16_224", 1024, 2 * rounds)


if __name__ == "__main__":
    main()
