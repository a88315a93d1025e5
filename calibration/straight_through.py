"""Fake quantization with gradients, and how little of it is kept until they are asked for.

Rounding passes gradients straight through; the numbers are those of ``kernels.quantize``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..kernels.quantize import codes_ref, qmax, scale_ref


def round_ste(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes unchanged."""
    return x + (x.round() - x).detach()


def fake_quantize(z: Tensor, bits: int, clip: Tensor | float = 1.0) -> Tensor:
    """Quantize and dequantize each row of ``z`` [..., K]; differentiable in z and clip. 16 bits return z.

    clip: as ``scale_ref``'s, or a tensor that broadcasts against [...].
    """
    if bits == 16:
        return z
    return _FakeQuantize.apply(z, bits, clip)


class _FakeQuantize(torch.autograd.Function):
    """``codes_ref(z, scale, bits, round_ste) * scale`` with ``scale_ref``, of which autograd would keep six tensors
    of z's size. Only z is kept: scale and codes are computed again."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, bits: int, clip: Tensor | float) -> Tensor:
        ctx.bits, ctx.clip = bits, None if isinstance(clip, Tensor) else clip
        ctx.save_for_backward(z, *([clip] if isinstance(clip, Tensor) else []))
        scale = scale_ref(z, bits, clip)
        return codes_ref(z, scale, bits).mul_(scale.unsqueeze(-1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor | None]:
        """With q = z/s, code c and s = clip * max|z| / qmax: dz = g where c is not clamped, ds = sum of
        ``g c - dz q``; ds then goes to clip and to the largest |z|, in equal parts if there are several."""
        (grad,), (z, *rest) = grads, ctx.saved_tensors
        clip: Tensor | float = rest[0] if rest else ctx.clip
        scale = scale_ref(z, ctx.bits, clip)
        steps = z / scale.unsqueeze(-1)
        codes = codes_ref(z, scale, ctx.bits)
        dz = grad * (steps.round() == codes)
        ds = (codes.mul_(grad) - steps.mul_(dz)).sum(dim=-1)
        del codes, steps
        size = z.abs()
        top = size.amax(dim=-1)
        ds = torch.where(top * clip > 0, ds / qmax(ctx.bits), 0)
        largest = (size == top.unsqueeze(-1)) * z.sign()
        part = ds * clip / largest.abs().sum(dim=-1).clamp(min=1)
        dclip = (ds * top).sum_to_size(clip.shape) if isinstance(clip, Tensor) else None
        return dz.addcmul_(largest, part.unsqueeze(-1)), None, dclip


def recomputed(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """``function(*args)``; what it computes on the way is computed again for the gradient instead of being kept.

    It must draw no random numbers, and whatever it reads beside ``args`` must not change until then. A product at
    its end is not repeated: its factors are all that the gradient needs. May be captured in a CUDA graph.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
