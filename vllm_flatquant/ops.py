"""PyTorch operators of the plugin, opaque to the compiler.

Traced as plain PyTorch, the compiler would drop the rounding to 16 bits between two matrix products
(docs/format.md lists the rounding points), and codes would differ from calibration's.
"""

import torch
from torch import Tensor

from .kernels.kron import kron_ref
from .kernels.kron_quant import kron_quant_ref
from .kernels.quantize import fake_quant_kv_ref
from .kernels.w4_gemm import w4_gemm_ref


@torch.library.custom_op("flatquant::linear_torch", mutates_args=())
def linear_torch(
    x: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    clip: Tensor,
    bits: int,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Transform, quantize and multiply by int4 weights.

    x: [T, K]. left, right, clip, bits: as ``kron_quant_ref``. weight: int8 codes [N, K]. weight_scale:
    float32 [N, 1]. bias: [N] or None. Returns [T, N] in x's dtype.
    """
    codes, scale = kron_quant_ref(x, left, right, clip, bits)
    return w4_gemm_ref(codes, scale, weight, weight_scale, bias, x.dtype)


@linear_torch.register_fake
def _(x, left, right, clip, bits, weight, weight_scale, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("flatquant::kron_torch", mutates_args=())
def kron_torch(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """``kron_ref``: x [T, K] -> [T, K] in x's dtype."""
    return kron_ref(x, left, right).clone()  # an operator must not return its input, as no factors would


@kron_torch.register_fake
def _(x, left, right):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("flatquant::head_transform", mutates_args=())
def head_transform(
    x: Tensor, matrix: Tensor | None, clip: Tensor | None, bits: int, head_dim: int
) -> Tensor:
    """Transform each head by ``matrix`` and pass it through a quantized KV cache.

    x: [T, heads * head_dim], strided or not. matrix: float32 [head_dim, head_dim] or None. clip, bits: as
    ``fake_quant_kv_ref``; 16 bits (queries) only transform. Returns [T, heads * head_dim], contiguous.
    """
    heads = x.reshape(x.shape[0], -1, head_dim)
    if matrix is not None:
        heads = (heads.float() @ matrix).to(x.dtype)
    if clip is not None:
        heads = fake_quant_kv_ref(heads, bits, clip)
    return heads.reshape(x.shape).clone(memory_format=torch.contiguous_format)


@head_transform.register_fake
def _(x, matrix, clip, bits, head_dim):
    return torch.empty_like(x, memory_format=torch.contiguous_format)
