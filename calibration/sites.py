"""A transform site while it is trained: diagonal, Kronecker factors, clip, fake quantization."""

from typing import cast

import torch
from torch import Tensor, nn

from ..kernels.kron import kron_wide_ref
from .matrices import MATRICES
from .straight_through import fake_quantize, recomputed

CLIP_INIT = 4.0
"""Logit of a clip before training: sigmoid(4) = 0.982 (FlatQuant's setting)."""

Matrices = tuple[Tensor | None, ...]
"""(left, left^-T, right, right^-T), each [S, n, n], None where there is no factor."""


class ClipRatio(nn.Module):
    """How much of an absolute maximum the largest code stands for: n numbers in (0, 1], learned or fixed.

    setting: "learned" (the sigmoid of a parameter that starts at ``CLIP_INIT``), or the number itself.
    """

    def __init__(self, n: int, setting: float | str):
        super().__init__()
        self.clip_logit = nn.Parameter(torch.full((n,), CLIP_INIT)) if setting == "learned" else None
        fixed = None if isinstance(setting, str) else torch.full((n,), float(setting))
        self.register_buffer("fixed", fixed, persistent=False)

    def forward(self) -> Tensor:
        """[n]"""
        if self.clip_logit is not None:
            return self.clip_logit.sigmoid()
        return cast(Tensor, self.fixed)


class Site(nn.Module):
    """One input transform shared by the linears that read it.

    ``forward(x)`` maps activations [..., K] to their fake-quantized transform; ``transform_weight``
    maps a weight [out, K] to the matching inverse. The result for the last input is kept, because q, k
    and v (gate and up) pass the same tensor one after another.

    left, right: sizes of the factors; left None: no on-line transform; right None: the head form.
    matrix: a key of ``MATRICES``. diag: start of the diagonal, or None for none. repeat: 0 where x is
    multiplied by the diagonal here; for o_proj, how many query heads share one of its numbers (a KV head's):
    x then comes with the diagonal applied, by v_proj. clip: as ``ClipRatio``.
    """

    def __init__(
        self,
        shards: int,
        left: int | None,
        right: int | None,
        bits: int,
        matrix: str,
        generator: torch.Generator,
        diag: Tensor | None = None,
        repeat: int = 0,
        head_dim: int = 1,
        clip: float | str = "learned",
    ):
        super().__init__()
        self.shards, self.bits, self.repeat, self.head_dim = shards, bits, repeat, head_dim
        self.left = MATRICES[matrix](shards, left, generator) if left else None
        self.right = MATRICES[matrix](shards, right, generator) if left and right else None
        self.log_diag = nn.Parameter(diag.log()) if diag is not None else None
        self.ratio = ClipRatio(shards, clip) if bits < 16 else None
        self._memo: tuple[Tensor, Tensor] | None = None
        self._matrices: Matrices | None = None

    def forget(self) -> None:
        """Drop what was kept for the last input and parameters; call after each step."""
        self._memo = self._matrices = None

    @property
    def own_diag(self) -> Tensor | None:
        """The diagonal itself; for o_proj one number for each output of v_proj. Positive."""
        return self.log_diag.exp() if self.log_diag is not None else None

    @property
    def diag(self) -> Tensor | None:
        """The diagonal for each channel of the input [K]."""
        own = self.own_diag
        if own is None or self.repeat < 2:
            return own
        return own.unflatten(0, (-1, self.head_dim)).repeat_interleave(self.repeat, 0).flatten()

    @property
    def clip(self) -> Tensor | None:
        """Multiplies the absolute maximum, [S], in (0, 1]."""
        return self.ratio() if self.ratio is not None else None

    def matrices(self) -> Matrices:
        """The factors and their inverses, kept until ``forget``."""
        if self._matrices is None:
            left = self.left() if self.left is not None else (None, None)
            right = self.right() if self.right is not None else (None, None)
            self._matrices = (*left, *right)
        return self._matrices

    def transform(self, x: Tensor, matrices: Matrices | None = None) -> Tensor:
        """Transformed activations [..., K] before quantization, float32."""
        left, _, right, _ = matrices or self.matrices()
        diag = self.diag
        if diag is not None and not self.repeat:
            x = x * diag
        return kron_wide_ref(x, left, right)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantized transformed activations, shape of x."""
        if self._memo is None or self._memo[0] is not x:
            self._memo = (x, recomputed(self._quantized, x, self.matrices()))
        return self._memo[1]

    def _quantized(self, x: Tensor, matrices: Matrices) -> Tensor:
        z = self.transform(x, matrices)
        if self.clip is None:
            return z
        return fake_quantize(z.unflatten(-1, (self.shards, -1)), self.bits, self.clip).flatten(-2)

    def transform_weight(
        self, weight: Tensor, matrices: Matrices, value_inv_t: Tensor | None = None
    ) -> Tensor:
        """``(W / d) (L^-T kron R^-T)`` for W [out, K].

        value_inv_t: [S or heads, head_dim, head_dim], the inverse transpose of P_v that takes R's place in
        o_proj.
        """
        _, left_inv_t, _, right_inv_t = matrices
        diag = self.diag
        if diag is not None:
            weight = weight / diag
        if value_inv_t is not None:
            right_inv_t = value_inv_t
        return kron_wide_ref(weight, left_inv_t, right_inv_t)
