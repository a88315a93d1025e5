"""8-bit lm_head: rounded to nearest with one scale per row, and what that costs on the calibration text."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.quantize import quantize_ref
from ..kernels.w8_linear import w8_linear_ref

HEAD = "lm_head.weight"
PACKED, SCALE = "lm_head.weight_packed", "lm_head.weight_scale"
_CHUNK = 128
"""Tokens whose logits are in memory at a time."""


@dataclass
class HeadReport:
    """Cost of the rounding: mean next-token loss (nats) with the 16-bit and the 8-bit head, and the mean
    KL divergence of the second from the first."""

    tokens: int
    loss_16: float
    loss_8: float
    divergence: float

    def __str__(self) -> str:
        return (
            f"8-bit lm_head: next-token loss {self.loss_16:.5f} -> {self.loss_8:.5f}, "
            f"KL divergence {self.divergence:.2e} nats ({self.tokens} tokens)"
        )


def quantize_head(weight: Tensor) -> dict[str, Tensor]:
    """The checkpoint's tensors of a head [V, hidden]: int8 codes and float32 scale [V, 1]."""
    codes, scale = quantize_ref(weight.float(), 8)
    return {PACKED: codes, SCALE: scale.unsqueeze(-1)}


@torch.no_grad()
def head_cost(weight: Tensor, head: dict[str, Tensor], hidden: Tensor, tokens: Tensor) -> HeadReport:
    """Compare both heads on normed hidden states.

    weight: [V, hidden]. head: as ``quantize_head``. hidden: float32 [N, T, hidden]. tokens: int64 [N, T].
    """
    inputs, targets = hidden[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    weight, codes, scale = (t.to(hidden.device) for t in (weight.float(), head[PACKED], head[SCALE]))
    sums = torch.zeros(3, dtype=torch.float64)
    for x, y in zip(inputs.split(_CHUNK), targets.to(hidden.device).split(_CHUNK), strict=True):
        wide = F.linear(x, weight).log_softmax(-1)
        narrow = w8_linear_ref(x, codes, scale).log_softmax(-1)
        sums[0] += F.nll_loss(wide, y, reduction="sum").item()
        sums[1] += F.nll_loss(narrow, y, reduction="sum").item()
        sums[2] += F.kl_div(narrow, wide, reduction="sum", log_target=True).item()
    loss_16, loss_8, divergence = (sums / len(targets)).tolist()
    return HeadReport(len(targets), loss_16, loss_8, divergence)


class ReferenceHead(nn.Module):
    """The finished head in PyTorch. codes: int8 [V, hidden]. scale: float32 [V, 1]."""

    codes: Tensor
    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor):
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> logits [..., V] in x's dtype."""
        return w8_linear_ref(x, self.codes, self.scale)
