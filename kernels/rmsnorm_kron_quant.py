"""RMSNorm (with residual add), Kronecker transform and quantization in one step.

The norm's ``1/rms`` is one positive scalar per token: it cancels in the codes and multiplies the scale,
so the transform runs on ``x * weight`` without waiting for the sum of squares.
"""

import torch
from torch import Tensor

from .kron_quant import kron_quant_ref


def rmsnorm_kron_quant_ref(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    left: Tensor | None,
    right: Tensor | None,
    clip: Tensor,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize, transform and quantize ``x``.

    x, residual: [T, K]. norm_weight: [K]. eps: added to the mean square. Factors, clip and bits as in
    ``kron_quant_ref`` with S = 1. Returns codes int8 [T, K], scale float32 [T, 1] and the new residual
    ``x + residual`` [T, K] in x's dtype (``x`` itself where residual is None).
    """
    total = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    rstd = torch.rsqrt(total.float().pow(2).mean(dim=-1, keepdim=True) + eps)
    codes, scale = kron_quant_ref(
        (total.float() * norm_weight.float()).to(x.dtype), left, right, clip, bits
    )
    return codes, scale * rstd, total
