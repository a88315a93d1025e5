"""Trainable invertible matrices: each gives the matrix P and its inverse transpose."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .hadamard import orthonormal_hadamard, random_orthogonal

CUBLAS_BATCH, CUBLAS_SIZE = 16, 128
"""Largest batch and size of matrices that PyTorch 2.11 factors with cuBLAS; above it takes MAGMA."""


def apart(function: Callable[..., Tensor], *batches: Tensor) -> Tensor:
    """``function`` of matrices [S, n, n] that factors them: of all at once, or of one [1, n, n] after another
    where PyTorch would give all to MAGMA. That allocates and waits, so no CUDA graph can record it; cuSOLVER, which
    takes single matrices, can be recorded."""
    if len(batches[0]) <= CUBLAS_BATCH and batches[0].shape[-1] <= CUBLAS_SIZE:
        return function(*batches)
    return torch.cat([function(*one) for one in zip(*(b.split(1) for b in batches), strict=True)])


def inverse(p: Tensor) -> Tensor:
    """Of each matrix of ``p`` [S, n, n], in float64; without a check that would wait for the device."""
    return apart(lambda batch: torch.linalg.inv_ex(batch)[0], p.double())


def cayley(raw: Tensor) -> Tensor:
    """Orthogonal matrix of the skew part of ``raw`` [S, n, n]: ``(I + A/2)^-1 (I - A/2)``.

    A is the lower triangle of raw minus its transpose (Cayley map, as in
    ``torch.nn.utils.parametrizations.orthogonal``).
    """
    lower = raw.tril(-1)
    skew = lower - lower.mT
    eye = torch.eye(raw.shape[-1], dtype=raw.dtype, device=raw.device)
    return apart(lambda a, b: torch.linalg.solve_ex(a, b)[0], eye + skew / 2, eye - skew / 2)


class SVDMatrix(nn.Module):
    """``P = U diag(s) V^T`` with U, V orthogonal and s positive (FlatQuant, section 3.2).

    U and V come from the Cayley map, so the inverse is free: ``P^-T = U diag(1/s) V^T``. The raw
    parameters start as random orthogonal matrices, which makes U V^T a mild rotation; s starts at 1 and
    is the exponential of its parameter, so that no step can make P singular.
    """

    def __init__(self, shards: int, n: int, generator: torch.Generator):
        super().__init__()
        self.u = nn.Parameter(random_orthogonal(shards, n, generator))
        self.v = nn.Parameter(random_orthogonal(shards, n, generator))
        self.log_s = nn.Parameter(torch.zeros(shards, 1, n))

    def forward(self) -> tuple[Tensor, Tensor]:
        """(P, P^-T), each [S, n, n]."""
        both = cayley(torch.cat([self.u, self.v]))
        u, v = both.chunk(2)
        s = self.log_s.exp()
        return (u * s) @ v.mT, (u / s) @ v.mT


class DirectMatrix(nn.Module):
    """A free matrix whose inverse is recomputed in float64 at every step; starts random orthogonal."""

    def __init__(self, shards: int, n: int, generator: torch.Generator):
        super().__init__()
        self.p = nn.Parameter(random_orthogonal(shards, n, generator))

    def forward(self) -> tuple[Tensor, Tensor]:
        """(P, P^-T), each [S, n, n]."""
        return self.p, inverse(self.p).mT.to(self.p.dtype)


class OrthogonalMatrix(nn.Module):
    """A trainable rotation: ``P = P^-T``, from the Cayley map."""

    def __init__(self, shards: int, n: int, generator: torch.Generator):
        super().__init__()
        self.u = nn.Parameter(random_orthogonal(shards, n, generator))

    def forward(self) -> tuple[Tensor, Tensor]:
        """(P, P^-T), the same matrix [S, n, n] twice."""
        p = cayley(self.u)
        return p, p


STABILITY = 0.1
"""AffineQuant's factor on what is off the diagonal, for 4-bit weights and activations."""


class AffineMatrix(nn.Module):
    """A free matrix that opens from its diagonal outwards (AffineQuant, arXiv 2403.12544, equations 5 to 7).

    ``P = p * mask``: the mask is 1 on the diagonal, ``STABILITY`` in a band around it that widens with every
    epoch, 0 beyond, so that P stays diagonally dominant, hence invertible. Starts as the identity; the
    inverse is recomputed in float64.
    """

    mask: Tensor

    def __init__(self, shards: int, n: int, generator: torch.Generator):
        super().__init__()
        self.p = nn.Parameter(torch.eye(n).expand(shards, n, n).clone())
        self.register_buffer("mask", torch.eye(n))

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Widen the band for ``epoch`` of ``epochs``, counted from 0; the last one has all."""
        n = len(self.mask)
        i = torch.arange(n, device=self.mask.device)
        distance = (i[:, None] - i[None, :]).abs()
        band = (distance > 0) & (distance <= (epoch + 1) / epochs * n)
        self.mask.copy_((distance == 0) + STABILITY * band)  # in place: a captured step reads it

    def forward(self) -> tuple[Tensor, Tensor]:
        """(P, P^-T), each [S, n, n]."""
        p = self.p * self.mask
        return p, inverse(p).mT.to(p.dtype)


class FixedMatrix(nn.Module):
    """An orthogonal matrix that is not trained; ``identity`` and ``hadamard`` make one."""

    p: Tensor

    def __init__(self, p: Tensor):
        super().__init__()
        self.register_buffer("p", p)

    def forward(self) -> tuple[Tensor, Tensor]:
        """(P, P^-T), the same matrix [S, n, n] twice."""
        return self.p, self.p


def identity(shards: int, n: int, generator: torch.Generator) -> FixedMatrix:
    """No transform, where the format wants one."""
    return FixedMatrix(torch.eye(n).expand(shards, n, n).contiguous())


def hadamard_matrix(shards: int, n: int, generator: torch.Generator) -> FixedMatrix:
    """An on-line Hadamard: the same for each shard, no random signs."""
    p = orthonormal_hadamard(n, generator).float()
    return FixedMatrix(p.expand(shards, n, n).contiguous())


MATRICES: dict[str, Callable[[int, int, torch.Generator], nn.Module]] = {
    "svd": SVDMatrix,
    "direct": DirectMatrix,
    "orthogonal": OrthogonalMatrix,
    "affine": AffineMatrix,
    "hadamard": hadamard_matrix,
    "identity": identity,
}
"""Kind -> what makes the module for (shards, n, generator); its result gives (P, P^-T), [S, n, n]."""
