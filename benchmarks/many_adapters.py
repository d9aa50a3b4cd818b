"""Mixed batches: every sample with its own adapter, against PEFT's LoRA r 8 (``adapter_names``).

    python benchmarks/many_adapters.py            # about 25 minutes on two busy cores
    python benchmarks/many_adapters.py --quick    # tiny shapes: whether every row runs; nothing is kept

Forward passes without gradients, adapters of random numbers on all linear layers, one adapter and 8 and 64 in
a batch; times are medians of interleaved rounds in one process, each over the base's of the same round.
ViT-tiny sees 32 images (so at most 32 adapters a batch). The GPT-2 shape (8 layers of width 512) sees 64
sequences: of 128 tokens, or of one token with a cache of 32; every pass enters its own context. "resident" is
what all adapters hold in memory: 64 of them, and for the GPT-2 shape 1, 100 and 1,000 (of LoRA
1 and 100). "first use" is how long a bank takes until a stored adapter computes.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import timm
import torch
import transformers
from torch import nn

from lightning_uora import (
    AdapterBank,
    UORAConfig,
    add_adapter,
    attach_uora,
    named_adapters,
    save_adapter,
    set_adapter,
    use_adapters,
)

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from bundled import minilm

RESULTS = Path(__file__).parent / "results"
COLUMNS = ["shape", "samples", "method", "rank", "adapters", "of_base", "seconds", "resident_kb"]
ADAPTERS, ROUNDS = 64, 9
Job = Callable[[], object]


def vit(quick: bool) -> tuple[nn.Module, Callable[[nn.Module], Any], int]:
    """ViT-tiny on images."""
    size = 64 if quick else 224
    model = timm.create_model("vit_tiny_patch16_224", img_size=size, num_classes=10)
    images = torch.randn(8 if quick else 32, 3, size, size)
    return model, lambda m: m(images), len(images)


def gpt(tokens: int, quick: bool) -> tuple[nn.Module, Callable[[nn.Module], Any], int]:
    """A GPT-2 shape on sequences; one token with a cache of 32."""
    sizes = {"n_embd": 64, "n_layer": 2} if quick else {"n_embd": 512, "n_layer": 8}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=1000, n_head=8, **sizes))
    samples = 8 if quick else 64
    ids = torch.randint(0, 1000, (samples, tokens))
    if tokens > 1:
        return model, lambda m: m(input_ids=ids, use_cache=False), samples
    past = torch.randint(0, 1000, (samples, 32))
    with torch.no_grad():
        cache = model(input_ids=past, use_cache=True).past_key_values

    def step(m: nn.Module) -> Any:
        out = m(input_ids=ids, past_key_values=cache, use_cache=True)
        cache.crop(-1)
        return out

    return model, step, samples


TARGETS = {"vit": ["qkv", "proj", "fc1", "fc2"], "gpt": ["c_attn", "c_proj", "c_fc"]}


def uora(model: nn.Module, kind: str, rank: int, count: int) -> int:
    """Adapters a0, a1, ... of random numbers; the bytes that they hold together."""
    names = [f"re:.*(blocks|h)\\..*({'|'.join(TARGETS[kind])})"]
    config = UORAConfig(rank=rank, target_modules=names, trainable_modules=())
    attach_uora(model, config)
    for number in range(count):
        add_adapter(model, f"a{number}")
        for _, module in named_adapters(model):
            nn.init.normal_(module.uora_b, std=0.1)
    set_adapter(model, "default")
    vectors = sum(p.nbytes for name, p in model.named_parameters() if "uora" in name)
    return vectors + sum(b.nbytes for name, b in model.named_buffers() if "uora" in name)


def lora(model: nn.Module, kind: str, count: int) -> tuple[nn.Module, int]:
    """PEFT's, with names likewise."""
    config = peft.LoraConfig(r=8, target_modules=TARGETS[kind], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config, adapter_name="a0")
    for number in range(1, count):
        adapted.add_adapter(f"a{number}", config)
    held = sum(p.nbytes for name, p in adapted.named_parameters() if "lora_" in name)
    return adapted.eval(), held


def medians(jobs: dict[str, Job], rounds: int) -> dict[str, tuple[float, float]]:
    """Seconds, and of the base's in the same round, by job; interleaved."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds + 1):
        for name, job in jobs.items():
            begin = time.perf_counter()
            job()
            times[name].append(time.perf_counter() - begin)
    kept = {name: found[1:] for name, found in times.items()}
    base = kept["base"]
    ratio = {n: statistics.median(a / b for a, b in zip(t, base, strict=True)) for n, t in kept.items()}
    return {name: (statistics.median(found), ratio[name]) for name, found in kept.items()}


@torch.no_grad()
def measure(shape: str, kind: str, make: Callable[[], tuple[nn.Module, Any, int]], quick: bool) -> list[dict]:
    """All rows of a shape."""
    torch.manual_seed(0)
    base, run, samples = make()
    base.eval()
    models: dict[str, tuple[nn.Module, int]] = {}
    rank = 16 if quick else 256
    torch.manual_seed(0)
    ours = make()[0].eval()
    held = {"UORA": uora(ours, kind, rank, ADAPTERS)}
    torch.manual_seed(0)
    theirs, held["LoRA"] = lora(make()[0].eval(), kind, ADAPTERS)
    del models
    jobs: dict[str, Job] = {"base": lambda: run(base)}
    for count in (1, 8, 64):
        names = [f"a{number % count}" for number in range(samples)]

        def mixed(names: list[str] = names) -> Any:
            with use_adapters(ours, names):
                return run(ours)

        def peft_mixed(names: list[str] = names) -> Any:
            return run(lambda *a, **k: theirs(*a, **k, adapter_names=names))  # type: ignore[arg-type]

        jobs[f"UORA {count}"], jobs[f"LoRA {count}"] = mixed, peft_mixed
    rows = []
    for name, (seconds, ratio) in medians(jobs, 2 if quick else ROUNDS).items():
        method, _, count = name.partition(" ")
        row = {"shape": shape, "samples": samples, "method": method, "adapters": count or 0}
        row |= {"rank": {"UORA": rank, "LoRA": 8}.get(method, 0), "of_base": round(ratio, 3)}
        row |= {"seconds": round(seconds, 4), "resident_kb": round(held.get(method, 0) / 1024)}
        rows.append(row)
        print(row, flush=True)
    return rows


def resident(quick: bool) -> list[dict]:
    """Bytes that 1, 100 and 1,000 adapters of the GPT-2 shape hold."""
    rows = []
    for count in (1, 4) if quick else (1, 100, 1000):
        for method, rank in (("UORA", 256), ("UORA", 64), ("LoRA", 8))[: 2 if count > 100 else 3]:
            model = gpt(8, quick)[0]
            held = uora(model, "gpt", rank, count) if method == "UORA" else lora(model, "gpt", count)[1]
            row = {"shape": "resident", "method": method, "rank": rank, "adapters": count}
            rows.append(row | {"resident_kb": round(held / 1024)})
            print(rows[-1], flush=True)
    return rows


def bank(quick: bool) -> list[dict]:
    """Seconds until a stored adapter of a MiniLM computes, when it is first named; the median of nine."""
    count, folder = 3 if quick else 10, tempfile.mkdtemp()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2).eval()
    trained = copy.deepcopy(model)
    attach_uora(trained, UORAConfig(rank=64))
    for number in range(count):
        save_adapter(trained, f"{folder}/a{number}")
    shelf, seconds = AdapterBank(model, folder, limit=count), []
    for number in range(count):
        begin = time.perf_counter()
        with shelf.use([f"a{number}"]):
            seconds.append(time.perf_counter() - begin)
    row = {"shape": "first use, MiniLM", "method": "UORA", "rank": 64, "adapters": count}
    print(row | {"seconds": round(statistics.median(seconds[1:]), 4)}, flush=True)
    return [row | {"seconds": round(statistics.median(seconds[1:]), 4)}]


def report(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = [f"{__doc__}".split("\n\n", maxsplit=2)[2].strip(), ""]
    lines += ["| shape | samples | method | adapters | of the base | seconds | resident, kB |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in rows:
        name = row["method"] if row["method"] == "base" else f"{row['method']} r {row['rank']}"
        cells = [
            row["shape"],
            row.get("samples", ""),
            name,
            row["adapters"],
            row.get("of_base", ""),
            row.get("seconds", ""),
            f"{row['resident_kb']:,}" if "resident_kb" in row else "",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(["# Many adapters in a batch", "", *lines, "", "On an accelerator: not measured.", ""])


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    shapes: dict[str, tuple[str, Any]] = {
        "ViT-tiny": ("vit", lambda: vit(quick)),
        "GPT-2 shape, 1 token": ("gpt", lambda: gpt(1, quick)),
        "GPT-2 shape, 128 tokens": ("gpt", lambda: gpt(128 if not quick else 8, quick)),
    }
    rows = [row for shape, (kind, make) in shapes.items() for row in measure(shape, kind, make, quick)]
    rows += bank(quick) + resident(quick)
    if quick:
        return
    with (RESULTS / "many_adapters.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (RESULTS / "many_adapters.md").write_text(report(rows))


if __name__ == "__main__":
    main()
