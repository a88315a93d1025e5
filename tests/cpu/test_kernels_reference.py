"""The references against float64: how far rounding to 16 bits may move a scale or a code."""

import pytest
import torch

from vllm_flatquant.kernels.kron import kron_ref, kron_wide_ref
from vllm_flatquant.kernels.kron_quant import kron_quant_ref
from vllm_flatquant.kernels.quantize import fake_quant_kv_ref, quantize_ref
from vllm_flatquant.kernels.rmsnorm_kron import rmsnorm_kron_ref
from vllm_flatquant.kernels.rmsnorm_kron_quant import rmsnorm_kron_quant_ref
from vllm_flatquant.kernels.silu_mul_kron import silu_mul_kron_ref
from vllm_flatquant.kernels.silu_mul_kron_quant import silu_mul_kron_quant_ref, silu_mul_ref
from vllm_flatquant.kernels.w4_gemm import int_matmul_ref, w4_gemm_ref

SCALE_TOLERANCE = 4e-3  # the intermediate is rounded to bf16, 2**-9 relative
CODE_SHARE = {4: 0.005, 8: 0.06}  # codes that a rounding may flip


def factors(shards: int, n: int) -> torch.Tensor:
    """Orthogonal matrices with bf16 values, [shards, n, n]."""
    torch.manual_seed(n)
    return torch.linalg.qr(torch.randn(shards, n, n))[0].bfloat16().float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("shards", "a", "b", "head"),
    [(1, 64, 64, False), (2, 56, 128, False), (4, 16, 24, False), (1, 32, 128, True), (2, 5, 16, True)],
)
def test_kron_quant_against_float64(shards, a, b, head, bits, dtype):
    torch.manual_seed(0)
    x = torch.randn(64, shards * a * b)
    x[:, 3] *= 50  # an outlier channel
    x = x.to(dtype)
    left, right = factors(shards, a), None if head else factors(shards, b)
    clip = torch.ones(shards)  # a clip below 1 makes steps finer, so more codes sit near an edge
    codes, scale = kron_quant_ref(x, left, right, clip, bits)
    wide = [f.double() if f is not None else None for f in (left, right)]
    exact_codes, exact_scale = kron_quant_ref(x.double(), *wide, clip.double(), bits)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert ((scale - exact_scale).abs() / exact_scale).max() < SCALE_TOLERANCE
    difference = (codes.int() - exact_codes.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < CODE_SHARE[bits]


def test_kron_is_the_kronecker_product():
    x, left, right = (
        torch.randn(3, 40).double(),
        torch.randn(2, 4, 4).double(),
        torch.randn(2, 5, 5).double(),
    )
    dense = torch.block_diag(*[torch.kron(lft, rgt) for lft, rgt in zip(left, right, strict=True)])
    assert torch.allclose(kron_wide_ref(x, left, right), x @ dense, atol=1e-12)
    head = torch.block_diag(*[torch.kron(lft, torch.eye(5).double()) for lft in left])
    assert torch.allclose(kron_wide_ref(x, left, None), x @ head, atol=1e-12)
    assert torch.equal(kron_wide_ref(x, None, None), x)
    assert kron_ref(x.bfloat16(), left.float(), right.float()).dtype == torch.bfloat16


def test_factors_that_do_not_fit():
    with pytest.raises(ValueError, match="do not fit an input of width 41"):
        kron_ref(torch.ones(2, 41), torch.ones(2, 4, 4), torch.ones(2, 5, 5))


def test_quantize_edges():
    z = torch.tensor([[0.0, 0.0, 0.0], [0.0, -5.0, 0.0], [7.0, 3.5, -7.0], [1.0, 0.5, -1.5]])
    codes, scale = quantize_ref(z, 4)
    assert codes.tolist() == [[0, 0, 0], [0, -7, 0], [7, 4, -7], [5, 2, -7]]  # halves go to even
    assert scale.tolist() == pytest.approx([1, 5 / 7, 1, 1.5 / 7])
    clipped, _ = quantize_ref(z, 4, 0.5)
    assert clipped[2].tolist() == [7, 7, -8]


@pytest.mark.parametrize("high", [8, 128])
@pytest.mark.parametrize("t", [1, 3, 17, 64])
def test_int_matmul_is_exact(t, high):
    a = torch.randint(-high, high, (t, 4097), dtype=torch.int8)
    b = torch.randint(-8, 8, (33, 4097), dtype=torch.int8)
    found = int_matmul_ref(a, b)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), a.long() @ b.long().T)


def test_int_matmul_at_the_extreme_of_its_range():
    a, b = torch.full((2, 28672), -128, dtype=torch.int8), torch.full((3, 28672), -8, dtype=torch.int8)
    assert (int_matmul_ref(a, b) == 128 * 8 * 28672).all()


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_w4_gemm_against_float64(shards):
    torch.manual_seed(0)
    codes = torch.randint(-8, 8, (5, 64), dtype=torch.int8)
    weight = torch.randint(-8, 8, (7, 64), dtype=torch.int8)
    scale, weight_scale, bias = torch.rand(5, shards), torch.rand(7, 1), torch.randn(7)
    found = w4_gemm_ref(codes, scale, weight, weight_scale, bias, torch.float32)
    x = (codes.double().view(5, shards, -1) * scale.double()[..., None]).flatten(1)
    exact = x @ (weight.double() * weight_scale.double()).T + bias.double()
    assert torch.allclose(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_blocks_are_those_of_a_rank():
    # Tensor parallelism: a rank that holds some of the blocks computes the same codes and scales.
    x, left, right = torch.randn(6, 4 * 12), factors(4, 3), factors(4, 4)
    codes, scale = kron_quant_ref(x, left, right, torch.ones(4), 4)
    for rank in range(2):
        own, half = slice(2 * rank, 2 * rank + 2), slice(24 * rank, 24 * rank + 24)
        local = kron_quant_ref(x[:, half], left[own], right[own], torch.ones(2), 4)
        assert torch.equal(local[0], codes[:, half])
        assert torch.equal(local[1], scale[:, own])


def test_fused_norm_is_norm_then_transform():
    torch.manual_seed(0)
    x, residual, weight = torch.randn(9, 48), torch.randn(9, 48), torch.rand(48) + 0.5
    left, right = factors(1, 6), factors(1, 8)
    codes, scale, total = rmsnorm_kron_quant_ref(
        x, residual, weight, 1e-5, left, right, torch.ones(1), 8
    )
    assert torch.equal(total, x + residual)
    normed = torch.nn.functional.rms_norm(total, (48,), weight, 1e-5)
    expected, expected_scale = kron_quant_ref(normed, left, right, torch.ones(1), 8)
    assert (codes.int() - expected.int()).abs().max() <= 1
    assert (codes != expected).float().mean() < 0.001
    assert torch.allclose(scale, expected_scale, rtol=1e-5)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fused_norm_of_16_bits_is_that_of_transformers(dtype, residual):
    """Bit for bit, so a served W4A16 model is the reference backend's in the same dtype up to the order of sums."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(0)
    x, added = (3 * torch.randn(2, 33, 48)).to(dtype)
    norm = LlamaRMSNorm(48, 1e-5).to(dtype)
    norm.weight.data = (torch.randn(48) + 0.5).to(dtype)
    left, right = factors(1, 6).to(dtype), factors(1, 8).to(dtype)
    z, total = rmsnorm_kron_ref(x, added if residual else None, norm.weight.data, 1e-5, left, right)
    assert torch.equal(total, x + added if residual else x)
    assert torch.equal(z, kron_ref(norm(total).detach(), left, right))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_silu_of_16_bits_rounds_once_less(dtype):
    """Against float64 it is at least as close as SiLU, a product and a transform of their own; within one step of them."""
    torch.manual_seed(0)
    gate, up = (3 * torch.randn(2, 64, 96)).to(dtype)
    left, right = factors(2, 6).to(dtype), factors(2, 8).to(dtype)
    fused = silu_mul_kron_ref(torch.cat([gate, up], dim=1), left, right).double()
    separate = kron_ref(torch.nn.functional.silu(gate) * up, left, right).double()
    product = torch.nn.functional.silu(gate.double()) * up.double()
    exact = kron_ref(product, left.double(), right.double())
    step = torch.finfo(dtype).eps
    assert (fused - exact).norm() <= (separate - exact).norm() <= step * exact.norm()
    assert ((fused - separate).norm(dim=1) <= step * exact.norm(dim=1)).all()
    assert (fused != separate).any()


def test_fused_silu_is_silu_then_transform():
    gate_up = torch.randn(9, 96)
    left, right = factors(2, 4), factors(2, 6)
    found = silu_mul_kron_quant_ref(gate_up, left, right, torch.ones(2), 4)
    expected = kron_quant_ref(silu_mul_ref(gate_up), left, right, torch.ones(2), 4)
    assert torch.equal(found[0], expected[0])
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert torch.allclose(silu_mul_ref(gate_up).double(), gate * gate.sigmoid() * up, atol=1e-6)


@pytest.mark.parametrize(("bits", "clip"), [(8, torch.ones(1)), (4, torch.ones(2))])
def test_kv_fake_quantization_error_is_half_a_step(bits, clip):
    z = torch.randn(2, 3, 5, 64) + 1
    error = (fake_quant_kv_ref(z, bits, clip) - z).abs()
    span = 2 * z.abs().amax(-1) if bits == 8 else z.amax(-1).clamp(min=0) - z.amin(-1).clamp(max=0)
    step = span / (254 if bits == 8 else 15)
    limit = 0.5 if bits == 8 else 1.0  # asymmetric: the zero point is rounded as well
    assert (error <= limit * step[..., None] + 1e-6).all()
    assert fake_quant_kv_ref(z, 16, clip) is z


def test_kv_of_zeros_stays_zero():
    z = torch.zeros(2, 8, dtype=torch.bfloat16)
    for bits, clip in ((8, torch.ones(1)), (4, torch.ones(2))):
        assert (fake_quant_kv_ref(z, bits, clip) == 0).all()
