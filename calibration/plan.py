"""What a run will take, before it is started: one block is really quantized on a few rows, the rest is arithmetic."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ..spec import FlatQuantSpec
from .endtoend import memory_needed
from .errors import UserError
from .export import TENSORS, WHOLE_BYTES
from .fingerprint import scan_weights
from .golden import head_name
from .head import HEAD
from .meter import Meter, peak_process, reset_peaks
from .quantize import check_inputs, choose_device, stream_device
from .quantize_block import ERROR_ROWS, quantize_block, save_block
from .recipe import Recipe
from .rotation import hadamard_rotation, rotated
from .source import SIDE_FILES, ModelSource
from .staging import sync
from .steps import EAGER_STEPS
from .streams import FULL, new_stream, record_inputs

ENOUGH_SECONDS = 2.0
"""Training on more rows is tried until it takes this long: shorter times say little."""

DOCUMENTS, LINES = 10_000, 3_000
"""Bytes, about, of card, recipe and recorded prompt, and of a block's lines in index and log."""


@dataclass
class Plan:
    """Estimates for a run. Bytes and seconds; ``stream`` is what one activation stream of all rows takes.

    cpu: largest resident memory of the process, ``mapped`` of it in files that the system may drop. gpu: largest
    memory of tensors on the GPU, 0 without one. staging: largest size of the staging folder. phases: seconds of
    each phase of a block. rows, steps: what was measured on block 0.
    """

    blocks: int
    block_weights: int
    block_bytes: int
    checkpoint: int
    staging: int
    stream: int
    mapped: int
    cpu: int
    gpu: int
    seconds: float
    phases: dict[str, float]
    rows: int
    steps: int


@dataclass
class Trial:
    """One block quantized on ``rows`` rows in ``steps`` training steps, with a single epoch; sizes of its files."""

    rows: int
    steps: int
    meter: Meter
    tensor_bytes: int
    other_bytes: int


def plan_run(
    model: str | Path,
    out: str | Path,
    recipe: Recipe,
    calib: str = "stdlib",
    device: str = "auto",
    on_check: Callable[[float], None] = lambda done: None,
) -> tuple[Plan, FlatQuantSpec]:
    """Estimates for ``quantize`` with these arguments, and the spec of its checkpoint. Leaves nothing behind.

    Every check of the run's start is made, all weights are read once (``on_check`` receives the finished
    fraction), and one block is tried. Raises UserError as the run would.
    """
    where = choose_device(device)
    out = Path(out).resolve()
    source, spec, tokens = check_inputs(model, out, recipe, calib, where, overwrite=True)
    start = time.monotonic()
    scan_weights(source.files.shards, {}, on_check)
    checked = time.monotonic() - start
    folder = nearest_folder(out.parent)
    if recipe.rotation != "none":  # learned ones cost the same when they are applied
        source = rotated(source, hadamard_rotation(source, recipe.seed), where)
    try:
        return make_plan(source, recipe, spec, tokens, where, folder, checked), spec
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); choose another --out") from None


def make_plan(
    source: ModelSource,
    recipe: Recipe,
    spec: FlatQuantSpec,
    tokens: Tensor,
    device: torch.device,
    folder: Path,
    checked: float,
) -> Plan:
    """Estimates for quantizing ``source``.

    tokens: calibration rows int64 [N, T]. folder: where the run will write; a temporary folder is made in it and
    removed. checked: seconds that reading all weights took.
    Time: phases that work on rows are fitted by a line through the last two trials, training by its steps. Memory: a
    trial's peak in each phase plus the streams of the rows that it did not have. Disk: sizes of files.
    """
    base, size = peak_now(), recipe.batch_size
    captured = EAGER_STEPS if device.type == "cuda" else 0  # steps before those that most are like
    small = large = try_block(source, recipe, spec, tokens[: 2 * size], device, folder)
    while large.rows < len(tokens) and (
        large is small or small.steps <= captured or large.meter.seconds["train"] < ENOUGH_SECONDS
    ):
        small, large = large, try_block(source, recipe, spec, tokens[: 4 * large.rows], device, folder)
    phases = block_seconds(small, large, recipe, len(tokens))
    blocks, stream = source.num_blocks, tokens.numel() * source.config.hidden_size * 4
    row = stream // len(tokens)
    generation = stream + (stream if recipe.follows_quantized else row)
    others = [source.files.size(name) for name in source.other_names()]
    files, dropped = [*[large.tensor_bytes] * blocks, *others], 0
    if recipe.lm_head < 16:  # int8 codes and a float32 scale for each row, in place of the 16-bit head
        entries, width = source.files.shape(head_name(source, source.files))
        files.append(entries * (width + 4))
        dropped = source.files.size(HEAD) if HEAD in source.other_names() else 0
    packed = sum(n for n in files if n < WHOLE_BYTES)
    side = DOCUMENTS + blocks * LINES
    side += sum(f.stat().st_size for pattern in SIDE_FILES for f in source.path.glob(pattern))
    before = generation if blocks > 1 else stream
    cpu, gpu = block_memory(large, recipe, source, len(tokens), row, device)
    edges = edge_memory(source, stream, generation)
    if recipe.distill_epochs:
        edges = max(edges, sum(memory_needed(source, recipe)) + 2 * stream)
    on_cpu = stream_device(recipe, source, device).type == "cpu"
    if device.type == "cpu":
        cpu = max(cpu, base + edges)
    else:
        gpu = max(gpu, edges)
    return Plan(
        blocks=blocks,
        block_weights=sum(
            prod(source.files.shape(f"{source.block_prefix(0)}{n}.weight")) for n in source.arch.linears
        ),
        block_bytes=large.tensor_bytes,
        checkpoint=sum(files) - dropped + side,
        staging=sum(files)
        + blocks * large.other_bytes
        + max(generation + before, generation + packed + side),
        stream=stream,
        mapped=(4 if recipe.follows_quantized else 2) * stream * on_cpu,
        cpu=cpu,
        gpu=gpu,
        seconds=checked
        + blocks * sum(phases.values())
        + (sum(others) + packed) / large.tensor_bytes * phases["save"],
        phases=phases,
        rows=large.rows,
        steps=large.steps if recipe.epochs else 0,
    )


def try_block(
    source: ModelSource,
    recipe: Recipe,
    spec: FlatQuantSpec,
    tokens: Tensor,
    device: torch.device,
    folder: Path,
) -> Trial:
    """Quantize block 0 on tokens [n, T] in one epoch, save it, and measure."""
    short = recipe.model_copy(update={"samples": len(tokens), "epochs": min(1, recipe.epochs)})
    with tempfile.TemporaryDirectory(prefix=".flatquant-plan.", dir=folder) as temporary:
        place, meter = Path(temporary), Meter(device)
        first = place / "inputs"
        first.mkdir()
        shape = (*tokens.shape, source.config.hidden_size)
        x, kwargs = record_inputs(
            source, tokens, device, new_stream(first / FULL, shape, torch.device("cpu"))
        )
        x = x.to(stream_device(recipe, source, device))
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(recipe.seed * 1009)
            result = quantize_block(source, 0, short, spec, x, x, kwargs[0], device, place, meter)
        meter.enter("save")
        save_block(place, source.block_prefix(0), *result)
        for file in place.iterdir():
            sync(file)
        meter.enter(None)
        tensors = sum(f.stat().st_size for f in place.glob(TENSORS))
        other = sum(f.stat().st_size for f in place.iterdir() if f.is_file() and f.suffix != ".npy")
        steps = -(-len(tokens) // recipe.batch_size)
        return Trial(len(tokens), steps, meter, tensors, other - tensors)


def block_seconds(small: Trial, large: Trial, recipe: Recipe, rows: int) -> dict[str, float]:
    """Seconds of each phase of a block with ``rows`` rows and all epochs."""
    full = {}
    for name, seconds in large.meter.seconds.items():
        growth = seconds - small.meter.seconds[name]
        if name == "train":
            steps = recipe.epochs * -(-rows // recipe.batch_size)
            full[name] = extend(seconds, growth, large.steps, small.steps, steps)
        elif name in ("load", "fold"):
            full[name] = min(seconds, small.meter.seconds[name])
        else:
            few = [min(n, ERROR_ROWS) if name == "check" else n for n in (large.rows, small.rows, rows)]
            full[name] = extend(seconds, growth, *few)
    return full


def extend(seconds: float, growth: float, count: int, less: int, wanted: int) -> float:
    """Seconds for ``wanted``, on the line through ``seconds`` for ``count`` and ``growth`` less for ``less``."""
    if wanted <= count or count == less:
        return seconds
    slope = min(max(growth, 0.0) / (count - less), seconds / count)
    return seconds + slope * (wanted - count)


def block_memory(
    trial: Trial, recipe: Recipe, source: ModelSource, rows: int, row: int, device: torch.device
) -> tuple[int, int]:
    """Largest CPU and GPU memory in bytes of a block with ``rows`` rows of ``row`` bytes a stream."""
    both = recipe.follows_quantized
    on_cpu = stream_device(recipe, source, device).type == "cpu"
    cpu, gpu = [], []
    for name in trial.meter.cpu:
        # Block 0, which was tried, reads one stream in both roles; blocks after it read two.
        tried = 1 + (name != "load") + (both and name in ("run", "save"))
        extra = (rows * (tried + both) - trial.rows * tried) * row
        cpu.append(trial.meter.cpu[name] + extra * on_cpu)
        gpu.append(trial.meter.gpu[name] + extra * (not on_cpu))
    return max(cpu), max(gpu) if device.type == "cuda" else 0


def edge_memory(source: ModelSource, stream: int, generation: int) -> int:
    """Bytes at the beginning (embedding and first stream) and at the end (streams and the head in float32)."""
    names = [n for n in source.other_names() if len(source.files.shape(n)) == 2]
    head = max((source.files.size(n) for n in names), default=0)
    head32 = max((prod(source.files.shape(n)) * 4 for n in names), default=0)
    return max(head + stream, head + head32 + generation)


def peak_now() -> int:
    """Resident memory in bytes."""
    reset_peaks(torch.device("cpu"))
    return peak_process()


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the first above it that exists."""
    return path if path.is_dir() else nearest_folder(path.parent)
