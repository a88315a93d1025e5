"""Rounding: RTN is the reference rule, GPTQ lowers the error that its Hessian measures and keeps its bound,
Qronos corrects a mismatch of inputs, MagR is a proximal map."""

import pytest
import torch

from vllm_flatquant.calibration import rounding
from vllm_flatquant.calibration.magr import clip_to_prox, shrink_range
from vllm_flatquant.calibration.rounding import largest_eigenvalue, prepare
from vllm_flatquant.calibration.weights import Grid
from vllm_flatquant.kernels.quantize import codes_ref, dequantize_weight_ref, qmax, quantize_ref

FOUR = Grid(4)


def rtn(weight, grid):
    """Codes and scale."""
    scale = grid.scale(weight)
    return rounding.rtn(weight, scale, grid.bits), scale


def gptq(weight, sweep, grid, block=128):
    scale = grid.scale(weight)
    return rounding.gptq(weight, scale, sweep, grid.bits, block), scale


def qronos(weight, sweep, cross, grid):
    scale = grid.scale(weight)
    return rounding.qronos(weight, scale, sweep, cross, grid.bits), scale


def problem(rows=24, columns=64, seed=0, tokens=512):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)  # correlated
    return weight, x


def error(weight, x, rounded, goal=None):
    """Of the layer's outputs, relative; ``goal``: what they should be."""
    goal = x @ weight.T if goal is None else goal
    return ((x @ dequantize_weight_ref(*rounded).double().T - goal).norm() / goal.norm()).item()


def test_rtn_is_quantize_ref():
    weight, _ = problem()
    for bits in (2, 3, 4, 8):
        codes, scale = rtn(weight, Grid(bits))
        expected, expected_scale = quantize_ref(weight, bits)
        assert torch.equal(codes, expected)
        assert torch.allclose(scale[:, 0].double(), expected_scale, rtol=1e-7)


@pytest.mark.parametrize("by_norm", [False, True])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("block", [128, 24, 1])
def test_gptq_beats_rtn(group, block, by_norm):
    weight, x = problem()
    grid = Grid(4, group)
    rounded = gptq(weight, prepare(x.T @ x, 0.01, by_norm=by_norm), grid, block)
    assert error(weight, x, rounded) < 0.85 * error(weight, x, rtn(weight, grid))


def test_gptq_does_not_depend_on_its_block_size():
    weight, x = problem()
    sweep = prepare(x.T @ x, 0.01, by_norm=True)
    assert torch.equal(gptq(weight, sweep, FOUR, 7)[0], gptq(weight, sweep, FOUR, 64)[0])


@pytest.mark.parametrize("by_norm", [False, True])
def test_gptq_with_uncorrelated_inputs_is_rtn(by_norm):
    weight, _ = problem()
    hessian = torch.diag(torch.rand(64, dtype=torch.float64) + 0.1)
    sweep = prepare(hessian, 0.01, by_norm=by_norm)
    assert torch.equal(sweep.order, torch.arange(64)) == (not by_norm)
    assert torch.equal(gptq(weight, sweep, FOUR)[0], rtn(weight, FOUR)[0])


@pytest.mark.parametrize("by_norm", [False, True])
@pytest.mark.parametrize(
    "rule, fraction", [("mean", 0.01), ("mean", 1.0), ("spectral", 1e-6), ("column", 0.01)]
)
def test_error_stays_in_the_deterministic_bound(rule, fraction, by_norm):
    """||X(w-q)||^2 + lambda ||w-q||^2 <= scale^2/4 sum_j 1/U_jj^2 for rows in which no code saturates."""
    weight, x = problem(rows=200)
    # Outliers widen the scale, so that errors that have moved rarely leave the range.
    weight[:, 3] = 4 * weight.abs().amax(dim=1)
    sweep = prepare(x.T @ x, fraction, rule, by_norm)
    codes, scale = gptq(weight, sweep, FOUR)
    difference = weight - dequantize_weight_ref(codes, scale).double()
    total = (difference @ x.T).square().sum(1) + (
        difference[:, sweep.order].square() * sweep.amount
    ).sum(1)
    bound = scale[:, 0].double() ** 2 / 4 * (sweep.upper.diagonal() ** -2).sum()
    free = (codes.abs() < qmax(4)).sum(dim=1) >= 63  # the outlier itself is on the edge
    assert free.sum() > 20
    assert (total <= bound * (1 + 1e-9))[free].all()
    assert sweep.bound == pytest.approx(
        float((sweep.upper.diagonal() ** -2).sum() / (x.T @ x).trace()), rel=1e-9
    )
    assert (sweep.bound < 1) == (fraction < 1)  # correlated inputs: less than rounding to nearest


def test_decreasing_norm_lowers_the_bound():
    """What the bounds paper says of the order, on inputs whose norms differ."""
    _, x = problem()
    x = x * torch.logspace(-1, 1, 64, dtype=torch.float64)
    natural, by_norm = prepare(x.T @ x, 0.01), prepare(x.T @ x, 0.01, by_norm=True)
    assert by_norm.bound < 0.8 * natural.bound
    assert (x.T @ x).diagonal()[by_norm.order].diff().max() <= 0


def test_damping_rules():
    _, x = problem()
    hessian = x.T @ x
    top = torch.linalg.eigvalsh(hessian)[-1]
    assert largest_eigenvalue(hessian) == pytest.approx(float(top), rel=0.02)
    assert prepare(hessian, 0.1).amount.tolist() == pytest.approx(
        [0.1 * float(hessian.diagonal().mean())] * 64
    )
    assert prepare(hessian, 0.1, "spectral").amount[0] == pytest.approx(0.1 * float(top), rel=0.02)
    assert torch.allclose(prepare(hessian, 0.1, "column").amount, 0.1 * hessian.diagonal())


def test_damping_ladder_and_dead_columns():
    indefinite = torch.ones(8, 8, dtype=torch.float64) - 1e-3 * torch.eye(8)
    sweep = prepare(indefinite, 1e-6)
    assert torch.isfinite(sweep.upper).all()
    assert sweep.tried == pytest.approx([10.0**n for n in range(-6, -1)][: len(sweep.tried)])
    assert len(sweep.tried) > 2
    weight, x = problem()
    x[:, 5] = 0
    codes, scale = gptq(weight, prepare(x.T @ x, 0.01), FOUR)
    assert torch.isfinite(dequantize_weight_ref(codes, scale)).all()
    assert torch.equal(codes[:, 5], rtn(weight, FOUR)[0][:, 5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["gptq", "qronos"])
@pytest.mark.parametrize("by_norm", [False, True])
def test_degenerate_inputs(method, by_norm, dtype):
    """Dead, duplicated and outlier inputs; zero rows; fewer tokens than inputs; nothing at all."""
    weight, x = problem(tokens=40)
    x = x / x.std()
    x[:, 0] = x[:, 9] = 0
    x[:, 11] = x[:, 12]
    weight[4] = 0
    weight[:, 20] /= 1e4
    x[:, 20] *= 1e4
    x = x.to(dtype).double()  # what the activations of such a model are
    assert torch.isfinite(x).all()
    for inputs in (x, torch.zeros_like(x)):
        hessian = inputs.T @ inputs
        sweep = prepare(hessian, 0.01, by_norm=by_norm)
        for grid in (Grid(2, dtype=dtype), Grid(4, 16, dtype, search=True)):
            if method == "gptq":
                codes, scale = gptq(weight, sweep, grid)
            else:
                codes, scale = qronos(weight, sweep, hessian, grid)
            assert torch.isfinite(scale).all() and (scale > 0).all()
            assert (codes[4] == 0).all()
            assert (codes.abs() <= 2 ** (grid.bits - 1)).all()


def test_outliers_and_damping():
    """One input of 1e4 times the others: only damping by column lets GPTQ do its work on those."""
    weight, x = problem()
    scaled, wide = weight.clone(), x.clone()
    scaled[:, 20] /= 2**13
    wide[:, 20] *= 2**13
    nearest = error(scaled, wide, rtn(scaled, FOUR))
    by_mean = error(scaled, wide, gptq(scaled, prepare(wide.T @ wide, 0.01), FOUR))
    by_column = error(scaled, wide, gptq(scaled, prepare(wide.T @ wide, 0.01, "column"), FOUR))
    assert by_mean > 0.9 * nearest
    assert by_column < 0.8 * nearest


def test_nan_hessian_is_an_error():
    with pytest.raises(ArithmeticError, match="NaN or inf"):
        prepare(torch.full((4, 4), torch.nan, dtype=torch.float64), 0.01)


def mismatched(seed=0):
    """A weight, exact inputs, and inputs as a quantized prefix gives them."""
    weight, x = problem(rows=32, seed=seed, tokens=2048)
    scale = x.abs().amax(dim=1) / qmax(4)
    return weight, x, codes_ref(x, scale, 4) * scale[:, None]


def test_qronos_beats_gptq_on_mismatched_inputs():
    better = 0
    for seed in range(3):
        weight, x, x_q = mismatched(seed)
        sweep = prepare(x_q.T @ x_q, 1e-3, "spectral", by_norm=True)
        goal = x @ weight.T
        ours = error(weight, x_q, qronos(weight, sweep, x_q.T @ x, FOUR), goal)
        theirs = error(weight, x_q, gptq(weight, sweep, FOUR), goal)
        better += ours < 0.97 * theirs
    assert better == 3


def test_qronos_without_mismatch_differs_from_gptq_by_its_first_column_only():
    """With X~ = X the second step solves for w again, so errors are about GPTQ's."""
    weight, x = problem()
    sweep = prepare(x.T @ x, 1e-6, "spectral", by_norm=True)
    ours = error(weight, x, qronos(weight, sweep, x.T @ x, FOUR))
    assert ours == pytest.approx(error(weight, x, gptq(weight, sweep, FOUR)), rel=0.1)


def test_qronos_follows_its_equations():
    """The two steps solved as written, in the order of columns that the sweep takes."""
    weight, x, x_q = mismatched()
    h, g = x_q.T @ x_q, x_q.T @ x
    sweep = prepare(h, 1e-3, "spectral", by_norm=True)
    codes, scale = qronos(weight, sweep, g, FOUR)
    o, lam, w = sweep.order, sweep.amount[0], weight[:, sweep.order]
    h, g = h[o][:, o], g[o][:, o]
    steps = scale.double()
    first = (w @ g[0] - w[:, 1:] @ h[0, 1:]) / h[0, 0]
    q = torch.round(first / steps[:, 0]).clamp(-8, 7)
    assert torch.equal(codes[:, o[0]].double(), q)
    damped = h[1:, 1:] + lam * torch.eye(63)
    goal = g[1:] @ w.T + lam * w[:, 1:].T - torch.outer(h[1:, 0], q * steps[:, 0])
    second = torch.linalg.solve(damped, goal).T
    expected = torch.round(second[:, 0] / steps[:, 0]).clamp(-8, 7)
    assert torch.equal(codes[:, o[1]].double(), expected)
    after = second[:, 1:] - torch.outer(
        second[:, 0] - expected * steps[:, 0],
        torch.linalg.inv(damped)[0, 1:] / torch.linalg.inv(damped)[0, 0],
    )
    assert torch.equal(codes[:, o[2]].double(), torch.round(after[:, 0] / steps[:, 0]).clamp(-8, 7))


def test_prox_is_a_minimum():
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(6, 20, generator=generator, dtype=torch.float64)
    v[5] *= 1e-3  # all of it is less than alpha

    def objective(w):
        return 0.5 * (w - v).square().sum(-1) + 0.3 * w.abs().amax(-1)

    best = clip_to_prox(v, 0.3)
    for _ in range(200):
        nudge = 1e-3 * torch.randn(v.shape, generator=generator, dtype=torch.float64)
        assert (objective(best) <= objective(best + nudge) + 1e-12).all()
    assert torch.equal(best[5], torch.zeros(20, dtype=torch.float64))
    excess = (v - best).abs().sum(-1)
    assert torch.allclose(excess[:5], torch.full((5,), 0.3, dtype=torch.float64))


def test_magr_shrinks_the_range_and_keeps_the_outputs():
    weight, x = problem(tokens=32)  # fewer tokens than inputs: much of the weight does not matter
    weight = 0.02 * weight
    for group in (None, 16):
        shrunk = shrink_range(weight, x.T @ x, 1e-3, 150, group)
        assert shrunk.abs().amax(1).mean() < 0.8 * weight.abs().amax(1).mean()
        clipped = torch.minimum(weight.abs(), shrunk.abs().amax(1, keepdim=True)) * weight.sign()
        assert (x @ (shrunk - weight).T).norm() < 0.25 * (x @ (clipped - weight).T).norm()
    assert torch.equal(shrink_range(weight, torch.zeros(64, 64).double(), 1e-3, 5, None), weight)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_searched_scales_err_less(bits):
    weight, _ = problem()

    def total(grid):
        return (weight - dequantize_weight_ref(*rtn(weight, grid))).abs().pow(2.4).sum(dim=1)

    assert (total(Grid(bits, search=True)) <= total(Grid(bits)) + 1e-9).all()
    assert total(Grid(bits, search=True)).sum() < 0.95 * total(Grid(bits)).sum()
    assert torch.allclose(Grid(bits, shrink=0.5).scale(weight), 0.5 * Grid(bits).scale(weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_w4a16_scales_are_values_of_the_gemm_type(dtype):
    weight, _ = problem()
    weight[0], weight[1] = 1e-12, 1e7
    scale = Grid(4, 16, dtype).scale(weight)
    assert torch.equal(scale, scale.to(dtype).float())
    assert torch.isfinite(scale).all() and (scale > 0).all()
