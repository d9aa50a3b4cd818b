"""Jobs in processes of their own, each with a time and a memory limit: one that hangs or dies is a row."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch

MEMORY = 12 << 30
"""Address space of one job, in bytes."""


class Running(NamedTuple):
    """A job that was started."""

    process: Any
    receiver: Connection
    name: Any
    deadline: float
    results: list[Any]


def each(
    work: Callable[[Any], Iterator[Any]], jobs: list[Any], workers: int, seconds: float
) -> Iterator[tuple[Any, list[Any], str]]:
    """(job, its results so far, how it ended otherwise than well) as they come."""
    waiting, running = list(reversed(jobs)), {}
    while waiting or running:
        while waiting and len(running) < workers:
            started = start(work, waiting.pop(), seconds)
            running[started.receiver] = started
        soonest = min(job.deadline for job in running.values()) - time.monotonic()
        for receiver in wait(list(running), timeout=max(0.0, soonest)):
            job = running[receiver]
            if not receive(job):
                del running[receiver]
                job.process.join()
                code = job.process.exitcode
                yield job.name, job.results, f"the process died with exit code {code}" if code else ""
        for receiver, job in list(running.items()):
            if job.deadline <= time.monotonic():
                job.process.kill()
                job.process.join()
                del running[receiver]
                yield job.name, job.results, f"took more than {seconds:g} s"


def start(work: Callable[[Any], Iterator[Any]], name: Any, seconds: float) -> Running:
    """Forked, so that the imports are there already; torch has started no thread yet."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=perform, args=(work, name, sender))
    process.start()
    sender.close()
    return Running(process, receiver, name, time.monotonic() + seconds, [])


def perform(work: Callable[[Any], Iterator[Any]], name: Any, sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    for result in work(name):
        sender.send(result)


def receive(job: Running) -> bool:
    """Take one result; False when there are no more."""
    try:
        job.results.append(job.receiver.recv())
    except EOFError:
        return False
    return True
