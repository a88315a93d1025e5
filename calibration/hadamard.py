"""Hadamard matrices, and the next best thing where no construction is at hand.

Sylvester's doubling and Paley's two constructions over prime fields (Paley 1933) reach 1, 2, 4, 8, 12, 16, 20,
24, 28, 32, 36, 40, 44, 48, 56, 60, ... (not 52, 92, 100, 116, ...).
"""

from functools import cache
from typing import Literal

import torch
from torch import Tensor


def _haar(shards: int, n: int, generator: torch.Generator) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(shards, n, n, generator=generator, dtype=torch.float64))
    return (q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)).contiguous()


def random_orthogonal(shards: int, n: int, generator: torch.Generator) -> Tensor:
    """Haar-distributed orthogonal matrices, float32 [shards, n, n], on the CPU."""
    return _haar(shards, n, generator).float()


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _jacobsthal(q: int) -> Tensor:
    """Q[i, j] = Legendre symbol of i - j modulo the odd prime q, float64 [q, q]."""
    symbol = torch.full((q,), -1.0, dtype=torch.float64)
    symbol[torch.arange(1, q) ** 2 % q] = 1
    symbol[0] = 0
    i = torch.arange(q)
    return symbol[(i[:, None] - i[None, :]) % q]


@cache
def _construction(n: int) -> Literal["one", "double", "paley1", "paley2"] | None:
    """How ``hadamard`` makes a matrix of n rows."""
    if n == 1:
        return "one"
    if n % 2 == 0 and _construction(n // 2):
        return "double"
    if n % 4 == 0 and _is_prime(n - 1):
        return "paley1"
    if n % 4 == 0 and (n // 2 - 1) % 4 == 1 and _is_prime(n // 2 - 1):
        return "paley2"
    return None


def hadamard(n: int) -> Tensor | None:
    """A Hadamard matrix, entries 1 and -1, float64 [n, n]; None if no construction here gives one."""
    kind = _construction(n)
    if kind is None:
        return None
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if kind == "one":
        return two[:1, :1]
    if kind == "double":
        half = hadamard(n // 2)
        assert half is not None
        return torch.kron(two, half)
    m = n if kind == "paley1" else n // 2
    s = torch.zeros(m, m, dtype=torch.float64)
    s[0, 1:], s[1:, 0], s[1:, 1:] = 1, 1, _jacobsthal(m - 1)
    eye = torch.eye(m, dtype=torch.float64)
    if kind == "paley1":  # skew
        s[1:, 0] = -1
        return eye + s
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(s, two) + torch.kron(eye, diagonal)


def rest_of(n: int) -> int:
    """What is left of n beside its largest divisor with a Hadamard matrix: 1 if n has one itself."""
    return next(m for m in range(1, n + 1) if n % m == 0 and _construction(n // m))


def orthonormal_hadamard(n: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix whose entries are as even as they can be made, float64 [n, n].

    A Hadamard matrix over sqrt(n); without one, the Kronecker product of the largest that divides n with a
    random orthogonal matrix.
    """
    rest = rest_of(n)
    matrix = hadamard(n // rest)
    assert matrix is not None
    matrix = matrix / (n // rest) ** 0.5
    if rest == 1:
        return matrix
    return torch.kron(matrix, _haar(1, rest, generator)[0])


def random_hadamard(n: int, generator: torch.Generator) -> Tensor:
    """``diag(+-1)`` times ``orthonormal_hadamard`` with random signs (QuaRot, section 3), float64 [n, n]."""
    signs = torch.randint(0, 2, (n, 1), generator=generator).double() * 2 - 1
    return signs * orthonormal_hadamard(n, generator)
