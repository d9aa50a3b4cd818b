"""A refresh every 10 steps, a save every 50, kills at random: the end is that of the unbroken run.

400 steps in ``make test``; 2,000 by ``make soak``.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from tests.soaking import REFRESH_EVERY, SAVE_EVERY, end_state, fit, newest, step_of

TENSORS_MORE, BYTES_MORE = 8, 24 << 20
"""What a run may hold later above what it held after its first quarter.

A tensor leaked at each refresh makes 30 in 400 steps and 150 in 2,000.
"""


class DiedError(Exception):
    """What a crash looks like from outside."""


class Dies(Callback):
    """Breaks a run off at a step, at one of the places where something may go wrong."""

    PLACES = ("on_train_batch_start", "on_before_optimizer_step", "on_before_zero_grad", "on_train_batch_end")

    def __init__(self, step: int, place: str):
        super().__init__()
        setattr(self, place, lambda trainer, *args: self.look(trainer, step))

    def look(self, trainer, step: int) -> None:
        if trainer.global_step >= step:
            raise DiedError


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Watches(Callback):
    """Live tensors and resident memory after each quarter of a run."""

    def __init__(self, steps: int):
        super().__init__()
        self.every = steps // 4
        self.seen: list[tuple[int, int]] = []

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step % self.every == 0:
            self.seen.append((live_tensors(), resident_bytes()))


def killed(folder: Path, steps: int, kind: str, after: int) -> None:
    """A run in a process of its own, killed by the system after it has saved step ``after``."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # as many as the run that it is compared to
    command = [sys.executable, "-m", "tests.soaking", str(folder), str(steps), kind]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None and not any(step_of(p) >= after for p in folder.glob("*.ckpt")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()[-2000:]


def died(folder: Path, steps: int, kind: str, deaths: int) -> None:
    """Run, die of an exception, resume from the last checkpoint, at steps drawn from a seed."""
    draws = random.Random(7)
    for step in sorted(draws.sample(range(3 * SAVE_EVERY, steps), deaths)):
        with pytest.raises(DiedError):
            fit(folder, steps, kind, Dies(step, draws.choice(Dies.PLACES)))


RESUMING = "ignore:You're resuming from a checkpoint that ended before the epoch ended"
EXISTS = "ignore:Checkpoint directory .* exists and is not empty"
WHOLE = pytest.param(2000, marks=pytest.mark.soak)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
@pytest.mark.filterwarnings(RESUMING, EXISTS)
@pytest.mark.parametrize("kind", ["full", "adapter"])
@pytest.mark.parametrize("steps", [400, WHOLE])
def test_a_run_broken_at_random_ends_as_the_unbroken_one_and_memory_does_not_grow(tmp_path, kind, steps):
    watches = Watches(steps)
    whole, records = end_state(*fit(tmp_path / "whole", steps, kind, watches))
    assert len(records) == steps // REFRESH_EVERY
    check_memory(watches.seen)
    folder = tmp_path / "broken"
    if kind == "full" or steps == 2000:
        killed(folder, steps, kind, after=SAVE_EVERY)
        assert SAVE_EVERY <= step_of(newest(folder)) < steps
    died(folder, steps, kind, deaths=2 if steps < 2000 else 12)
    again, records_again = end_state(*fit(folder, steps, kind))
    assert records_again == records
    assert list(again) == list(whole)
    assert [name for name, value in again.items() if not torch.equal(value, whole[name])] == []


def check_memory(seen: list[tuple[int, int]]) -> None:
    (tensors, resident), *later = seen
    assert len(later) == 3
    assert max(count for count, _ in later) <= tensors + TENSORS_MORE
    assert max(size for _, size in later) <= resident + BYTES_MORE
