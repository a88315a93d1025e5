"""Calibration activations: the full-precision stream and the stream of the quantized prefix."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import parallel
from .data import check_vocabulary
from .source import ModelSource

FULL, QUANTIZED = "full.npy", "quantized.npy"
"""Files of the two streams in the folder of the stage whose output they are."""


def new_stream(file: Path | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """An uninitialized float32 tensor for a stream: on the CPU a memory-mapped ``file``, which the system may
    keep on the disk alone; on a GPU, or without a file, in memory. The disk space is taken now, so that a full
    disk is an OSError here. The file has room for the streams of all processes, one after another."""
    if file is None or device.type != "cpu":
        return torch.empty(shape, device=device)
    if parallel.is_writer():
        whole = (parallel.world() * shape[0], *shape[1:])
        np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=whole)
        number = os.open(file, os.O_RDWR)
        try:
            os.posix_fallocate(number, 0, os.fstat(number).st_size)
        finally:
            os.close(number)
    parallel.wait()
    return _mapped(file)


def _mapped(file: Path) -> Tensor:
    """This process's part of the stream in ``file``."""
    return parallel.own_part(torch.from_numpy(np.load(file, mmap_mode="r+")))


def store_stream(file: Path, stream: Tensor) -> None:
    """Write a stream to ``file`` unless ``new_stream`` mapped it there."""
    exists = file.exists()
    parallel.wait()  # so that each has looked before the first makes it
    if not exists:
        new_stream(file, tuple(stream.shape), torch.device("cpu")).copy_(stream)


def read_streams(folder: Path, device: torch.device) -> tuple[Tensor, Tensor]:
    """This process's streams in ``folder``, on ``device``, memory-mapped if that is the CPU; one that is not there
    is the other."""

    def read(file: Path) -> Tensor:
        return _mapped(file).to(device)

    full, quantized = folder / FULL, folder / QUANTIZED
    x = read(full if full.exists() else quantized)
    return x, read(quantized) if full.exists() and quantized.exists() else x


def drop_streams(folder: Path) -> None:
    """Remove the streams from a stage's folder."""
    if not parallel.is_writer():
        return
    for name in (FULL, QUANTIZED):
        (folder / name).unlink(missing_ok=True)


class _Recorder(nn.Module):
    """Stands in for a decoder layer: keeps what it was called with and passes the input on."""

    def __init__(self, layer: nn.Module, last: bool):
        super().__init__()
        self.last = last
        self.hidden: Tensor | None = None
        self.kwargs: dict[str, Any] = {}
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self.hidden, self.kwargs = hidden_states, kwargs
        if self.last:
            raise _Stop
        return hidden_states


class _Stop(Exception):
    """Ends the recording forward pass before the final norm."""


def record_inputs(
    source: ModelSource, tokens: Tensor, device: torch.device, out: Tensor | None = None
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Input of the first block, float32 [N, T, hidden] on the CPU or in ``out``, and every block's other
    arguments.

    tokens: int64 [N, T]. The arguments (masks, RoPE tables) are those of one row; they broadcast.
    """
    model = source.model
    blocks: nn.ModuleList = model.get_submodule(source.arch.blocks)
    recorders = [_Recorder(b, i == len(blocks) - 1) for i, b in enumerate(blocks)]
    embedding = source.files.tensor(f"{source.arch.blocks.rpartition('.')[0]}.embed_tokens.weight")
    check_vocabulary(tokens, embedding.shape[0])
    hidden = torch.empty(*tokens.shape, embedding.shape[1]) if out is None else out
    for i, row in enumerate(tokens):
        hidden[i] = embedding[row]
    model.model.layers = nn.ModuleList(recorders)
    model.model.rotary_emb.to(device)
    try:
        model.model(inputs_embeds=hidden[:1].to(device), use_cache=False)
    except _Stop:
        pass
    finally:
        model.model.layers = blocks
    return hidden, [r.kwargs for r in recorders]


def batches(x: Tensor, size: int, device: torch.device) -> Iterator[Tensor]:
    """Consecutive slices of ``x`` [N, ...] on ``device``."""
    for start in range(0, len(x), size):
        yield x[start : start + size].to(device, non_blocking=True)


@torch.no_grad()
def run_block(
    layer: nn.Module,
    x: Tensor,
    kwargs: dict[str, Any],
    batch_size: int,
    device: torch.device,
    out: Tensor | None = None,
) -> Tensor:
    """The layer's output for every row of ``x`` [N, T, hidden], on x's device or in ``out``."""
    out = torch.empty_like(x) if out is None else out
    for i, batch in enumerate(batches(x, batch_size, device)):
        out[i * batch_size : i * batch_size + len(batch)] = layer(batch, **kwargs)
    return out
