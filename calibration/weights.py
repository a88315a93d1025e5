"""Weight clipping and scales: learnable while training, fixed numbers afterwards."""

import torch
from torch import Tensor, nn

from ..kernels.quantize import scale_ref
from .sites import CLIP_INIT, fake_quantize


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
        return torch.minimum(torch.maximum(w, low), high).flatten(-2)


def fake_quantize_weight(weight: Tensor, bits: int, group_size: int | None) -> Tensor:
    """Round-to-nearest fake quantization of [out, in], one scale per row or group; differentiable."""
    return fake_quantize(grouped(weight, group_size), bits).flatten(-2)


def weight_scale(weight: Tensor, bits: int, group_size: int | None, dtype: torch.dtype | None) -> Tensor:
    """Scales float32 [out, groups] of ``weight`` [out, in].

    dtype: a 16-bit type to round them to (what a weight-only GEMM reads), or None.
    """
    scale = scale_ref(grouped(weight, group_size), bits).float()
    return scale if dtype is None else scale.to(dtype).float()
