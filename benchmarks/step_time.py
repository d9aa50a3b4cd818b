"""Step time and memory of UORA against the frozen floor, PEFT's VeRA and LoRA, and full fine-tuning.

    python benchmarks/step_time.py                    # every part, about 25 minutes on one core
    python benchmarks/step_time.py table crossing     # some of: table, rank, tokens, layers, crossing, life
    python benchmarks/step_time.py --quick            # a smoke run of every part, nothing is kept
    python benchmarks/step_time.py --device cuda      # the shapes for one accelerator

One process, one thread on a CPU. Every method trains its own copy of one model with random weights on the
same batch with AdamW; "floor" is the frozen model with one small parameter that trains (it does in every
method). Rounds visit the methods in turn; a ratio is the median over rounds of a step's time divided by the
floor's in the same round, with quartiles. "Saved" is what autograd keeps for backward beyond parameters and
buffers, every storage once; "peak" by how much memory grows during a step. Rows go to
``benchmarks/results/step_time.csv``, each as soon as it is there, and from there to ``step_time.md`` and
``step_time.png``.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_uora import (
    ReinitSchedule,
    UORAConfig,
    attach_uora,
    detach_uora,
    load_adapter,
    named_adapters,
    refresh,
    save_adapter,
)
from lightning_uora.adapters.functional import factored_flops, merged_flops

sys.path.insert(0, str(Path(__file__).parent))
from timing import METHODS, SHAPES, build, interleaved, now, peak_of

RESULTS = Path(__file__).parent / "results"
COLUMNS = ["part", "shape", "precision", "layers", "rank", "batch", "tokens", "method", "ms", "ratio"]
COLUMNS += ["low", "high", "saved_mib", "peak_mib", "trained"]
PARTS = ("table", "rank", "tokens", "layers", "crossing", "life")
TABLE = [  # shape, layers, rank, batch
    ("ViT-tiny", 12, 1024, 8),
    ("ViT-tiny", 12, 64, 8),
    ("ViT-small", 12, 1024, 8),
    ("ViT-small", 12, 64, 4),
    ("BERT", 4, 256, 8),
    ("GPT-2", 4, 256, 8),
    ("ViT-base", 12, 64, 2),
    ("ViT-base", 12, 1024, 8),
]
ON_CUDA = [
    ("ViT-base", 12, 1024, 64),
    ("RoBERTa-large", 24, 1024, 32),
    ("Llama 1B", 16, 1024, 4),
    ("Llama 8B", 8, 1024, 2),
]


def models(
    part: str, shape: str, layers: int, rank: int, batch: int, given: argparse.Namespace
) -> list[dict]:
    """One row for each method on one model."""
    spec = SHAPES[shape]
    dtype = torch.bfloat16 if given.precision == "bf16-true" else torch.float32
    base, x = spec.build(layers).to(given.device, dtype), spec.batch(batch).to(given.device)
    x = x.to(dtype) if x.is_floating_point() else x
    built = {method: build(spec, base, method, rank) for method in METHODS}
    budget = 1 if given.quick else given.seconds
    readings = interleaved(built, x, budget, given.precision == "bf16-mixed", given.compile)
    rows = []
    for method, r in readings.items():
        print(
            f"{part} {shape}, {layers} layers, r {rank}, batch {batch}: {method:14} "
            f"{r.seconds * 1e3:8.1f} ms {r.ratio:6.3f} x floor [{r.low:.3f}, {r.high:.3f}]  "
            f"saved {r.saved / 2**20:7.1f} MiB, "
            f"peak {r.peak / 2**20:7.1f} MiB",
            flush=True,
        )
        precision = given.precision + (", compiled" if given.compile else "")
        where = [part, shape, precision, layers, rank, batch, batch * spec.length]
        what = [round(r.seconds * 1e3, 2), *(round(v, 4) for v in (r.ratio, r.low, r.high))]
        memory = [round(r.saved / 2**20, 2), round(r.peak / 2**20, 2)]
        rows.append(dict(zip(COLUMNS, [*where, method, *what, *memory, r.trained], strict=True)))
    return rows


def crossing(given: argparse.Namespace) -> Iterator[dict]:
    """One layer alone, merged against factored, over tokens and ranks: where the cost model should decide."""
    sizes = [(192, 576), (768, 768), (768, 2304)]
    for n, m in sizes[:1] if given.quick else sizes:
        for rank in (16,) if given.quick else (16, 64, 256, 1024):
            for tokens in (64, 256) if given.quick else (64, 256, 1024, 4096):
                yield from _one_layer(n, m, rank, tokens, given)


def _one_layer(n: int, m: int, rank: int, tokens: int, given: argparse.Namespace) -> list[dict]:
    x = torch.randn(tokens, n, device=given.device, requires_grad=True)
    layers = {}
    for how in ("merged", "factored"):
        layers[how] = nn.Sequential(nn.Linear(n, m)).to(given.device)
        attach_uora(layers[how], UORAConfig(rank, "all-linear", trainable_modules=(), compute=how))
    g, times = torch.randn(tokens, m, device=given.device), {"merged": [], "factored": []}
    for turn in range(3 if given.quick else 13):
        for how, layer in layers.items():
            start = now(x)
            layer(x).backward(g)
            if turn >= 2:
                times[how].append(now(x) - start)
    merged, factored = (sorted(t)[len(t) // 2] for t in times.values())
    counted = factored_flops(tokens, m, n, rank) / merged_flops(tokens, m, n, rank)
    auto = factored if counted < 1 else merged
    loss = auto / min(merged, factored)
    print(f"{n} -> {m}, r {rank}, {tokens} tokens: factored / merged {factored / merged:.2f}, counted "
          f"{counted:.2f}; the automatic choice {loss:.2f} x the better", flush=True)  # fmt: skip
    rows = []
    for method, seconds in (("merged", merged), ("factored", factored), ("auto", auto)):
        row = ["crossing", f"{n} -> {m}", "32", 1, rank, tokens, tokens, method, round(seconds * 1e3, 3)]
        ratio = [seconds / min(merged, factored), counted, 0.0, 0.0, 0.0, 0]
        rows.append(dict(zip(COLUMNS, row + [round(v, 4) for v in ratio], strict=True)))
    return rows


def life(given: argparse.Namespace) -> Iterator[dict]:
    """What is done once (seconds), memory that attaching takes, and evaluation against the plain model."""
    rank = 64 if given.quick else 1024
    name = "ViT-tiny" if given.quick else "ViT-base"
    spec = SHAPES[name]
    model, other, plain = (spec.build(12).to(given.device).eval() for _ in range(3))
    other.load_state_dict(model.state_dict())
    config = UORAConfig(rank=rank, target_modules="qkv", trainable_modules=())
    attach_uora(spec.build(1), config)  # pages LAPACK in
    x = spec.batch(1).to(given.device)

    def row(what: str, seconds: float, ratio: float = 0.0, peak: float = 0.0) -> dict:
        print(
            f"{name}, rank {rank}: {what} {seconds:.2f} s, {ratio:.3f} x, {peak / 2**20:.0f} MiB", flush=True
        )
        values = [round(seconds * 1e3, 1), round(ratio, 4), 0.0, 0.0, 0.0, round(peak / 2**20, 1), 0]
        return dict(zip(COLUMNS, ["life", name, "32", 12, rank, 0, 0, what, *values], strict=True))

    start = time.perf_counter()
    grown = peak_of(lambda: attach_uora(model, config), x)
    yield row("attach", time.perf_counter() - start, peak=grown)
    with torch.no_grad():
        for _, module in named_adapters(model):
            module.uora_d.uniform_()
            module.uora_b.uniform_()
    with tempfile.TemporaryDirectory() as folder:
        schedule = ReinitSchedule(threshold=0.25, threshold_mode="fraction")
        works = {
            "refresh of a quarter": lambda: refresh(model, schedule),
            "save": lambda: save_adapter(model, folder),
            "load": lambda: load_adapter(other, folder),
        }
        for what, work in works.items():
            start = time.perf_counter()
            work()
            yield row(what, time.perf_counter() - start)
    yield row("evaluation", *_evaluation(plain, model, x, 3 if given.quick else 15))
    start = time.perf_counter()
    detach_uora(model, merge=True)
    yield row("merge", time.perf_counter() - start)


@torch.inference_mode()
def _evaluation(plain: nn.Module, adapted: nn.Module, x: Tensor, rounds: int) -> tuple[float, float]:
    """Median seconds of the adapted model without gradients, and as a ratio to the plain one."""
    adapted(x)
    times = []
    for _ in range(rounds):
        start = now(x)
        plain(x)
        middle = now(x)
        adapted(x)
        times.append((now(x) - middle, middle - start))
    return statistics.median(a for a, _ in times), statistics.median(a / b for a, b in times)


def measured(part: str, given: argparse.Namespace) -> Iterator[dict]:
    """All rows of one part."""
    quick = given.quick
    if part == "table":
        rows = ON_CUDA if given.device == "cuda" else TABLE
        for shape, layers, rank, batch in [("ViT-tiny", 1, 16, 1)] if quick else rows:
            if given.shapes and shape not in given.shapes:
                continue
            yield from models(part, shape, layers, rank, batch, given)
    elif part == "rank":
        for rank in (16,) if quick else (16, 64, 256, 1024):
            yield from models(part, "ViT-tiny", 1 if quick else 4, rank, 1 if quick else 8, given)
    elif part == "tokens":
        for rank, batch in [(16, 1)] if quick else [(r, b) for r in (64, 1024) for b in (1, 4, 16, 64)]:
            yield from models(part, "ViT-tiny", 1 if quick else 4, rank, batch, given)
    elif part == "layers":
        for layers in (1,) if quick else (2, 6, 12, 24):
            yield from models(part, "ViT-tiny", layers, 16 if quick else 256, 1 if quick else 4, given)
    else:
        yield from (crossing if part == "crossing" else life)(given)


def keep(row: dict) -> None:
    """Put a row into the table, in place of one of the same measurement."""
    path, old = RESULTS / "step_time.csv", []
    same = COLUMNS[: COLUMNS.index("method") + 1]
    if path.exists():
        with path.open(newline="") as file:
            old = [r for r in csv.DictReader(file) if any(r[c] != str(row[c]) for c in same)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*old, row])


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--report", action="store_true", help="only make the table and the plot anew")
    parser.add_argument("--seconds", type=float, default=40, help="about so long for each model")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), help="of the table, only these")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="32", choices=["32", "bf16-mixed", "bf16-true"])
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    if not set(given.parts) <= set(PARTS):
        parser.error(f"parts are {', '.join(PARTS)}; got {' '.join(given.parts)}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for part in () if given.report else given.parts or PARTS:
        for row in measured(part, given):
            if not given.quick:
                keep(row)
    if not given.quick:
        from step_time_report import report

        report(RESULTS)


if __name__ == "__main__":
    main()
