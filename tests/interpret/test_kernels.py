"""Every kernel's indexing, masks and rounding, under Triton's interpreter: no GPU needed.

Run in a process of its own: ``TRITON_INTERPRET=1 pytest tests/interpret``.
"""

import pytest
import torch

pytest.importorskip("triton")
from vllm_flatquant.kernels.jit import INTERPRET
from vllm_flatquant.kernels.kron import kron_ref, kron_triton
from vllm_flatquant.kernels.kron_quant import kron_quant_ref, kron_quant_triton
from vllm_flatquant.kernels.pack import pack_device
from vllm_flatquant.kernels.rmsnorm_kron import rmsnorm_kron_ref, rmsnorm_kron_triton
from vllm_flatquant.kernels.rmsnorm_kron_quant import (
    rmsnorm_kron_quant_ref,
    rmsnorm_kron_quant_triton,
)
from vllm_flatquant.kernels.silu_mul_kron import silu_mul_kron_ref, silu_mul_kron_triton
from vllm_flatquant.kernels.silu_mul_kron_quant import (
    silu_mul_kron_quant_ref,
    silu_mul_kron_quant_triton,
)
from vllm_flatquant.kernels.tiles import Tile
from vllm_flatquant.kernels.w4_gemm import run_tile, w4_gemm_ref, w4_gemm_triton
from vllm_flatquant.kernels.w4_gemv import w4_gemv

pytestmark = pytest.mark.skipif(
    not INTERPRET, reason="needs TRITON_INTERPRET=1 before Triton is imported"
)

FORMS = ["both", "head", "right", "none"]
SIZES = [(1, 4, 8), (2, 12, 20), (4, 5, 16)]  # S, a, b


def factors(form: str, shards: int, a: int, b: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    left = torch.randn(shards, a, a).div(a**0.5).bfloat16().float() if form in ("both", "head") else None
    right = (
        torch.randn(shards, b, b).div(b**0.5).bfloat16().float() if form in ("both", "right") else None
    )
    return left, right


def inputs(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Random rows, the first all zero and the second with one large outlier."""
    x = torch.randn(rows, columns)
    x[0] = 0
    if rows > 1:
        x[1, columns // 3] = 100.0
    return x.to(dtype)


def same_codes(got: torch.Tensor, want: torch.Tensor, share: float) -> None:
    """Codes differ by at most 1, on at most ``share`` of them."""
    difference = (got.int() - want.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() <= share


@pytest.mark.parametrize("shards,a,b", SIZES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [4, 8])
def test_kron_quant(form: str, shards: int, a: int, b: int, bits: int) -> None:
    torch.manual_seed(0)
    x = inputs(3, shards * a * b, torch.float32)
    left, right = factors(form, shards, a, b)
    clip = torch.rand(shards) * 0.3 + 0.7
    codes, scale = kron_quant_triton(x, left, right, clip, bits)
    want_codes, want_scale = kron_quant_ref(x, left, right, clip, bits)
    torch.testing.assert_close(scale, want_scale, rtol=1e-5, atol=0)
    same_codes(codes, want_codes, 1e-3)
    assert (scale[0] == 1).all() and (codes[0] == 0).all()


def test_kron_quant_rounds_between_the_factors() -> None:
    """A 16-bit input: X R is rounded to its dtype, as in the reference (which a wide input would miss)."""
    torch.manual_seed(0)
    x = inputs(5, 240, torch.float16)
    left, right = factors("both", 1, 12, 20)
    codes, scale = kron_quant_triton(x, left, right, torch.ones(1), 8)
    want_codes, want_scale = kron_quant_ref(x, left, right, torch.ones(1), 8)
    torch.testing.assert_close(scale, want_scale, rtol=1e-3, atol=0)
    same_codes(codes, want_codes, 2e-2)  # the interpreter truncates where the hardware rounds to nearest


def test_rows_may_be_strided() -> None:
    torch.manual_seed(0)
    wide = inputs(4, 96, torch.float32)
    left, right = factors("both", 1, 4, 8)
    for x in (wide[:, 32:64], wide.t().contiguous().t()[:, :32]):
        codes, scale = kron_quant_triton(x, left, right, torch.ones(1), 4)
        want_codes, want_scale = kron_quant_ref(x.contiguous(), left, right, torch.ones(1), 4)
        torch.testing.assert_close(scale, want_scale, rtol=1e-5, atol=0)
        same_codes(codes, want_codes, 1e-3)


@pytest.mark.parametrize("shards,a,b", SIZES)
@pytest.mark.parametrize("form", FORMS[:3])
def test_kron(form: str, shards: int, a: int, b: int) -> None:
    torch.manual_seed(0)
    x = inputs(3, shards * a * b, torch.float32)
    left, right = factors(form, shards, a, b)
    torch.testing.assert_close(
        kron_triton(x, left, right), kron_ref(x, left, right), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("form", ["both", "none"])
def test_rmsnorm_kron_quant(form: str, residual: bool) -> None:
    torch.manual_seed(0)
    x, other = inputs(3, 96, torch.float32), torch.randn(3, 96)
    weight = torch.randn(96)
    left, right = factors(form, 1, 8, 12)
    added = other if residual else None
    codes, scale, total = rmsnorm_kron_quant_triton(
        x, added, weight, 1e-5, left, right, torch.ones(1), 4
    )
    want = rmsnorm_kron_quant_ref(x, added, weight, 1e-5, left, right, torch.ones(1), 4)
    torch.testing.assert_close(scale, want[1], rtol=1e-5, atol=0)
    same_codes(codes, want[0], 1e-3)
    if residual:
        assert torch.equal(total, want[2])
    else:
        assert total.numel() == 0


@pytest.mark.parametrize("form", ["both", "none"])
def test_silu_mul_kron_quant(form: str) -> None:
    torch.manual_seed(0)
    x = inputs(3, 2 * 2 * 60, torch.float32)
    left, right = factors(form, 2, 5, 12)
    codes, scale = silu_mul_kron_quant_triton(x, left, right, torch.ones(2), 4)
    want_codes, want_scale = silu_mul_kron_quant_ref(x, left, right, torch.ones(2), 4)
    torch.testing.assert_close(scale, want_scale, rtol=1e-5, atol=0)
    same_codes(codes, want_codes, 1e-3)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("a,b", [(8, 8), (5, 20), (2, 24)])
@pytest.mark.parametrize("form", FORMS)
def test_rmsnorm_kron(form: str, a: int, b: int, residual: bool) -> None:
    torch.manual_seed(0)
    x, weight = inputs(3, a * b, torch.float32), torch.randn(a * b)
    left, right = factors(form, 1, a, b)
    args = (x, torch.randn(3, a * b) if residual else None, weight, 1e-5, left, right)
    z, total = rmsnorm_kron_triton(*args)
    want = rmsnorm_kron_ref(*args)
    torch.testing.assert_close(z, want[0], rtol=1e-5, atol=1e-5)
    if residual:
        assert torch.equal(total, want[1])
    else:
        assert total.numel() == 0 and (z[0] == 0).all()


def test_rmsnorm_kron_in_fp16_divides_first() -> None:
    """Before it is normed, this input times the weight is beyond what fp16 holds; after, it is small."""
    torch.manual_seed(0)
    x, weight = inputs(3, 96, torch.float16), torch.rand(96).half() + 0.5
    x[:, 7], weight[7] = 4e4, 3.0
    left, right = factors("both", 1, 8, 12)
    got, want = (
        f(x, None, weight, 1e-5, left, right)[0] for f in (rmsnorm_kron_triton, rmsnorm_kron_ref)
    )
    assert want.isfinite().all() and want.abs().max() > 5
    torch.testing.assert_close(got, want, rtol=0, atol=2**-9 * want.abs().max().item())


@pytest.mark.parametrize("form", FORMS)
def test_transforms_of_16_bits_round_where_their_references_do(form: str) -> None:
    """Nearly every bit is the same; a rounding left out, such as that of the normed input, moves a quarter or more."""
    torch.manual_seed(0)
    x, pair, weight = (
        inputs(9, 240, torch.float16),
        inputs(9, 480, torch.float16),
        torch.rand(240).half(),
    )
    left, right = factors(form, 1, 12, 20)
    norms = [
        [f(x, residual, weight, 1e-5, left, right)[0] for f in (rmsnorm_kron_triton, rmsnorm_kron_ref)]
        for residual in (None, torch.randn(9, 240).half())
    ]
    silu = silu_mul_kron_triton(pair, left, right), silu_mul_kron_ref(pair, left, right)
    for got, want in (*norms, silu):
        assert got.isfinite().all() and (got != want).float().mean() < 0.01


@pytest.mark.parametrize("shards,a,b", [*SIZES, (1, 7, 16)])
@pytest.mark.parametrize("form", FORMS[:3])
def test_silu_mul_kron(form: str, shards: int, a: int, b: int) -> None:
    torch.manual_seed(0)
    x = inputs(3, 2 * shards * a * b, torch.float32)
    left, right = factors(form, shards, a, b)
    got, want = silu_mul_kron_triton(x, left, right), silu_mul_kron_ref(x, left, right)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "t,n,k,shards,tile",
    [
        (1, 16, 128, 1, Tile(16, 16, 1, 2)),
        (3, 40, 256, 1, Tile(16, 32, 2, 2)),
        (17, 33, 384, 1, Tile(16, 16, 2, 2, 2, 2)),  # three blocks, two a step: masked
        (5, 48, 2 * 352, 2, Tile(16, 32, 2, 2, 2)),  # shards that end inside a block
        (2, 64, 4 * 512, 4, Tile(16, 64, 4, 2, 4)),
        (4, 20, 100, 1, Tile(16, 32, 2, 2)),  # less than one block
        (70, 24, 256, 1, Tile(128, 32, 4, 2)),  # wide token tile: rows clamped, not masked
    ],
)
def test_w4_gemm(t: int, n: int, k: int, shards: int, tile: Tile) -> None:
    torch.manual_seed(0)
    codes = torch.randint(-128, 128, (t, k), dtype=torch.int8)
    weight = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    scale, weight_scale, bias = torch.rand(t, shards) + 0.1, torch.rand(n, 1) + 0.1, torch.randn(n)
    out = torch.full((t, n), float("nan"))
    w4_gemm_triton(codes, scale, pack_device(weight, shards), weight_scale, bias, out, tile)
    want = w4_gemm_ref(codes, scale, weight, weight_scale, bias, torch.float32)
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-4)


def test_w4_gemm_accumulators_are_exact() -> None:
    """Unit scales: the float32 output is the integer product itself, also at the extremes of both codes."""
    codes = torch.full((2, 512), -128, dtype=torch.int8)
    codes[1] = 127
    weight = torch.full((16, 512), -8, dtype=torch.int8)
    weight[1::2] = 7
    out = torch.full((2, 16), float("nan"))
    tile = Tile(16, 16, 1, 2, 2)
    w4_gemm_triton(codes, torch.ones(2, 1), pack_device(weight), torch.ones(16, 1), None, out, tile)
    assert torch.equal(out.long(), codes.long() @ weight.long().T)


@pytest.mark.parametrize(
    "n,k,shards,tile",
    [
        (16, 128, 1, Tile(1, 4, 1, 1, 1)),
        (40, 1024, 1, Tile(1, 16, 2, 1, 4)),  # rows beyond the last, two steps
        (33, 7 * 128, 1, Tile(1, 8, 2, 1, 4)),  # a step that ends behind the blocks
        (24, 2 * 3 * 128, 2, Tile(1, 8, 1, 1, 2)),  # the same within each shard
        (8, 4 * 128, 4, Tile(1, 8, 1, 1, 4)),  # a step wider than a shard
    ],
)
def test_w4_gemv(n: int, k: int, shards: int, tile: Tile) -> None:
    """One token: the integer product itself with unit scales, also at the extremes, and the reference with others."""
    torch.manual_seed(0)
    assert tile.fits(n, k, shards)
    codes = torch.randint(-128, 128, (1, k), dtype=torch.int8)
    weight = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    codes[0, ::3], weight[:, ::3] = -128, -8
    packed, out = pack_device(weight, shards), torch.full((1, n), float("nan"))
    w4_gemv(codes, torch.ones(1, shards), packed, torch.ones(n, 1), None, out, tile)
    assert torch.equal(out.long(), codes.long() @ weight.long().T)
    scale, weight_scale, bias = torch.rand(1, shards) + 0.1, torch.rand(n, 1) + 0.1, torch.randn(n)
    run_tile(codes, scale, packed, weight_scale, bias, out, tile)
    want = w4_gemm_ref(codes, scale, weight, weight_scale, bias, torch.float32)
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-4)
    apart = torch.empty(1, k + 2, dtype=torch.int8)[:, :k].copy_(codes)  # a row of a wider array
    run_tile(apart, scale, packed, weight_scale, bias, out, tile)
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-4)
    with pytest.raises(ValueError, match="is for one token, and these are 2"):
        w4_gemv(codes.repeat(2, 1), scale, packed, weight_scale, bias, out, tile)


def test_more_room_than_tokens() -> None:
    """Beyond 256 tokens grids and memory are for 64 at a time: programs without a token, rows that nobody reads."""
    torch.manual_seed(0)
    t, k = 257, 32
    x, other, weight = inputs(t, k, torch.float32), torch.randn(t, k), torch.randn(k)
    left, right = factors("both", 1, 4, 8)
    found = kron_quant_triton(x, left, right, torch.ones(1), 4)
    want = kron_quant_ref(x, left, right, torch.ones(1), 4)
    normed = rmsnorm_kron_quant_triton(x, other, weight, 1e-5, left, right, torch.ones(1), 4)
    want_normed = rmsnorm_kron_quant_ref(x, other, weight, 1e-5, left, right, torch.ones(1), 4)
    pair = torch.cat([x, other], dim=1)
    multiplied = silu_mul_kron_quant_triton(pair, left, right, torch.ones(1), 4)
    want_multiplied = silu_mul_kron_quant_ref(pair, left, right, torch.ones(1), 4)
    for got, wanted in ((found, want), (normed, want_normed), (multiplied, want_multiplied)):
        assert got[0].shape == (t, k) and got[1].shape == (t, 1)
        torch.testing.assert_close(got[1], wanted[1], rtol=1e-5, atol=0)
        same_codes(got[0], wanted[0], 1e-3)
    assert torch.equal(normed[2], want_normed[2])
    z, total = rmsnorm_kron_triton(x, other, weight, 1e-5, left, right)
    want_z, want_total = rmsnorm_kron_ref(x, other, weight, 1e-5, left, right)
    torch.testing.assert_close(z, want_z, rtol=1e-5, atol=1e-5)
    assert z.shape == (t, k) and torch.equal(total, want_total)
    z = silu_mul_kron_triton(pair, left, right)
    torch.testing.assert_close(z, silu_mul_kron_ref(pair, left, right), rtol=1e-5, atol=1e-4)
    rows = torch.randint(-8, 8, (24, k), dtype=torch.int8)
    ones = torch.ones(24, 1)
    out = torch.full((320, 24), float("nan"))
    w4_gemm_triton(*found, pack_device(rows), ones, None, out, Tile(128, 32, 4, 2))
    torch.testing.assert_close(out[:t], w4_gemm_ref(*found, rows, ones, None, torch.float32))
    assert out[t:].isnan().all()
