"""Fake quantization with gradients, and how little of it is kept until they are asked for.

Rounding passes gradients straight through; the numbers are those of ``kernels/quantize.py``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..kernels import fake_quantize as kernel


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
    """``kernels.fake_quantize``. Only z is kept, of six tensors of its size that autograd would keep."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, bits: int, clip: Tensor | float) -> Tensor:
        ctx.bits, ctx.clip = bits, None if isinstance(clip, Tensor) else clip
        ctx.save_for_backward(z, *([clip] if isinstance(clip, Tensor) else []))
        return kernel.fake_quantize(z, bits, clip)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor | None]:
        z, *rest = ctx.saved_tensors
        dz, dclip = kernel.fake_quantize_backward(grads[0], z, ctx.bits, rest[0] if rest else ctx.clip)
        return dz, None, dclip


def recomputed(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """``function(*args)``; what it computes on the way is computed again for the gradient instead of being kept.

    It must draw no random numbers, and whatever it reads beside ``args`` must not change until then. A product at
    its end is not repeated: its factors are all that the gradient needs. May be captured in a CUDA graph.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
