"""Optimizer steps of one loss: AdamW and, on a GPU, one CUDA graph for everything that a step does.

Training transforms is many small operations, so a GPU waits for Python unless the whole step (loss, gradients,
AdamW) is captured once and replayed.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import parallel
from .capture import CaptureError, Recording, missing_memory, side_stream, wanted, warn_once
from .precision import products

EAGER_STEPS = 3
"""Steps before the capture: they make the optimizer's state and the libraries' workspaces."""


def cosine(steps: int, warmup: float = 0.0, floor: float = 0.0) -> Callable[[int], float]:
    """Factor of the learning rate at each step: linear over the first ``warmup`` (a part of 1) of them, then a
    cosine from 1 to ``floor``."""
    warm = round(warmup * steps)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        done = (step - warm) / max(1, steps - warm)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return factor


class MeanLoss:
    """Mean over rows of the losses of steps, on their device; a skipped step, NaN, does not count."""

    def __init__(self, device: torch.device):
        self.total, self.rows = torch.zeros((), device=device), torch.zeros((), device=device)

    def add(self, loss: Tensor, rows: int) -> None:
        """``loss``: scalar mean over ``rows`` rows."""
        self.total += loss.nan_to_num(nan=0.0) * rows
        self.rows += ~loss.isnan() * rows

    def __float__(self) -> float:
        """NaN where every step was skipped."""
        return float(self.total / self.rows)


class Steps:
    """AdamW on ``loss(*inputs)``, a scalar.

    groups: the optimizer's, with their rates. factor: multiplies the rates at each step. normalize: divide each
    loss by its own value (FlatQuant's setting, so that all blocks have gradients of one size). precision: of
    float32 products, as ``torch.set_float32_matmul_precision`` calls it. graph: capture on CUDA; where memory does
    not suffice or the capture fails, a warning says so and the steps stay eager. With several processes
    (parallel.py) each has its part of the inputs, loss and gradients are their mean, and nothing is captured: a
    capture with NCCL inside is not tried yet.

    A step whose loss or gradient is not finite changes nothing and is counted in ``skipped``; nothing waits for the
    device.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        groups: list[dict[str, Any]],
        factor: Callable[[int], float],
        device: torch.device,
        weight_decay: float = 0.0,
        normalize: bool = False,
        precision: str = "highest",
        graph: bool = True,
    ):
        self.precision, self.device = precision, device
        self.loss, self.factor, self.normalize = loss, factor, normalize
        self.rates = [group["lr"] for group in groups]
        groups = [{**g, "lr": torch.tensor(g["lr"], device=device)} for g in groups]
        cuda = device.type == "cuda"
        self.optimizer: Any = torch.optim.AdamW(
            groups, weight_decay=weight_decay, fused=True, capturable=cuda
        )
        self.parameters = [p for group in groups for p in group["params"]]
        self.skipped = torch.zeros((), device=device)
        self.count = 0
        self.wanted = graph and wanted(device)
        self.side = side_stream(device) if self.wanted else None
        self.graph: Recording | None = None

    def step(self, *inputs: Tensor) -> Tensor:
        """One step on ``inputs``; the loss before it, NaN if the step was skipped, a new scalar tensor."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"].fill_(rate * self.factor(self.count))
        self.count += 1
        if self.wanted and self.graph is None and self.count > EAGER_STEPS:
            self._capture(inputs)
        if self.graph is not None and self.graph.takes(inputs):
            return self.graph.replay(inputs).clone()
        if self.side is None:
            return self._eager(inputs)
        self.side.wait_stream(torch.cuda.current_stream())  # what is captured later must have run there
        with torch.cuda.stream(self.side):
            result = self._eager(inputs)
        torch.cuda.current_stream().wait_stream(self.side)
        return result

    def _eager(self, inputs: tuple[Tensor, ...]) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with products(self.precision):
            loss = self.loss(*inputs)
            value = loss.detach().clone()
            parallel.mean_(value)
            (loss / value.clamp(min=1e-30) if self.normalize else loss).backward()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        parallel.mean_(*gradients)
        norm = nn.utils.get_total_norm(gradients)
        bad = ~(torch.isfinite(norm) & torch.isfinite(value))
        self.optimizer.found_inf = (
            bad.float()
        )  # the fused kernel leaves everything as it is if this is 1
        self.optimizer.step()
        self.skipped += bad
        return torch.where(bad, torch.nan, value)

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        self._drop()
        missing = missing_memory(self.device)
        if missing > 0:
            return self._stay_eager(f"{missing / 1e9:.0f} GB of GPU memory too little")
        assert self.side is not None
        try:
            self.graph = Recording(
                lambda *kept: self._eager(kept), inputs, self._drop, self.device, self.side
            )
        except CaptureError as error:
            self._stay_eager(str(error))

    def _drop(self) -> None:
        """Let go of what a step leaves behind."""
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.found_inf = None

    def _stay_eager(self, why: str) -> None:
        self.wanted, self.side = False, None
        warn_once(f"training steps are not captured in a CUDA graph and run slower: {why}")
