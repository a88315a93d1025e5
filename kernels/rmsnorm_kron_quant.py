"""RMSNorm (with residual add), Kronecker transform and quantization in one step.

    Z = L^T (x * weight) R,   scale[t] = clip * max|Z[t]| / qmax * rsqrt(mean(x[t]^2) + eps)

The norm's ``1/rms`` is one positive scalar per token: it cancels in the codes and multiplies the scale,
so the transform runs on ``x * weight`` without waiting for the sum of squares.

The kernel has a second form, without quantization: ``rmsnorm_kron.py``.
"""

import torch
from torch import Tensor

from .jit import empty, launch, leading, register, room, tl, triton
from .kron import empty_codes, fused, load_factors, plan, prefetch, prefetchable, rows, transform
from .kron_quant import kron_quant_ref, quantize
from .quantize import qmax


@triton.jit(do_not_specialize=["t"])
def _rmsnorm_kron_kernel(
    x_ptr,  # [T, K], rows stride_x apart
    residual_ptr,  # [T, K], rows stride_r apart; any pointer where RESIDUAL is false
    weight_ptr,  # [K]
    l_ptr,  # [1, a, a]
    r_ptr,  # [1, b, b]
    clip_ptr,  # float32 [1]; any pointer where QMAX is 0
    out_ptr,  # [T, K]: codes, int8; where QMAX is 0 what would be quantized, in x's dtype
    scale_ptr,  # float32 [T]; any pointer where QMAX is 0
    total_ptr,  # [T, K]: x + residual
    t,
    stride_x,
    stride_r,
    a,
    b,
    eps,
    RESIDUAL: tl.constexpr,
    QMAX: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    L: tl.constexpr,
    R: tl.constexpr,
    WIDE: tl.constexpr,
    PDL: tl.constexpr,
    AHEAD: tl.constexpr,
    THREADS: tl.constexpr,
    ASM: tl.constexpr,
):
    left_t, right = load_factors(l_ptr, r_ptr, 0, a, b, A, B, L, R, x_ptr.dtype.element_ty)
    if QMAX:
        clip = tl.load(clip_ptr)
    i, j = tl.arange(0, A)[:, None], tl.arange(0, B)[None, :]
    inside = (i < a) & (j < b)
    at = i * b + j
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for token in range(tl.program_id(0), t, tl.num_programs(0)):
        later = token + tl.num_programs(0)
        prefetch(x_ptr, later, t, stride_x, a * b, AHEAD, THREADS)
        total = tl.load(x_ptr + token * tl.cast(stride_x, tl.int64) + at, mask=inside, other=0.0)
        dtype: tl.constexpr = total.dtype
        if RESIDUAL:
            prefetch(residual_ptr, later, t, stride_r, a * b, AHEAD, THREADS)
            residual = tl.load(
                residual_ptr + token * tl.cast(stride_r, tl.int64) + at, mask=inside, other=0.0
            )
            total = (total.to(tl.float32) + residual.to(tl.float32)).to(dtype)
            tl.store(total_ptr + token * tl.cast(a * b, tl.int64) + at, total, mask=inside)
        wide = total.to(tl.float32)
        square = tl.sum(tl.sum(wide * wide, axis=1), axis=0)
        if QMAX:
            x = (wide * weight.to(tl.float32)).to(dtype)
        else:  # no scale takes 1/rms, which comes first then, and fp16 cannot overflow
            normed = (wide * tl.rsqrt(square / (a * b) + eps)).to(dtype)
            x = (normed.to(tl.float32) * weight.to(tl.float32)).to(dtype)
        if not WIDE:
            # An opaque copy: without it the compiler computes x twice, once in the layout of the stores
            # and once in that of the product's register operand.
            x = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2
            )
        z = transform(x, left_t, right, L, R, WIDE)
        if QMAX:
            codes, scale = quantize(z, clip, QMAX, ASM)
            tl.store(out_ptr + token * tl.cast(a * b, tl.int64) + at, codes, mask=inside)
            tl.store(scale_ptr + token, scale * tl.rsqrt(square / (a * b) + eps))
        else:
            tl.store(out_ptr + token * tl.cast(a * b, tl.int64) + at, z.to(dtype), mask=inside)


def start(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    left: Tensor | None,
    right: Tensor | None,
    out: Tensor,
    quantizer: tuple[Tensor, Tensor, int] | None = None,
) -> Tensor:
    """Launch the kernel, which fills ``out``; returns ``x + residual`` [T, K], or an empty tensor without a residual.

    x: as ``rows`` gives it, with factors that are ``fused``. out: codes int8 [T, K]; in x's dtype without a
    ``quantizer``: clip, scale (to be filled) and the largest code. The rest as ``rmsnorm_kron_quant``.
    """
    t, k = x.shape
    added = x if residual is None else rows(residual)
    p = plan(x, k, left, right, 1, "norm", prefetchable(added))
    clip, scale, most = quantizer or (x, x, 0)
    total = empty((0,) if residual is None else (room(t), k), x.dtype, x.device)
    total = total if residual is None else leading(total, t)
    if t:
        launch(
            _rmsnorm_kron_kernel, p.grid, x, added, norm_weight, x if left is None else left.contiguous(),
            x if right is None else right.contiguous(), clip, out, scale, total,
            t, x.stride(0), added.stride(0), p.a, p.b, eps, RESIDUAL=residual is not None, QMAX=most,
            **p.meta,
        )  # fmt: skip
    return total


def rmsnorm_kron_quant_triton(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    left: Tensor | None,
    right: Tensor | None,
    clip: Tensor,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's launch. Shapes as the op: without a residual the third result is empty."""
    x = rows(x)
    t, k = x.shape
    if not fused(x, k, left, right, 1):
        return _rmsnorm_kron_quant_torch(x, residual, norm_weight, eps, left, right, clip, bits)
    codes = empty_codes(t, k, x.device)
    scale = leading(empty((room(t), 1), torch.float32, x.device), t)
    total = start(x, residual, norm_weight, eps, left, right, codes, (clip, scale, qmax(bits)))
    return codes, scale, total


def _rmsnorm_kron_quant_torch(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    left: Tensor | None,
    right: Tensor | None,
    clip: Tensor,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    results = rmsnorm_kron_quant_ref(x, residual, norm_weight, eps, left, right, clip, bits)
    return results if residual is not None else (*results[:2], x.new_empty(0))


def _rmsnorm_kron_quant_fake(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    left: Tensor | None,
    right: Tensor | None,
    clip: Tensor,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    codes, scale = (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty((x.shape[0], 1), dtype=torch.float32),
    )
    return codes, scale, x.new_empty((0,) if residual is None else x.shape)


register(
    "rmsnorm_kron_quant", rmsnorm_kron_quant_triton, _rmsnorm_kron_quant_torch, _rmsnorm_kron_quant_fake
)


def rmsnorm_kron_quant(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    left: Tensor | None,
    right: Tensor | None,
    clip: Tensor,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize, transform and quantize: the Triton kernel on CUDA, the reference on the CPU.

    x, residual: [T, K] bf16, fp16 or float32. norm_weight: [K]. Factors, clip and bits as ``kron_quant``
    with S = 1. Returns codes int8 [T, K], scale float32 [T, 1] and the new residual ``x + residual`` (``x``
    itself where residual is None; the op underneath then returns an empty tensor, since it may not alias).
    Errors as ``kron_quant``.
    """
    codes, scale, total = torch.ops.flatquant.rmsnorm_kron_quant(
        x, residual, norm_weight, eps, left, right, clip, bits
    )
    return codes, scale, x if residual is None else total


def sum_and_rstd_ref(x: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """``x + residual`` [T, K] in x's dtype (``x`` itself where residual is None) and its 1/rms, float32 [T, 1]."""
    total = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    return total, torch.rsqrt(total.float().pow(2).mean(dim=-1, keepdim=True) + eps)


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
    total, rstd = sum_and_rstd_ref(x, residual, eps)
    codes, scale = kron_quant_ref(
        (total.float() * norm_weight.float()).to(x.dtype), left, right, clip, bits
    )
    return codes, scale * rstd, total
