"""The fused transforms without quantization on a GPU, against their references at model shapes.

Uninitialised memory is poisoned as in ``test_kernels.py``, whose shapes and inputs these are.
"""

import math

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from vllm_flatquant.kernels import silu_mul_kron_quant as silu
from vllm_flatquant.kernels.jit import hopper
from vllm_flatquant.kernels.kron import kron
from vllm_flatquant.kernels.rmsnorm_kron import rmsnorm_kron, rmsnorm_kron_ref
from vllm_flatquant.kernels.silu_mul_kron import silu_mul_kron, silu_mul_kron_ref

from .test_kernels import DEVICE, TOKENS, factors, gate_up, inputs, poisoned  # noqa: F401 (poisoned is in use)

SHARE = {torch.bfloat16: 0.05, torch.float16: 0.25}
"""Of a result, how much may differ at all: 1.2% and 15% where sums are off by 5e-7 to 1e-6 (emulated on a CPU)."""


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    """Few elements differ, each by at most two steps of its size and its row's.

    Tensor cores add in another order than the reference, so now and then an element of the normed input, of X R
    or of the result falls on the other side of a rounding: 0.7 to 1.3 steps in all, emulated. A rounding left out
    moves more than half of the elements.
    """
    assert got.dtype == want.dtype and got.shape == want.shape
    wide = want.float()
    size = wide.abs() + wide.pow(2).mean(dim=1, keepdim=True).sqrt()
    difference = (got.float() - wide).abs()
    assert (difference <= 2 * torch.finfo(want.dtype).eps * size).all()  # NaN is not
    assert (difference > 0).float().mean() <= SHARE[want.dtype]


@pytest.mark.parametrize("a,b", [(64, 64), (64, 80), (64, 128), (16, 256), (16, 24)])
def test_rmsnorm_kron(a: int, b: int) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        left, right = factors(1, a, b, dtype)
        weight = (torch.randn(a * b, device=DEVICE) * 0.2 + 1).to(dtype)
        for t in TOKENS if dtype == torch.bfloat16 else [17]:
            x = inputs(t, a * b, dtype)
            for residual in (torch.randn_like(x), None):
                args = (x, residual, weight, 1e-5, left, right)
                got, want = rmsnorm_kron(*args), rmsnorm_kron_ref(*args)
                same(got[0], want[0])
                assert torch.equal(got[1], want[1])
                assert torch.equal(got[0], rmsnorm_kron(*args)[0])
    same(
        rmsnorm_kron(x, None, weight, 1e-5, left, None)[0],
        rmsnorm_kron_ref(x, None, weight, 1e-5, left, None)[0],
    )


def test_rmsnorm_kron_beyond_what_fp16_holds() -> None:
    left, right = factors(1, 64, 64, torch.float16)
    x, weight = inputs(17, 4096, torch.float16), torch.ones(4096, device=DEVICE).half()
    x[:, 7], weight[7] = 4e4, 3.0
    want = rmsnorm_kron_ref(x, None, weight, 1e-5, left, right)[0]
    assert want.isfinite().all()
    same(rmsnorm_kron(x, None, weight, 1e-5, left, right)[0], want)


@pytest.mark.parametrize(
    "shards,a,b", [(1, 112, 128), (2, 100, 128), (4, 80, 80), (1, 128, 224), (1, 2, 192), (4, 16, 22)]
)
def test_silu_mul_kron(shards: int, a: int, b: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain kernel."""
    monkeypatch.setattr(silu, "HOPPER_FROM", math.inf)
    for dtype in (torch.bfloat16, torch.float16):
        left, right = factors(shards, a, b, dtype)
        for t in TOKENS if dtype == torch.bfloat16 else [17]:
            x = torch.randn(t, 2 * shards * a * b, device=DEVICE).to(dtype) * 3
            got = silu_mul_kron(x, left, right)
            same(got, silu_mul_kron_ref(x, left, right))
            assert torch.equal(got, silu_mul_kron(x, left, right))


@pytest.mark.skipif(not hopper(DEVICE), reason="the Hopper form")
@pytest.mark.parametrize(
    "shards,a,b,dtype",
    [
        (1, 112, 128, torch.bfloat16),
        (1, 80, 64, torch.bfloat16),
        (2, 100, 128, torch.bfloat16),
        (4, 65, 64, torch.float16),
        (1, 128, 128, torch.float16),
    ],
)
def test_silu_mul_kron_on_hopper(shards: int, a: int, b: int, dtype: torch.dtype) -> None:
    """At any number of tokens: nothing behind the input is used, and a row's bits are those it has alone."""
    k = shards * a * b
    left, right = factors(shards, a, b, dtype)
    for t in (1, 3, 133, 257, 4097):
        x = gate_up(t, k, dtype)
        assert silu.on_hopper(x, left, right, shards)
        got = silu_mul_kron(x, left, right)
        same(got, silu_mul_kron_ref(x, left, right))
        assert torch.equal(got, silu_mul_kron(x, left, right))
        for row in {0, t // 2, t - 1}:
            assert torch.equal(got[row], silu_mul_kron(x[row : row + 1].clone(), left, right)[0])


def test_strided_unaligned_and_too_large_inputs() -> None:
    left, right = factors(1, 64, 64, torch.bfloat16)
    wide = torch.randn(33, 3 * 4096 + 8, device=DEVICE).bfloat16()
    weight = torch.randn(4096, device=DEVICE).bfloat16()
    for x in (wide[:, 4096:8192], wide[:, 3:4099], wide[::2, :4096]):
        residual = wide[: len(x), 8192:12288]
        args = (x, residual, weight, 1e-5, left, right)
        for got, want in zip(rmsnorm_kron(*args), rmsnorm_kron_ref(*args), strict=True):
            same(got, want)
    for x in (wide[:, 1:8193], wide[::2, 8:8200]):
        same(silu_mul_kron(x, left, right), silu_mul_kron_ref(x, left, right))
    left, right = factors(1, 160, 160, torch.bfloat16)  # which the references take
    x, weight = inputs(5, 25600, torch.bfloat16), torch.ones(25600, device=DEVICE).bfloat16()
    same(
        rmsnorm_kron(x, x, weight, 1e-5, left, right)[0],
        rmsnorm_kron_ref(x, x, weight, 1e-5, left, right)[0],
    )
    pair = torch.cat([x, x], dim=1)
    same(silu_mul_kron(pair, left, right), silu_mul_kron_ref(pair, left, right))


def test_replayed_in_a_cuda_graph() -> None:
    """Both captured together with a product of another's; a replay on new inputs equals the eager result."""
    square, tall = factors(1, 64, 64, torch.bfloat16), factors(1, 112, 128, torch.bfloat16)
    weight = torch.ones(4096, device=DEVICE).bfloat16()
    gate_up = torch.randn(2 * 14336, 4096, device=DEVICE).bfloat16() / 64

    def layer(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z, total = rmsnorm_kron(x, residual, weight, 1e-5, *square)
        return silu_mul_kron(z @ gate_up.t(), *tall), total

    for t in (1, 64, 300):
        x, residual = inputs(t, 4096, torch.bfloat16), inputs(t, 4096, torch.bfloat16)
        layer(x, residual)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            first = layer(x, residual)
        for _ in range(3):
            x.copy_(inputs(t, 4096, torch.bfloat16))
            graph.replay()
            for got, want in zip(first, layer(x, residual), strict=True):
                assert torch.equal(got, want)


def test_fused_is_separate_within_roundings() -> None:
    """Against the kernel that follows a norm or SiLU*mul of PyTorch's: the order of a sum, and silu's own rounding."""
    left, right = factors(1, 64, 64, torch.bfloat16)
    x, weight = inputs(257, 4096, torch.bfloat16), torch.randn(4096, device=DEVICE).bfloat16()
    rstd = torch.rsqrt(x.float().pow(2).mean(dim=-1, keepdim=True) + 1e-5)
    normed = (x.float() * rstd).bfloat16() * weight
    same(rmsnorm_kron(x, None, weight, 1e-5, left, right)[0], kron(normed, left, right))
    gate, up = inputs(257, 4096, torch.bfloat16), inputs(257, 4096, torch.bfloat16)
    separate = kron(torch.nn.functional.silu(gate) * up, left, right).float()
    got = silu_mul_kron(torch.cat([gate, up], dim=1), left, right).float()
    assert ((got - separate).norm(dim=1) <= 2**-7 * separate.norm(dim=1)).all()  # emulated: 0.7 of it


def test_opcheck() -> None:
    left, right = factors(1, 16, 24, torch.bfloat16)
    x, weight = inputs(5, 384, torch.bfloat16), torch.ones(384, device=DEVICE).bfloat16()
    ops = torch.ops.flatquant
    torch.library.opcheck(ops.silu_mul_kron.default, (torch.cat([x, x], dim=1), left, right))
    for residual in (x, None):
        torch.library.opcheck(ops.rmsnorm_kron.default, (x, residual, weight, 1e-5, left, right))
