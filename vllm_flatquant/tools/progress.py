"""Quantize with one progress bar and one line per block."""

import time
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from ..calibration import parallel
from ..calibration.quantize import Callbacks, choose_device, quantize
from ..calibration.quantize_block import BlockReport
from ..calibration.recipe import Recipe
from ..calibration.staging import finished_blocks

TITLES = {"check": "checking weights", "quantize": "quantizing", "distill": "training end to end"}
"""Stage of ``Callbacks.progress`` -> what the bar is called."""


def what_is_kept(out: Path) -> str:
    """After a stop: what is left, and how to go on."""
    done = finished_blocks(out.resolve())
    if not done:
        return "nothing was written"
    started = parallel.world() > 1
    again = (
        f"torchrun --nproc-per-node {parallel.world()} -m vllm_flatquant.cli" if started else "flatquant"
    )
    return f"{done} finished blocks are kept: go on with `{again} quantize --out {out} --resume`"


def quantize_with_progress(
    model: str, out: Path, recipe: Recipe, calib: str, device: str, overwrite: bool, resume: bool = False
) -> Path:
    """``calibration.quantize.quantize`` with its progress on the terminal."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    start = time.monotonic()
    article = "an" if recipe.kv == 8 else "a"
    kv = "" if recipe.kv == 16 else f" with {article} {recipe.kv}-bit KV cache"
    console.print(
        f"{'going on ' if resume else ''}quantizing {model} to {recipe.scheme}{kv}, {recipe.rounding.upper()}, on "
        f"{choose_device(device)}; calibrating on {recipe.samples} x {recipe.seq_len} tokens of {calib}, "
        f"{recipe.epochs} epochs" + (f", {parallel.world()} processes" if parallel.world() > 1 else "")
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}

        def on_progress(stage: str, done: float) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(TITLES[stage], total=1.0)
            progress.update(tasks[stage], completed=done)

        callbacks = Callbacks(
            block=lambda report: console.print(block_line(report)),
            progress=on_progress,
            note=lambda sentence: console.print(f"note: {sentence}"),
        )
        path = quantize(model, out, recipe, calib, device, overwrite, callbacks, resume)
    console.print(f"wrote {path} in {time.monotonic() - start:.0f} s; serve it with: vllm serve {path}")
    return path


WORSE = 1.5
"""A finished block whose error is so many times the untrained one's is called worse; rounding alone can add some."""


def block_line(report: BlockReport) -> str:
    """``block 3/32  error 3.1e-04 -> 8.2e-05  41 s  peak 11.3 GB``"""
    extra = f"  {report.skipped_steps} steps skipped" if report.skipped_steps else ""
    if not report.error_after < WORSE * report.error_before:
        extra += "  worse than untrained: choose a smaller learning rate"
    return (
        f"block {report.block + 1}/{report.blocks}  error {report.error_before:.2e} -> "
        f"{report.error_after:.2e}  {report.seconds:.1f} s  peak {report.peak_memory_gb:.1f} GB{extra}"
    )
