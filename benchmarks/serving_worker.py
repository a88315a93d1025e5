"""What `serving_engine.py` asks of the process that has the GPU: vLLM mixes ``Tracer`` into its worker."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

BUSY, BEFORE, AFTER, BETWEEN = (
    "(busy)",
    "(idle before the first)",
    "(idle after the last)",
    "(idle before) ",
)
"""Rows of a trace that are no kernels: when any ran, and when none did, by the kernel that came next."""


def idle(kernels: Iterable[tuple[int, int, str]], begin: int, end: int) -> dict[str, tuple[int, int]]:
    """How often and for how long none of ``kernels`` (start, end, name) ran between ``begin`` and ``end``, and how long
    any did. A kernel that waits for another under programmatic dependent launch runs, but its wait is not counted twice.
    """
    found: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    until, busy = begin, 0
    for start, stop, name in sorted(kernels):
        if start > until:
            key = BEFORE if until == begin else BETWEEN + name
            count, spent = found[key]
            found[key] = count + 1, spent + start - until
        busy += max(0, stop - max(start, until))
        until = max(until, stop)
    found[AFTER] = 1, max(0, end - until)
    found[BUSY] = 1, busy
    return dict(found)


class Tracer:
    """Methods of vLLM's worker, called by name through ``collective_rpc``."""

    def card_memory_used(self) -> float | None:
        """GiB in use on the card, by whomever; None without one."""
        if not torch.cuda.is_available():
            return None
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**30

    def begin_trace(self) -> None:
        """Record kernels from here on; without a GPU, operators."""
        cuda = torch.cuda.is_available()
        self.benchmark_trace = profile(
            activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]
        )
        self.benchmark_trace.start()

    def end_trace(self, begin: int, end: int) -> list[dict[str, Any]]:
        """Kernels since ``begin_trace``: name, how often, microseconds in all; and ``idle``'s rows of the time from
        ``begin`` to ``end``, nanoseconds of ``time.time_ns``: of the trace's clock too, or there are none."""
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.synchronize()
        self.benchmark_trace.stop()
        device = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
        found: list[dict[str, Any]] = []
        for event in self.benchmark_trace.key_averages():
            us = event.self_device_time_total if cuda else event.self_cpu_time_total
            if event.device_type == device and us > 0:
                found.append({"kernel": event.key, "count": event.count, "us": us})
        events = self.benchmark_trace.profiler.kineto_results.events()
        spans = [(e.start_ns(), e.end_ns(), e.name()) for e in events if e.device_type() == device]
        within = [(max(begin, a), min(b, end), name) for a, b, name in spans if a < end and begin < b]
        for name, (count, ns) in idle(within, begin, end).items() if within else ():
            found.append({"kernel": name, "count": count, "us": ns / 1e3})
        return found
