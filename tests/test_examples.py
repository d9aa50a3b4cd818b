"""Examples and benchmark scripts run, in a small form."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def run(monkeypatch, script: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert not stop.value.code, stop.value.code


@pytest.mark.filterwarnings("ignore")
def test_vision_example_learns_prints_and_draws(monkeypatch, tmp_path, capsys):
    run(monkeypatch, "examples/vision_timm.py", "--epochs", "2", "--out", str(tmp_path))
    assert "4,549" in capsys.readouterr().out
    assert (tmp_path / "results.png").stat().st_size > 5_000


@pytest.mark.filterwarnings("ignore")
def test_vision_example_takes_any_timm_model_on_an_image_folder(monkeypatch, tmp_path, capsys):
    from PIL import Image

    for part in ("train", "val"):
        for name, shade in (("dark", 40), ("light", 200)):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for index in range(8):
                Image.new("RGB", (32, 32), (shade, shade + index, shade)).save(folder / f"{index}.png")
    options = [
        "--model",
        "test_vit",
        "--data",
        str(tmp_path),
        "--epochs",
        "1",
        "--rank",
        "4",
        "--out",
        str(tmp_path),
    ]
    run(monkeypatch, "examples/vision_timm.py", *options)
    assert "UORA" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "test_vit"], "--model and --data go together"),
        (["--model", "no_such_vit", "--data", "."], "timm knows no model 'no_such_vit'"),
        (["--model", "test_vit", "--data", "/does/not/exist"], "--data /does/not/exist"),
    ],
)
def test_vision_example_refuses_bad_input_in_one_line(monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["vision_timm.py", "--out", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "examples/vision_timm.py"), run_name="__main__")
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.filterwarnings("ignore")
def test_refresh_benchmark_runs_in_a_small_form(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["refresh.py", "cost", "--quick"])
    threads = torch.get_num_threads()
    runpy.run_path(str(ROOT / "benchmarks/refresh.py"), run_name="__main__")
    torch.set_num_threads(threads)
    assert capsys.readouterr().out.count("training steps of batch 4") == 2


@pytest.mark.filterwarnings("ignore")
def test_files_benchmark_runs_in_a_small_form(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["files.py", "--quick"])
    runpy.run_path(str(ROOT / "benchmarks/files.py"), run_name="__main__")
    assert capsys.readouterr().out.count("kB |") == 12
