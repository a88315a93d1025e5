"""A transform site while it is trained: diagonal, Kronecker factors, clip, fake quantization.

Rounding passes gradients straight through; the numbers are those of ``kernels.quantize``.
"""

import torch
from torch import Tensor, nn

from ..kernels.kron import kron_wide_ref
from ..kernels.quantize import codes_ref, scale_ref
from .matrices import MATRICES

CLIP_INIT = 4.0
"""Logit of a clip before training: sigmoid(4) = 0.982 (FlatQuant's setting)."""


def round_ste(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes unchanged."""
    return x + (x.round() - x).detach()


def fake_quantize(z: Tensor, bits: int, clip: Tensor | float = 1.0) -> Tensor:
    """Quantize and dequantize each row of ``z`` [..., K]; differentiable. 16 bits return z."""
    if bits == 16:
        return z
    scale = scale_ref(z, bits, clip)
    return codes_ref(z, scale, bits, round_ste) * scale.unsqueeze(-1)


class Site(nn.Module):
    """One input transform shared by the linears that read it.

    ``forward(x)`` maps activations [..., K] to their fake-quantized transform; ``transform_weight``
    maps a weight [out, K] to the matching inverse. The result for the last input is kept, because q, k
    and v (gate and up) pass the same tensor one after another.
    """

    def __init__(
        self,
        shards: int,
        left: int,
        right: int | None,
        bits: int,
        matrix: str,
        generator: torch.Generator,
        diag: Tensor | None = None,
    ):
        super().__init__()
        self.shards, self.bits = shards, bits
        self.left = MATRICES[matrix](shards, left, generator)
        self.right = MATRICES[matrix](shards, right, generator) if right else None
        self.log_diag = nn.Parameter(diag.log()) if diag is not None else None
        self.clip_logit = nn.Parameter(torch.full((shards,), CLIP_INIT)) if bits < 16 else None
        self._memo: tuple[Tensor, Tensor] | None = None
        self._matrices: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None = None

    def forget(self) -> None:
        """Drop what was kept for the last input and parameters; call after each step."""
        self._memo = self._matrices = None

    @property
    def diag(self) -> Tensor | None:
        """Multiplies the activations [K]; positive."""
        return self.log_diag.exp() if self.log_diag is not None else None

    @property
    def clip(self) -> Tensor | None:
        """Multiplies the absolute maximum, [S], in (0, 1)."""
        return self.clip_logit.sigmoid() if self.clip_logit is not None else None

    def matrices(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """(left, left^-T, right, right^-T)."""
        if self._matrices is None:
            right = self.right() if self.right is not None else (None, None)
            self._matrices = (*self.left(), *right)
        return self._matrices

    def transform(self, x: Tensor) -> Tensor:
        """Transformed activations [..., K] before quantization, float32."""
        left, _, right, _ = self.matrices()
        if self.diag is not None:
            x = x * self.diag
        return kron_wide_ref(x, left, right)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantized transformed activations, shape of x."""
        if self._memo is None or self._memo[0] is not x:
            z = self.transform(x)
            if self.clip is not None:
                blocks = z.unflatten(-1, (self.shards, -1))
                z = fake_quantize(blocks, self.bits, self.clip).flatten(-2)
            self._memo = (x, z)
        return self._memo[1]

    def transform_weight(self, weight: Tensor, value_inv_t: Tensor | None = None) -> Tensor:
        """``(W / d) (L^-T kron R^-T)`` for W [out, K].

        value_inv_t: [1, head_dim, head_dim], the inverse transpose of P_v that takes R's place in o_proj.
        """
        _, left_inv_t, _, right_inv_t = self.matrices()
        if self.diag is not None:
            weight = weight / self.diag
        if value_inv_t is not None:
            right_inv_t = value_inv_t.expand(self.shards, -1, -1)
        return kron_wide_ref(weight, left_inv_t, right_inv_t)
