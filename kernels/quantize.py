"""Symmetric integer quantization: the one definition of every code and scale in the project.

    scale = clip * max|z| / qmax          (1 where the maximum is 0)
    code  = clamp(round_half_even(z / scale), -qmax - 1, qmax)

with qmax = 2**(bits-1) - 1 (FlatQuant, arXiv 2410.09426, section 3.1, symmetric case).
"""

from collections.abc import Callable

import torch
from torch import Tensor


def qmax(bits: int) -> int:
    """Largest code of a symmetric signed format: 7 for 4 bits, 127 for 8."""
    return 2 ** (bits - 1) - 1


def scale_ref(z: Tensor, bits: int, clip: Tensor | float = 1.0) -> Tensor:
    """Scale of each row (the last dimension) of ``z``.

    z: [..., K] floating point. clip: broadcasts against [...]; multiplies the absolute maximum.
    Returns [...] in z's dtype (float32 or float64); 1 where a row is all zero.
    """
    amax = z.abs().amax(dim=-1) * clip
    return torch.where(amax > 0, amax / qmax(bits), torch.ones_like(amax))


def codes_ref(
    z: Tensor, scale: Tensor, bits: int, round_fn: Callable[[Tensor], Tensor] = torch.round
) -> Tensor:
    """Codes of ``z`` [..., K] for ``scale`` [...], still floating point.

    ``round_fn`` lets training pass a straight-through round; the numbers are the same.
    """
    return round_fn(z / scale.unsqueeze(-1)).clamp(-qmax(bits) - 1, qmax(bits))


def quantize_ref(z: Tensor, bits: int, clip: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Codes int8 [..., K] and scale [...] of ``z`` [..., K], one scale per row."""
    scale = scale_ref(z, bits, clip)
    return codes_ref(z, scale, bits).to(torch.int8), scale


def dequantize_weight_ref(codes: Tensor, scale: Tensor) -> Tensor:
    """Weight float32 [N, K] of int8 codes [N, K] and scale float32 [N, groups]."""
    groups = codes.unflatten(-1, (scale.shape[1], -1)).float()
    return (groups * scale.unsqueeze(-1)).flatten(-2)


def asymmetric_ref(
    z: Tensor,
    bits: int,
    clip: Tensor,
    round_fn: Callable[[Tensor], Tensor] = torch.round,
) -> Tensor:
    """Asymmetric fake quantization of each row, as used for a 4-bit KV cache.

    z: [..., D]. clip: [2], multiplies the row's (maximum clamped to >= 0, minimum clamped to <= 0).
    ``scale = (max - min) / (2**bits - 1)``, ``zero = round(-min / scale)``,
    ``code = clamp(round(z / scale) + zero, 0, 2**bits - 1)`` (FlatQuant, asymmetric case).
    Returns the dequantized values, [..., D] in z's dtype.
    """
    top = 2**bits - 1
    high = z.amax(dim=-1, keepdim=True).clamp(min=0) * clip[0]
    low = z.amin(dim=-1, keepdim=True).clamp(max=0) * clip[1]
    scale = (high - low) / top
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = round_fn(-low / scale)
    return ((round_fn(z / scale) + zero).clamp(0, top) - zero) * scale


def fake_quant_kv_ref(
    z: Tensor,
    bits: int,
    clip: Tensor,
    round_fn: Callable[[Tensor], Tensor] = torch.round,
) -> Tensor:
    """What a quantized KV cache returns for ``z`` [..., head_dim], one scale per token and head.

    8 bits are symmetric (clip [1]), 4 bits asymmetric (clip [2]); 16 bits return ``z`` itself.
    Mathematics in float32 (float64 stays), result in z's dtype.
    """
    if bits == 16:
        return z
    wide = z if z.dtype == torch.float64 else z.float()
    if bits == 8:
        scale = scale_ref(wide, bits, clip)
        out = codes_ref(wide, scale, bits, round_fn) * scale.unsqueeze(-1)
    else:
        out = asymmetric_ref(wide, bits, clip, round_fn)
    return out.to(z.dtype)
