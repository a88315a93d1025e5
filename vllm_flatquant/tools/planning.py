"""``flatquant quantize --dry-run``: what a run would take and give, before it is started."""

import shutil
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from ..calibration.plan import Plan, nearest_folder, plan_run
from ..calibration.quantize import choose_device
from ..calibration.recipe import Recipe
from ..choice import choose_backend, cuda_capability, kernel_name
from ..spec import FlatQuantSpec
from .inspection import spec_lines


def print_plan(model: str, out: Path, recipe: Recipe, calib: str, device: str) -> Plan:
    """Make the plan of a run and print it."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(
        f"dry run: quantizing {model} on {choose_device(device)}; one block is tried, nothing is kept"
    )
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("checking weights", total=1.0)
        plan, spec = plan_run(
            model, out, recipe, calib, device, lambda done: progress.update(task, completed=done)
        )
    free = shutil.disk_usage(nearest_folder(out.resolve().parent)).free
    for line in plan_lines(plan, spec, recipe, free):
        console.print(line)
    return plan


def plan_lines(plan: Plan, spec: FlatQuantSpec, recipe: Recipe, free: int) -> list[str]:
    """A plan for people. free: bytes left on the disk."""
    capability = cuda_capability()
    backend = choose_backend(capability)
    kernel = kernel_name(spec.weights.bits, spec.activations.bits, capability)
    longest = sorted(plan.phases.items(), key=lambda item: -item[1])[:3]
    gpu = f"{size(plan.gpu)} on the GPU, " if plan.gpu else ""
    mapped = (
        f" ({size(plan.mapped)} of it in mapped files, which the system may drop)" if plan.mapped else ""
    )
    lines = [
        *spec_lines(spec),
        (
            f"blocks      {plan.blocks}, each {plan.block_weights / 1e6:.1f}M quantized weights and "
            f"{size(plan.block_bytes)} in the checkpoint"
        ),
        f"memory      peak {gpu}{size(plan.cpu)} in the process{mapped}",
        (
            f"disk        checkpoint {size(plan.checkpoint)}; up to {size(plan.staging)} while it is made "
            f"(free: {size(free)})"
        ),
        (
            f"time        {duration(plan.seconds)}: each block {duration(sum(plan.phases.values()))}, of that "
            + ", ".join(f"{name} {duration(seconds)}" for name, seconds in longest)
        ),
        (
            f"measured    block 0 on {plan.rows} of {recipe.samples} rows, {plan.steps} training steps; a busy machine "
            "gives other times"
        ),
        f"serving     here through the {backend.name} backend ({backend.reason}): {kernel}",
    ]
    if recipe.distill_epochs:
        lines.append("not in it   time and disk of the end-to-end stage; its memory is")
    if recipe.rotation == "learned":
        lines.append("not in it   learning the rotations, which holds the model in memory several times")
    if plan.staging > free:
        lines.append("warning     the disk is too small for this run")
    return lines


def size(count: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
