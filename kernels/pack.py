"""Packing of integer codes: on disk (a little-endian stream of bits for each row) and for the GEMM."""

import math

import torch
from torch import Tensor


def packing_step(bits: int) -> int:
    """Columns that fill whole bytes: 4, 8, 2 and 1 for 2, 3, 4 and 8 bits. Rows are packed in such steps."""
    return 8 // math.gcd(8, bits)


def packed_shape(rows: int, columns: int, bits: int) -> tuple[int, int]:
    """Shape of ``pack_codes``' result. ``packing_step(bits)`` must divide ``columns``."""
    return rows, columns * bits // 8


def packed_dtype(bits: int) -> torch.dtype:
    """Dtype of ``pack_codes``' result."""
    return torch.int8 if bits == 8 else torch.uint8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Two's-complement codes, column j in bits ``bits * j`` and up of its row's little-endian bit stream.

    codes: int8 [N, K] in [-2**(bits-1), 2**(bits-1) - 1]. bits: 2, 3, 4 or 8.
    Returns uint8 [N, K * bits / 8], or for 8 bits the int8 codes themselves.
    Raises ValueError unless whole bytes are filled.
    """
    step = packing_step(bits)
    if codes.shape[-1] % step:
        raise ValueError(
            f"cannot pack {codes.shape[-1]} columns: int{bits} packing needs a multiple of {step}"
        )
    if bits == 8:
        return codes
    fields = codes.to(torch.int32) & (2**bits - 1)
    word = sum((fields[..., j::step] << (bits * j) for j in range(1, step)), start=fields[..., 0::step])
    count = step * bits // 8
    return torch.stack([(word >> (8 * i)) & 0xFF for i in range(count)], -1).flatten(-2).to(torch.uint8)


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """Inverse of ``pack_codes``: uint8 [N, K * bits / 8] (int8 for 8 bits) -> int8 [N, K]."""
    if bits == 8:
        return packed
    step = packing_step(bits)
    count = step * bits // 8
    streams = packed.to(torch.int32)
    word = sum(
        (streams[..., i::count] << (8 * i) for i in range(1, count)), start=streams[..., 0::count]
    )
    mask = 2**bits - 1
    fields = torch.stack([(word >> (bits * j)) & mask for j in range(step)], -1).flatten(-2)
    return (fields - (fields > mask // 2) * 2**bits).to(torch.int8)


def pack_int4(codes: Tensor) -> Tensor:
    """``pack_codes`` at 4 bits: int8 [N, K], K even -> uint8 [N, K/2], low nibble = even column."""
    return pack_codes(codes, 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """Inverse of ``pack_int4``: uint8 [N, K/2] -> int8 [N, K]."""
    return unpack_codes(packed, 4)


KBLOCK = 128  # input columns of one block of the device layout: 64 bytes of every weight row


_AT_ONCE = 2**22  # codes that are unpacked, each in several int32, to be packed again


def device_shape(rows: int, columns: int, shards: int = 1) -> tuple[int, int, int]:
    """Shape of ``pack_device``'s result for codes [rows, columns]."""
    return shards * -(-(columns // shards) // KBLOCK), rows, KBLOCK // 2


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
    blocks = device_shape(n, k, shards)[0] // shards
    padded = torch.nn.functional.pad(codes.reshape(n, shards, width), (0, blocks * KBLOCK - width))
    halves = (padded.reshape(n, shards * blocks, 2, KBLOCK // 2) & 0xF).to(torch.uint8)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).transpose(0, 1).contiguous()


def repack_device(packed: Tensor, bits: int, shards: int = 1) -> Tensor:
    """``pack_device(unpack_codes(packed, bits), shards)`` of ``pack_codes``' result for 2 to 4 bits; uint8 [blocks, N, 64].

    4-bit codes are never unpacked: while it runs, it takes less memory than the weight would in bf16.
    """
    n, k = packed.shape[0], packed.shape[1] * 8 // bits
    if bits != 4 or k % (2 * shards):
        parts = packed.split(max(1, _AT_ONCE // k))
        return torch.cat([pack_device(unpack_codes(part, bits), shards) for part in parts], dim=1)
    width = k // shards // 2
    blocks = device_shape(n, k, shards)[0] // shards
    if room := blocks * KBLOCK // 2 - width:
        packed = torch.nn.functional.pad(packed.reshape(n, shards, width), (0, room))
    # A byte on disk is columns 2 i and 2 i + 1; those of the first half of a block meet those 64 columns further.
    halves = packed.reshape(n, shards * blocks, 2, KBLOCK // 4)
    first, second = halves[:, :, 0].transpose(0, 1), halves[:, :, 1].transpose(0, 1)
    out = torch.empty(shards * blocks, n, KBLOCK // 4, 2, dtype=torch.uint8, device=packed.device)
    out[..., 0] = (first & 0xF) | (second << 4)
    out[..., 1] = (first >> 4) | (second & 0xF0)
    return out.reshape(shards * blocks, n, KBLOCK // 2)


def unpack_device(packed: Tensor, columns: int, shards: int = 1) -> Tensor:
    """Inverse of ``pack_device``: uint8 [blocks, N, 64] -> int8 [N, columns]."""
    blocks, n, _ = packed.shape
    nibbles = torch.stack([packed & 0xF, packed >> 4], dim=2).to(torch.int8)
    codes = nibbles - 16 * (nibbles > 7).to(torch.int8)
    codes = codes.permute(1, 0, 2, 3).reshape(n, shards, blocks // shards * KBLOCK)
    return codes[:, :, : columns // shards].reshape(n, columns).contiguous()
