"""Draws that know the inputs, measured: what calibration costs, and how good the sketch is.

    python benchmarks/calibration.py cost       # seconds and memory; about six minutes on one core
    python benchmarks/calibration.py sketch     # principal angles to the exact axes, on trained features
    add --quick for a smoke run, --device cuda for an accelerator

Cost: random weights, random inputs. ViT-B/16, a BERT-base shape, and two layers of a 1-billion Llama shape
(width 2048, 5632 inside), eight calibration batches each, targets as a user would choose them; a training
step is forward, backward and AdamW on the vectors. "Held" is what the moments occupy beyond A; on an
accelerator the peak of the allocator beyond that of a forward without gradients is given too. Sketch: the
axes of each layer's inputs in a ViT (width 384) trained on the digits, found exactly in float64 and by
the sketch. What it does to the scores is in the table of ``benchmarks/quality.py``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from torch import Tensor, nn
from training import fit, now, pretrain

from lightning_uora import UORAConfig, attach_uora, calibrate, named_adapters
from lightning_uora.adapters import attachment_of
from lightning_uora.inputs.moments import ExactMoment, SketchedMoment, sketch_size
from lightning_uora.inputs.observer import Observer
from lightning_uora.inputs.passes import Watch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from bundled import digits

TARGETS = ["qkv", "proj", "fc1", "fc2"]


def shapes(quick: bool) -> dict[str, tuple[Callable[[], nn.Module], Any, Callable[[nn.Module, Any], Tensor]]]:
    """Name: how to build the model, a batch maker, and the loss of a batch."""
    scale = 8 if quick else 1
    tokens = 16 if quick else 256
    vit = {"embed_dim": 768 // scale, "depth": 12 // (scale // 4 or 1), "num_heads": 12 // (scale // 4 or 1)}
    width = {"hidden_size": 768 // scale, "num_attention_heads": 12, "intermediate_size": 3072 // scale}
    bert = transformers.BertConfig(**width, num_hidden_layers=2 if quick else 12, vocab_size=1000)
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4, "num_hidden_layers": 2}
    llama = transformers.LlamaConfig(
        hidden_size=2048 // scale, intermediate_size=5632 // scale, vocab_size=1000, **heads
    )

    def ids(batch: int, length: int) -> Tensor:
        return torch.randint(0, 1000, (batch, length))

    return {
        "ViT-B/16, batch 4": (
            lambda: timm.models.VisionTransformer(img_size=32 if quick else 224, num_classes=10, **vit),
            lambda: torch.randn(4, 3, *[32 if quick else 224] * 2),
            lambda model, x: model(x).square().mean(),
        ),
        f"BERT-base, batch 4 x {tokens // 2}": (
            lambda: transformers.BertModel(bert),
            lambda: ids(4, tokens // 2),
            lambda model, x: model(x).last_hidden_state.square().mean(),
        ),
        f"Llama 1B, 2 layers, batch 1 x {tokens}": (
            lambda: transformers.LlamaModel(llama),
            lambda: ids(1, tokens),
            lambda model, x: model(x).last_hidden_state.square().mean(),
        ),
    }


def held(model: nn.Module, batch: Tensor, forward: Callable[[Tensor], Tensor]) -> int:
    """Bytes that the moments of a calibration hold at most, as one batch shows."""
    one = attachment_of(model, "a benchmark")
    watch = Watch(one, one.owner.config.rank, off=True)
    watch.run([batch], forward, model, fewest=0)
    moments = watch.moments.values()
    return sum(m.sum.nbytes * 3 // 2 if isinstance(m, SketchedMoment) else m.sum.nbytes for m in moments)


def cost(quick: bool, device: str) -> None:
    """Seconds of a calibration in training steps, and memory, for each shape and rank."""
    for name, (build, batch, loss) in shapes(quick).items():
        for rank in (4,) if quick else (16, 256):
            model = build().to(device)
            weights = sum(p.nbytes for p in model.parameters())
            attach_uora(model, UORAConfig(rank=rank, target_modules="attention", init="inputs"))
            batches = [batch().to(device) for _ in range(8)]
            forward = lambda x, model=model, loss=loss: loss(model, x)  # noqa: E731
            moments = held(model, batches[0], forward)
            peak = ""
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                with torch.no_grad():
                    model.eval()(batches[0])
                plain = torch.cuda.max_memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            start = now()
            calibrate(model, batches, forward)
            seconds = now() - start
            if device == "cuda":
                above = torch.cuda.max_memory_allocated() - plain
                peak = f", peak {above / 2**20:.1f} MiB above a forward's"
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
            model.train()
            steps = fit(forward, batches[:1] * (2 if quick else 4), optimizer)
            step = statistics.median(steps[1:])
            layers = list(named_adapters(model))
            A = sum(rank * part.n * 4 for _, module in layers for part in module.adapted_parts)
            print(
                f"{name}, r {rank}, {len(layers)} modules: {seconds:.2f} s = {seconds / step:.1f} "
                f"training steps of {step:.3f} s; A {A / 2**20:.1f} MiB, moments hold "
                f"{moments / 2**20:.1f} MiB = {moments / weights:.2%} of the weights{peak}",
                flush=True,
            )


def trained_wide_vit(epochs: int) -> nn.Module:
    """A ViT of width 384 after some epochs on the digits 0-4."""
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 384, "depth": 3, "num_heads": 6}
    model, data = (
        timm.models.VisionTransformer(**sizes, mlp_ratio=2.0, num_classes=5),
        digits(range(5), False),
    )
    pretrain(model, data, lr=5e-4, epochs=epochs)
    return model


def sketch(quick: bool) -> None:
    """Angles and lost second moment of the sketch, against eigenvectors in float64."""
    model = trained_wide_vit(0 if quick else 6)
    attach_uora(model, UORAConfig(4, TARGETS, ["patch_embed"], init="inputs"))
    x = digits(range(5, 10), moved=True).tensors[0][: 64 if quick else 512]
    seen: dict[tuple[int, str], list[Tensor]] = {}
    one = attachment_of(model, "a benchmark")
    owner = one.owner
    owner.disabled += 1
    with torch.no_grad(), Observer(one, lambda layer, part, rows: seen.setdefault(
        (layer.layer_index, part.name), []).append(rows)):  # fmt: skip
        model.eval()(x)
    for rank in (4,) if quick else (16, 64):
        results: dict[tuple[str, int], list[tuple[float, ...]]] = {}
        for rows in seen.values():
            inputs = torch.cat(rows)
            n = inputs.shape[1]
            exact = torch.linalg.eigh(inputs.double().t() @ inputs.double())[1].flip(1)[:, :rank]
            test = torch.randn(n, sketch_size(rank), generator=torch.Generator().manual_seed(0))
            for moment in (ExactMoment(n, inputs.device), SketchedMoment(test)):
                results.setdefault((type(moment).__name__, n), []).append(compare(moment, inputs, exact))
        for (kind, n), found in results.items():
            mean, largest, axis, lost = (torch.tensor(column) for column in zip(*found, strict=True))
            print(
                f"r {rank}, n {n}, {kind} of {len(found)} layers: principal angles mean {mean.mean():.3f}, "
                f"largest {largest.max():.3f}, median angle of single axes {axis.mean():.3f} degrees; "
                f"at most {lost.max():.1e} of the leading second moment lost",
                flush=True,
            )


def compare(moment: ExactMoment | SketchedMoment, inputs: Tensor, exact: Tensor) -> tuple[float, ...]:
    """Mean and largest principal angle, median angle of single axes (degrees), share of the moment lost."""
    for number in range(moment.passes):
        if number:
            moment.next_pass()
        moment.add(inputs)
    U, x = moment.axes().present()[: exact.shape[1]].t(), inputs.double()
    exact = exact[:, : U.shape[1]]
    sines = torch.linalg.svdvals(U - exact @ (exact.t() @ U)).clamp(max=1)
    single = (U * exact).sum(0).abs().clamp(max=1).acos().rad2deg().median().item()
    lost = 1 - (x @ U).square().sum() / (x @ exact).square().sum()
    angles = sines.asin().rad2deg()
    return angles.mean().item(), angles.max().item(), single, lost.item()


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["cost", "sketch"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if arguments.what == "cost":
        cost(arguments.quick, arguments.device)
    else:
        sketch(arguments.quick)


if __name__ == "__main__":
    main()
