"""Time and memory of the phases of a block: what the log reports, and what a plan is computed from."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch


class Meter:
    """Seconds and largest memory in bytes of each phase; ``enter`` ends the phase before, and may come back.

    cpu: of this process, with the parts of mapped files that are in memory. gpu: of the GPU's tensors.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}
        self.cpu: dict[str, int] = {}
        self.gpu: dict[str, int] = {}
        self._phase: str | None = None
        self._start = 0.0

    def enter(self, phase: str | None) -> None:
        """Begin ``phase``; None ends the last one."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self._phase is not None:
            gpu = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
            name, spent = self._phase, time.monotonic() - self._start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
            self.cpu[name] = max(self.cpu.get(name, 0), peak_process())
            self.gpu[name] = max(self.gpu.get(name, 0), gpu)
        self._phase, self._start = phase, time.monotonic()
        reset_peaks(self.device)

    @property
    def peak_gb(self) -> float:
        """Largest memory of all phases in GB (10^9 bytes): of the GPU's tensors if the device is one."""
        return max((self.gpu if self.device.type == "cuda" else self.cpu).values()) / 1e9


@contextmanager
def metered(device: torch.device) -> Iterator[dict[str, float]]:
    """Gives a dict that holds ``seconds`` and ``peak_memory_gb`` of what is inside, once that has ended."""
    meter = Meter(device)
    cost: dict[str, float] = {}
    meter.enter("all")
    yield cost
    meter.enter(None)
    cost |= {"seconds": meter.seconds["all"], "peak_memory_gb": meter.peak_gb}


def reset_peaks(device: torch.device) -> None:
    """Let peaks count from here; for the process that needs Linux's /proc."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_process() -> int:
    """Largest resident memory in bytes since ``reset_peaks``."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_memory(device: torch.device) -> float:
    """Peak in GB (10^9 bytes): of the GPU's tensors if the device is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return peak_process() / 1e9


def limit_memory(device: torch.device, part: float) -> None:
    """Let this process have at most ``part`` (of 1) of a GPU's memory, as if the GPU had no more."""
    torch.cuda.set_per_process_memory_fraction(min(1.0, part), device.index)


def total_memory(device: torch.device) -> int:
    """Bytes of a GPU that this process may have."""
    whole = torch.cuda.get_device_properties(device).total_memory
    return int(whole * torch.cuda.get_per_process_memory_fraction(device.index))


def free_memory(device: torch.device) -> int:
    """Bytes that the device can still give this process: of a GPU what neither others nor its limit take."""
    if device.type == "cuda":
        allowed = total_memory(device) - torch.cuda.memory_reserved(device)
        return min(torch.cuda.mem_get_info(device)[0], allowed)
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")
