"""Quantize with one progress bar and one line per block."""

import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ..calibration.quantize import BlockReport, choose_device, quantize
from ..calibration.recipe import Recipe


def quantize_with_progress(
    model: str, out: Path, recipe: Recipe, calib: str, device: str, overwrite: bool
) -> Path:
    """``calibration.quantize.quantize`` with its progress on the terminal."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    columns = (TextColumn("quantizing"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    start = time.monotonic()
    kv = "" if recipe.kv == 16 else f" with a {recipe.kv}-bit KV cache"
    console.print(
        f"quantizing {model} to {recipe.scheme}{kv}, {recipe.rounding.upper()}, on {choose_device(device)}; "
        f"calibrating on {recipe.samples} x {recipe.seq_len} tokens of {calib}, {recipe.epochs} epochs"
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=1.0)

        def on_block(report: BlockReport) -> None:
            console.print(block_line(report))

        path = quantize(
            model,
            out,
            recipe,
            calib,
            device,
            overwrite,
            on_block=on_block,
            on_progress=lambda done: progress.update(task, completed=done),
        )
    console.print(f"wrote {path} in {time.monotonic() - start:.0f} s; serve it with: vllm serve {path}")
    return path


def block_line(report: BlockReport) -> str:
    """``block 3/32  error 3.1e-04 -> 8.2e-05  41 s  peak 11.3 GB``"""
    extra = f"  {report.skipped_steps} steps skipped" if report.skipped_steps else ""
    return (
        f"block {report.block + 1}/{report.blocks}  error {report.error_before:.2e} -> "
        f"{report.error_after:.2e}  {report.seconds:.1f} s  peak {report.peak_memory_gb:.1f} GB{extra}"
    )
