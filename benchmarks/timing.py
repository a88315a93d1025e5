"""Timing shared by the benchmarks: CUDA graph replay over rotating buffers that together exceed the L2."""

import csv
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

L2_BYTES = 64 * 2**20
RESULTS = Path(__file__).parent / "results"


def need_gpu() -> None:
    """End the script with a sentence where there is nothing to time."""
    if not torch.cuda.is_available():
        sys.exit("no CUDA GPU is visible to PyTorch here, and this times kernels on one")


def copies(bytes_each: int, at_least: int = 3 * L2_BYTES, limit: int = 48) -> int:
    """How many copies of a buffer make a rotation that no L2 holds."""
    return max(2, min(limit, -(-at_least // bytes_each)))


def graph_us(
    call: Callable[[int], object], rotation: int, replays: int = 7, min_ms: float = 2.0, least: int = 128
) -> list[float]:
    """Microseconds of ``call(i)``, one figure per replay of a graph that holds i = 0 .. rotation-1, repeated.

    ``call`` must use buffer set ``i`` and launch on the current stream. least: calls in a graph, where they are quick.
    """
    call(0)
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for i in range(rotation):
        call(i)
    end.record()
    torch.cuda.synchronize()
    once = max(start.elapsed_time(end), 1e-3)  # launches included, so an overestimate for small kernels
    laps = max(
        1, min(int(min_ms / once) + 1, 400 // rotation + 1), -(-least // rotation) if once < 20 else 1
    )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(laps):
            for i in range(rotation):
                call(i)
    graph.replay()
    torch.cuda.synchronize()
    figures = []
    for _ in range(replays):
        torch.cuda._sleep(1_000_000)  # the host gets ahead, so that no launch of the graph is timed
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        figures.append(start.elapsed_time(end) * 1e3 / (laps * rotation))
    return figures


def summary(figures: list[float]) -> tuple[float, float]:
    """Median, and spread as (max - min) / median."""
    median = statistics.median(figures)
    return median, (max(figures) - min(figures)) / median


def clocks() -> str:
    """SM clock now, MHz. NVML answers in a millisecond; nvidia-smi, for want of it, takes most of a row's time."""
    try:
        return str(torch.cuda.clock_rate())
    except (ImportError, RuntimeError):
        pass
    query = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    return (
        subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().splitlines()[0]
    )


def commit() -> str:
    """The commit of this tree. COMMIT names it where there is no git, as in a copy on another machine."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return os.environ.get("COMMIT") or done.stdout.strip() or "unknown"


def environment() -> dict[str, str]:
    """GPU, versions and commit, as every results row carries them."""
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit(),
    }


class Table:
    """A results CSV that only grows. Rows are dictionaries; ``key`` columns identify what was measured."""

    def __init__(self, path: Path, columns: list[str], key: list[str]):
        self.path, self.columns, self.key = path, columns, key
        self.seen = set()
        if path.exists():
            with path.open() as file:
                self.seen = {self._id(row) for row in csv.DictReader(file)}

    def _id(self, row: dict) -> tuple[str, ...]:
        return tuple(str(row[column]) for column in self.key)

    def has(self, row: dict) -> bool:
        return self._id(row) in self.seen

    def append(self, row: dict) -> None:
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            if new:
                writer.writeheader()
            writer.writerow(row)
        self.seen.add(self._id(row))
