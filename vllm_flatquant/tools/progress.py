"""Quantize with one progress bar and one line per block."""

import time
from pathlib import Path
from shlex import quote

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

TITLES = {
    "check": "checking weights",
    "quantize": "quantizing",
    "write": "writing text",
    "distill": "training end to end",
}
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
    return f"{done} finished blocks are kept: go on with `{again} quantize --out {quote(str(out))} --resume`"


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
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}

        def on_progress(stage: str, done: float) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(TITLES[stage], total=1.0)
                if (
                    stage == "check" and not console.is_terminal
                ):  # minutes in which a log file gets nothing
                    console.print(TITLES[stage])
            progress.update(tasks[stage], completed=done)

        callbacks = Callbacks(
            accepted=lambda: console.print(
                f"{'going on ' if resume else ''}quantizing {model} to {described(recipe)}, on {choose_device(device)}; "
                f"{calibration(recipe, calib)}"
            ),
            block=lambda report: console.print(block_line(report)),
            progress=on_progress,
            note=lambda sentence: console.print(f"note: {sentence}"),
        )
        path = quantize(model, out, recipe, calib, device, overwrite, callbacks, resume)
    console.print(
        f"wrote {path} in {time.monotonic() - start:.0f} s; serve it with: vllm serve {quote(str(path))}"
    )
    return path


def described(recipe: Recipe) -> str:
    """``w4a16 with a scale for every 128 weights, a 4-bit KV cache, FlatQuant, GPTQ``"""
    extras = [f"a scale for every {recipe.group_size} weights"] if recipe.group_size else []
    for bits, part in ((recipe.kv, "KV cache"), (recipe.lm_head, "output head")):
        if bits < 16:
            extras.append(f"{'an' if bits == 8 else 'a'} {bits}-bit {part}")
    also = f" with {', '.join(extras)}" if extras else ""
    how = dict.fromkeys(
        (recipe.system, {"qronos": "Qronos"}.get(recipe.rounding, recipe.rounding.upper()))
    )
    return f"{recipe.scheme}{also}, {', '.join(how)}"


def calibration(recipe: Recipe, calib: str) -> str:
    """``calibrating on 128 x 2048 tokens of stdlib, 15 epochs for each block, 3 epochs end to end``"""
    parts = [f"calibrating on {recipe.samples} x {recipe.seq_len} tokens of {calib}"]
    for epochs, of in ((recipe.epochs, "for each block"), (recipe.distill_epochs, "end to end")):
        parts += [f"{epochs} {'epoch' if epochs == 1 else 'epochs'} {of}"] if epochs else []
    parts += [f"{parallel.world()} processes"] if parallel.world() > 1 else []
    return ", ".join(parts)


WORSE = 1.5
"""A finished block whose error is so many times that at the start is called worse; rounding alone can add some."""


def block_line(report: BlockReport) -> str:
    """``block 3/32  mean squared error of its output 3.1e-04 -> 8.2e-05  41 s  peak memory 11.3 GB``"""
    extra = f"  {report.skipped_steps} steps skipped" if report.skipped_steps else ""
    if not report.error_after < WORSE * report.error_before:
        extra += "  worse than " + (
            "untrained: choose a smaller learning rate"
            if report.epoch_losses
            else "at the start: choose another rounding"
        )
    return (
        f"block {report.block + 1}/{report.blocks}  mean squared error of its output {report.error_before:.2e} -> "
        f"{report.error_after:.2e}  {report.seconds:.1f} s  peak memory {report.peak_memory_gb:.1f} GB{extra}"
    )
