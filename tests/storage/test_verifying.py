"""What is written is compared, bit by bit, with what was given."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_uora.storage import save_checkpoint
from lightning_uora.storage.verifying import difference, write_verified

SAME = [
    {"a": torch.tensor([1.0, math.nan]), "b": [1, "x", None, math.nan, {"c": (True,)}]},
    {"empty": torch.zeros(0, 3), "one": torch.tensor(2), "half": torch.ones(3, 2).half().t()},
    {"yes": torch.tensor([True, False]), "z": torch.tensor([1 + 2j])},
]


@pytest.mark.parametrize("content", SAME)
def test_what_was_given_is_written(content, tmp_path):
    save_checkpoint(content, tmp_path / "plain.ckpt")
    found = torch.load(tmp_path / "plain.ckpt", weights_only=True)
    assert difference(content, found) is None
    assert [path.name for path in tmp_path.iterdir()] == ["plain.ckpt"]


OTHER = {
    "a": (torch.tensor([0.0]), torch.tensor([-0.0])),
    "dtype": (torch.zeros(2), torch.zeros(2).bfloat16()),
    "shape": (torch.zeros(2, 3), torch.zeros(3, 2)),
    "number": (1, 2),
    "nan": (math.nan, 0.0),
    "less": ([1, 2], [1]),
    "other key": ({"x": 1}, {"y": 1}),
    "no tensor": (torch.zeros(1), 0),
    "no mapping": ({"x": 1}, 3),
}


@pytest.mark.parametrize("name", OTHER)
def test_a_difference_is_named_by_its_place(name):
    given, found = OTHER[name]
    wrong = difference({"deep": [{"same": 1, name: given}]}, {"deep": [{"same": 1, name: found}]})
    assert wrong is not None
    assert wrong.startswith(f"deep.0.{name}")


def test_a_merged_checkpoint_that_reads_back_otherwise_leaves_the_old_file(tmp_path, monkeypatch):
    """The archive is whole: its checksums are right, and a number is not."""
    path, write = tmp_path / "plain.ckpt", torch.save
    state = nn.Linear(5, 3).state_dict()
    save_checkpoint({"state_dict": state}, path)
    before = path.read_bytes()

    def spoil(content, file):
        other = {**content["state_dict"], "weight": content["state_dict"]["weight"] + 1e-7}
        write({**content, "state_dict": other}, file)

    monkeypatch.setattr(torch, "save", spoil)
    with pytest.raises(OSError, match=r"does not read back the same \(state_dict.weight\)"):
        save_checkpoint({"state_dict": state}, path)
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["plain.ckpt"]


class Runs:
    """An object whose unpickling would raise."""

    def __reduce__(self):
        return eval, ("1 / 0",)


def test_nothing_runs_when_a_checkpoint_is_read_back(tmp_path):
    checkpoint = {"state_dict": {"w": torch.arange(7)}, "hyper_parameters": {"of": Runs()}}
    write_verified(checkpoint, tmp_path / "a.ckpt", lambda path: torch.save(checkpoint, path))
    with pytest.raises(ZeroDivisionError):
        torch.load(tmp_path / "a.ckpt", weights_only=False)
