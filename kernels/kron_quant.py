"""Kronecker transform and per-token quantization in one step.

    Z = L^T X R,   scale[t, s] = clip[s] * max|Z[t, block s]| / qmax,   code = round(Z / scale)

One scale per token and shard block, so that codes and scales are the same at every tensor-parallel size.
"""

from torch import Tensor

from .kron import kron_wide_ref
from .quantize import quantize_ref


def kron_quant_ref(
    x: Tensor, left: Tensor | None, right: Tensor | None, clip: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Transform and quantize ``x``.

    x: [T, K] float32, bf16 or fp16. left: [S, a, a] or None. right: [S, b, b] or None.
    clip: [S] float32. bits: 4 or 8.
    Returns codes int8 [T, K] (4-bit values stay one per byte) and scale float32 [T, S].
    """
    shards = clip.shape[0]
    z = kron_wide_ref(x, left, right).reshape(x.shape[0], shards, x.shape[1] // shards)
    codes, scale = quantize_ref(z, bits, clip)
    return codes.reshape(x.shape), scale
