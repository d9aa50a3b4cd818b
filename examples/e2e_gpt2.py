"""Teach a causal language model to turn data into a sentence: GPT-2 on E2E NLG, or a small one offline.

    python examples/e2e_gpt2.py                       # offline: facts about functions into words
    python examples/e2e_gpt2.py --online --model openai-community/gpt2 --epochs 5

Offline, a small GPT-2 is first pretrained by this script on half of the library's functions; then only
adapters train (8,704 of a million parameters), on the other half. Four minutes of two CPU cores, most of them
pretraining; BLEU on unseen combinations: 0 before, 79 to 96 after, over seeds 0 to 3. Online: GPT-2 on the
E2E restaurant data, an hour on one accelerator; not run where this was written, which has no network. Without
either option: offline, unless the model is in the local hub cache.
"""

from __future__ import annotations

import sys

import torch
from bundled import BadInputError, Documented, is_offline, one_line_errors, shuffled, topic_of
from compare import quiet_trainer, quiet_transformers, text_options
from lightning.pytorch import seed_everything
from small_lm import LanguageModel, functions, load
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.text import BLEUScore, ROUGEScore
from transformers import PreTrainedTokenizerBase

from lightning_uora import UORACallback, summarize

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
Row = tuple[str, list[str]]
"""Data as text, and the sentences that say it."""


def signature_rows() -> list[Row]:
    """What is known of functions, as attributes like E2E's, with three ways to say it in words.

    Names are left out, as is usual for E2E: what is written depends on topic and counts alone, and a
    combination that is tested was never seen.
    """
    return shuffled(list({_data(entry): _sentences(entry) for entry in functions(held_out=True)}.items()))


def _facts(entry: Documented) -> tuple[str, str, str, str]:
    needed = sum(default is None for _, default in entry.arguments)
    counts = (NUMBERS[needed], NUMBERS[len(entry.arguments) - needed])
    return topic_of(entry) or "other things", "private" if entry.name.startswith("_") else "public", *counts


def _data(entry: Documented) -> str:
    keys = ("topic", "kind", "needs", "optional")
    return ", ".join(f"{key}[{value}]" for key, value in zip(keys, _facts(entry), strict=True))


def _sentences(entry: Documented) -> list[str]:
    topic, kind, needed, optional = _facts(entry)
    return [
        f"A {kind} function about {topic} that needs {needed} arguments and takes {optional} more.",
        f"This {kind} function for {topic} has {needed} needed and {optional} optional arguments.",
        f"About {topic}: {kind}, with {needed} arguments to give and {optional} to choose.",
    ]


def e2e_rows(split: str) -> list[Row]:
    """E2E NLG: meaning representations, and all the sentences that people wrote for each."""
    from datasets import load_dataset

    texts: dict[str, list[str]] = {}
    for row in load_dataset("tuetschek/e2e_nlg", revision="refs/convert/parquet", split=split):
        texts.setdefault(row["meaning_representation"], []).append(row["human_reference"])
    return list(texts.items())


def batch(tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> dict[str, Tensor]:
    """Data and one of its sentences in a line, padded on the right; only the sentence counts in the loss."""
    lines, labels = [], []
    for data, sentences in rows:
        prompt = tokenizer.encode(f"{data} =>")
        which = int(torch.randint(len(sentences), ()))
        answer = [*tokenizer.encode(f" {sentences[which]}"), tokenizer.eos_token_id]
        lines.append(torch.tensor(prompt + answer)[:256])
        labels.append(torch.tensor([-100] * len(prompt) + answer)[:256])
    pad = torch.nn.utils.rnn.pad_sequence
    lengths = torch.tensor([len(line) for line in lines])
    ids = pad(lines, batch_first=True, padding_value=tokenizer.pad_token_id)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": pad(labels, batch_first=True, padding_value=-100),
    }


@torch.inference_mode()
def say(module: LanguageModel, tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> list[str]:
    """What the model generates for the data of each row, greedily, in left-padded batches."""
    module.eval()
    said = []
    for start in range(0, len(rows), 32):
        prompts = [f"{data} =>" for data, _ in rows[start : start + 32]]
        tokens = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(module.device)
        tokens.pop("token_type_ids", None)
        ids = module.model.generate(**tokens, max_new_tokens=64, do_sample=False)
        said += tokenizer.batch_decode(ids[:, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in said]


def scores(said: list[str], rows: list[Row]) -> str:
    """BLEU-4 and ROUGE-L against all references, in percent."""
    references = [sentences for _, sentences in rows]
    bleu = BLEUScore(4)(said, references).item()
    rouge = ROUGEScore(rouge_keys="rougeL")(said, references)["rougeL_fmeasure"].item()
    return f"BLEU {100 * bleu:.1f}, ROUGE-L {100 * rouge:.1f}"


def main() -> None:
    """Adapt, and show what the model says before and after."""
    parser = text_options(__doc__, "openai-community/gpt2", 40, "e2e_gpt2")
    parser.add_argument("--pretraining-epochs", type=int, default=5)
    given = parser.parse_args()
    quiet_transformers()
    offline = is_offline(given.offline, given.model)
    with one_line_errors("" if offline else given.model):
        model, tokenizer = load(given.model, "gpt2" if offline else None, given.out, given.pretraining_epochs)
        rows = signature_rows() if offline else []
        parts = (rows[60:], rows[:60]) if offline else (e2e_rows("train"), e2e_rows("validation")[:200])
        train, held = (part[: given.limit] for part in parts)
        if not train or not held:
            raise BadInputError("no rows to train on or to test on")
    seed_everything(given.seed, verbose=False)
    module = LanguageModel(model, vector_lr=0.1 if offline else 1e-2)
    before = say(module, tokenizer, held)
    callback = UORACallback(given.rank, "all-linear", trainable_modules=())
    loader = DataLoader(train, 16, shuffle=True, collate_fn=lambda rows: batch(tokenizer, rows))
    quiet_trainer(given.epochs, [callback]).fit(module, loader)
    after = say(module, tokenizer, held)
    for (data, sentences), old, new in list(zip(held, before, after, strict=False))[:3]:
        print(f"\ndata    {data}\nbefore  {old[:100]!r}\nafter   {new}\nwanted  {sentences[0]}")
    print(f"\nbefore: {scores(before, held)}; after: {scores(after, held)}")
    print(f"trained {summarize(module).trainable_params:,} of {summarize(module).total_params:,} parameters")


if __name__ == "__main__":
    sys.exit(main())
