"""Integer GEMM with 4-bit weights: int8-container activations times int4 weights, rescaled once.

    y[t, n] = w_scale[n] * sum_s x_scale[t, s] * (sum_{k in block s} q[t, k] w[n, k]) + bias[n]

The inner sums are exact int32; the outer sum runs over s in ascending order in float32.
"""

import torch
from torch import Tensor


def int_matmul_ref(a: Tensor, b: Tensor) -> Tensor:
    """Exact integer product ``a @ b.T`` of int8 ``a`` [T, K] and int8 ``b`` [N, K]: int32 [T, N].

    The CPU has an exact int8 product for any shape; elsewhere float64 is exact far beyond int32.
    """
    if a.device.type == "cpu":
        return torch._int_mm(a.contiguous(), b.T)
    return (a.double() @ b.double().T).to(torch.int32)


def w4_gemm_ref(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Quantized linear layer.

    codes: int8 [T, K]. scale: float32 [T, S]. weight: int8 codes [N, K] (unpacked).
    weight_scale: float32 [N, 1]. bias: [N] or None. Returns [T, N] in ``out_dtype``.
    """
    shards = scale.shape[1]
    width = codes.shape[1] // shards
    out = torch.zeros(codes.shape[0], weight.shape[0], dtype=torch.float32, device=codes.device)
    for s in range(shards):
        block = slice(s * width, (s + 1) * width)
        acc = int_matmul_ref(codes[:, block], weight[:, block])
        out += acc.float() * scale[:, s : s + 1]
    out *= weight_scale.reshape(1, -1)
    if bias is not None:
        out += bias.float()
    return out.to(out_dtype)
