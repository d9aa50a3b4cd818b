"""The tasks of ``quality.py``: what is adapted, to what, on which rows, and how the result is scored.

Every task is real data that comes with Python or PyPI, split anew for each seed into training, validation and
test rows. What a task needs to pretrain is kept in ``outputs/quality``; in a quick run it is pretrained for
one epoch, and kept apart.
"""

from __future__ import annotations

import copy
import fcntl
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from timm.utils.model import freeze_batch_norm_2d
from torch import Tensor, nn
from training import pretrain
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from bundled import digits, docstring_topics, efficientnet, enlarged, fashion, minilm
from compare import quiet_transformers
from small_lm import load
from vision_timm import small_vit

SPLITS = ("train", "val", "test")


class Task:
    """One problem for one seed: a model, rows, a loss and a score in points, higher is better.

    Attributes:
        base: The pretrained model with a fresh head; copy it before it is adapted.
        names: Full names of the modules to adapt.
        head: Name of the module that every method trains, or "".
        others: Names of modules that are trained beside, at the head's rate, and counted.
        rows: Row indices of each split.
        order: For each training step, the indices of its batch.
    """

    metric = "accuracy"
    head = ""
    head_lr = 3e-3
    base: nn.Module
    names: list[str]
    others: Sequence[str] = ()
    steps, batch_size, sizes = 0, 0, (0, 0, 0)

    def __init__(self, seed: int, total: int, quick: bool) -> None:
        if quick:
            self.steps, self.sizes = 8, (32, 32, 32)
        generator = torch.Generator().manual_seed(seed)
        shuffled_rows = torch.randperm(total, generator=generator)[: sum(self.sizes)]
        self.rows = dict(zip(SPLITS, shuffled_rows.split(self.sizes), strict=True))
        drawn = torch.randint(self.sizes[0], (self.steps, self.batch_size), generator=generator)
        self.order = list(self.rows["train"][drawn])

    def model(self) -> nn.Module:
        """A copy to adapt."""
        return copy.deepcopy(self.base)

    def adapted(self, *leaves: str, within: str = "") -> list[str]:
        """Full names of the modules whose last part is one of ``leaves``."""
        names = (name for name, _ in self.base.named_modules() if within in name)
        return [name for name in names if name.rpartition(".")[2] in leaves]

    def run(self, model: nn.Module, index: Tensor) -> Any:
        """Forward those rows."""
        raise NotImplementedError

    def loss(self, model: nn.Module, index: Tensor) -> Tensor:
        """What training minimises."""
        return nn.functional.cross_entropy(self.run(model, index), self.labels(index))

    def labels(self, index: Tensor) -> Tensor:
        """What :meth:`run` should say."""
        raise NotImplementedError

    @torch.inference_mode()
    def score(self, model: nn.Module, split: str) -> float:
        """Right answers among all, in percent."""
        right = total = 0
        for index in self.rows[split].split(64):
            said, wanted = self.run(model.eval(), index).argmax(-1), self.labels(index)
            right += int((said == wanted).sum())
            total += wanted.numel()
        return 100 * right / total


class Digits(Task):
    """A small timm ViT pretrained on the digits 0-4, adapted to 5-9, inverted and rotated by 90 degrees."""

    head = "head"
    steps, batch_size, sizes = 240, 64, (250, 250, 390)

    def __init__(self, seed: int, quick: bool = False) -> None:
        data = digits(range(5, 10), moved=True)
        super().__init__(seed, len(data), quick)
        self.x, self.y = data.tensors
        self.base = _pretrained_vit(seed, quick)
        torch.manual_seed(seed)
        self.base.reset_classifier(5)
        self.names = self.adapted("qkv", "proj", "fc1", "fc2", within="blocks.")

    @override
    def run(self, model: nn.Module, index: Tensor) -> Tensor:
        return model(self.x[index])

    @override
    def labels(self, index: Tensor) -> Tensor:
        return self.y[index]


def _kept(quick: bool) -> Path:
    return Path("outputs", "quality-quick" if quick else "quality")


def _pretrained_vit(seed: int, quick: bool) -> nn.Module:
    kept = _kept(quick) / f"vit-{seed}.pt"
    model = small_vit()
    if kept.exists():
        model.load_state_dict(torch.load(kept, weights_only=True))
        return model
    torch.manual_seed(seed)
    model, data = small_vit(), digits(range(5), moved=False)
    pretrain(model, data, lr=1e-3, epochs=1 if quick else 25)
    _keep(model.state_dict(), kept)
    return model


class Docstrings(Task):
    """MiniLM with its real pretrained weights, to ten topics of standard-library docstrings."""

    head = "classifier"
    head_lr = 1e-2
    steps, batch_size, sizes = 80, 16, (600, 200, 500)
    leaves: tuple[str, ...] = ("query", "value")

    def __init__(self, seed: int, quick: bool = False) -> None:
        self.ids, self.mask, self.y = _tokenised_docstrings()
        super().__init__(seed, len(self.y), quick)
        torch.manual_seed(seed)
        self.base = _minilm()
        self.names = self.adapted(*self.leaves, within="encoder.")

    @override
    def run(self, model: nn.Module, index: Tensor) -> Tensor:
        longest = int(self.mask[index].sum(1).max())
        ids, mask = self.ids[index, :longest], self.mask[index, :longest]
        return model(input_ids=ids, attention_mask=mask).logits

    @override
    def labels(self, index: Tensor) -> Tensor:
        return self.y[index]


class DocstringsAll(Docstrings):
    """The same with adapters on every linear layer of the encoder."""

    leaves = ("query", "key", "value", "dense")


def _minilm() -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    quiet_transformers()
    return AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=10)


@cache
def _tokenised_docstrings(length: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    from transformers import AutoTokenizer

    texts, labels = zip(*docstring_topics(), strict=True)
    how = {"truncation": True, "max_length": length, "padding": "max_length", "return_tensors": "pt"}
    tokens = AutoTokenizer.from_pretrained(minilm())(list(texts), **how)
    return tokens["input_ids"], tokens["attention_mask"], torch.tensor(labels)


class Fashion(Task):
    """EfficientNet-Lite0 with its real ImageNet weights to Fashion-MNIST, 48 px; all convolutions.

    Attributes:
        only: What the adapted modules' names hold.
        moving: Whether BatchNorm's running statistics move in training.
        affine: Whether BatchNorm's weights and biases are trained beside the adapters.
    """

    head = "classifier"
    steps, batch_size, sizes = 200, 32, (1000, 500, 2000)
    size, only, moving, affine = 48, ("",), True, False

    def __init__(self, seed: int, quick: bool = False) -> None:
        self.x, self.y = fashion("train").tensors
        super().__init__(seed, len(self.x), quick)
        torch.manual_seed(seed)
        base = efficientnet(10).to(memory_format=torch.channels_last)
        self.base = base if self.moving else freeze_batch_norm_2d(base)
        modules = dict(self.base.named_modules())
        convolutions = [name for name, module in modules.items() if isinstance(module, nn.Conv2d)]
        self.names = [name for name in convolutions if any(part in name for part in self.only)]
        if self.affine:
            self.others = [name for name, module in modules.items() if isinstance(module, nn.BatchNorm2d)]

    @override
    def run(self, model: nn.Module, index: Tensor) -> Tensor:
        images = enlarged(self.x[index], self.size)
        return model(images.contiguous(memory_format=torch.channels_last))

    @override
    def labels(self, index: Tensor) -> Tensor:
        return self.y[index]


class FashionPointwise(Fashion):
    """The same with adapters on the pointwise convolutions alone."""

    only = ("conv_pw",)


class FashionDense(Fashion):
    """The same without the depthwise convolutions: pointwise, stem and the last."""

    only = ("conv_pw", "conv_stem", "conv_head")


class FashionFrozen(Fashion):
    """All convolutions; BatchNorm as in evaluation while it trains."""

    moving = False


class FashionFrozenPointwise(FashionFrozen):
    """BatchNorm as in evaluation; adapters on the pointwise convolutions alone."""

    only = ("conv_pw",)


class FashionFrozenDense(FashionFrozen):
    """BatchNorm as in evaluation; no adapters on the depthwise convolutions."""

    only = ("conv_pw", "conv_stem", "conv_head")


class FashionAffine(Fashion):
    """All convolutions; BatchNorm's weights and biases trained beside, at the head's rate."""

    affine = True


class Manual(Task):
    """A small GPT-2 pretrained on half of the library's docstrings, adapted to Python's reference manual."""

    metric = "token accuracy"
    steps, batch_size, sizes = 160, 8, (600, 150, 300)
    length = 64

    def __init__(self, seed: int, quick: bool = False) -> None:
        with _locked(
            _kept(quick)
        ) as folder:  # else every process that comes before it is kept would pretrain
            self.base, tokenizer = load("", "gpt2", folder, epochs=1 if quick else 5)
        self.ids = _rows_of_tokens(tokenizer, "\n".join(topics.values()), self.length)
        super().__init__(seed, len(self.ids), quick)
        self.names = self.adapted("c_attn", "c_fc", "c_proj")

    @override
    def run(self, model: nn.Module, index: Tensor) -> Tensor:
        return model(input_ids=self.ids[index, :-1], use_cache=False).logits

    @override
    def labels(self, index: Tensor) -> Tensor:
        return self.ids[index, 1:]

    @override
    def loss(self, model: nn.Module, index: Tensor) -> Tensor:
        said, wanted = self.run(model, index).flatten(0, 1), self.labels(index).flatten()
        return nn.functional.cross_entropy(said, wanted)


def _rows_of_tokens(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> Tensor:
    ids = torch.tensor(tokenizer.encode(text))
    return ids[: len(ids) // length * length].reshape(-1, length)


@contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    """The folder, for one process at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield folder


def _keep(value: Any, path: Path) -> None:
    """Written whole or not at all: two processes may want the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    torch.save(value, partial)
    partial.replace(path)


TASKS: dict[str, type[Task]] = {
    "digits": Digits,
    "docstrings": Docstrings,
    "docstrings-all": DocstringsAll,
    "manual": Manual,
    "fashion": Fashion,
    "fashion-pointwise": FashionPointwise,
    "fashion-dense": FashionDense,
    "fashion-frozen-norm": FashionFrozen,
    "fashion-frozen-pointwise": FashionFrozenPointwise,
    "fashion-frozen-dense": FashionFrozenDense,
    "fashion-norm-trained": FashionAffine,
}
