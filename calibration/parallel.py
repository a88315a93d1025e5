"""Data-parallel calibration: the processes that ``torchrun`` started on one machine, each with its share of the rows.

Every global batch is divided equally, so batch size and number of steps are those of one process; what depends
on all rows (gradients, losses, channel maxima, Hessians) is reduced, and all processes hold the same trained values.
The first process alone prints, locks and commits. With one process every function here does nothing.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import UserError
from .launch import Stopped, is_writer, launched, rank, world  # noqa: F401 - asked beside the functions here
from .recipe import Recipe

TIMEOUT = timedelta(hours=12)
"""How long a process waits for the others: the first one reads and writes whole models alone meanwhile.
``torchrun`` ends them all as soon as one fails."""


def own_device(device: torch.device) -> torch.device:
    """``cuda`` as the GPU of this process; UserError if there are fewer GPUs than processes."""
    if device.type != "cuda" or world() == 1:
        return device
    local, have = launched("LOCAL_RANK", 0), torch.cuda.device_count()
    if local >= have:
        raise UserError(
            f"torchrun started {world()} processes and this machine has {have} usable GPUs; use --nproc-per-node {have}"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def share(recipe: Recipe) -> Recipe:
    """The recipe with this process's part of ``samples`` and ``batch_size``; UserError if they cannot be divided,
    or if a part of the recipe runs in one process only."""
    count = world()
    if count == 1:
        return recipe
    if launched("LOCAL_WORLD_SIZE", 1) != count:
        raise UserError("torchrun started processes on several machines; use one machine (--nnodes 1)")
    for name, ends in (("batch_size", "in a recipe file"), ("samples", "with --samples")):
        number = getattr(recipe, name)
        if number % count:
            raise UserError(
                f"{name}={number} cannot be divided among {count} processes; use a number of processes that "
                f"divides it, or set another {name} {ends}"
            )
    if recipe.distill_epochs:
        raise UserError(
            f"training end to end (distill_epochs={recipe.distill_epochs}) runs in one process; start it without "
            "torchrun"
        )
    if recipe.rotation == "learned":
        raise UserError("learning rotations runs in one process; start it without torchrun")
    parts = {"batch_size": recipe.batch_size // count, "samples": recipe.samples // count}
    return recipe.model_copy(update=parts)


@contextmanager
def group(device: torch.device) -> Iterator[None]:
    """The processes are connected inside: tensors on a GPU through NCCL, on the CPU through gloo."""
    if world() == 1:
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield
        wait()
    finally:
        dist.destroy_process_group()


def own_rows(rows: Tensor, batch_size: int) -> Tensor:
    """This process's part of every batch of ``rows`` [N, ...]; batch_size: of all processes together."""
    if world() == 1:
        return rows
    return torch.cat([batch.chunk(world())[rank()] for batch in rows.split(batch_size)])


def own_part(rows: Tensor) -> Tensor:
    """View of this process's part of ``rows`` [world * n, ...] that lie one process after another."""
    return rows.unflatten(0, (world(), -1))[rank()]


def _together(collective: Callable[[Tensor], object], tensors: Iterable[Tensor]) -> None:
    """Run ``collective`` on tensors of one dtype and device as if they were one."""
    kept = [t.detach() for t in tensors]
    if world() == 1 or not kept:
        return
    alone = len(kept) == 1 and kept[0].is_contiguous()  # a large Hessian is not copied
    flat = kept[0] if alone else torch.cat([t.flatten() for t in kept])
    try:
        collective(flat)
    except RuntimeError:  # a connection that closed
        raise Stopped("another process of this run has stopped; start the run again") from None
    if alone:
        return
    for tensor, part in zip(kept, flat.split([t.numel() for t in kept]), strict=True):
        tensor.copy_(part.view_as(tensor))


def sum_(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over the processes."""
    _together(dist.all_reduce, tensors)


def mean_(*tensors: Tensor) -> None:
    """Replace each tensor by its mean over the processes."""

    def mean(flat: Tensor) -> None:
        dist.all_reduce(flat)
        flat /= world()

    _together(mean, tensors)


def max_(*tensors: Tensor) -> None:
    """Replace each tensor by its elementwise maximum over the processes."""
    _together(lambda flat: dist.all_reduce(flat, dist.ReduceOp.MAX), tensors)


def broadcast_(*tensors: Tensor) -> None:
    """Replace each tensor by that of the first process."""
    _together(lambda flat: dist.broadcast(flat, 0), tensors)


def anywhere(flag: bool) -> bool:
    """Whether ``flag`` is true in any process."""
    found = torch.tensor(int(flag))
    max_(found)
    return bool(found)


def wait() -> None:
    """Return when every process has come here."""
    anywhere(False)
