"""Rounding: RTN is the reference rule, GPTQ lowers the error that its Hessian measures."""

import pytest
import torch

from vllm_flatquant.calibration.rounding import cholesky_inverse_upper, gptq, rtn
from vllm_flatquant.kernels.quantize import dequantize_weight_ref, quantize_ref


def problem(rows=24, columns=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(512, columns, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)  # correlated
    return weight, x


def test_rtn_is_quantize_ref():
    weight, _ = problem()
    codes, scale = rtn(weight, 4, None, None)
    expected, expected_scale = quantize_ref(weight, 4)
    assert torch.equal(codes, expected)
    assert torch.allclose(scale[:, 0].double(), expected_scale, rtol=1e-7)


@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("block", [128, 24, 1])
def test_gptq_beats_rtn(group, block):
    weight, x = problem()
    hessian = x.T @ x

    def error(codes, scale):
        return ((dequantize_weight_ref(codes, scale).double() - weight) @ x.T).norm()

    codes, scale, _ = gptq(weight, hessian, 4, group, None, block=block)
    assert error(codes, scale) < 0.85 * error(*rtn(weight, 4, group, None))


def test_gptq_does_not_depend_on_its_block_size():
    weight, x = problem()
    one = gptq(weight, x.T @ x, 4, None, None, block=7)[0]
    other = gptq(weight, x.T @ x, 4, None, None, block=64)[0]
    assert torch.equal(one, other)


def test_gptq_with_uncorrelated_inputs_is_rtn():
    weight, _ = problem()
    codes, _, _ = gptq(weight, torch.eye(64, dtype=torch.float64), 4, None, None)
    assert torch.equal(codes, rtn(weight, 4, None, None)[0])


def test_w4a16_scales_are_values_of_the_gemm_type():
    weight, _ = problem()
    _, scale = rtn(weight, 4, 16, torch.bfloat16)
    assert torch.equal(scale, scale.bfloat16().float())


def test_damping_ladder_and_dead_columns():
    singular = torch.ones(8, 8, dtype=torch.float64) - 1e-3 * torch.eye(8)  # indefinite
    upper, damping = cholesky_inverse_upper(singular, 1e-6)
    assert torch.isfinite(upper).all()
    assert damping > 1e-6
    weight, x = problem()
    x[:, 5] = 0
    codes, scale, _ = gptq(weight, x.T @ x, 4, None, None)
    assert torch.isfinite(dequantize_weight_ref(codes, scale)).all()


def test_nan_hessian_is_an_error():
    with pytest.raises(ArithmeticError, match="NaN or inf"):
        cholesky_inverse_upper(torch.full((4, 4), torch.nan, dtype=torch.float64), 0.01)
