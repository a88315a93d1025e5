"""Packing for the disk and for the GEMM: exact inverses, for every size."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_flatquant.kernels.pack import (
    KBLOCK,
    device_shape,
    pack_codes,
    pack_device,
    pack_int4,
    packed_dtype,
    packed_shape,
    packing_step,
    repack_device,
    unpack_codes,
    unpack_device,
    unpack_int4,
)


@pytest.mark.parametrize("n,k", [(1, 2), (3, 10), (16, 4096)])
def test_pack_int4_is_its_own_inverse(n: int, k: int) -> None:
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    packed = pack_int4(codes)
    assert packed.shape == (n, k // 2) and packed.dtype == torch.uint8
    assert torch.equal(unpack_int4(packed), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("n,steps", [(1, 1), (3, 5), (16, 512)])
def test_pack_codes_is_its_own_inverse(n: int, steps: int, bits: int) -> None:
    top = 2 ** (bits - 1)
    codes = torch.randint(-top, top, (n, steps * packing_step(bits)), dtype=torch.int8)
    codes[0, 0], codes[-1, -1] = -top, top - 1
    packed = pack_codes(codes, bits)
    assert tuple(packed.shape) == packed_shape(*codes.shape, bits)
    assert packed.dtype == packed_dtype(bits) and packed.is_contiguous()
    assert torch.equal(unpack_codes(packed, bits), codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_pack_codes_is_a_little_endian_bit_stream(bits: int) -> None:
    top = 2 ** (bits - 1)
    codes = torch.randint(-top, top, (24,), dtype=torch.int8)
    stream = sum((code % 2**bits) << (bits * j) for j, code in enumerate(codes.tolist()))
    assert bytes(pack_codes(codes[None], bits)[0].tolist()) == stream.to_bytes(24 * bits // 8, "little")


@pytest.mark.parametrize("bits, step", [(2, 4), (3, 8), (4, 2), (8, 1)])
def test_pack_codes_refuses_parts_of_a_byte(bits: int, step: int) -> None:
    assert packing_step(bits) == step
    if step > 1:
        with pytest.raises(ValueError, match=f"int{bits} packing needs a multiple of {step}"):
            pack_codes(torch.zeros(2, step + 1, dtype=torch.int8), bits)


def test_pack_int4_refuses_an_odd_width() -> None:
    with pytest.raises(ValueError, match="multiple of 2"):
        pack_int4(torch.zeros(2, 3, dtype=torch.int8))


@pytest.mark.parametrize(
    "n,k,shards",
    [(1, 128, 1), (5, 384, 1), (7, 100, 1), (3, 1408, 4), (2, 25600, 8), (16, 14336, 2), (4, 1, 1)],
)
def test_pack_device_is_its_own_inverse(n: int, k: int, shards: int) -> None:
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    packed = pack_device(codes, shards)
    assert packed.shape == (shards * -(-(k // shards) // KBLOCK), n, KBLOCK // 2)
    assert packed.dtype == torch.uint8 and packed.is_contiguous()
    assert torch.equal(unpack_device(packed, k, shards), codes)


def test_pack_device_layout() -> None:
    """Byte j of row n in a block: column j in the low nibble, column j + 64 in the high one; zeros pad."""
    codes = torch.randint(-8, 8, (3, 200), dtype=torch.int8)
    packed = pack_device(codes).int()
    columns = codes.int() & 0xF
    for block, n, j in [(0, 0, 0), (0, 2, 63), (1, 1, 5), (1, 2, 63)]:
        low, high = block * 128 + j, block * 128 + j + 64
        want = columns[n, low] | ((columns[n, high] << 4) if high < 200 else 0)
        assert packed[block, n, j] == want
    assert (packed[1, :, 72 - 64 :] >> 4 == 0).all()


def test_pack_device_names_the_shards_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="3 shards"):
        pack_device(torch.zeros(2, 128, dtype=torch.int8), 3)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("n,k,shards", [(1, 8, 1), (3, 256, 1), (5, 384, 2), (2, 1200, 4), (40, 104, 4)])
def test_repack_goes_from_disk_to_device(monkeypatch, n: int, k: int, shards: int, bits: int) -> None:
    monkeypatch.setattr("vllm_flatquant.kernels.pack._AT_ONCE", 1024)
    top = 2 ** (bits - 1)
    codes = torch.randint(-top, top, (n, k), dtype=torch.int8)
    packed = repack_device(pack_codes(codes, bits), bits, shards)
    assert packed.is_contiguous() and tuple(packed.shape) == device_shape(n, k, shards)
    assert torch.equal(packed, pack_device(codes, shards))


class Memory(TorchDispatchMode):
    """Bytes of all tensors that operators under this mode have made and somebody still holds, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        storage = result.untyped_storage() if isinstance(result, torch.Tensor) else None
        if storage is not None and storage._cdata not in self.known:
            given = {x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)}
            if storage._cdata not in given:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("n,k,shards", [(1024, 4096, 1), (512, 1792, 1), (512, 2048, 4)])
def test_repack_takes_less_memory_than_bf16_weights(n: int, k: int, shards: int) -> None:
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    with Memory() as memory:
        repacked = repack_device(packed, 4, shards)
    assert repacked.nbytes <= memory.peak
    assert packed.nbytes + memory.peak <= 2 * n * k
    with Memory() as memory:
        pack_device(unpack_codes(packed, 4), shards)
    assert memory.peak > 4 * n * k  # as it would be through int32, or this measures nothing
