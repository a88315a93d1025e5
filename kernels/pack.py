"""4-bit packing: on disk (two's-complement nibbles, low nibble = even column) and for the GEMM."""

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


KBLOCK = 128  # input columns of one block of the device layout: 64 bytes of every weight row


def pack_device(codes: Tensor, shards: int = 1) -> Tensor:
    """int8 codes in [-8, 7], [N, K] -> uint8 [blocks, N, 64], the layout ``w4_gemm`` reads.

    The K axis of each shard block (K / shards columns) is cut into blocks of 128 columns, the last one
    padded with zeros. Byte j of row n in a block holds column j in its low nibble and column j + 64 in its
    high nibble, so that one block of 128 activations is two contiguous halves and no kernel interleaves.
    Blocks are outermost: the rows of a tile are then one contiguous piece of memory, one prefetch each.

    Raises ValueError if ``shards`` does not divide K.
    """
    n, k = codes.shape
    if k % shards:
        raise ValueError(f"cannot pack {k} columns in {shards} shards: shards must divide the columns")
    width = k // shards
    blocks = -(-width // KBLOCK)
    padded = torch.nn.functional.pad(codes.reshape(n, shards, width), (0, blocks * KBLOCK - width))
    halves = (padded.reshape(n, shards * blocks, 2, KBLOCK // 2) & 0xF).to(torch.uint8)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).transpose(0, 1).contiguous()


def unpack_device(packed: Tensor, columns: int, shards: int = 1) -> Tensor:
    """Inverse of ``pack_device``: uint8 [blocks, N, 64] -> int8 [N, columns]."""
    blocks, n, _ = packed.shape
    nibbles = torch.stack([packed & 0xF, packed >> 4], dim=2).to(torch.int8)
    codes = nibbles - 16 * (nibbles > 7).to(torch.int8)
    codes = codes.permute(1, 0, 2, 3).reshape(n, shards, blocks // shards * KBLOCK)
    return codes[:, :, : columns // shards].reshape(n, columns).contiguous()
