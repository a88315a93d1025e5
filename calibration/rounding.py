"""From folded weights to integer codes: round to nearest, or GPTQ."""

import torch
from torch import Tensor

from ..kernels.quantize import codes_ref
from .weights import grouped, weight_scale


def rtn(
    weight: Tensor, bits: int, group_size: int | None, scale_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Round to nearest.

    weight: [out, in]. Returns codes int8 [out, in] and scale float32 [out, groups].
    scale_dtype: as in ``weight_scale``.
    """
    scale = weight_scale(weight, bits, group_size, scale_dtype)
    codes = codes_ref(grouped(weight, group_size), scale.to(weight.dtype), bits)
    return codes.flatten(-2).to(torch.int8), scale


def cholesky_inverse_upper(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper Cholesky factor of ``(H + lambda I)^-1`` for H [K, K], and the damping that it took.

    lambda is ``damping`` times the mean diagonal, raised tenfold until the matrix is positive definite.
    """
    eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    mean = hessian.diagonal().mean()
    while True:
        factor, failed = torch.linalg.cholesky_ex(hessian + damping * mean * eye)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed and torch.isfinite(upper).all():
                return upper, damping
        if damping > 1e3:
            raise ArithmeticError(
                "the Hessian is not finite; the calibration activations hold NaN or inf"
            )
        damping *= 10


def gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    group_size: int | None,
    scale_dtype: torch.dtype | None,
    damping: float = 0.01,
    block: int = 128,
) -> tuple[Tensor, Tensor, float]:
    """GPTQ (arXiv 2210.17323, algorithm 1) with scales fixed beforehand from ``weight``.

    weight: [out, in] float64. hessian: sum of z^T z over the layer's quantized inputs, [in, in] float64.
    Columns are rounded in order; each one's error moves to those after it, in blocks of ``block``.
    Returns codes int8 [out, in], scale float32 [out, groups] and the damping used.
    """
    scale = weight_scale(weight, bits, group_size, scale_dtype)
    per_column = scale.to(weight.dtype).repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
    hessian = hessian.clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    upper, damping = cholesky_inverse_upper(hessian, damping)
    w = weight.clone()
    codes = torch.empty_like(w)
    for start in range(0, w.shape[1], block):
        stop = min(start + block, w.shape[1])
        errors = torch.empty_like(w[:, start:stop])
        for i in range(start, stop):
            codes[:, i] = codes_ref(w[:, i : i + 1], per_column[:, i], bits)[:, 0]
            error = (w[:, i] - codes[:, i] * per_column[:, i]) / upper[i, i]
            w[:, i:stop] -= error[:, None] * upper[i, i:stop]
            errors[:, i - start] = error
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return codes.to(torch.int8), scale, damping
