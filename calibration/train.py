"""Train the transforms and clips of one block against its full-precision output."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .architectures import Architecture
from .block import Stats, TrainableBlock
from .recipe import Recipe
from .streams import run_block


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
) -> tuple[Tensor, Stats]:
    """Full-precision output of the block for x [N, T, hidden], and the channel maxima of its inputs."""
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
        out = run_block(layer, x, kwargs, batch_size, device)
    finally:
        for handle in handles:
            handle.remove()
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
    optimizer = torch.optim.AdamW(block.parameter_groups(recipe.lr, recipe.clip_lr_factor))
    steps = max(1, recipe.epochs * -(-len(x) // recipe.batch_size))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=recipe.lr * 1e-3)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    losses: list[Tensor] = []
    skipped = torch.zeros((), device=device)
    for _ in range(recipe.epochs):
        total = torch.zeros((), device=device)
        for start in range(0, len(x), recipe.batch_size):
            batch = x[start : start + recipe.batch_size].to(device, non_blocking=True)
            goal = target[start : start + recipe.batch_size].to(device, non_blocking=True)
            block.forget()
            loss = F.mse_loss(layer(batch, **kwargs), goal)
            optimizer.zero_grad(set_to_none=True)
            (loss / loss.detach().clamp(min=1e-30)).backward()
            norm = torch.stack(
                torch._foreach_norm([p.grad for p in parameters if p.grad is not None])
            ).sum()
            finite = torch.isfinite(norm) & torch.isfinite(loss)
            if finite:
                optimizer.step()
            skipped += ~finite
            schedule.step()
            total += torch.where(finite, loss.detach(), torch.zeros_like(total)) * len(batch)
        losses.append(total / len(x))
    block.forget()
    return TrainReport([float(loss) for loss in losses], int(skipped))
