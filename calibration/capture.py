"""One CUDA graph of everything that a function does: made where it fits into memory, given back where it fails."""

import gc
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache

import torch
from torch import Tensor

from . import parallel
from .meter import free_memory

log = logging.getLogger(__name__)
EAGER = "FLATQUANT_EAGER_TRAINING"
"""Environment variable that turns captures off, should a driver or library not bear them."""
SPARE = 1.2
"""A graph's memory in units of the tensors that live in it at once: the rest lies between them."""
_open: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture could not be ended: the allocator of pinned memory will go on asking them."""


def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which everything on a GPU is captured, and runs before that.

    One for the whole process: cuBLAS keeps a workspace (32 MiB on Hopper) for each stream and thread that it was
    used in, so with a stream for each block a run would grow by two of them for each block.
    """
    return _stream(_index(device))


@cache
def _stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)


def _index(device: torch.device) -> int:
    """Of the GPU."""
    return torch.cuda.current_device() if device.index is None else device.index


class CaptureError(RuntimeError):
    """A function cannot be captured; nothing is left of the attempt."""


def wanted(device: torch.device) -> bool:
    """Whether to capture at all: on a GPU, unless ``EAGER`` is set, and not beside NCCL, which is not tried yet."""
    return device.type == "cuda" and parallel.world() == 1 and not os.environ.get(EAGER)


@cache
def warn_once(text: str) -> None:
    """Once, not for each block."""
    log.warning(text)


def missing_memory(device: torch.device) -> int:
    """Bytes that a GPU lacks for a graph of what has run just now outside a graph; 0 or less if it will fit.

    A graph has memory of its own for every tensor that it makes. How much is estimated from the peak since it was
    last reset, beyond what is allocated now, so nothing of that run may be alive. Empties the allocator's cache.
    """
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    made = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    return int(SPARE * made) - free_memory(device)


def capture(
    function: Callable[[], Tensor],
    drop: Callable[[], None],
    device: torch.device,
    stream: torch.cuda.Stream,
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of ``function``, captured on ``stream``, and the tensor it returned, which each replay writes.

    ``function`` must not draw random numbers: its replays would draw some that are drawn outside too. Raises
    CaptureError, after ``drop`` has let go of what the function had stored and the memory is free again.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    before = torch.cuda.current_stream(device)
    index, result = _index(device), None
    # PyTorch 2.11 lets nobody draw from a random state any more, nor replay a graph that has it, if a capture that
    # has it could not be ended. So each capture has a copy.
    generator = torch.cuda.default_generators[index]
    random_state = generator.graphsafe_get_state()
    generator.graphsafe_set_state(generator.clone_state())
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            result = function()
        return graph, result
    except RuntimeError as error:
        # What happened inside, before the capture could not be ended either. No name may keep that: its traceback
        # holds the tensors of the function.
        why = str(error.__context__ or error).partition("\n")[0]
    finally:
        generator.graphsafe_set_state(random_state)
    torch.cuda.set_stream(before)  # torch.cuda.graph leaves its own behind if it cannot end the capture
    result = None
    drop()
    gc.collect()
    with suppress(RuntimeError):
        torch.cuda.synchronize(device)
    if not _has_ended(graph):
        # Neither does PyTorch then close the pool, which would keep its memory and stop the allocator from ever
        # emptying its cache for a large tensor.
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            with suppress(RuntimeError):
                getattr(torch._C, name, lambda *_: None)(index, pool)
        _open.append(graph)
    del graph
    torch.cuda.empty_cache()
    raise CaptureError(why)


def _has_ended(graph: torch.cuda.CUDAGraph) -> bool:
    """Whether the graph closes its pool itself when it goes."""
    try:
        graph.pool()
    except RuntimeError:
        return False
    return True


class Recording:
    """A graph of ``function(*inputs)``, for any inputs of the shapes of the first. Raises as ``capture``."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        inputs: tuple[Tensor, ...],
        drop: Callable[[], None],
        device: torch.device,
        stream: torch.cuda.Stream,
    ):
        self.inputs = tuple(t.clone() for t in inputs)
        self.graph, self.result = capture(lambda: function(*self.inputs), drop, device, stream)

    def takes(self, inputs: tuple[Tensor, ...]) -> bool:
        """Whether these have the shapes."""
        return all(a.shape == b.shape for a, b in zip(inputs, self.inputs, strict=True))

    def replay(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The function's result, which the next replay overwrites."""
        for kept, new in zip(self.inputs, inputs, strict=True):
            kept.copy_(new)
        self.graph.replay()
        return self.result


class Repeated:
    """``function(*inputs)``, a tensor, called many times with inputs of few shapes and waiting for nothing.

    On a GPU the first call runs as it is, which loads what it needs; the second is captured, and all of its shapes
    are replays, each of which overwrites the result of the one before. If it cannot be captured, a warning says that
    ``name`` runs slower.
    """

    def __init__(self, function: Callable[..., Tensor], device: torch.device, name: str):
        self.function, self.device, self.name = function, device, name
        self.calls = 0
        self.recording: Recording | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2 and wanted(self.device):
            stream = side_stream(self.device)
            try:
                self.recording = Recording(self.function, inputs, lambda: None, self.device, stream)
            except CaptureError as error:
                warn_once(f"{self.name} is not captured in a CUDA graph and runs slower: {error}")
        if self.recording is not None and self.recording.takes(inputs):
            return self.recording.replay(inputs)
        return self.function(*inputs)
