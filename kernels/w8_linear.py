"""16-bit activations times 8-bit weights with one scale per row: the output head.

    y[t, n] = scale[n] * sum_k x[t, k] * code[n, k] + bias[n]

The codes are exact in bf16 and fp16, so the products are those of a 16-bit linear layer, at half the bytes. With
few tokens those bytes are the cost: one program reads its rows of codes once for all tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .jit import INTERPRET, launch, register, tl, triton
from .kron import rows

TOKEN_BLOCKS = (16, 32, 64, 128)
"""Tokens of one program, padded: each is a variant of the kernel, to be compiled at load."""
MOST_TOKENS = 256
"""Above this the multiplication is no longer bound by the weights' bytes, and cuBLAS takes over."""

_SLICE = 16384
"""Rows that are dequantized at a time then, so that no 16-bit copy of the whole weight is made."""


@triton.jit(do_not_specialize=["t"])
def _w8_linear_kernel(
    x_ptr,  # [T, K], rows stride_x apart
    w_ptr,  # int8 [N, K]
    w_scale_ptr,  # float32 [N]
    bias_ptr,  # [N]; any pointer where HAS_BIAS is false
    y_ptr,  # [T, N]
    t,
    n,
    k,
    stride_x,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,  # multiply in float32: the interpreter's 16-bit products are wrong
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    # Token blocks that share rows of codes run at the same time, so that these come from DRAM once.
    token = tl.program_id(0) * BM + tl.arange(0, BM)
    row = tl.program_id(1) * BN + tl.arange(0, BN)
    column = tl.arange(0, BK)
    acc = tl.zeros((BN, BM), tl.float32)
    for start in range(0, k, BK):
        inside = start + column < k
        w = tl.load(
            w_ptr + row[:, None].to(tl.int64) * k + start + column[None, :],
            mask=(row[:, None] < n) & inside[None, :],
            other=0,
        )
        x = tl.load(
            x_ptr + token[None, :].to(tl.int64) * stride_x + start + column[:, None],
            mask=(token[None, :] < t) & inside[:, None],
            other=0.0,
        )
        if WIDE:
            acc += tl.dot(w.to(tl.float32), x.to(tl.float32), input_precision="ieee")
        else:
            acc += tl.dot(w.to(x.dtype), x)
    y = acc * tl.load(w_scale_ptr + row, mask=row < n, other=0.0)[:, None]
    if HAS_BIAS:
        y += tl.load(bias_ptr + row, mask=row < n, other=0.0).to(tl.float32)[:, None]
    tl.store(
        y_ptr + token[None, :].to(tl.int64) * n + row[:, None],
        y.to(y_ptr.dtype.element_ty),
        mask=(token[None, :] < t) & (row[:, None] < n),
    )


def w8_linear_triton(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The kernel's launch, for up to ``MOST_TOKENS`` tokens; else cuBLAS. Shapes as ``w8_linear``."""
    x = rows(x)
    (t, k), n = x.shape, codes.shape[0]
    if t > MOST_TOKENS:
        return _dequantized(x, codes, scale, bias)
    y = torch.empty(t, n, dtype=x.dtype, device=x.device)
    if t:
        tokens = next((block for block in TOKEN_BLOCKS if t <= block), TOKEN_BLOCKS[-1])
        block = 64 if tokens < 64 else 128
        launch(
            _w8_linear_kernel, (triton.cdiv(t, tokens), triton.cdiv(n, block)),
            x, codes, scale, x if bias is None else bias, y, t, n, k, x.stride(0), HAS_BIAS=bias is not None,
            WIDE=INTERPRET or x.dtype == torch.float32, BM=tokens, BN=block, BK=128,
            num_warps=8 if tokens == 128 else 4, num_stages=3 if tokens == 128 else 4,
        )  # fmt: skip
    return y


def _dequantized(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Products in x's dtype, a slice of rows at a time; scale and bias in float32 as in the kernel.

    Codes reach 128: sums that fp16 must hold are taken of ``x / 128``.
    """
    shrink = 128.0 if x.dtype == torch.float16 else 1.0
    x = x / shrink
    y = torch.empty(x.shape[0], codes.shape[0], dtype=x.dtype, device=x.device)
    for start in range(0, codes.shape[0], _SLICE):
        part = slice(start, start + _SLICE)
        wide = F.linear(x, codes[part].to(x.dtype)).float() * (shrink * scale[part].flatten())
        y[:, part] = wide if bias is None else wide + bias[part].float()
    return y


def _w8_linear_cpu(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return w8_linear_ref(x, codes, scale, bias)


def _w8_linear_fake(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


register("w8_linear", w8_linear_triton, _w8_linear_cpu, _w8_linear_fake)


def w8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The Triton kernel on CUDA (cuBLAS above ``MOST_TOKENS`` tokens), the reference on the CPU.

    x: [T, K] bf16, fp16 or float32. codes: int8 [N, K]. scale: float32 [N, 1]. bias: [N] or None.
    Returns [T, N] in x's dtype. Raises RuntimeError if x is on another GPU than the current one.
    """
    return torch.ops.flatquant.w8_linear(x, codes, scale, bias)


def w8_linear_ref(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """``w8_linear`` in float32, rounded once to x's dtype. Shapes as there, x may be [..., K]."""
    y = F.linear(x.float(), codes.float()) * scale.flatten()
    return (y if bias is None else y + bias.float()).to(x.dtype)
