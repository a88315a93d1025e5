"""SiLU(gate) * up and Kronecker transform in one step, from the packed gate_up output, as W4A16 uses them.

    Z = L^T (silu(gate) * up) R

The kernels are those of ``silu_mul_kron_quant.py`` without their quantization.
"""

import torch
from torch import Tensor

from .jit import empty, register
from .kron import factor_sizes, fused, kron_ref, rows, shape_of
from .silu_mul_kron_quant import silu_mul_ref, start


def silu_mul_kron_triton(gate_up: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """The kernels' launch. Shapes as ``silu_mul_kron``."""
    x = rows(gate_up)
    t, k = x.shape[0], x.shape[1] // 2
    shards, _, _ = factor_sizes(k, shape_of(left), shape_of(right))
    if not fused(x, k, left, right, shards):
        return silu_mul_kron_ref(x, left, right)
    z = empty((t, k), x.dtype, x.device)
    start(x, left, right, shards, z)
    return z


def _silu_mul_kron_cpu(gate_up: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    return silu_mul_kron_ref(gate_up, left, right)


def _silu_mul_kron_fake(gate_up: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


register("silu_mul_kron", silu_mul_kron_triton, _silu_mul_kron_cpu, _silu_mul_kron_fake)


def silu_mul_kron(gate_up: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """gate_up: [T, 2*K]. Factors, result [T, K] and errors as ``kron`` for width K; both None: SiLU*mul alone."""
    return torch.ops.flatquant.silu_mul_kron(gate_up, left, right)


def silu_mul_kron_ref(gate_up: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """gate_up: [T, 2*K]. Factors and result [T, K], in gate_up's dtype, as in ``kron_ref`` for width K."""
    return kron_ref(silu_mul_ref(gate_up), left, right)
