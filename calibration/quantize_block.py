"""One block: full-precision output, training, folding, rounding, and the files of its stage."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..spec import FlatQuantSpec
from . import parallel
from .block import TrainableBlock
from .endtoend import LATENT
from .errors import UserError
from .export import TENSORS, save_tensors, write_text
from .fold import fold_block
from .meter import Meter
from .precision import products
from .recipe import Recipe
from .round_block import RoundingReport, round_block
from .source import ModelSource, is_finite
from .streams import FULL, QUANTIZED, batches, new_stream, run_block, store_stream
from .train import collect_stats, train_block

ERROR_ROWS = 16
"""Rows on which a block's error is measured before and after."""
REPORT, LATENTS = "report.json", "latents.safetensors"
"""Files of a block's stage: its BlockReport, and its weights before rounding if a later stage needs them."""


@dataclass
class BlockReport:
    """One line of calibration_log.jsonl. Errors and losses are mean squared, against the
    full-precision block; a loss is that of one training epoch. Time and memory are the first process's."""

    block: int
    blocks: int
    error_before: float
    error_after: float
    epoch_losses: list[float]
    skipped_steps: int
    rounding: dict[str, RoundingReport]
    seconds: float
    peak_memory_gb: float
    processes: int = 1


def quantize_block(
    source: ModelSource,
    index: int,
    recipe: Recipe,
    spec: FlatQuantSpec,
    x: Tensor,
    x_q: Tensor,
    kwargs: dict[str, Any],
    device: torch.device,
    folder: Path | None = None,
    meter: Meter | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor], BlockReport]:
    """Quantize one block.

    x: full-precision stream [N, T, hidden]. x_q: stream of the quantized prefix, [N or 1, T, hidden]; only the
    first row is used unless ``recipe.follows_quantized``. folder: where streams on the CPU are mapped to files.
    meter: receives time and memory of the phases load, observe, check, train, fold, round and run.
    Returns both streams after the block, the block's checkpoint tensors by relative name (with the weights
    before rounding under ``LATENT`` names if the recipe distills), and the report.
    """
    meter = meter or Meter(device)
    meter.enter("load")
    size = recipe.batch_size
    x_q = x_q if recipe.follows_quantized else x_q[:1]
    stored = source.block_tensors(index)
    layer = source.load_block(index, device)
    meter.enter("observe")
    target = new_stream(folder and folder / FULL, tuple(x.shape), x.device)
    with products(recipe.precision):
        stats = collect_stats(layer, source.arch, x, kwargs, size, device, target)[1]
    if parallel.anywhere(not all(is_finite(row) for row in target)):
        raise UserError(
            f"block {index} gives NaN or inf on the calibration text; the model is damaged or its dtype "
            "overflows"
        )
    block = TrainableBlock(layer, source.arch, recipe, stats, seed=recipe.seed * 1009 + index)
    meter.enter("check")
    few = slice(0, max(1, ERROR_ROWS // parallel.world()))
    with products(recipe.precision):
        before = block_error(layer, x[few], target[few], kwargs, size, device)
    block.forget()
    meter.enter("train")
    inputs = x_q if recipe.chain == "quantized" else x
    trained = train_block(block, layer, inputs, target, kwargs, recipe, device)
    meter.enter("fold")
    folded = fold_block(block, stored)
    del block, layer
    finished = source.load_block(index, device)
    with products(recipe.precision):
        meter.enter("round")
        tensors, rounding = round_block(finished, folded, recipe, spec, source, x, x_q, kwargs, device)
        meter.enter("check")
        after = block_error(finished, x[few], target[few], kwargs, size, device)
        meter.enter("run")
        quantized = new_stream(folder and folder / QUANTIZED, tuple(x_q.shape), x_q.device)
        run_block(finished, x_q, kwargs, size, device, quantized)
    if recipe.distill_epochs:
        tensors |= {n + LATENT: w.float() for n, w in folded.weights.items()}
    meter.enter(None)
    report = BlockReport(
        block=index,
        blocks=source.num_blocks,
        error_before=before,
        error_after=after,
        epoch_losses=trained.losses,
        skipped_steps=trained.skipped,
        rounding=rounding,
        seconds=sum(meter.seconds.values()),
        peak_memory_gb=meter.peak_gb,
        processes=parallel.world(),
    )
    return target, quantized, tensors, report


def save_block(
    folder: Path,
    prefix: str,
    x: Tensor,
    x_q: Tensor,
    tensors: dict[str, Tensor],
    report: BlockReport,
) -> None:
    """Write what ``quantize_block`` returned to the folder of its stage, which each process gives its rows of the
    streams. prefix: of the tensors' full names."""
    store_stream(folder / FULL, x)
    store_stream(folder / QUANTIZED, x_q)
    if not parallel.is_writer():
        return
    latents = {n: t.cpu() for n, t in tensors.items() if n.endswith(LATENT)}
    save_tensors(folder, {prefix + n: t for n, t in tensors.items() if n not in latents})
    if latents:
        save_file(latents, folder / LATENTS)
    write_text(folder / REPORT, json.dumps(asdict(report)) + "\n")


def load_block(folder: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors that ``save_block`` wrote, by relative name."""
    tensors = {
        n.removeprefix(prefix): t
        for file in sorted(folder.glob(TENSORS))
        for n, t in load_file(file).items()
    }
    return tensors | (load_file(folder / LATENTS) if (folder / LATENTS).exists() else {})


@torch.no_grad()
def block_error(
    layer: nn.Module,
    x: Tensor,
    target: Tensor,
    kwargs: dict[str, Any],
    batch_size: int,
    device: torch.device,
) -> float:
    """Mean squared difference between the layer's output for x and ``target``, both [N, T, hidden], over the rows
    of all processes."""
    error = torch.zeros((), device=device)  # there: a row of a 70B model is 67 MB
    for batch, goal in zip(
        batches(x, batch_size, device), batches(target, batch_size, device), strict=True
    ):
        error += F.mse_loss(layer(batch, **kwargs), goal) * len(batch) / len(x)
    parallel.mean_(error)
    return error.item()
