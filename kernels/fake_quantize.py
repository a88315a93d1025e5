"""Fake quantization of a training step, forward and backward: each row of z in one pass over memory.

    s = clip * max|z| / qmax  (1 where that is 0),   out = clamp(round_half_even(z / s), -qmax - 1, qmax) * s

Backward with q = z / s and code c: dz = g where c is not clamped, and ds = sum of g c - dz q, which goes on to clip
and to the largest |z|, in equal parts if there are several. Rounding passes gradients straight through.
Only autograd calls this (``calibration/straight_through.py``), so that it is no custom operator.
"""

import torch
from torch import Tensor

from .jit import HAS_TRITON, INTERPRET, launch, tl, triton
from .quantize import codes_ref, qmax, scale_ref

LONGEST = 32768
"""Elements of a row that one program holds in registers."""
ELEMENTS = 1024
"""Of several short rows in one program."""


@triton.jit
def _load_rows(z_ptr, clip_ptr, clip_value, rows, k, shards, HAS_CLIP: tl.constexpr, R: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """Where the program's rows are, which of it is there, their values [R, K], and the clip of each [R]."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, K)
    at = row[:, None] * k + column[None, :]
    inside = (row < rows)[:, None] & (column < k)[None, :]
    z = tl.load(z_ptr + at, mask=inside, other=0.0)
    if HAS_CLIP:
        clip = tl.load(clip_ptr + row % shards)
    else:
        clip = tl.full([R], 0.0, tl.float32) + clip_value
    return row, at, inside, z, clip


@triton.jit
def _clamp(x, low, high):
    """NaN stays."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _quantized(z, clip, QMAX: tl.constexpr):
    """Scale, codes, z / scale, its rounding, bits of |z| and of each row's largest: the reference's numbers.

    As integers, a NaN is larger than every number: the maximum is NaN as PyTorch's is. Adding 1.5 * 2**23 rounds to
    even what lies near the codes, and the sign bit keeps -0.
    """
    bits = z.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(bits, axis=1)
    amax = largest.to(tl.float32, bitcast=True) * clip
    scale = tl.where(amax > 0, tl.div_rn(amax, tl.full(amax.shape, QMAX, tl.float32)), 1.0)
    steps = tl.div_rn(z, tl.broadcast_to(scale[:, None], z.shape))
    near = (_clamp(steps, -QMAX - 2.0, QMAX + 1.0) + 12582912.0) - 12582912.0
    sign = steps.to(tl.int32, bitcast=True) & -0x80000000
    rounded = (near.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return scale, _clamp(rounded, -QMAX - 1.0, QMAX * 1.0), steps, rounded, bits, largest


@triton.jit
def _fake_quantize_kernel(
    z_ptr,  # float32 [rows, k]
    clip_ptr,  # float32 [shards] if HAS_CLIP
    clip_value,
    out_ptr,  # float32 [rows, k]
    rows,
    k,
    shards,
    QMAX: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
):
    _, at, inside, z, clip = _load_rows(z_ptr, clip_ptr, clip_value, rows, k, shards, HAS_CLIP, R, K)
    scale, code, _, _, _, _ = _quantized(z, clip, QMAX)
    tl.store(out_ptr + at, code * scale[:, None], mask=inside)


@triton.jit
def _fake_quantize_backward_kernel(
    grad_ptr,  # float32 [rows, k]
    z_ptr,  # float32 [rows, k]
    clip_ptr,  # float32 [shards] if HAS_CLIP
    clip_value,
    dz_ptr,  # float32 [rows, k]
    dclip_ptr,  # float32 [rows], each row's share, if HAS_CLIP
    rows,
    k,
    shards,
    QMAX: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
):
    row, at, inside, z, clip = _load_rows(z_ptr, clip_ptr, clip_value, rows, k, shards, HAS_CLIP, R, K)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0)
    _, code, steps, rounded, bits, largest = _quantized(z, clip, QMAX)
    dz = grad * (rounded == code).to(tl.float32)
    ds = tl.sum(code * grad - steps * dz, axis=1)
    top = largest.to(tl.float32, bitcast=True)
    ds = tl.where(top * clip > 0, tl.div_rn(ds, tl.full(ds.shape, QMAX, tl.float32)), 0.0)
    if HAS_CLIP:
        tl.store(dclip_ptr + row, ds * top, mask=row < rows)
    at_top = bits == largest[:, None]
    part = tl.div_rn(ds * clip, tl.maximum(tl.sum(at_top.to(tl.int32), axis=1), 1).to(tl.float32))
    signed = part.to(tl.int32, bitcast=True)[:, None] ^ (z.to(tl.int32, bitcast=True) & -0x80000000)
    rest = (part * 0.0)[:, None]  # NaN if the part is: it reaches the whole row
    tl.store(dz_ptr + at, dz + tl.where(at_top, signed.to(tl.float32, bitcast=True), rest), mask=inside)


def _takes(z: Tensor, clip: Tensor | float) -> bool:
    """Whether the kernels compute this, or the reference."""
    if not HAS_TRITON or not (z.is_cuda or INTERPRET) or z.dtype != torch.float32:
        return False
    if z.numel() == 0 or z.shape[-1] > LONGEST:
        return False
    if not isinstance(clip, Tensor):
        return True
    one = clip.numel() == 1 and clip.dim() < z.dim()
    return clip.dtype == z.dtype and clip.device == z.device and (one or clip.shape == z.shape[-2:-1])


def _launch(
    kernel: object, z: Tensor, clip: Tensor | float, bits: int, read: list[Tensor], write: list[Tensor]
) -> None:
    k = z.shape[-1]
    rows, width = z.numel() // k, triton.next_power_of_2(k)
    together = max(1, ELEMENTS // width)
    if isinstance(clip, Tensor):
        ratios, number, shards = clip.contiguous(), 1.0, clip.numel()
    else:
        ratios, number, shards = z, float(clip), 0
    with torch.cuda.device_of(z):
        launch(
            kernel, (triton.cdiv(rows, together),), *read, ratios, number, *write, rows, k, shards,
            QMAX=qmax(bits), HAS_CLIP=shards > 0, R=together, K=width,
            num_warps=min(max(together * width // 256, 4), 32),
        )  # fmt: skip


def fake_quantize(z: Tensor, bits: int, clip: Tensor | float = 1.0) -> Tensor:
    """``fake_quantize_ref``: the kernel on CUDA for float32, rows of up to 32768 and a clip that is a number, has
    one element or is [S] against z [..., S, K]; else the reference. May be captured in a CUDA graph."""
    if not _takes(z, clip):
        return fake_quantize_ref(z, bits, clip)
    z = z.contiguous()
    out = torch.empty_like(z)
    _launch(_fake_quantize_kernel, z, clip, bits, [z], [out])
    return out


def fake_quantize_backward(
    grad: Tensor, z: Tensor, bits: int, clip: Tensor | float
) -> tuple[Tensor, Tensor | None]:
    """``fake_quantize_backward_ref``, by the kernel where ``fake_quantize`` uses one. Deterministic."""
    if not _takes(z, clip):
        return fake_quantize_backward_ref(grad, z, bits, clip)
    z, grad = z.contiguous(), grad.contiguous()
    dz, dclip = torch.empty_like(z), z.new_empty(z.shape[:-1] if isinstance(clip, Tensor) else 0)
    _launch(_fake_quantize_backward_kernel, z, clip, bits, [grad, z], [dz, dclip])
    return dz, dclip.sum_to_size(clip.shape) if isinstance(clip, Tensor) else None


def fake_quantize_ref(z: Tensor, bits: int, clip: Tensor | float = 1.0) -> Tensor:
    """Each row of ``z`` [..., K], float32 or float64, quantized and dequantized; same shape and dtype.

    clip: as ``scale_ref``'s, a number or a tensor that broadcasts against [...].
    """
    scale = scale_ref(z, bits, clip)
    return codes_ref(z, scale, bits).mul_(scale.unsqueeze(-1))


def fake_quantize_backward_ref(
    grad: Tensor, z: Tensor, bits: int, clip: Tensor | float
) -> tuple[Tensor, Tensor | None]:
    """Gradients (of z; of clip if it is a tensor) for ``grad``, that of the result; shapes as theirs."""
    scale = scale_ref(z, bits, clip)
    steps = z / scale.unsqueeze(-1)
    codes = codes_ref(z, scale, bits)
    dz = grad * (steps.round() == codes)
    ds = (codes.mul_(grad) - steps.mul_(dz)).sum(dim=-1)
    del codes, steps
    size = z.abs()
    top = size.amax(dim=-1)
    ds = torch.where(top * clip > 0, ds / qmax(bits), 0)
    largest = (size == top.unsqueeze(-1)) * z.sign()
    part = ds * clip / largest.abs().sum(dim=-1).clamp(min=1)
    dclip = (ds * top).sum_to_size(clip.shape) if isinstance(clip, Tensor) else None
    return dz.addcmul_(largest, part.unsqueeze(-1)), dclip
