"""Train the transforms and clips of one block against its full-precision output."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import parallel
from .architectures import Architecture
from .block import Stats, TrainableBlock
from .recipe import Recipe
from .steps import MeanLoss, Steps, cosine
from .streams import batches, run_block


@dataclass
class TrainReport:
    """Mean squared error against the full-precision block in each epoch, and skipped steps."""

    losses: list[float]
    skipped: int


def collect_stats(
    layer: nn.Module,
    arch: Architecture,
    x: Tensor,
    kwargs: dict[str, Any],
    batch_size: int,
    device: torch.device,
    out: Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """Full-precision output of the block for x [N, T, hidden], in ``out`` if given, and the channel maxima of
    its inputs."""
    amax: dict[str, Tensor] = {}

    def watch(name: str):
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            now = inputs[0].detach().abs().flatten(0, -2).amax(dim=0)
            amax[name] = torch.maximum(amax[name], now) if name in amax else now

        return hook

    places = {"qkv": arch.qkv[0], "o": arch.o, "gate_up": arch.gate_up[0], "down": arch.down}
    handles = [
        layer.get_submodule(place).register_forward_pre_hook(watch(name))
        for name, place in places.items()
    ]
    try:
        out = run_block(layer, x, kwargs, batch_size, device, out)
    finally:
        for handle in handles:
            handle.remove()
    parallel.max_(*amax.values())
    return out, Stats(**amax)


def train_block(
    block: TrainableBlock,
    layer: nn.Module,
    x: Tensor,
    target: Tensor,
    kwargs: dict[str, Any],
    recipe: Recipe,
    device: torch.device,
) -> TrainReport:
    """Minimise the mean squared error of ``layer`` (wrapped by ``block``) on x -> target, [N, T, hidden].

    AdamW, cosine schedule to a thousandth of the rate, fixed batch order, each batch's loss divided by
    its own value (FlatQuant's setting). A step with a non-finite loss or gradient is skipped and counted.
    """
    if not any(True for _ in block.parameters()):
        return TrainReport([], 0)  # a recipe that learns nothing
    steps = max(1, recipe.epochs * -(-len(x) // recipe.batch_size))

    def loss(batch: Tensor, goal: Tensor) -> Tensor:
        try:
            return F.mse_loss(layer(batch, **kwargs), goal)
        finally:
            block.forget()  # what the gradient needs is autograd's

    groups = block.parameter_groups(recipe.lr, recipe.clip_lr_factor)
    trainer = Steps(
        loss,
        groups,
        cosine(steps, floor=1e-3),
        device,
        weight_decay=1e-2,
        normalize=True,
        precision=recipe.precision,
    )
    losses: list[MeanLoss] = []
    for epoch in range(recipe.epochs):
        block.begin_epoch(epoch, recipe.epochs)
        losses.append(MeanLoss(device))
        for batch, goal in zip(
            batches(x, recipe.batch_size, device),
            batches(target, recipe.batch_size, device),
            strict=True,
        ):
            losses[-1].add(trainer.step(batch, goal), len(batch))
    parallel.broadcast_(*block.parameters())  # they are equal but for what a device may round otherwise
    return TrainReport([float(total) for total in losses], int(trainer.skipped))
