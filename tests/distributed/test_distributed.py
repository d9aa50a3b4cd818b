"""Two processes on this machine: DistributedDataParallel and FSDP2 train the model that one process trains.

Starting processes takes most of the time here, so all scenarios run in two launches (``distributed_runs``),
and the tests read what they left.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from safetensors.torch import load_file
from torch import nn

from lightning_uora import load_from_checkpoint, named_adapters, summarize
from lightning_uora.adapters.own_rows import unpacked
from tests.distributed_runs import (
    ACCUMULATE,
    KINDS,
    SCHEDULES,
    STOPS,
    Save,
    ended,
    made,
    rows,
    uora,
)
from tests.toys import Toy, trainer

ROOT = Path(__file__).parents[2]
LIMIT = 900  # seconds for all launches; they take about 40 on a machine that does nothing else
RESUMING = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
STRATEGIES = ["ddp", "sharded"]
FILES = [("full", "folder"), ("full", "file"), ("adapter", "file")]


@dataclass
class Runs:
    """What the launches left, and the same runs in this process."""

    folder: Path
    single: dict[str, dict[str, Any]]
    printed: str

    def both(self, name: str) -> list[Any]:
        """What each of the two ranks found."""
        return [torch.load(self.folder / f"{name}.{r}.pt", weights_only=True) for r in range(2)]

    def one(self, name: str) -> Any:
        """What the ranks found, which must be the same."""
        first, second = self.both(name)
        assert_equal(first, second)
        return first


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("distributed")
    single = {name: ended(made(), uora(**schedule)) for name, schedule in SCHEDULES.items()}
    single["ema and gradient"] = ended(made(), uora(criterion="ema", growth="gradient"))
    for kind in KINDS:
        for stop, batches in STOPS.items():
            save = Save(folder / f"single {kind} {stop}.ckpt", batches)
            single["accumulated"] = ended(made(), uora(kind), save, **ACCUMULATE)
    return Runs(folder, single, launch(folder, "launched", "spawned"))


def launch(folder: Path, *parts: str) -> str:
    """Run parts side by side, each with its processes in a group that is gone in the end; what they print."""
    environment = {
        k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "MASTER_PORT", "WORLD_SIZE")
    }
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    processes = []
    for part in parts:
        with (folder / f"{part}.txt").open("w") as output:
            command = [sys.executable, "-m", "tests.distributed_runs", part, str(folder)]
            processes.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
                )
            )
    try:
        codes = [process.wait(LIMIT) for process in processes]
    finally:
        for process in processes:
            kill(process)
    texts = [(folder / f"{part}.txt").read_text() for part in parts]
    assert codes == [0] * len(parts), "\n".join(texts)[-6000:]
    return "\n".join(texts)


def kill(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def assert_equal(found: Any, expected: Any) -> None:
    """Bit by bit, however nested."""
    assert type(found) is type(expected)
    if isinstance(found, dict):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    if isinstance(found, list | tuple):
        assert len(found) == len(expected)
        for one, two in zip(found, expected, strict=True):
            assert_equal(one, two)
    elif isinstance(found, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


def assert_same_run(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same refreshes, and every number of the state and of the optimizer within rounding."""
    assert found["refreshes"] == expected["refreshes"]
    assert len(found["refreshes"]) >= 4
    assert list(found["state"]) == list(expected["state"])
    torch.testing.assert_close(found["state"], expected["state"], rtol=0, atol=1e-5)
    torch.testing.assert_close(found["moments"], expected["moments"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_are_equal_bit_for_bit_and_end_where_one_process_does(runs, strategy: str, schedule: str):
    """A, B, vectors, head, moments, record; one process gets the batches of both ranks as one.

    Under DDP the second rank starts from another base.
    """
    found = runs.one(f"{strategy} {schedule}")
    assert {"A_6_0:rows", "B_6_1:columns"} <= {key.rpartition(".")[2] for key in found["state"]}
    assert_same_run(found, runs.single[schedule])


def test_ranks_that_would_choose_differently_follow_the_first(runs):
    assert_same_run(runs.one("disagreeing"), runs.single["gradient"])


def test_refreshes_after_validations_are_the_same(runs):
    """A forward without backward leaves FSDP2's root group whole."""
    assert_same_run(runs.one("sharded with validation"), runs.single["magnitude"])


def test_spawned_ranks_end_where_one_process_does(runs):
    found = torch.load(runs.folder / "spawned.0.pt", weights_only=True)
    expected = runs.single["ema and gradient"]["state"]
    state = {k: v for k, v in found["state"].items() if not k.endswith(".record")}
    assert found["done"]
    torch.testing.assert_close(state, expected, rtol=0, atol=1e-5)
    record = json.loads(bytes(found["state"]["uora_projections.record"].tolist()))["refreshes"]
    assert unpacked(record) == runs.single["ema and gradient"]["refreshes"]


def test_a_module_that_only_its_spawned_copies_would_adapt_is_warned_of():
    run, callback = trainer(strategy="ddp_spawn", devices=2), uora()
    with pytest.warns(UserWarning, match=r"train copies.*Call attach_uora\(module, callback.config\)"):
        callback.setup(run, made(), "fit")


def test_parameters_that_no_loss_depends_on_are_found_and_named_once(runs):
    found = runs.one("ddp unused")
    assert found["state"]["body.0.uora_b"].abs().max() > 0
    assert not found["state"]["spare.uora_b"].any()
    assert runs.printed.count("No gradient in the first optimizer step for spare.uora_d, spare.uora_b") == 1


def test_the_table_is_printed_once(runs):
    assert runs.printed.count("UORA adapters") == 1


def test_buffers_that_travel_do_not_include_A_and_B(runs):
    """BatchNorm's three are sent at each of 16 forwards; without the ignore list A and B are too."""
    statistics = dict.fromkeys(
        [f"body.1.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")], 16
    )
    kept, sent = runs.one("travelled")
    assert kept == statistics
    assert sent == {**statistics, "uora_projections.A_6": 16, "uora_projections.B_6": 16}


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run", ["saves", "resumes", "resumes single"])
def test_a_resume_on_two_ranks_is_the_unbroken_run_of_one(runs, run: str, kind: str, stop: str):
    """From two ranks and from one, between steps and while gradients accumulate."""
    assert_same_run(runs.one(f"ddp {run} {kind} {stop}"), runs.single["accumulated"])


@RESUMING
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_on_one_rank_of_a_run_on_two_is_the_unbroken_run(runs, kind: str, stop: str):
    path = runs.folder / f"ddp {kind} {stop}.ckpt"
    assert_same_run(ended(made(), uora(kind), path=path, **ACCUMULATE), runs.single["accumulated"])


def test_waiting_gradients_of_a_checkpoint_are_the_mean_over_ranks(runs):
    """The second rank's loss did not reach the body: its gradient there counts as zero."""
    (x, y), model = rows()[:8], made()
    second = nn.functional.cross_entropy(model.head(x[1::2]), y[1::2])
    first = nn.functional.cross_entropy(made_adapted(model)(x[0::2]), y[0::2])
    ((first + second) / 2 / 2).backward()  # two ranks, two accumulated batches
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    saved = torch.load(runs.folder / "unused.ckpt", weights_only=True)["uora_gradients"]
    assert set(saved) == set(expected)
    assert expected["body.0.uora_b"].abs().max() > 0
    torch.testing.assert_close(saved, expected)


def made_adapted(model: Toy) -> Toy:
    uora().setup(trainer(), model, "fit")
    return model


def test_a_trainer_on_one_device_among_several_ranks_decides_for_itself(runs):
    alone, other = runs.both("alone")
    assert [record["step"] for record in alone] == [2, 4, 6, 8]
    assert other == []


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize(("kind", "form"), FILES)
@pytest.mark.parametrize("run", ["saves", "resumes"])
def test_sharded_resumes_are_the_unbroken_run(runs, run: str, kind: str, form: str, stop: str):
    assert_same_run(runs.one(f"{run} sharded {kind} {form} {stop}"), runs.single["accumulated"])


def test_a_model_made_on_meta_gets_its_base_from_the_checkpoint(runs):
    assert_same_run(runs.one("resumes meta"), runs.single["accumulated"])


def test_a_sharded_run_takes_A_and_B_from_the_checkpoint_and_does_not_draw_them(runs):
    """What a platform that draws otherwise could not rebuild."""
    path = runs.folder / "sharded full file between steps.ckpt"
    saved = torch.load(path, weights_only=True)["state_dict"]
    found = runs.one("exact")
    assert torch.equal(found["uora_projections.A_6_0:rows"], saved["uora_projections.A_6_0:rows"] * 1.0001)
    name = "uora_projections.B_6_0:columns"
    assert torch.equal(found[name], saved[name])


def test_averages_of_a_sharded_run_survive_a_resume(runs):
    assert_same_run(runs.one("saves ema"), runs.single["ema"])
    assert_same_run(runs.one("resumes ema"), runs.single["ema"])


@RESUMING
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_runs_file_resumes_in_one_process(runs, kind: str, stop: str):
    path = runs.folder / f"sharded {kind} file {stop}.ckpt"
    assert_same_run(ended(made(), uora(kind), path=path, **ACCUMULATE), runs.single["accumulated"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_model_reads_checkpoints_of_other_strategies(runs, kind: str):
    path = runs.folder / f"ddp {kind} while accumulating.ckpt"
    torch.manual_seed(4)
    expected = load_from_checkpoint(Toy, path).state_dict()
    expected.pop("uora_projections.record")
    assert_equal(runs.one(f"sharded reads ddp {kind}"), dict(expected))


def test_a_folder_of_shards_is_named_as_such_and_loads_once_it_is_one_file(runs, tmp_path):
    folder = runs.folder / "sharded full folder between steps.ckpt"
    with pytest.raises(ValueError, match=r"is a folder of shards.*consolidate_checkpoint"):
        load_from_checkpoint(Toy, folder)
    torch.save(_load_distributed_checkpoint(folder), tmp_path / "whole.ckpt")
    torch.manual_seed(4)
    found = load_from_checkpoint(Toy, tmp_path / "whole.ckpt").state_dict()
    torch.manual_seed(4)
    expected = load_from_checkpoint(Toy, runs.folder / "sharded full file between steps.ckpt").state_dict()
    assert list(found) == list(expected)
    assert_equal(list(found.values()), list(expected.values()))


def test_a_sharded_model_is_summarised_drawn_refreshed_and_saved_whole(runs):
    found = runs.one("tools")
    assert found["summary"] == str(summarize(made_adapted(made())))
    assert found["drawn"][0] == pytest.approx([abs(d) for d in found["d"]])
    saved = load_file(runs.folder / "adapter" / "uora_adapter.safetensors")
    assert {"body.0.uora_d", "head.weight"} <= set(saved)
    assert all(torch.equal(saved[key], found["state"][key]) for key in saved)


def test_a_refresh_while_parameters_are_whole_is_kept_by_the_shards(runs):
    found = runs.one("tools")
    assert found["plain"]
    expected = found["before"].clone()
    expected[found["rows"]] *= 0.5  # a row of A and a column of B turned by 45 degrees each
    assert found["rows"]
    torch.testing.assert_close(found["after"], expected)


def test_whole_copies_of_sharded_weights_are_not_kept_in_evaluation(runs):
    assert runs.one("tools")["cache"] == [{}, {}]


def test_a_sharded_model_is_neither_detached_nor_exported(runs):
    found = runs.one("tools")
    assert found["detach"].startswith(
        "ValueError: model is sharded, and a sharded model cannot be detached; save"
    )
    assert found["export"].startswith("ValueError: model is sharded; save a checkpoint and export that file")
    assert found["weight kept"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("adapter folder", "MisconfigurationException: checkpoint='adapter' leaves the base out"),
        ("tensor parallel", "ValueError: weight of a Linear is still sharded in its forward"),
        ("inputs", "call calibrate after attach_uora and before fully_shard"),
        ("sharded first", "weight of module 'body.0' (Linear) is sharded; call attach_uora before"),
        ("another rank", "adapters of another configuration: rank (4 saved, 3 here)"),
        (
            "another architecture",
            "the adapter is for 'body.0', but this model has adapters at 'body.0', 'body.2'",
        ),
        ("another base", "trained on another base (different: 'body.0.weight'"),
    ],
)
def test_what_a_sharded_run_cannot_do_is_refused(runs, fault: str, message: str):
    assert message in runs.one("refused")[fault]


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_strategies_that_flatten_parameters_are_refused(strategy, stage: str):
    """Neither runs here (no GPU, no deepspeed), so the strategy is made without its own constructor."""
    run, model = trainer(), Toy()
    run._accelerator_connector.strategy = object.__new__(strategy)
    run._accelerator_connector.strategy._precision_plugin = None
    with pytest.raises(
        MisconfigurationException, match=f"{strategy.__name__} flattens.*ModelParallelStrategy"
    ):
        uora().setup(run, model, stage)
    assert not list(named_adapters(model))
