"""Kronecker transform of a linear layer's input: ``Z = L^T X R`` with ``X = x.view(a, b)``.

In row-vector form ``z = x (L kron R)`` (FlatQuant, arXiv 2410.09426, equation 5). With S shards the
transform is block-diagonal: block s of the input, ``a*b`` wide, has factors ``L[s]`` and ``R[s]``.
``R = None`` is the head-axis form used before o_proj: ``Z = L^T X``, heads by head_dim.

Rounding points (docs/format.md): the factors are bf16 values; ``Y = X R`` is rounded to x's dtype if
that has 16 bits; products accumulate in float32. A float32 or float64 input is not rounded on the way.

One program owns one shard and walks over tokens, so the factors stay on chip; a token is one [a, b] tile,
and ``L^T`` comes first in the second product, so that nothing is ever transposed and codes keep their order.
"""

import logging
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .jit import INTERPRET, empty, hopper, launch, leading, multiprocessors, register, room, tl, triton


@triton.jit
def load_factors(l_ptr, r_ptr, shard, a, b, A: tl.constexpr, B: tl.constexpr, L: tl.constexpr,
                 R: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """``L[shard]^T`` [A, A] and ``R[shard]`` [B, B] in DTYPE, zero outside a and b; zero where absent."""
    left_t = tl.zeros((1, 1), DTYPE)
    right = tl.zeros((1, 1), DTYPE)
    if L:
        i, j = tl.arange(0, A)[:, None], tl.arange(0, A)[None, :]
        left_t = tl.load(l_ptr + shard * a * a + j * a + i, mask=(i < a) & (j < a), other=0.0).to(DTYPE)
    if R:
        i, j = tl.arange(0, B)[:, None], tl.arange(0, B)[None, :]
        right = tl.load(r_ptr + shard * b * b + i * b + j, mask=(i < b) & (j < b), other=0.0).to(DTYPE)
    return left_t, right


@triton.jit
def transform(x, left_t, right, L: tl.constexpr, R: tl.constexpr, WIDE: tl.constexpr):
    """``L^T (X R)`` of one [A, B] tile, float32; ``X R`` is rounded to x's dtype on the way.

    WIDE multiplies in float32: for float32 inputs, and for the interpreter, whose 16-bit products are wrong.
    """
    y = x
    if R:
        if WIDE:
            y = tl.dot(x.to(tl.float32), right.to(tl.float32), input_precision="ieee").to(x.dtype)
        else:
            y = tl.dot(x, right).to(x.dtype)
    if L:
        if WIDE:
            return tl.dot(left_t.to(tl.float32), y.to(tl.float32), input_precision="ieee")
        else:
            return tl.dot(left_t, y)
    return y.to(tl.float32)


@triton.jit
def prefetch(ptr, token, t, stride, size, AHEAD: tl.constexpr, THREADS: tl.constexpr):
    """Ask L2 for ``size`` elements of row ``token``, if there is such a row: one instruction of one thread."""
    if AHEAD:
        lane = tl.arange(0, THREADS)
        width: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
        start = lane.to(tl.int64) * 0 + token * tl.cast(stride, tl.int64)
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }",
            "=r,l,r",
            [ptr + start, tl.where((lane == 0) & (token < t), size * width, 0)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit(do_not_specialize=["t"])
def _kron_kernel(
    x_ptr,  # [T, K], rows stride_x apart
    l_ptr,  # [S, a, a]
    r_ptr,  # [S, b, b]
    z_ptr,  # [T, K]
    t,
    stride_x,
    a,
    b,
    A: tl.constexpr,
    B: tl.constexpr,
    L: tl.constexpr,
    R: tl.constexpr,
    WIDE: tl.constexpr,
    PDL: tl.constexpr,
    AHEAD: tl.constexpr,
    THREADS: tl.constexpr,
    ASM: tl.constexpr,
):
    shard, shards = tl.program_id(1), tl.num_programs(1)
    left_t, right = load_factors(l_ptr, r_ptr, shard, a, b, A, B, L, R, x_ptr.dtype.element_ty)
    i, j = tl.arange(0, A)[:, None], tl.arange(0, B)[None, :]
    inside = (i < a) & (j < b)
    at = shard * a * b + i * b + j
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for token in range(tl.program_id(0), t, tl.num_programs(0)):
        later = token + tl.num_programs(0)
        prefetch(x_ptr + shard * a * b, later, t, stride_x, a * b, AHEAD, THREADS)
        x = tl.load(x_ptr + token * tl.cast(stride_x, tl.int64) + at, mask=inside, other=0.0)
        z = transform(x, left_t, right, L, R, WIDE)
        tl.store(z_ptr + token * tl.cast(shards * a * b, tl.int64) + at, z.to(x.dtype), mask=inside)


Shape = tuple[int, ...]


class Plan(NamedTuple):
    """Sizes of one launch: the tile, its padding, the grid and the compiler's options."""

    a: int
    b: int
    meta: dict[str, object]
    grid: tuple[int, int]


def plan(
    x: Tensor,
    k: int,
    left: Tensor | None,
    right: Tensor | None,
    shards: int,
    kind: str = "plain",
    aligned: bool = True,
) -> Plan:
    """How to launch a transform of width ``k`` with these factors over the rows of ``x``.

    kind: what surrounds the transform: "plain" (quantization), "norm", "silu", or "kron" (nothing).
    aligned: whether other inputs can be prefetched too (as ``prefetchable``).
    The numbers of warps, of programs on an SM and of loads in flight were measured on an H100
    (docs/decisions.md).
    Raises ValueError if the factors do not fit ``k`` (as ``factor_sizes``).
    """
    t = room(x.shape[0])
    sms = multiprocessors(x.device) if x.is_cuda else t * shards
    # Few tokens: every program has one, and nothing to load ahead. (The transform alone has one form.)
    load = 0 if t * shards <= sms and kind != "kron" else 1 if t < 32 * sms else 2
    a, b, meta, most = _plan(
        k,
        shape_of(left),
        shape_of(right),
        shards,
        kind,
        load,
        aligned and prefetchable(x),
        x.dtype,
        x.device,
        sms,
    )
    return Plan(a, b, meta, (min(t, most), shards))


def prefetchable(x: Tensor) -> bool:
    """Whether rows of ``x`` begin at multiples of 16 bytes."""
    return x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0


@lru_cache(maxsize=1024)
def _plan(
    k: int,
    left: Shape | None,
    right: Shape | None,
    shards: int,
    kind: str,
    load: int,
    aligned: bool,
    dtype: torch.dtype,
    device: torch.device,
    sms: int,
) -> tuple[int, int, dict[str, object], int]:
    """(a, b, compile-time arguments, most programs along the tokens). ``load``: 0 few tokens, 1 some, 2 many."""
    if left is None and right is None:
        b = (k // shards) & -(k // shards)  # the largest power of two in the width of a shard
        b = min(b, 256)
        a = k // shards // b
    else:
        found, a, b = factor_sizes(k, left, right)
        if found != shards:
            raise ValueError(f"flatquant: {shards} clips do not fit transform factors of {found} shards")
    size_a, size_b = _padded(a, b, left, right)
    area, few, on_hopper = size_a * size_b, load == 0, hopper(device)
    warps = 8 if area > 8192 else 4 if area > 1024 else 2
    on_each, registers = max(1, min(16, 65536 // area)), None
    loads = 2 if kind in ("norm", "silu") else 1
    needed = (_factor_area(size_a, size_b, left, right) + (1 + 2 * loads) * area) * dtype.itemsize
    stages = 2 if few and needed <= _on_chip(device) else 1
    if left is not None and right is not None and not few:
        if kind == "plain" and area <= 4096:
            on_each, stages = 4, 2
        elif kind == "plain" and area == 16384:
            on_each, warps = 2, 4
        elif kind == "norm" and area <= 4096 and load == 1:
            on_each, registers = 4, 128
        elif kind == "silu" and area == 16384:
            registers = 128
    aligned = aligned and a * b * dtype.itemsize % 16 == 0
    meta: dict[str, object] = {
        "A": size_a, "B": size_b, "L": left is not None, "R": right is not None,
        "WIDE": INTERPRET or dtype == torch.float32, "PDL": on_hopper,
        "AHEAD": on_hopper and aligned and not few and kind != "silu",
        "THREADS": 32 * warps, "ASM": not INTERPRET, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip
    if on_hopper:
        meta["launch_pdl"] = True
        if registers:
            meta["maxnreg"] = registers
    return a, b, meta, -(-sms * on_each // shards)


def _padded(a: int, b: int, left: Shape | None, right: Shape | None) -> tuple[int, int]:
    """Tile sizes: powers of two, at least 16 where there is a product."""
    least = 16 if left is not None or right is not None else 1
    return max(least, triton.next_power_of_2(a)), max(least, triton.next_power_of_2(b))


def _factor_area(size_a: int, size_b: int, left: Shape | None, right: Shape | None) -> int:
    return (size_a**2 if left is not None else 0) + (size_b**2 if right is not None else 0)


@cache
def _on_chip(device: torch.device) -> int:
    """Bytes of shared memory that a program can have for tiles and factors."""
    if device.type != "cuda":
        return 2**30
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 2**16) - 2048


def fused(x: Tensor, k: int, left: Tensor | None, right: Tensor | None, shards: int) -> bool:
    """Whether one token's tile and its factors fit on chip; says so once where they do not.

    Sizes are padded to powers of two; with 16-bit inputs 128 x 256 is the largest tile. The launchers then
    run the reference instead, which is exact and slow: more shards, or other factors, avoid it.
    """
    if left is None and right is None:
        return True
    return _fused(k, shape_of(left), shape_of(right), shards, x.dtype.itemsize, x.device)


@lru_cache(maxsize=1024)
def _fused(
    k: int,
    left: Shape | None,
    right: Shape | None,
    shards: int,
    itemsize: int,
    device: torch.device,
) -> bool:
    _, a, b = factor_sizes(k, left, right)
    size_a, size_b = _padded(a, b, left, right)
    tiles = 1 if itemsize == 2 else 3  # float32 products keep their operands apart
    needed = (_factor_area(size_a, size_b, left, right) + tiles * size_a * size_b) * itemsize
    if size_a * size_b <= 2**15 and needed <= _on_chip(device):
        return True
    _say_slow(k, shards, a, b)
    return False


@cache
def _say_slow(k: int, shards: int, a: int, b: int) -> None:
    logging.getLogger(__name__).warning(
        "flatquant: no fused kernel for a transform of %d columns in %d shard(s) of %d x %d: its PyTorch "
        "reference runs instead, slowly. More shards, or factors that fit in 128 x 256, avoid this.", k, shards, a, b
    )  # fmt: skip


def empty_codes(t: int, k: int, device: torch.device) -> Tensor:
    """Room for codes int8 [T, K], with memory behind them up to a whole token tile of ``w4_gemm``.

    A bulk load that reaches past its array is slow, one that reads bytes nobody uses is not.
    """
    return leading(empty((-(-t // 128) * 128, k), torch.int8, device), t)


def rows(x: Tensor) -> Tensor:
    """``x`` [T, K] with contiguous columns (rows may be apart)."""
    return x if x.stride(-1) == 1 else x.contiguous()


def kron_triton(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """The kernel's launch. Shapes as ``kron``; at least one factor."""
    x = rows(x)
    t, k = x.shape
    some = left if left is not None else right
    assert some is not None
    if not fused(x, k, left, right, some.shape[0]):
        return kron_ref(x, left, right)
    p = plan(x, k, left, right, some.shape[0], "kron")
    out = empty((t, k), x.dtype, x.device)
    if t:
        launch(
            _kron_kernel, p.grid, x, x if left is None else left.contiguous(), x if right is None else right.contiguous(), out,
            t, x.stride(0), p.a, p.b, **p.meta,
        )  # fmt: skip
    return out


def _kron_cpu(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    return kron_ref(x, left, right).clone()


def _kron_fake(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


register("kron", kron_triton, _kron_cpu, _kron_fake)


def kron(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """The transform alone, as W4A16 uses it: the Triton kernel on CUDA, the reference on the CPU.

    x: [T, K] bf16, fp16 or float32. left: [S, a, a] or None. right: [S, b, b] or None. Factors are best
    in x's dtype. Returns [T, K] in x's dtype. Raises ValueError if the factors do not fit x, RuntimeError if x
    is on another GPU than the current one.
    """
    if left is None and right is None:
        return x
    return torch.ops.flatquant.kron(x, left, right)


def kron_wide_ref(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """``kron_ref`` before the last rounding: float32, or float64 for a float64 input.

    Differentiable in x, left and right, so calibration trains through the same numbers.

    x: [..., S*a*b]. left: [S, a, a] or None. right: [S, b, b] or None (then b is what a leaves over).
    Returns [..., S*a*b]. Raises ValueError if the factors do not fit x.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if left is None and right is None:
        return x.to(wide)
    shards, a, b = factor_sizes(x.shape[-1], shape_of(left), shape_of(right))
    y = x.reshape(-1, shards, a, b).to(wide)
    if right is not None:
        # one product a shard: as T products of [a, b], the gradient of right would be [T, b, b] before its sum
        y = torch.einsum("tsab,sbc->tsac", y, right.to(wide))
        if x.dtype in (torch.bfloat16, torch.float16):
            y = y.to(x.dtype).to(wide)
    if left is not None:
        y = left.to(wide).mT @ y
    return y.reshape(x.shape)


def shape_of(factor: Tensor | None) -> Shape | None:
    """The shape of a factor that may be absent."""
    return None if factor is None else tuple(factor.shape)


def factor_sizes(k: int, left: Shape | None, right: Shape | None) -> tuple[int, int, int]:
    """(S, a, b) of factors of these shapes applied to an input of width ``k``; ValueError if they do not fit."""
    some = left if left is not None else right
    if some is None:
        return 1, 1, k
    shards = some[0]
    a = left[1] if left is not None else k // (shards * some[1])
    b = right[1] if right is not None else k // (shards * a)
    if shards * a * b != k or (left is not None and right is not None and right[0] != shards):
        shapes = [shape for shape in (left, right) if shape is not None]
        raise ValueError(
            f"transform factors {shapes} do not fit an input of width {k}; "
            "the width must equal shards * left * right"
        )
    return shards, a, b


def kron_ref(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """The transform alone, as W4A16 uses it. Shapes as ``kron_wide_ref``; result in x's dtype."""
    return kron_wide_ref(x, left, right).to(x.dtype)
