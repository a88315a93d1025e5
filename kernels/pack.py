"""4-bit packing on disk: two's-complement nibbles, low nibble = even column."""

import torch
from torch import Tensor


def pack_int4(codes: Tensor) -> Tensor:
    """int8 codes in [-8, 7], [N, K] with K even -> uint8 [N, K/2]."""
    if codes.shape[-1] % 2:
        raise ValueError(f"cannot pack {codes.shape[-1]} columns: int4 packing needs an even number")
    nibbles = (codes & 0xF).to(torch.uint8)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """Inverse of ``pack_int4``: uint8 [N, K/2] -> int8 [N, K]."""
    pairs = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2).to(torch.int8)
    return pairs - 16 * (pairs > 7).to(torch.int8)
