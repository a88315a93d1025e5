"""SiLU(gate) * up, Kronecker transform and quantization in one step, from the packed gate_up output."""

import torch.nn.functional as F
from torch import Tensor

from .kron_quant import kron_quant_ref


def silu_mul_ref(gate_up: Tensor) -> Tensor:
    """[T, 2*K] (gate, then up) -> ``silu(gate) * up`` [T, K], float32 inside, result in its dtype."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def silu_mul_kron_quant_ref(
    gate_up: Tensor, left: Tensor | None, right: Tensor | None, clip: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """gate_up: [T, 2*K]. Factors, clip, bits and results as in ``kron_quant_ref`` for width K."""
    return kron_quant_ref(silu_mul_ref(gate_up), left, right, clip, bits)
