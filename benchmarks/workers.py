"""Jobs in worker processes that share one device: what one job breaks, no other job notices."""

import multiprocessing as mp
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from vllm_flatquant.calibration.meter import limit_memory

Job = dict[str, Any]
MEMORY_PART = 0.9
"""Of a GPU's memory that all workers together may take; contexts and libraries need the rest."""


def run_jobs(
    waiting: list[Job],
    workers: int,
    deadline: float,
    ready: Callable[[list[Job], list[Job]], list[Job]] = lambda waiting, running: waiting,
) -> Iterator[tuple[Job, Any, str | None]]:
    """Run ``job["stage"](job)`` for each job in ``waiting``, ``workers`` at a time, until ``deadline`` (monotonic
    seconds). Yields (job, result, None), or (job, None, error) where it failed, as they come.

    ready: which of the waiting jobs may start now, in order, given those and the running ones. Workers divide a
    GPU's memory evenly. A worker that fails a job, or dies, is replaced: an error can leave a GPU's context
    unusable. Without a GPU one is after every job, or what the job before left would count as the next one's memory.
    Jobs that the deadline cuts off stay in ``waiting``.
    """
    reused = torch.cuda.is_available()
    context = mp.get_context("spawn")
    idle: list[tuple[Any, Connection]] = []
    busy: dict[Connection, tuple[Any, Job]] = {}
    try:
        while True:
            for job in ready(waiting, [j for _, j in busy.values()])[: workers - len(busy)]:
                waiting.remove(job)
                if not idle:
                    ours, theirs = context.Pipe()
                    process = context.Process(
                        target=work, args=(theirs, MEMORY_PART / workers), daemon=True
                    )
                    start_deaf(process)
                    theirs.close()  # so that a worker that dies is the end of the pipe
                    idle.append((process, ours))
                process, ours = idle.pop()
                ours.send(job)
                busy[ours] = process, job
            left = deadline - time.monotonic()
            if not busy or left <= 0:
                break
            for ours in wait(list(busy), None if left == float("inf") else left):
                assert isinstance(ours, Connection)
                process, job = busy.pop(ours)
                try:
                    result, error = ours.recv()
                except EOFError:
                    process.join()
                    result, error = None, f"the process ended with status {process.exitcode}"
                if error is None and reused:
                    idle.append((process, ours))
                else:
                    ours.close()
                yield job, result, error
    finally:
        waiting[:0] = [job for _, job in busy.values()]
        for process, _ in [*idle, *busy.values()]:
            process.kill()


def start_deaf(process: Any) -> None:
    """Start a process that Ctrl-C does not reach: the one that asked ends it, and says what is left."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)


def work(pipe: Connection, part: float) -> None:
    """A worker: answers each job with (result, error), until the first that fails. part: of the GPU's memory."""
    if torch.cuda.is_available():
        limit_memory(torch.device("cuda"), part)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            result = job["stage"](job)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other jobs go on
            pipe.send((None, f"{type(error).__name__}: {error}".splitlines()[0]))
            return
        pipe.send((result, None))
