"""How exactly float32 matrices are multiplied."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Multiply float32 matrices in this precision inside, in the words of ``torch.set_float32_matmul_precision``."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
