"""Weight clipping and scales: learnable while training, fixed numbers afterwards."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels.quantize import codes_ref, scale_ref
from .sites import CLIP_INIT
from .straight_through import fake_quantize


def grouped(weight: Tensor, group_size: int | None) -> Tensor:
    """[out, in] -> [out, groups, group_size]; one group as wide as the row if group_size is None."""
    return weight.unflatten(-1, (-1, group_size or weight.shape[-1]))


class WeightClip(nn.Module):
    """Learnable weight clipping: each group is clamped to (sigmoid(a) * min, sigmoid(b) * max)."""

    def __init__(self, rows: int, groups: int):
        super().__init__()
        self.max_logit = nn.Parameter(torch.full((rows, groups, 1), CLIP_INIT))
        self.min_logit = nn.Parameter(torch.full((rows, groups, 1), CLIP_INIT))

    def forward(self, weight: Tensor, group_size: int | None) -> Tensor:
        """Clipped weight, [out, in] as given."""
        w = grouped(weight, group_size)
        high = w.amax(dim=-1, keepdim=True) * self.max_logit.sigmoid().to(w.dtype)
        low = w.amin(dim=-1, keepdim=True) * self.min_logit.sigmoid().to(w.dtype)
        return torch.clamp(w, low, high).flatten(-2)


def fake_quantize_weight(weight: Tensor, bits: int, group_size: int | None) -> Tensor:
    """Round-to-nearest fake quantization of [out, in], one scale per row or group; differentiable."""
    return fake_quantize(grouped(weight, group_size), bits).flatten(-2)


@dataclass(frozen=True)
class Grid:
    """The levels that weights are rounded to: one symmetric scale for each row or group, fixed beforehand.

    bits: 2, 3, 4 or 8. dtype: a 16-bit type that scales are rounded to (what a weight-only GEMM reads), or
    None. search: scales that lower the error of the weights themselves, instead of the largest weight's.
    shrink: multiplies the scales (MagR's rule for 2 and 3 bits).
    """

    bits: int
    group_size: int | None = None
    dtype: torch.dtype | None = None
    search: bool = False
    shrink: float = 1.0

    def scale(self, weight: Tensor) -> Tensor:
        """Scales float32 [out, groups] of ``weight`` [out, in]."""
        w = grouped(weight, self.group_size)
        ratio = search_ratio(w, self.bits) if self.search else 1.0
        scale = scale_ref(w, self.bits, ratio * self.shrink).float()
        if self.dtype is None:
            return scale
        kind = torch.finfo(self.dtype)
        rounded = scale.clamp(max=kind.max).to(self.dtype).float()
        return torch.where(rounded > 0, rounded, kind.tiny)  # no scale may vanish


def search_ratio(weight: Tensor, bits: int) -> Tensor:
    """The part of each group's largest weight at which clipping errs least.

    weight: [out, groups, group_size]. Least sum of |error|^2.4 over 1, 0.99, ..., 0.21 (the search of GPTQ's
    and QuaRot's code). Returns float32 [out, groups].
    """
    weight = weight.float()
    best = torch.full(weight.shape[:-1], torch.inf, dtype=weight.dtype, device=weight.device)
    ratio = torch.ones_like(best)
    for step in range(80):
        now = 1 - step / 100
        scale = scale_ref(weight, bits, now)
        error = weight - codes_ref(weight, scale, bits) * scale.unsqueeze(-1)
        total = error.abs().pow(2.4).sum(dim=-1)
        better = total < best
        best, ratio = torch.where(better, total, best), torch.where(better, now, ratio)
    return ratio
