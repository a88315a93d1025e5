"""RMSNorm (with residual add) and Kronecker transform in one step, as W4A16 uses them.

    Z = L^T N R,   N = x / rms(x) * weight,   rms(x) = sqrt(mean(x[t]^2) + eps)

The kernel is that of ``rmsnorm_kron_quant.py`` without its quantization. There is no scale here for 1/rms to
multiply, so it comes first, and N is what an RMSNorm on its own returns: ``x / rms(x)`` is rounded to x's dtype,
and so is its product with the weight.
"""

import torch
from torch import Tensor

from .jit import empty, register
from .kron import fused, kron_ref, rows
from .rmsnorm_kron_quant import start, sum_and_rstd_ref


def rmsnorm_kron_triton(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    left: Tensor | None,
    right: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The kernel's launch. Shapes as the op: without a residual the second result is empty."""
    x = rows(x)
    if not fused(x, x.shape[1], left, right, 1):
        return _rmsnorm_kron_torch(x, residual, norm_weight, eps, left, right)
    z = empty(x.shape, x.dtype, x.device)
    return z, start(x, residual, norm_weight, eps, left, right, z)


def _rmsnorm_kron_torch(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    left: Tensor | None,
    right: Tensor | None,
) -> tuple[Tensor, Tensor]:
    z, total = rmsnorm_kron_ref(x, residual, norm_weight, eps, left, right)
    return z, x.new_empty(0) if residual is None else total


def _rmsnorm_kron_fake(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    left: Tensor | None,
    right: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((0,) if residual is None else x.shape)


register("rmsnorm_kron", rmsnorm_kron_triton, _rmsnorm_kron_torch, _rmsnorm_kron_fake)


def rmsnorm_kron(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    left: Tensor | None,
    right: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Normalize and transform: the Triton kernel on CUDA, the reference on the CPU.

    x, residual: [T, K] bf16, fp16 or float32. norm_weight: [K]. Factors as ``kron`` with S = 1; both None:
    the norm alone. Returns z [T, K] in x's dtype and the new residual ``x + residual`` (``x`` itself where
    residual is None; the op underneath then returns an empty tensor, since it may not alias). Errors as ``kron``.
    """
    z, total = torch.ops.flatquant.rmsnorm_kron(x, residual, norm_weight, eps, left, right)
    return z, x if residual is None else total


def rmsnorm_kron_ref(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    left: Tensor | None,
    right: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Normalize and transform ``x``.

    x, residual: [T, K]. norm_weight: [K]. eps: added to the mean square. Factors as ``kron_ref`` with S = 1.
    Returns z [T, K] and the new residual ``x + residual`` [T, K], both in x's dtype (``x`` itself where
    residual is None).
    """
    total, rstd = sum_and_rstd_ref(x, residual, eps)
    normed = (total.float() * rstd).to(x.dtype)
    return kron_ref((normed.float() * norm_weight.float()).to(x.dtype), left, right), total
