"""Peak memory and time of a training step on Llama-shaped stacks: frozen base, LoRA, PEFT's VeRA and UORA.

    python benchmarks/memory.py              # all rows; an hour on two cores
    python benchmarks/memory.py --shapes 1B  # some of them; the others are kept
    python benchmarks/memory.py --quick      # tiny layers: whether every row runs; nothing is kept

Random weights, in bfloat16 or packed to nf4 (bitsandbytes), adapters on all linear layers, AdamW. Each row is
a process of its own: the peak is the highest resident memory of the steps less what the process took before
there was a model. "after" is after four refreshes of the default schedule on drawn vectors. The Mixtral block
has 8 experts of 44 million numbers (84 MiB) each, which LoRA leaves alone and UORA adapts.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import resource
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
SHAPES = {
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 16,
    },
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2},
    "2 layers of 8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
MIXTRAL = "Mixtral block"
SHAPES[MIXTRAL] = {
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "num_hidden_layers": 1,
}
BASES = ("bfloat16", "nf4")
METHODS = (
    ("floor", 0),
    ("lora", 8),
    ("vera", 256),
    ("vera", 1024),
    ("uora", 256),
    ("uora after", 256),
    ("uora", 1024),
    ("uora after", 1024),
)
FEWER = tuple(one for one in METHODS if one[1] <= 256)
WITH_EXPERTS = (("floor", 0), ("lora on attention", 8), ("uora", 256), ("uora after", 256))
COLUMNS = ["shape", "base", "checkpointing", "method", "rank", "tokens", "peak_mib", "seconds", "trainable"]
STEPS = 3


def resident() -> float:
    """Peak resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def packed(model, kind: str) -> None:
    """Put a 4-bit layer in the place of every Linear, one by one."""
    import bitsandbytes as bnb
    import torch
    from torch import nn

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                new = bnb.nn.Linear4bit(
                    child.in_features,
                    child.out_features,
                    bias=False,
                    compute_dtype=torch.bfloat16,
                    quant_type=kind,
                    device="meta",
                )
                new.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type=kind)
                setattr(module, name, new.to("cpu"))
                del child
    gc.collect()


def adapted(model, method: str, rank: int):
    """The model with that method's adapters on all linear layers."""
    import torch
    from peft import LoraConfig, VeraConfig, get_peft_model

    from lightning_uora import ReinitSchedule, UORAConfig, attach_uora, named_adapters, refresh

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    if method == "floor":
        return model.requires_grad_(False)
    if method == "lora on attention":
        return get_peft_model(model, LoraConfig(r=rank, target_modules=names[:4]))
    if method == "lora":
        return get_peft_model(model, LoraConfig(r=rank, target_modules=names))
    if method == "vera":
        return get_peft_model(model, VeraConfig(r=rank, target_modules=names))
    attach_uora(model, UORAConfig(rank=rank, target_modules="all-linear", trainable_modules=()))
    if method == "uora after":
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            with torch.no_grad():
                for _, layer in named_adapters(model):
                    layer.uora_d.copy_(torch.randn(layer.uora_d.shape, generator=generator))
            refresh(model, ReinitSchedule())
    return model


def measure(shape: str, base: str, checkpointing: bool, method: str, rank: int, tokens: int) -> dict:
    """One row, in this process."""
    import torch
    import transformers

    from lightning_uora import attach_uora  # noqa: F401 - its import is not the model's memory

    torch.set_num_threads(2)
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "vocab_size": 1000, "dtype": "bfloat16", **SHAPES[shape]}
    kind = transformers.MixtralConfig if "num_local_experts" in sizes else transformers.LlamaConfig
    config = kind(**sizes)
    start = resident()
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    if base != "bfloat16":
        packed(model.model, base)
    model = adapted(model, method, rank).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what refreshing and packing have freed is not the step's
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3) if trained else None
    embedded = torch.randn(1, tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    seconds = []
    for _ in range(STEPS):
        begin = time.perf_counter()
        model(inputs_embeds=embedded).logits.float().square().mean().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin)
    return {
        "shape": shape,
        "base": base,
        "checkpointing": checkpointing,
        "method": method,
        "rank": rank,
        "tokens": tokens,
        "peak_mib": round(peak() - start),
        "seconds": round(statistics.median(seconds), 2),
        "trainable": sum(p.numel() for p in trained),
    }


def peak() -> float:
    """Highest resident memory since it was last cleared, in MiB."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024


def alone(*row: object) -> dict:
    """A row in a process of its own."""
    command = [sys.executable, __file__, "--row", *map(str, row)]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    if out.returncode:
        raise RuntimeError(out.stderr[-2000:])
    return dict(zip(COLUMNS, next(csv.reader([out.stdout.strip().splitlines()[-1]])), strict=True))


def report(rows: list[dict]) -> str:
    """The rows as Markdown, each beside LoRA r 8 on the same base."""
    lines = [f"{__doc__}".split("\n\n", maxsplit=2)[2].strip(), ""]
    lines += ["| stack | base | checkpointing | method | peak MiB | of LoRA r 8 | step, s | trainable |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in rows:
        place = ("shape", "base", "checkpointing", "tokens")
        same = (
            one
            for one in rows
            if one["method"].startswith("lora") and all(str(one[k]) == str(row[k]) for k in place)
        )
        lora = next(same, None)
        share = f"{float(row['peak_mib']) / float(lora['peak_mib']):.3f}" if lora else ""
        name = row["method"].upper().replace(" AFTER", ", after refreshes")
        name = "frozen base" if row["method"] == "floor" else f"{name}, r {row['rank']}"
        again = "yes" if str(row["checkpointing"]) == "True" else "no"
        cells = [f"{row['shape']}, {row['tokens']} tokens", row["base"], again, name, row["peak_mib"], share]
        lines.append(f"| {' | '.join([*cells, row['seconds'], format(int(row['trainable']), ',')])} |")
    return "\n".join([*lines, "", "On an accelerator: not measured.", ""])


def jobs(shape: str) -> list[tuple]:
    """Base, checkpointing and methods of a shape's rows."""
    if shape == MIXTRAL:
        return [("bfloat16", False, WITH_EXPERTS)]
    if shape == "1B":
        return [(base, False, FEWER) for base in BASES]
    return [(base, again, FEWER if again else METHODS) for base in BASES for again in (False, True)]


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--shapes", nargs="+", default=[s for s in SHAPES if s != "tiny"], choices=SHAPES)
    parser.add_argument("--row", nargs=6, help=argparse.SUPPRESS)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.row:
        shape, base, checkpointing, method, rank, tokens = given.row
        row = measure(shape, base, checkpointing == "True", method, int(rank), int(tokens))
        csv.DictWriter(sys.stdout, COLUMNS).writerow(row)
        return
    tokens, shapes = (32, ["tiny"]) if given.quick else (512, given.shapes)
    rows = []
    for shape in shapes:
        for base, checkpointing, methods in jobs(shape):
            for method, rank in methods:
                rows.append(alone(shape, base, checkpointing, method, rank, tokens))
                print(rows[-1], flush=True)
    if given.quick:
        return
    with (RESULTS / "memory.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["shape"] not in shapes] + rows
    with (RESULTS / "memory.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (RESULTS / "memory.md").write_text(f"# Memory of a training step\n\n{report(rows)}")


if __name__ == "__main__":
    main()
